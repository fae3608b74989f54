"""A prepared corpus's folder made up for the tests of its report, with documents that try to break out of the
page. `python -m tests.report.made_corpus FOLDER` makes one to look at.
"""

import html.parser
import itertools
import json
import math
import random
import sys

from t5style.corpus.document import Document, ShardWriter
from t5style.report import data_report
from t5style.run_dir import RunDir

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u202e{{ 7*7 }} \x00 ```\n| a | b |"
STAGES = [
    ("ExtractHtml", {"no text": 0.012}, 0.97, 4.0, 0.42),
    ("Normalize", {}, 0.31, 30.0, 1.0),
    ("Language", {"language not kept": 0.083, "language uncertain": 0.021}, 0.0, 17.0, 1.0),
    ("UrlFilter", {"URL on a list": 0.002}, 0.0, 300.0, 1.0),
    (
        "GopherRepetition",
        {"duplicate 4-grams": 0.041, "repeated lines": 0.038, "repeated paragraphs": 0.009},
        0.0,
        6.0,
        1.0,
    ),
    (
        "GopherQuality",
        {
            "fewer than 50 words": 0.121,
            "mean word length not in 3 to 10": 0.017,
            "too few stop words": 0.034,
            "too many symbols": 0.006,
        },
        0.0,
        7.0,
        1.0,
    ),
    ("C4", {"curly bracket": 0.018, "lorem ipsum": 0.0004, "fewer than 3 sentences": 0.02}, 0.44, 9.0, 0.96),
    ("QualityClassifier", {"quality below 0.3": 0.09}, 0.0, 12.0, 1.0),
    ("Redact", {}, 0.05, 5.0, 1.0),
    ("ExactDuplicates", {"duplicate": 0.046}, 0.0, 200.0, 1.0),
    ("NearDuplicates", {"near-duplicate": 0.087}, 0.0, 15.0, 1.0),
    ("Decontaminate", {}, 0.0, 25.0, 1.0),
]
LANGUAGES = ["en", "de", "fr", "es", "ru", "ja", "zh", "it", "pt", "pl", "nl", "ar", "fa", "tr", "cs", "sv"]
LANGUAGES += ["ko", "vi", "el", "uk", "he", "hi", "unknown"]
PROSE = """the of and to in a is that for it was on with as be by this are from or an have not which at they
one you river market season letter council engine harvest window north paper garden winter machine bridge
history science museum public train music village coast theory forest record budget island school"""
WORDS = PROSE.split()


def text_of(rng, words):
    """Invented prose: sentences of words drawn by Zipf's law."""
    weights = [1 / (rank + 2) for rank in range(len(WORDS))]
    drawn = rng.choices(WORDS, weights, k=words)
    sentences, at = [], 0
    while at < words:
        length = rng.randint(6, 16)
        sentences.append(" ".join(drawn[at : at + length]).capitalize() + ".")
        at += length
    return " ".join(sentences)


def edges_of(low, high, bins, log):
    if log:
        return [low * (high / low) ** (k / bins) for k in range(bins + 1)]
    return [low + (high - low) * k / bins for k in range(bins + 1)]


def bump(rng, total, bins, center, width, cut):
    """Counts of a bell over bins, and those left when what lies below `cut` is mostly dropped."""
    weights = [math.exp(-(((k - center) / width) ** 2)) + 0.002 for k in range(bins)]
    read = [int(total * weight / sum(weights)) for weight in weights]
    return read, [int(n * (0.75 if k >= cut else 0.06 * rng.random())) for k, n in enumerate(read)]


def make_card(documents_in, rng):
    """A data card as the corpus job writes it."""
    stages, dropped, left, size = [], {}, documents_in, documents_in * 6_100
    for name, reasons, changed, speed, shrink in STAGES:
        lost = {reason: n for reason, share in reasons.items() if (n := int(documents_in * share))}
        kept = left - sum(lost.values())
        out = int(size * kept / max(left, 1) * shrink)
        stages.append(
            {
                "name": name,
                "in": left,
                "kept": kept,
                "dropped": lost,
                "changed": int(kept * changed),
                "seconds": round(size / 1e6 / speed, 3),
                "bytes_in": size,
                "bytes_out": out,
            }
        )
        dropped |= lost
        left, size = kept, out

    def table(names, power):
        weights = [1 / (rank + 1) ** power for rank in range(len(names))]
        shares = {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}
        return {
            name: {
                "documents": int(left * share),
                "characters": int(size * share / 1.1),
                "bytes": int(size * share),
            }
            for name, share in shares.items()
        }

    histograms = {}
    for name, edges, center, cut in (
        ("characters", edges_of(10, 1e6, 40, True), 21, 12),
        ("words", [0, *edges_of(1, 1e5, 40, True)], 20, 15),
        ("mean_word_length", edges_of(0, 20, 40, False), 10, 6),
        ("duplicate_line_fraction", edges_of(0, 1, 40, False), 1, 0),
        ("quality_score", edges_of(0, 1, 40, False), 22, 12),
        ("language_probability", edges_of(0, 1, 40, False), 38, 26),
    ):
        read, kept = bump(rng, documents_in, len(edges) - 1, center, 6, cut)
        histograms[name] = {"edges": edges, "read": read, "kept": kept}
    sizes = {str(k): int(left * 0.03 / k**2.2) for k in [*range(2, 12), 40, 350, 812]}
    sizes["812"] = 1
    grams = {
        str(n): [
            (" ".join(words), int(90_000 / (rank + 1)))
            for rank, words in enumerate(itertools.islice(itertools.permutations(WORDS, n), 60))
        ]
        for n in (1, 2, 3)
    }
    kinds = ("EMAIL", "PHONE", "URL_CREDENTIALS", "IPV4", "CARD", "IBAN", "SSN", "SECRET")
    return {
        "documents_in": documents_in,
        "documents": left,
        "bytes_in": documents_in * 6_100,
        "cut_in_two": 0,
        "quarantined": documents_in // 500,
        "dropped": dropped,
        "splits": table(["train", "validation", "test"], 6),
        "sources": table(["crawl", "forum & <b>board</b>", "encyclopedia", "books", "patents"], 1.3),
        "licenses": table(["unknown", "CC-BY-SA-4.0", "PSF-2.0", "Apache-2.0"], 1.1),
        "languages": table(LANGUAGES, 1.4),
        "stages": [{"__class__": "t5style.corpus.stages.MinLength", "characters": 50}],
        "stages_table": stages,
        "histograms": histograms,
        "ngrams": grams,
        "pii": {kind: {"found": 9000 // 3**k, "documents": 7000 // 3**k} for k, kind in enumerate(kinds)},
        "quarantine_reasons": {
            "not valid UTF-8": documents_in // 900,
            "truncated gzip": documents_in // 1500,
            "malformed JSON": documents_in // 500 - documents_in // 900 - documents_in // 1500,
        },
        "clusters": {"sizes": sizes},
        "seconds": 812.4,
        "mb_per_second": documents_in * 6_100 / 1e6 / 812.4,
        "extends": "runs/before",
        "erased": [{"time": "2026-03-02", "documents": 2}],
    }


def make_corpus(folder, documents_in=1_000_000, shards=True, seed=0):
    """A finished run folder; its shards hold few documents whatever the card says."""
    rng = random.Random(seed)
    run = RunDir(folder).create()
    card = make_card(documents_in, rng)
    written = {}
    for split, count in (("train", 40), ("validation", 7)) if shards else ():
        with ShardWriter(run.path / split, 20_000) as writer:
            for i in range(count):
                text = HOSTILE if i == 3 else text_of(rng, 200)
                document = Document(
                    text,
                    f"{split}/{i}",
                    "crawl",
                    f"https://e.org/{i}",
                    "PSF-2.0",
                    "en",
                    {"page": i},
                    "2020-01-01",
                )
                writer.write(document)
                written.setdefault(split, []).append(document)
    if shards:
        card["splits"] = {name: card["splits"][name] for name in written}
    lines = []
    for row in card["stages_table"]:
        for reason in row["dropped"]:
            for k in range(20):
                text = HOSTILE if k == 0 else text_of(rng, 120)
                lines.append(
                    {
                        "stage": row["name"],
                        "reason": reason,
                        "detail": f"{rng.randint(3, 49)} of 50",
                        "id": f"crawl/{reason}-{k}",
                        "url": f"https://e.org/{k}",
                        "characters": len(text) + 900,
                        "text": text,
                    }
                )
    write_lines(run.path / "dropped.jsonl", lines)
    write_lines(
        run.path / "quarantine.jsonl",
        [
            {
                "file": f"in/{k:05d}.gz",
                "position": f"byte {k * 77}",
                "reason": reason,
                "detail": "at <b>x</b>",
            }
            for reason, n in card["quarantine_reasons"].items()
            for k in range(n)
        ],
    )
    groups = []
    for k in range(60):
        text = (HOSTILE if k == 1 else "") + text_of(rng, 300)
        near = text.split()
        for _ in range(k % 9):
            near[rng.randrange(len(near))] = rng.choice(("brook", "lantern", "<i>ink</i>"))
        texts = [text, " ".join(near), " ".join(near)] if k % 2 else [" ".join(near)] * 3
        copies = [{"id": f"copy-{k}-{j}", "url": "", "text": texts[j][:2000]} for j in range(3)]
        groups.append(
            {"size": 4, "kept": {"id": f"doc-{k}", "url": "", "text": text[:2000]}, "dropped": copies}
        )
    write_lines(run.path / "clusters.jsonl", groups)
    (run.path / "data_card.json").write_text(json.dumps(card))
    run.write_lineage(
        {
            "sessions": [
                {
                    "code": {"version": "0.1.0", "commit": "abc123"},
                    "command": "python -m t5style.main <x>",
                    "started": "2026-01-01T00:00:00+0000",
                }
            ]
        }
    )
    return run, card, written


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Page(html.parser.HTMLParser):
    """What a browser would make of a page: its tags, ids, links and the text that it shows."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.links, self.attributes, self.data = set(), [], [], set(), []

    @classmethod
    def of(cls, text):
        page = cls()
        page.feed(text)
        page.close()
        page.shown = " ".join(" ".join(page.data).split())
        return page

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        values = dict(attrs)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [values["href"]] if "href" in values else []

    def handle_data(self, data):
        if self.lasttag != "style":
            self.data.append(data)


if __name__ == "__main__":
    make_corpus(sys.argv[1])
    print(data_report.write(sys.argv[1]))
