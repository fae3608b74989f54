"""Personal data found by t5style, by Presidio's pattern recognisers and by plain regular expressions.

    python experiments/benchmarks/corpus_privacy.py --data=../shared/data
    python experiments/benchmarks/corpus_privacy.py --data=../shared/data --rounds=9 --show

Quality is measured on Presidio's own synthetic set (presidio-research, `pii/presidio_synth_dataset_v2.json`
under --data). A labelled value counts as found where a span of its kind covers all of it; a span is false
where it touches no labelled value of its kind. Presidio's recognisers (presidio-analyzer) are called as they
are, so no spaCy model is needed; what their own validation refuses is left out, as its analyzer does.

Speed is megabytes of UTF-8 for each second of CPU time, the contestants taking turns, best of --rounds: on
the labelled texts one by one; on ordinary prose and articles (`pretrain/`, `extract/ground_truth.json`) in
pieces of 20,000 characters; and on both, half and half by bytes.
"""

from __future__ import annotations

import argparse
import ipaddress
import json
import logging
import pathlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable

from t5style.corpus import privacy, privacy_checks

# Their name in the labelled set, ours.
KINDS = {
    "EMAIL_ADDRESS": "email_address",
    "PHONE_NUMBER": "phone_number",
    "CREDIT_CARD": "credit_card",
    "IBAN_CODE": "iban_code",
    "IP_ADDRESS": "ip_address",
    "US_SSN": "us_ssn",
}
Found = list[tuple[int, int, str]]
Finder = Callable[[str], Found]


def ours(text: str) -> Found:
    return [(start, end, kind.upper()) for start, end, kind in privacy.find(text)]


def ours_same_kinds(text: str) -> Found:
    kinds = tuple(KINDS.values())
    return [(start, end, kind.upper()) for start, end, kind in privacy.find(text, kinds)]


def presidio() -> Finder:
    """The recognisers of the six kinds with their defaults."""
    from presidio_analyzer import EntityRecognizer
    from presidio_analyzer.predefined_recognizers import (
        CreditCardRecognizer,
        EmailRecognizer,
        IbanRecognizer,
        IpRecognizer,
        PhoneRecognizer,
        UsSsnRecognizer,
    )

    logging.getLogger("presidio-analyzer").setLevel(logging.ERROR)
    recognizers = [
        EmailRecognizer(),
        PhoneRecognizer(),
        CreditCardRecognizer(),
        IbanRecognizer(),
        IpRecognizer(),
        UsSsnRecognizer(),
    ]

    def find(text: str) -> Found:
        results = []
        for recognizer in recognizers:
            results += recognizer.analyze(text, recognizer.supported_entities, None)
        results = EntityRecognizer.remove_duplicates(results)
        return [(result.start, result.end, result.entity_type) for result in results if result.score > 0]

    return find


PLAIN = {
    "EMAIL_ADDRESS": re.compile(r"[A-Za-z0-9._%+-]+@[A-Za-z0-9.-]+\.[A-Za-z]{2,}"),
    "PHONE_NUMBER": re.compile(
        r"(?<![\w.])(?:\+?\d{1,3}[ .-]?)?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}(?:x\d+)?(?!\w)"
    ),
    "CREDIT_CARD": re.compile(r"\b(?:\d[ -]?){12,18}\d\b"),
    "IBAN_CODE": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "IP_ADDRESS": re.compile(
        r"\b(?:\d{1,3}\.){3}\d{1,3}\b|(?<![\w:])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}"
    ),
    "US_SSN": re.compile(r"\b\d{3}-\d{2}-\d{4}\b"),
}


def _iban(value: str) -> bool:
    return privacy_checks.iban(value.replace(" ", "").upper())


def _address(value: str) -> bool:
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return False
    return True


def _phone(value: str) -> bool:
    return 7 <= len(re.sub(r"\D", "", value.partition("x")[0])) <= 13


CHECKS = {
    "PHONE_NUMBER": _phone,
    "CREDIT_CARD": lambda value: privacy_checks.luhn(re.sub(r"\D", "", value)),
    "IBAN_CODE": _iban,
    "IP_ADDRESS": _address,
}


def plain(text: str) -> Found:
    """A regular expression for each kind, checksums where there are some."""
    found: Found = []
    for kind, pattern in PLAIN.items():
        check = CHECKS.get(kind)
        found += [(*m.span(), kind) for m in pattern.finditer(text) if check is None or check(m[0])]
    return found


