"""The page of a corpus: what it tells of a folder made up here, and that nothing breaks out of it."""

import json
import time

import pytest

from t5style import launch
from t5style.report import data_report
from t5style.run_dir import RunDir, UserError
from tests import helpers
from tests.report.made_corpus import Page, make_corpus, write_lines


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
        "133,000 duplicates removed",
        "22 languages; en is 41.7 % of the text",
        "8 more",
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
    # Groups that differ come first; copies of one text are compared once.
    assert "kept: doc-1 left out: copy-1-0 · the same" in page.shown
    assert "kept: doc-1 left out: copy-1-1 · 2 words differ" in page.shown
    assert "copy-1-2" not in page.shown
    assert "doc-0" not in page.shown


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
    unknown = {"unknown": count}
    (run.path / "data_card.json").write_text(json.dumps(card | {"languages": unknown, "licenses": unknown}))
    page = Page.of(data_report.write(run.path).read_text())
    assert "No language is known" in page.shown
    assert "The licence of the text is not known." in page.shown


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
