"""MinHash near-deduplication beside datatrove's, datasketch's and rensa's on the same documents in one run,
and the speed of the other kinds of deduplication and of decontamination.

    python experiments/benchmarks/corpus_dedup.py --data=../shared/data
    python experiments/benchmarks/corpus_dedup.py --data=../shared/data --rounds=5 --documents=1000

All take word 5-grams, 14 bands of 8 rows, and go from texts in memory to clusters of similar ones. datasketch
and rensa leave the words to the user: they get ``str.lower().split()``, the cheapest there is. Of datatrove
the steps' own functions are called in memory, without its files between them, with its own words and
normalisation. Clusters are connected components for all.

The implementations take turns; a figure is the best of the rounds, in megabytes of UTF-8 for each second of
CPU time of all threads of the process, which is what a core delivers however busy the machine is. Found and
wrong count pairs of documents against the planted ones.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import random
import time
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np

from t5style.corpus import decontaminate, dedup
from t5style.corpus.decontaminate import Decontaminate
from t5style.corpus.document import Document

NGRAM, BANDS, ROWS = 5, 14, 8
Clusters = list[list[int]]


def _ngrams(text: str) -> set[str]:
    words = text.lower().split()
    return {" ".join(words[i : i + NGRAM]) for i in range(max(len(words) - NGRAM + 1, 1))}


def _clusters(links: Iterable[tuple[int, int]], n: int) -> Clusters:
    roots = dedup.components(n, np.array(list(links), np.int64).reshape(-1, 2))
    groups = collections.defaultdict(list)
    for item, root in enumerate(roots.tolist()):
        groups[root].append(item)
    return [group for group in groups.values() if len(group) > 1]


def ours(texts: Sequence[str]) -> Clusters:
    return dedup.near_duplicates(texts, NGRAM, BANDS, ROWS)


def datatrove() -> Callable[[Sequence[str]], Clusters]:
    import tempfile

    from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature

    step = MinhashDedupSignature(
        tempfile.gettempdir(), MinhashConfig(n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=ROWS)
    )

    def run(texts: Sequence[str]) -> Clusters:
        first: dict[Hashable, int] = {}
        links = []
        for number, text in enumerate(texts):
            shingles = step.get_shingles(text)
            if shingles.size:
                for band, values in enumerate(step.get_signature(shingles)):
                    links.append((first.setdefault((band, *values), number), number))
        return _clusters(links, len(texts))

    return run


def datasketch() -> Callable[[Sequence[str]], Clusters]:
    from datasketch import MinHash, MinHashLSH

    def run(texts: Sequence[str]) -> Clusters:
        lsh = MinHashLSH(num_perm=BANDS * ROWS, params=(BANDS, ROWS))
        links = []
        for number, text in enumerate(texts):
            minhash = MinHash(num_perm=BANDS * ROWS, seed=1)
            minhash.update_batch([gram.encode() for gram in _ngrams(text)])
            links += [(other, number) for other in lsh.query(minhash)]
            lsh.insert(number, minhash)
        return _clusters(links, len(texts))

    return run


def rensa() -> Callable[[Sequence[str]], Clusters]:
    from rensa import RMinHash, RMinHashLSH

    def run(texts: Sequence[str]) -> Clusters:
        lsh = RMinHashLSH(threshold=0.7, num_perm=BANDS * ROWS, num_bands=BANDS)
        links = []
        for number, text in enumerate(texts):
            minhash = RMinHash(num_perm=BANDS * ROWS, seed=1)
            minhash.update(_ngrams(text))
            links += [(other, number) for other in lsh.query(minhash)]
            lsh.insert(number, minhash)
        return _clusters(links, len(texts))

    return run


def megabytes(texts: Iterable[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def cpu(function: Callable[[], object]) -> float:
    """Seconds of CPU time."""
    began = time.process_time()
    function()
    return time.process_time() - began


def best(function: Callable[[], object], rounds: int) -> float:
    function()  # compiles
    return min(cpu(function) for _ in range(rounds))


def articles(data: pathlib.Path, size: int) -> tuple[list[str], list[str], set[frozenset[str]]]:
    """Names, texts, and pairs of names that were planted."""
    names, texts = [], []
    with (data / f"dedup/articles_{size}.train").open() as file:
        for line in file:
            name, text = line.split(" ", 1)
            names.append(name)
            texts.append(text)
    truth = (data / f"dedup/articles_{size}.truth").read_text().splitlines()
    return names, texts, {frozenset(line.split()) for line in truth if line.strip()}


def compare(data: pathlib.Path, rounds: int, size: int) -> None:
    names, texts, truth = articles(data, size)
    total = megabytes(texts)
    runs: dict[str, Callable[[Sequence[str]], Clusters]] = {"t5style": ours}
    for make in (datatrove, datasketch, rensa):
        try:
            runs[make.__name__] = make()
        except ImportError as error:
            print(f"{make.__name__} is left out: {error}")
    seconds: dict[str, list[float]] = collections.defaultdict(list)
    found: dict[str, set[frozenset[str]]] = {}
    for number in range(rounds + 1):
        for name, run in runs.items():
            began = time.process_time()
            clusters = run(texts)
            if number:  # the first round compiles and loads
                seconds[name].append(time.process_time() - began)
            found[name] = {frozenset((names[a], names[b])) for c in clusters for a in c for b in c if a < b}
    print(f"\nNear-duplicates among {len(texts)} articles, {total:.2f} MB, {len(truth)} planted pairs")
    print(f"{'':12}{'MB/s':>8}{'ours/its':>10}{'found':>8}{'wrong':>8}")
    for name in runs:
        speed, ratio = total / min(seconds[name]), min(seconds[name]) / min(seconds["t5style"])
        hits = len(found[name] & truth)
        print(f"{name:12}{speed:8.1f}{ratio:10.1f}{hits:5}/{len(truth)}{len(found[name] - truth):8}")


def recall(pairs: int = 1000, words: int = 150) -> None:
    """Recall at known similarity: copies of random texts with replaced words."""
    rng = random.Random(0)
    minhash = dedup.MinHash(NGRAM, BANDS, ROWS)
    print(f"\nRecall of {pairs} edited copies; theory 1 - (1 - s^{ROWS})^{BANDS}")
    print(f"{'mean s':>8}{'found':>8}{'theory':>8}{'sd':>8}")
    for edits in (1, 2, 4, 6, 8, 12, 20):
        hits, similarity = 0, []
        for _ in range(pairs):
            text = [str(rng.randrange(10**6)) for _ in range(words)]
            copy = list(text)
            for place in rng.sample(range(words), edits):
                copy[place] = f"x{rng.randrange(10**6)}"
            a, b = " ".join(text), " ".join(copy)
            similarity.append(len(_ngrams(a) & _ngrams(b)) / len(_ngrams(a) | _ngrams(b)))
            hits += bool((minhash.band_keys(a) == minhash.band_keys(b)).any())
        s = np.array(similarity)
        p = 1 - (1 - s**ROWS) ** BANDS
        deviation = np.sqrt((p * (1 - p)).sum()) / pairs
        print(f"{s.mean():8.3f}{hits / pairs:8.3f}{p.mean():8.3f}{deviation:8.3f}")


def growth(data: pathlib.Path, documents: int, rounds: int) -> None:
    """Cost at 1, 4 and 16 times as many documents, of the articles' words in random order."""
    _, texts, _ = articles(data, 1000)
    words = [text.split() for text in texts]
    pool = [word for text in words for word in text]
    rng = random.Random(0)
    made = []
    for number in range(16 * documents):
        if number % 10 == 9:  # a copy of an earlier one
            made.append(made[rng.randrange(number)])
        else:
            made.append(" ".join(rng.choices(pool, k=len(words[number % len(words)]))))
    print("\nCost of more documents, one in ten a copy")
    print(f"{'documents':>10}{'MB':>8}{'seconds':>9}{'MB/s':>8}")
    for factor in (1, 4, 16):
        part = made[: factor * documents]
        seconds = best(lambda part=part: ours(part), max(1, rounds // 2))  # type: ignore[misc]
        print(f"{len(part):10}{megabytes(part):8.1f}{seconds:9.2f}{megabytes(part) / seconds:8.1f}")


def others(data: pathlib.Path, rounds: int) -> None:
    """Speed of the other kinds, one document after the other."""
    _, texts, _ = articles(data, 1000)
    repeats = dedup.Substrings()
    prints = np.concatenate([repeats.fingerprints(text) for text in texts])
    values, counts = np.unique(prints, return_counts=True)
    repeated = values[counts > 1]
    files = [str(data / "eval")]
    built = cpu(lambda: decontaminate._index(tuple(files), 13, (), 8))
    stage = Decontaminate(files=files)
    index = decontaminate._index(tuple(files), 13, (), 8)
    documents = [Document(text, str(number)) for number, text in enumerate(texts)]
    kinds: dict[str, Callable[[], object]] = {
        "exact: digests": lambda: [dedup.text_digest(text) for text in texts],
        "lines: keys": lambda: [dedup.line_keys(text) for text in texts],
        "passages: fingerprints": lambda: [repeats.fingerprints(text) for text in texts],
        "passages: windows": lambda: [repeats.windows(text, repeated) for text in texts],
        "near: band keys": lambda: [dedup.MinHash().band_keys(text) for text in texts],
        f"decontaminate ({len(index.hashes)} n-grams)": lambda: [stage(item) for item in documents],
    }
    print(f"\nOther kinds ({len(repeated)} of {len(prints)} fingerprints are repeated)")
    for name, function in kinds.items():
        print(f"{name:36}{megabytes(texts) / best(function, rounds):8.1f} MB/s")
    print(f"The index of {', '.join(files)} took {built:.1f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--documents", type=int, default=1000, help="of the smallest corpus in the growth table"
    )
    arguments = parser.parse_args()
    for size in (100, 1000):
        compare(arguments.data, arguments.rounds, size)
    recall()
    growth(arguments.data, arguments.documents, arguments.rounds)
    others(arguments.data, arguments.rounds)


if __name__ == "__main__":
    main()