def quality(records: list[dict], find: Finder, show: bool) -> dict[str, tuple[int, int, int, int]]:
    """For each kind: labelled values, those found, spans, false spans."""
    counts = {kind: [0, 0, 0, 0] for kind in KINDS}
    for record in records:
        text = record["full_text"]
        spans = find(text)
        labels = [
            (span["start_position"], span["end_position"], span["entity_type"]) for span in record["spans"]
        ]
        for start, end, kind in labels:
            if kind in KINDS:
                hit = any(s <= start and end <= e and k == kind for s, e, k in spans)
                counts[kind][0] += 1
                counts[kind][1] += hit
                if show and not hit:
                    print(f"  missed {kind} {text[start:end]!r} in {text[max(0, start - 40) : end + 20]!r}")
        for start, end, kind in spans:
            if kind not in KINDS:
                if show:
                    print(f"  other {kind} {text[start:end]!r} in {text[max(0, start - 40) : end + 20]!r}")
                continue
            false = not any(s < end and start < e and k == kind for s, e, k in labels)
            counts[kind][2] += 1
            counts[kind][3] += false
            if show and false:
                print(f"  false {kind} {text[start:end]!r} in {text[max(0, start - 40) : end + 20]!r}")
    return {kind: (a, b, c, d) for kind, (a, b, c, d) in counts.items()}


def prose(data: pathlib.Path, size: int) -> list[str]:
    """Pieces of 20,000 characters from books, Wikipedia and news, so many bytes of each."""
    texts = [path.read_text("utf-8") for path in sorted((data / "pretrain").glob("**/*.txt"))]
    articles = json.loads((data / "extract/ground_truth.json").read_text("utf-8"))
    texts.append("\n\n".join(article["articleBody"] for article in articles.values()))
    pieces = []
    for text in texts:
        text = text[: size // len(texts)]
        pieces += [text[place : place + 20_000] for place in range(0, len(text), 20_000)]
    return pieces


def size_of(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def seconds(find: Finder, texts: list[str]) -> float:
    start = time.process_time()
    for text in texts:
        find(text)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("../shared/data"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--megabytes", type=float, default=1.0, help="of prose")
    parser.add_argument("--show", action="store_true", help="list what is missed or false")
    options = parser.parse_args()
    records = json.loads((options.data / "pii/presidio_synth_dataset_v2.json").read_text("utf-8"))
    finders: dict[str, Finder] = {"ours": ours, "ours, 6 kinds": ours_same_kinds, "plain regexes": plain}
    try:
        finders["presidio"] = presidio()
    except ImportError:
        print("presidio-analyzer is not installed: not compared (pip install presidio-analyzer)")

    cards = [s["entity_value"] for r in records for s in r["spans"] if s["entity_type"] == "CREDIT_CARD"]
    bad = sum(not privacy_checks.luhn(re.sub(r"\D", "", card)) for card in cards)
    print(f"{len(records)} labelled texts; {bad} of {len(cards)} labelled cards fail the Luhn sum\n")
    results = {}
    for name, find in finders.items():
        if options.show:
            print(name)
        results[name] = quality(records, find, options.show)
    print(f"{'kind':15}{'labelled':>9}", *(f"{name + ': recall, precision (false)':>46}" for name in results))
    for kind in KINDS:
        row = f"{kind:15}{results['ours'][kind][0]:9}"
        for counts in results.values():
            labelled, hits, spans, false = counts[kind]
            precision = (spans - false) / spans if spans else float("nan")
            row += f"{hits / labelled:32.3f} {precision:6.3f} ({false:4})"
        print(row)

    dense = [record["full_text"] for record in records]
    clean = prose(options.data, int(options.megabytes * 1e6))
    print(f"\nspans of these kinds in {size_of(clean) / 1e6:.2f} MB of prose and articles")
    for name, find in finders.items():
        if name != "presidio":
            found = Counter(kind for text in clean for _, _, kind in find(text) if kind in KINDS)
            print(f"{name:20}", dict(found))
    repeat = max(1, round(size_of(clean) / size_of(dense)))
    texts = {"labelled texts": dense, "prose and articles": clean, "half and half": dense * repeat + clean}
    sizes = {name: size_of(part) / 1e6 for name, part in texts.items()}
    best: dict[tuple[str, str], float] = {}
    for _ in range(options.rounds):
        for name, find in finders.items():
            for part, items in texts.items():
                if name == "presidio":
                    if part == "half and half":
                        continue  # what it takes follows from the two
                    if part == "prose and articles":
                        items = items[::8]
                spent = seconds(find, items) / (size_of(items) / 1e6)
                best[name, part] = min(spent, best.get((name, part), float("inf")))
    print(f"\n{'MB/s of CPU time':20}", *(f"{part + f' ({sizes[part]:.2f} MB)':>30}" for part in texts))
    for name in finders:
        if name == "presidio":
            both = (best[name, "labelled texts"] + best[name, "prose and articles"]) / 2
            best[name, "half and half"] = both
        print(f"{name:20}", *(f"{1 / best[name, part]:30.2f}" for part in texts))


if __name__ == "__main__":
    main()
