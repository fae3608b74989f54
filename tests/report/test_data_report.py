"""The report of a corpus: what the page, the Croissant metadata and the dataset card say of a folder made up
here, with documents that try to break out of the page.
"""

import html.parser
import itertools
import json
import math
import random
import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style import launch
from t5style.corpus.document import Document, ShardWriter
from t5style.report import croissant, data_report, dataset_card, diff, pictures
from t5style.run_dir import RunDir, UserError
from tests import helpers

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \u202e{{ 7*7 }} \x00 ```\n| a | b |"
STAGES = [
    ("ExtractHtml", {"no text": 0.012}, 0.97, 4.0, 0.42),
    ("Normalize", {}, 0.31, 30.0, 1.0),
    ("Language", {"language not kept": 0.083, "language uncertain": 0.021}, 0.0, 17.0, 1.0),
    ("UrlFilter", {"URL on a list": 0.002}, 0.0, 300.0, 1.0),
    (
        "GopherRepetition",
        {"repeated 4-grams": 0.041, "repeated lines": 0.038, "repeated paragraphs": 0.009},
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
        text = text_of(rng, 300)
        near = text.split()
        for _ in range(k % 9):
            near[rng.randrange(len(near))] = rng.choice(("brook", "lantern", "<i>ink</i>"))
        copies = [{"id": f"copy-{k}-{j}", "url": "", "text": " ".join(near)[:2000]} for j in range(3)]
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


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus with its report: run folder, card, documents by split, page, what the page holds."""
    run, card, written = make_corpus(tmp_path_factory.mktemp("corpus") / "out")
    began = time.process_time()
    path = data_report.write(run.path)
    seconds = time.process_time() - began
    text = path.read_text()
    return run, card, written, text, Page.of(text), seconds


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


def test_documents_cannot_break_out_of_the_page(corpus):
    *_, text, page, _ = corpus
    allowed = (
        "html head meta title style body div nav a main header h1 h2 h3 h4 p b bdi span br ul li table tr "
    )
    allowed += "th td svg path details summary del ins pre code"
    assert page.tags <= set(allowed.split())
    assert not {name for name in page.attributes if name.startswith("on") or name in ("src", "srcdoc")}
    assert "default-src 'none'" in text
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    assert len(set(page.ids)) == len(page.ids)
    assert "</script><script>alert(1)</script><img src=x onerror=alert(2)>" in page.shown
    assert "{{ 7*7 }}" in page.shown
    assert "forum & <b>board</b>" in page.shown
    assert "<i>ink</i>" in page.shown


def test_page_tells_what_the_card_says(corpus):
    _, card, _, _, page, _ = corpus
    for expected in (
        "1,000,000 documents (6.1 GB of text) were read and 354,600",
        "GopherQuality left out most: 178,000 documents, 22.4 % of what reached it",
        "−178,000 22.4 %",
        "ExtractHtml took 49.5 % of the time",
        "17 reasons for leaving documents out; the commonest: fewer than 50 words",
        "121,000 12.1 %",
        "400 0.04 %",  # not 0.0 %
        "22 languages; en is 41.7 % of the text",
        "8 more",
        "Left out and changed nothing: Decontaminate.",
        "The licence of 50.5 % of the text is not known.",
        "Mean word length: median 5.28 read, 5.63 kept",
        "Triples of words",
        "101 to 1,000",
        "The largest group had 812.",
        "brook",
        "words the same",
        "EMAIL",
        "2,000 files or records could not be read",
        "in/00019.gz",
        "Extends runs/before",
        "2 documents, 2026-03-02",
        "python -m t5style.main <x>",
        "t5style 0.1.0, commit abc123",
        "MinLength( characters = 50 )",
        "@misc{out,",
    ):
        assert expected in page.shown, expected
    assert "in/00020.gz" not in page.shown
    assert f"{card['documents']:,} come out" in page.shown
    assert page.shown.count("crawl/fewer than 50 words-") == data_report.EXAMPLES


SECTIONS = {
    "stages_table": "stages",
    "histograms": "measures",
    "ngrams": "ngrams",
    "clusters": "duplicates",
    "quarantined": "quarantine",
}


def rewritten(folder, change):
    """The page of a small corpus whose card was changed."""
    run, card, _ = make_corpus(folder, 5_000, shards=False)
    card = change(card)
    (run.path / "data_card.json").write_text(json.dumps(card))
    return Page.of(data_report.write(run.path).read_text())


@pytest.mark.parametrize(
    "key", [*SECTIONS, "quarantine_reasons", "seconds", "mb_per_second", "extends", "erased"]
)
def test_what_was_not_counted_is_left_out(tmp_path, key):
    page = rewritten(tmp_path / "out", lambda card: {name: card[name] for name in card if name != key})
    expected = {*SECTIONS.values(), "top", "reasons", "content", "lineage", "personal"} - {SECTIONS.get(key)}
    assert set(page.ids) == expected
    if key == "stages_table":  # reasons are known without the stages; their examples too
        assert "fewer than 50 words" in page.shown
        assert "crawl/fewer than 50 words-0" in page.shown
    if key == "quarantine_reasons":  # counted from the file
        assert "malformed JSON 2" in page.shown


def test_a_card_of_counts_alone_makes_a_page(tmp_path):
    run = RunDir(tmp_path / "out").create()
    count = {"documents": 1, "characters": 2, "bytes": 3}
    card = {"documents_in": 1, "documents": 1, "bytes_in": 3, "dropped": {}, "splits": {"train": count}}
    (run.path / "data_card.json").write_text(json.dumps(card))
    page = Page.of(data_report.write(run.path).read_text())
    assert set(page.ids) == {"top", "content", "lineage"}
    assert "None was left out" in page.shown
    assert "The split train has only 1 document:" in page.shown


def test_everything_dropped_nothing_read_and_odd_texts(tmp_path):
    def nothing(card):
        for row in card["stages_table"]:
            row |= {
                "in": 0,
                "kept": 0,
                "dropped": {},
                "seconds": 0,
                "bytes_in": 0,
                "bytes_out": 0,
                "changed": 0,
            }
        for histogram in card["histograms"].values():
            histogram |= {"read": [0] * 40, "kept": [0] * 40}
        return card | {"documents_in": 0, "documents": 0, "dropped": {}, "pii": {}, "clusters": {"sizes": {}}}

    page = rewritten(tmp_path / "none", nothing)
    assert {"measures", "duplicates", "reasons", "personal"} & set(page.ids) == set()

    run, _, _ = make_corpus(tmp_path / "odd", 5_000, shards=False)
    write_lines(
        run.path / "dropped.jsonl", [{"reason": "no text", "text": "half \ud83d pair", "detail": None}]
    )
    assert "half ? pair" in data_report.write(run.path).read_text()


def test_no_personal_data_is_said_only_where_it_was_looked_for(tmp_path):
    page = rewritten(tmp_path / "looked", lambda card: card | {"pii": {}})
    assert "No personal data was found" in page.shown
    assert "No stage looked for personal data." not in page.shown
    metadata = json.loads((tmp_path / "looked" / "croissant.json").read_text())
    assert "found none" in metadata["rai:personalSensitiveInformation"][0]

    def without(card):
        return card | {"pii": {}, "stages_table": [r for r in card["stages_table"] if r["name"] != "Redact"]}

    page = rewritten(tmp_path / "not", without)
    assert "personal" not in page.ids
    assert "No stage looked for personal data." in page.shown
    metadata = json.loads((tmp_path / "not" / "croissant.json").read_text())
    assert "rai:personalSensitiveInformation" not in metadata


def test_times_of_their_own_file_sampling_and_copies(tmp_path):
    """As a preparation leaves them: times apart, characters for bytes, and a last row that only drops."""

    def change(card):
        rows = card["stages_table"]
        for row in rows:
            row["characters"] = row.pop("bytes_in")
            del row["seconds"], row["bytes_out"]
        left = rows[-1]["kept"]
        rows.append({"name": "Sampling", "in": 0, "kept": 0, "changed": 0, "characters": 0})
        rows[-1]["dropped"] = {"left out by sampling": 100}
        card["dropped"]["left out by sampling"] = 100
        stages = {f"{i} {row['name']}": float(row["name"] == "C4") + 1 for i, row in enumerate(rows)}
        timings = {"stages": stages, "seconds": 100.0}
        (tmp_path / "out" / "timings.json").write_text(json.dumps(timings))
        return card | {"documents": left - 100 + 60, "copies": 60, "seconds": 1, "mb_per_second": 1}

    page = rewritten(tmp_path / "out", change)
    assert "60 of them copies that sampling made" in page.shown
    assert "C4 took 14.3 % of the time" in page.shown
    assert "M characters/s" in page.shown
    assert "Sampling 1,774 1,674 100 5.6 %" in page.shown
    assert "1,674 come out" in page.shown
    assert "33.5 % of those read" in page.shown  # 1,674 of 5,000, copies not counted
    assert "0.305 MB/s read in 1 min 40 s" in page.shown


def test_pictures_of_samples_are_to_the_scale_of_all_documents():
    counts = {"edges": [0, 1, 2], "read": [30, 10], "kept": [10, 10]}
    picture = pictures.histogram("x", counts, 4_000, 2_000)
    assert picture["read"] == "M0 100V0.00H1V66.67H2V100Z"  # 3,000 and 1,000
    assert picture["kept"] == "M0 100V66.67H1V66.67H2V100Z"  # 1,000 and 1,000
    assert picture["top"] == 0.75
    assert picture["medians"] == ("0.667", "1")


def test_many_measures_are_ranked_and_folded(tmp_path):
    def change(card):
        plain = card["histograms"]["quality_score"]
        same = plain | {"kept": plain["read"]}
        more = {f"share_{k}": same for k in range(8)} | {
            "share_moved": card["histograms"]["mean_word_length"]
        }
        return card | {"histograms": more | card["histograms"]}

    shown = rewritten(tmp_path / "out", change).shown
    assert "7 more measures" in shown
    order = [
        shown.index(f"{name}: median") for name in ("Words", "Mean word length", "Share moved", "Share 0")
    ]
    assert order == sorted(order)
    assert shown.index("Share moved: median") < shown.index("7 more measures")


def test_examples_do_not_show_addresses_and_numbers():
    text = "Ask a.b+c@mail.example.org or +49 (30) 1234-5678, card 4111 1111 1111 1111, since 2020-01-01."
    assert data_report.masked(text) == "Ask ‹e-mail› or ‹number›, card ‹number›, since 2020-01-01."
    example = data_report._example({"text": "write to x@y.example", "detail": "x@y.example"})
    assert (example["text"], example["detail"]) == ("write to ‹e-mail›", "‹e-mail›")


def test_cost_does_not_grow_with_the_corpus(corpus, tmp_path):
    """A million documents: what is read is summaries."""
    *_, text, _, seconds = corpus
    assert seconds < 3
    assert len(text) < 400_000
    run, card, _ = make_corpus(tmp_path / "long", 1_000_000, shards=False)
    line = json.dumps({"reason": "another", "text": "x" * 300}) + "\n"
    with (run.path / "dropped.jsonl").open("a") as file:
        file.writelines(line for _ in range(data_report.LINES * 2))
    card["dropped"]["not in the file"] = 1  # looked for in vain
    (run.path / "data_card.json").write_text(json.dumps(card))
    began = time.process_time()
    data_report.write(run.path)
    assert time.process_time() - began < 6


def test_croissant_gives_the_documents_back(corpus):
    mlcroissant = pytest.importorskip("mlcroissant", reason="needs the package mlcroissant")
    run, card, written, *_ = corpus
    dataset = mlcroissant.Dataset(jsonld=str(run.path / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    assert not dataset.metadata.ctx.issues.warnings
    for split, documents in written.items():
        read = [
            {name.removeprefix(f"{split}/"): value.decode() for name, value in record.items()}
            for record in dataset.records(split)
        ]
        assert [record["text"] for record in read] == [document.text for document in documents]
        assert [json.loads(record.pop("meta")) for record in read] == [dict(d.meta) for d in documents]
        assert read[0] == {name: getattr(documents[0], name) for name in read[0]}
        assert set(read[0]) == set(croissant.COLUMNS) - {"meta"}
    metadata = dataset.metadata
    assert metadata.license == ["CC-BY-SA-4.0", "PSF-2.0", "Apache-2.0"]
    assert "EMAIL: 9000 found in 7000 of the documents kept" in metadata.personal_sensitive_information
    assert metadata.data_collection.startswith("1000000 documents (6100000000 bytes of text) were read")
    assert metadata.data_limitations[0].startswith(
        f"The licence of {card['licenses']['unknown']['documents']} of"
    )
    assert metadata.data_preprocessing_protocol[0].startswith(
        "ExtractHtml: 1000000 documents in, 988000 kept"
    )


def test_croissant_names_every_file_with_its_checksum(corpus):
    import hashlib

    run, *_ = corpus
    metadata = json.loads((run.path / "croissant.json").read_text())
    files = {x["contentUrl"]: x for x in metadata["distribution"] if x["@type"] == "cr:FileObject"}
    on_disk = {path.relative_to(run.path).as_posix(): path for path in run.path.glob("*/*.parquet")}
    assert len(files) > 2
    assert files.keys() == on_disk.keys()
    for name, path in on_disk.items():
        assert files[name]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert files[name]["contentSize"] == f"{path.stat().length} B"


def test_dataset_card_is_read_by_the_hub(corpus):
    hub = pytest.importorskip("huggingface_hub", reason="needs the package huggingface_hub")
    run, *_ = corpus
    card = hub.DatasetCard((run.path / "README.md").read_text())
    assert card.data.language[:2] == ["en", "de"]
    assert "unknown" not in card.data.language
    assert card.data.license == ["apache-2.0", "cc-by-sa-4.0", "other", "unknown"]
    assert card.data.size_categories == ["100K<n<1M"]
    (config,) = card.data.to_dict()["configs"]
    for entry in config["data_files"]:
        assert list(run.path.glob(entry["path"])), entry
    assert "| forum &amp; &lt;b&gt;board&lt;/b&gt; |" in card.text
    assert "| URL\\_CREDENTIALS | 1,000 | 777 |" in card.text


@pytest.mark.parametrize(
    ("documents", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (10**6, "1M<n<10M"),
        (10**12 - 1, "100B<n<1T"),
        (10**12, "n>1T"),
    ],
)
def test_size_categories(documents, category):
    assert dataset_card.head({"documents": documents, "splits": {}})["size_categories"] == [category]


def joined(runs):
    return "".join(text for kind, text in runs if kind != "gap")


@given(
    st.lists(st.sampled_from(["a", "b", " c", "d ", "\n", "。", "日"]), max_size=30).map("".join), st.data()
)
def test_diff_loses_nothing(left, data):
    right = data.draw(st.one_of(st.just(left), st.text("ab c日\n", max_size=30)))
    one, other, different = diff.sides(left, right)
    assert joined(one) == left
    assert joined(other) == right
    assert not {kind for kind, _ in [*one, *other]} - {"same", "only"}
    assert different >= sum(kind == "only" for kind, _ in [*one, *other])
    if left == right:
        assert different == 0


def test_diff_marks_the_words_that_differ():
    words = [f"word{i}" for i in range(100)]
    changed = [*words[:50], "other", *words[51:]]
    one, other, different = diff.sides(" ".join(words), " ".join(changed))
    assert different == 2
    assert [run for run in one if run[0] == "only"] == [("only", "word50")]
    assert [run for run in other if run[0] == "only"] == [("only", "other")]
    assert ("gap", "26 words the same") in one
    assert joined(one).startswith("word0 word1 ")
    assert joined(one).endswith("word98 word99")
    assert diff.sides("甲乙丙", "甲丁丙")[0] == [("same", "甲"), ("only", "乙"), ("same", "丙")]


@pytest.mark.parametrize("alphabet", ["a", "ab", "abcdefgh"])
def test_diff_of_repetitive_texts_takes_no_time(alphabet):
    rng = random.Random(0)
    left, right = (" ".join(rng.choices(alphabet, k=50_000)) for _ in range(2))
    began = time.process_time()
    one, _, _ = diff.sides(left, right)
    assert time.process_time() - began < 1
    assert one[-1][0] == "gap"
    assert "more characters" in one[-1][1]


counts_of = st.lists(st.integers(0, 1000), min_size=1, max_size=60)


@given(counts_of, st.data())
def test_histogram_keeps_proportions(read, data):
    kept = [data.draw(st.integers(0, n)) for n in read]
    low = data.draw(st.floats(-1e3, 1e3))
    edges = edges_of(low, low + data.draw(st.floats(1e-3, 1e6)), len(read), False)
    if data.draw(st.booleans()) and len(read) > 1:
        edges = [0.0, *edges_of(1, 10 ** data.draw(st.integers(1, 9)), len(read) - 1, True)]
    picture = pictures.histogram("x", {"edges": edges, "read": read, "kept": kept}, sum(read), sum(kept))
    if not sum(read):
        assert picture is None
        return
    heights = [100 - float(y) for y in re.findall(r"V([\d.]+)H", picture["read"])]
    filled = [n for n in read if n]
    assert heights[0] > 0
    assert heights[-1] > 0
    assert len(heights) == picture["bins"]
    assert max(heights) == pytest.approx(100)
    assert sum(heights) == pytest.approx(100 * sum(read) / max(filled), abs=0.01 * len(read))
    places = [x for x, _ in picture["ticks"]]
    assert places == sorted(places)
    assert all(0 <= x <= 100 for x in places)
    assert len(places) <= 16


def test_axes_have_round_numbers():
    def labels(edges, first=0):
        n = len(edges) - 1
        ones = [0] * first + [1] * (n - first)
        picture = pictures.histogram("x", {"edges": edges, "read": ones, "kept": ones}, n, n)
        return [label for _, label in picture["ticks"]]

    assert labels(edges_of(0, 1, 40, False)) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert labels(edges_of(0, 20, 40, False)) == ["0", "5", "10", "15", "20"]
    assert labels(edges_of(10, 1e6, 40, True)) == ["10", "100", "1 k", "10 k", "100 k", "1 M"]
    assert labels(edges_of(10, 1e6, 40, True), first=32) == ["100 k", "200 k", "500 k", "1 M"]
    assert labels([-math.inf, 0, 1, 2, math.inf]) == ["-1", "0", "1", "2", "3"]


def test_the_stream_narrows_by_what_is_left_out():
    rows = pictures.stream([{"name": "a", "in": 1000, "kept": 750}, {"name": "b", "in": 750, "kept": 750}])
    assert rows[0]["kept_path"] == "M0 0H645.0V40H0Z"
    assert rows[0]["lost_path"].startswith("M645.0 0H860.0C")
    assert (rows[1]["kept_path"], rows[1]["lost_path"]) == ("M0 0H645.0L645.0 40H0Z", "")
    (tiny,) = pictures.stream([{"name": "a", "in": 10**9, "kept": 10**9 - 1}])
    assert tiny["lost_path"].startswith("M858.0 0H860.0C")  # still to be seen


def test_job_writes_beside_the_corpus(tmp_path):
    run, _, _ = make_corpus(tmp_path / "out", 5_000, shards=False)
    job = data_report.DataReport(str(run.path))
    assert job.inputs() == [str(run.path)]
    figures = job(RunDir(tmp_path / "report"))
    path = run.path / "data_report.html"
    assert figures == {"report": str(path), "bytes": len(path.read_bytes())}
    assert {"croissant.json", "README.md"} <= {entry.name for entry in run.path.iterdir()}


def test_bad_input_is_named(tmp_path):
    with pytest.raises(UserError, match="corpus is empty"):
        data_report.DataReport("")
    with pytest.raises(UserError, match=r"nothing has no data_card.json"):
        data_report.write(tmp_path / "nothing")
    run, _, _ = make_corpus(tmp_path / "out", 5_000, shards=False)
    for name in ("dropped.jsonl", "quarantine.jsonl", "clusters.jsonl"):
        before = (run.path / name).read_bytes()
        (run.path / name).write_bytes(before.splitlines()[0] + b"\n{]\n")
        with pytest.raises(UserError, match=rf"{name}, line 2: not a JSON object"):
            data_report.write(run.path)
        (run.path / name).write_bytes(before)
    (run.path / "data_card.json").write_text("{")
    with pytest.raises(UserError, match=r"data_card.json is not JSON"):
        data_report.write(run.path)
    assert not (run.path / "data_report.html").exists()


def test_report_can_be_made_from_the_command_line(monkeypatch):
    monkeypatch.chdir(helpers.ROOT)
    bindings = ["CORPUS='run'", "RUN_DIR='report'"]
    assert launch.load(["gin/runs/data_report.gin"], bindings).job == data_report.DataReport("run")


if __name__ == "__main__":
    import sys

    make_corpus(sys.argv[1])
    print(data_report.write(sys.argv[1]))
