"""Our quality rules beside datatrove's on the same English documents, in one run: decisions and speed.

    python experiments/benchmarks/corpus_quality.py --data=../shared/data
    python experiments/benchmarks/corpus_quality.py --data=../shared/data --rounds=7

Needs `pip install "datatrove[processing]==0.10.*" spacy`. The documents: news articles, books cut into
pieces, encyclopaedia and chat texts found below --data, and copies of them spoilt in one way or another,
so that every rule has some to drop. Each document is judged by both; Gopher is datatrove's
GopherQualityFilter, then its GopherRepetitionFilter (which share one word splitting, as in its
pipelines). Every disagreement is listed with its cause: other words, or the same words and another
decision.

Speed is text for each second of CPU time, from a Python string to the decision, in alternating rounds.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import pathlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from t5style.corpus import quality

# datatrove's reasons under our names.
REASONS = {
    "gopher_short_doc": "too few words",
    "gopher_long_doc": "too many words",
    "gopher_below_avg_threshold": "words too short",
    "gopher_above_avg_threshold": "words too long",
    "gopher_too_many_hashes": "too many hash signs",
    "gopher_too_many_ellipsis": "too many ellipses",
    "gopher_too_many_bullets": "too many bullets",
    "gopher_too_many_end_ellipsis": "lines end in ellipses",
    "gopher_below_alpha_threshold": "too few words with letters",
    "gopher_enough_stop_words": "too few stop words",
    "dup_para_frac": "duplicate paragraphs",
    "dup_para_char_frac": "characters in duplicate paragraphs",
    "dup_line_frac": "duplicate lines",
    "dup_line_char_frac": "characters in duplicate lines",
    **{f"top_{n}_gram": f"frequent {n}-gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"duplicate {n}-grams" for n in range(5, 11)},
    "lorem_ipsum": "lorem ipsum",
    "curly_bracket": "curly bracket",
    "too_few_sentences": "too few sentences",
    "line_punct_ratio": "too few lines end in punctuation",
    "short_line_ratio": "too many short lines",
    "char_dup_ratio": "characters in duplicate lines",
    "list_ratio": "a list",
}


def clean_documents(data: pathlib.Path) -> Iterator[str]:
    """Real texts in English, of a few hundred to some ten thousand characters."""
    for article in json.loads((data / "extract/ground_truth.json").read_text()).values():
        yield article["articleBody"]
    for line in (data / "dedup/articles_1000.train").read_text().splitlines():
        yield line.split(" ", 1)[1]
    chooser = random.Random(0)
    for path in sorted((data / "pretrain").glob("gutenberg/*.txt")):
        yield from _pieces(path.read_text(errors="replace"), chooser, 8000)
    yield from _pieces((data / "pretrain/wikitext2-valid.txt").read_text(), chooser, 4000)
    yield from _pieces((data / "pretrain/tinyshakespeare.txt").read_text(), chooser, 4000)
    for line in (data / "instruct/oasst1_filtered_octopack.jsonl").read_text().splitlines():
        record = json.loads(line)
        text = f"{record['prompt']}\n\n{record['completion']}"
        if sum(map(str.isascii, text)) > 0.97 * len(text):
            yield text
    with gzip.open(data / "preference/hh_harmless_a.jsonl.gz", "rt") as lines:
        for line in lines:
            yield json.loads(line)["chosen"].strip()


def _pieces(text: str, chooser: random.Random, mean: int) -> Iterator[str]:
    """The text cut at line ends into pieces of various lengths."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + int(chooser.expovariate(1 / mean)) + 200)
        end = len(text) if end < 0 else end
        yield text[start:end]
        start = end


def spoil(text: str, chooser: random.Random) -> str:
    """The text with one defect, slight or heavy."""
    share = chooser.random()
    lines = text.split("\n")
    words = text.split(" ")

    def some(items: list[str], change: Callable[[str], str]) -> list[str]:
        return [change(item) if chooser.random() < share else item for item in items]

    defects: list[Callable[[], str]] = [
        lambda: "\n".join(some(lines, lambda line: f"{line}\n{line}")),
        lambda: "\n\n".join(some(text.split("\n\n"), lambda piece: f"{piece}\n\n{piece}")),
        lambda: "\n".join(some(lines, lambda line: chooser.choice(["- ", "• ", "  -"]) + line)),
        lambda: "\n".join(some(lines, lambda line: line.rstrip(". ") + chooser.choice(["...", "…", "... "]))),
        lambda: " ".join(word + " #tag" if chooser.random() < share / 4 else word for word in words),
        lambda: " ".join(word + "..." if chooser.random() < share / 4 else word for word in words),
        lambda: " ".join(some(words, lambda word: chooser.choice(["%", "12.5", "=>", "--", "3/4", "$40"]))),
        lambda: " ".join(words[: chooser.randint(1, 80)]),
        lambda: " ".join(some(words, lambda word: word + chooser.choice(words))),
        lambda: " ".join(some(words, lambda word: " ".join(word))),
        lambda: " ".join(some(words, lambda word: "click here to read more")),
        lambda: " ".join(words[:200] + words[: int(200 * share)] * 2),
        lambda: " ".join(
            word for word in words if word not in ("the", "to", "of", "and", "that", "with", "be")
        ),
        lambda: " ".join(some(words, lambda word: word + "\n")),
        lambda: "\n".join(some(lines, lambda line: line.rstrip(".!?\"'") + chooser.choice(["", "", ","]))),
        lambda: " ".join(some(words, lambda word: f"(see {word})[{chooser.randint(1, 99)}]")),
        lambda: text.replace(". ", chooser.choice([".", "... ", "!!! ", ".\n", ".\n\n\n", ". \t"])),
        lambda: text.replace("'", "’").replace(" ", chooser.choice(["  ", " ", " \n"])),
        lambda: "\n".join(
            some(lines, lambda line: line + chooser.choice(["Uses cookies.", " JavaScript is on.", ""]))
        ),
        lambda: (
            text
            + chooser.choice([" function() { return 0; }", "\nLorem ipsum dolor sit amet.", "\n\n\n", ""])
        ),
    ]
    return chooser.choice(defects)()


def documents(data: pathlib.Path, clean_ones: int, spoilt: int) -> list[str]:
    """So many clean documents and spoilt ones, and a few extreme ones."""
    chooser = random.Random(1)
    clean = [text for text in clean_documents(data) if text]
    clean = chooser.sample(clean, min(clean_ones, len(clean)))
    extreme = [
        *(
            " ",
            "\n",
            "\n\n",
            "a",
            "...",
            "# # #",
            "the",
            "\n\nthe and\n\n",
            "x" * 5000,
            "-\n" * 60,
            "a b\r\nc\x0bd\u2028e",
        ),
        " ".join(chooser.choice(clean) for _ in range(400)),
    ]
    return clean + [spoil(chooser.choice(clean), chooser) for _ in range(spoilt)] + extreme


class Peer:
    """datatrove's filters."""

    def __init__(self) -> None:
        try:
            import spacy  # noqa: F401
            from datatrove.data import Document
            from datatrove.pipeline import filters
        except ImportError as error:
            raise SystemExit(
                f"{error.name} is not installed; this comparison needs: "
                "pip install 'datatrove[processing]==0.10.*' spacy"
            ) from error
        self._document = Document
        self._gopher = (filters.GopherQualityFilter(), filters.GopherRepetitionFilter())
        self._fineweb = filters.FineWebQualityFilter()
        self._c4 = filters.C4QualityFilter()

    def gopher(self, text: str) -> str | None:
        return self._first(self._gopher, text)

    def fineweb(self, text: str) -> str | None:
        return self._first((self._fineweb,), text)

    def c4(self, text: str) -> str | None:
        return self._first((self._c4,), text)

    def c4_text(self, text: str) -> str | None:
        """What is left of the text, None for nothing."""
        document = self._document(text=text, id="")
        return document.text if self._c4.filter(document) is True else None

    def _first(self, filters: Any, text: str) -> str | None:
        document = self._document(text=text, id="")
        for one in filters:
            result = one.filter(document)
            if result is not True:
                return REASONS.get(result[1], result[1])
        return None

    @staticmethod
    def words(text: str) -> list[str]:
        from datatrove.utils.text import split_into_words

        return split_into_words(text)


def our_words(text: str) -> list[str]:
    from t5style.corpus import quality_lookup, quality_tables, quality_words

    rules, sequences = quality_lookup.splitting(True)
    starts, ends = quality_words.split(quality_tables.codes_of(text), rules, sequences, False)
    return [text[a:b] for a, b in zip(starts, ends, strict=True)]


def compare(name: str, ours: Any, theirs: Any, texts: list[str]) -> None:
    """Prints how often two judges agree, and on what they do not."""
    dropped: collections.Counter[str] = collections.Counter()
    causes: collections.Counter[str] = collections.Counter()
    decisions = reasons = words = 0
    for text in texts:
        mine, other = ours(text), theirs(text)
        dropped[other or "kept"] += 1
        decisions += (mine is None) == (other is None)
        reasons += mine == other
        words += our_words(text) == Peer.words(text)
        if mine != other:
            cause = "same words" if our_words(text) == Peer.words(text) else "other words"
            causes[f"{cause}: ours {mine or 'keep'}, datatrove {other or 'keep'}"] += 1
    print(
        f"\n{name}: {len(texts):,} documents, the same decision on {decisions / len(texts):.3%}, "
        f"the same reason on {reasons / len(texts):.3%}, the same words in {words / len(texts):.3%}"
    )
    print("  datatrove: " + ", ".join(f"{reason} {count}" for reason, count in dropped.most_common()))
    for cause, count in causes.most_common():
        print(f"  disagreement x {count}: {cause}")
    if not causes:
        print("  no disagreement")


def speed(judge: Any, texts: list[str]) -> float:
    """MB of UTF-8 for each second of CPU time."""
    size = sum(len(text.encode()) for text in texts)
    start = time.process_time()
    for text in texts:
        judge(text)
    return size / 1e6 / (time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clean", type=int, default=2000, help="number of documents as they are")
    parser.add_argument("--spoilt", type=int, default=2000, help="number of spoilt documents")
    parser.add_argument("--timed", type=int, default=200, help="documents timed in each round")
    options = parser.parse_args()
    peer = Peer()
    texts = documents(options.data, options.clean, options.spoilt)
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.1f} M characters")
    judges = {
        "Gopher": (quality.gopher, peer.gopher),
        "FineWeb": (quality.fineweb, peer.fineweb),
        "C4": (quality.c4, peer.c4),
    }
    for name, (ours, theirs) in judges.items():
        compare(name, ours, theirs, texts)
    edit = quality.C4().edit
    left = [(edited if isinstance(edited := edit(text), str) else None, peer.c4_text(text)) for text in texts]
    kept = [mine == other for mine, other in left if other is not None]
    print(f"  kept texts are edited alike in {sum(kept)} of {len(kept)} cases")
    chooser = random.Random(2)
    print(f"\nMB for each CPU second, median of {options.rounds} rounds")
    for name, (ours, theirs) in judges.items():
        rates = []
        for number in range(options.rounds + 1):
            timed = chooser.sample(texts, min(options.timed, len(texts)))
            rates.append((speed(ours, timed), speed(theirs, timed)))
            if not number:
                rates.clear()  # a warm-up
        mine, other = (statistics.median(column) for column in zip(*rates, strict=True))
        ratio = statistics.median(a / b for a, b in rates)
        print(f"{name:8} ours {mine:7.2f}   datatrove {other:6.2f}   {ratio:6.1f} x")


if __name__ == "__main__":
    main()
