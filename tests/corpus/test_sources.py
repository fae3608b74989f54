import gzip
import json
import os

import pytest
import zstandard

from t5style.corpus.cleaners import StripGutenberg, strip_gutenberg
from t5style.corpus.document import Document, read_documents
from t5style.corpus.sources import Files, JsonLines, Quarantined, Samples, TextFiles
from t5style.run_dir import UserError


def read(source):
    """(documents, quarantined) of all parts."""
    items = [item for part in source.parts() for item in part.read()]
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, Quarantined)]


def test_text_files_give_one_document_each_with_its_source(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.txt").write_text("second\n")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst \xc3\xa9\r\n")
    (tmp_path / "deep" / "c.txt.gz").write_bytes(gzip.compress(b"third"))
    (tmp_path / ".hidden").write_text("no")
    documents, quarantined = read(TextFiles([str(tmp_path)], source="s", license="CC0-1.0", language="en"))
    assert quarantined == []
    assert [(item.id, item.text) for item in documents] == [
        ("s/a.txt", "first é\r\n"),
        ("s/b.txt", "second\n"),
        ("s/deep/c.txt.gz", "third"),
    ]
    assert {(item.source, item.license, item.language) for item in documents} == {("s", "CC0-1.0", "en")}
    assert documents[0].url == str(tmp_path / "a.txt")


def test_ids_do_not_depend_on_where_the_folder_lies_and_tell_files_apart(tmp_path):
    for place in ("here", "there"):
        (tmp_path / place / "x").mkdir(parents=True)
        (tmp_path / place / "x" / "1.txt").write_text("t")
    first = [part.id for part in TextFiles([f"{tmp_path}/here/**/*.txt"]).parts()]
    second = [part.id for part in TextFiles([f"{tmp_path}/there/**/*.txt"]).parts()]
    assert first == second == ["text/x/1.txt"]
    both = TextFiles([f"{tmp_path}/here", f"{tmp_path}/there", f"{tmp_path}/here/x/1.txt"])
    assert [part.id for part in both.parts()] == ["text/here/x/1.txt", "text/there/x/1.txt"]


@pytest.mark.parametrize(
    ("content", "reason", "position"),
    [
        (b"", "empty file", "byte 0"),
        ("schön und größer und müder ".encode() + b"\xff kaputt", "not utf-8", "byte 31"),
        (b"\x7fELF\x01\x00\x00", "binary file", "byte 5"),
        (b"x" * 101, "too large", "byte 100"),
    ],
)
def test_bad_text_files_are_quarantined_with_their_place(tmp_path, content, reason, position):
    path = tmp_path / "x.txt"
    path.write_bytes(content)
    (tmp_path / "y.txt").write_text("good")
    documents, quarantined = read(TextFiles([str(tmp_path)], max_bytes=100))
    assert [item.text for item in documents] == ["good"]
    assert [(item.file, item.reason, item.position) for item in quarantined] == [
        (str(path), reason, position)
    ]


def test_other_encodings_are_read_when_named(tmp_path):
    (tmp_path / "x.txt").write_bytes("naïve".encode("latin-1"))
    assert read(TextFiles([str(tmp_path)], encoding="latin-1"))[0][0].text == "naïve"
    documents, quarantined = read(TextFiles([str(tmp_path)], encoding="utf-8"))
    assert documents == []
    assert [(item.position, item.reason) for item in quarantined] == [("byte 2", "not utf-8")]
    (tmp_path / "x.txt").write_bytes("naïve".encode("utf-16"))
    assert read(TextFiles([str(tmp_path)], encoding="utf-16"))[0][0].text == "naïve"


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_broken_compression_is_quarantined(tmp_path, suffix):
    line = json.dumps({"text": "words " * 50}).encode() + b"\n"
    compress = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    whole = compress(b"".join(line.replace(b"words", b"w%d" % index) for index in range(20_000)))
    (tmp_path / f"cut.jsonl.{suffix}").write_bytes(whole[: len(whole) // 2])
    (tmp_path / f"none.jsonl.{suffix}").write_bytes(b"this is not compressed at all")
    documents, quarantined = read(JsonLines([str(tmp_path)]))
    assert 1000 < len(documents) < 20_000  # what could be read before the cut is kept
    assert [item.reason for item in quarantined] == ["broken compression"] * 2
    assert quarantined[0].position == f"after line {len(documents)}"
    (tmp_path / f"cut.txt.{suffix}").write_bytes(whole[: len(whole) // 2])
    documents, quarantined = read(TextFiles([f"{tmp_path}/cut.txt.*"]))
    assert documents == []
    assert [item.reason for item in quarantined] == ["broken compression"]


def test_json_lines_take_known_fields_and_keep_the_rest(tmp_path):
    records = [
        {"body": "one", "key": 7, "language": "de", "url": "u", "score": 0.5, "meta": {"m": 1}},
        {"body": "two", "language": 3},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
    source = JsonLines(
        [str(tmp_path)], text_field="body", id_field="key", source="s", language="en", license="L"
    )
    documents, quarantined = read(source)
    assert quarantined == []
    file = str(tmp_path / "x.jsonl")
    second = len(json.dumps(records[0])) + 1
    meta = {"file": file, "position": "line 1", "m": 1, "score": 0.5}
    assert documents == [
        Document("one", "7", "s", "u", "L", "de", meta),
        Document("two", f"s/x.jsonl:byte{second}", "s", "", "L", "en", {"file": file, "language": 3}),
    ]


def test_bad_json_lines_are_quarantined_with_their_line(tmp_path):
    lines = [
        b'{"text": "good"}',
        b'{"text": "cut off',
        b'["no object"]',
        b'{"content": "no text"}',
        b'{"text": 5}',
        b'{"text": "\xff"}',
        b"\x00\x01\x02",
        b"[" * 100_000,
        b'{"text": "' + b"x" * 500_000 + b'"}',
        b'{"text": "half \\ud800 pair"}',
        b'{"text": "last"}',
    ]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    documents, quarantined = read(JsonLines([str(tmp_path)], max_bytes=400_000))
    assert [item.text for item in documents] == ["good", "half \ufffd pair", "last"]
    assert [(item.position, item.reason) for item in quarantined] == [
        ("line 2", "malformed JSON"),
        ("line 3", "not a JSON object"),
        ("line 4", "no text"),
        ("line 5", "no text"),
        ("line 6", "not utf-8"),
        ("line 7", "malformed JSON"),
        ("line 8", "malformed JSON"),
        ("line 9", "too large"),
    ]
    assert "the field 'text' is missing" in quarantined[2].detail
    assert "is a int" in quarantined[3].detail


def test_half_a_surrogate_pair_anywhere_in_json_reads_as_the_replacement_character(tmp_path):
    record = {name: f"{name} \ud800" for name in ("text", "id", "url", "source", "language", "key")}
    record |= {"meta": {"list \udfff": ["\ud83d\ude00", "\udc00"]}, "pair": "\U0001f600"}
    (tmp_path / "x.jsonl").write_text(json.dumps(record))
    ((document,), quarantined) = read(JsonLines([str(tmp_path)]))
    assert quarantined == []
    assert document == Document(
        "text \ufffd",
        "id \ufffd",
        "source \ufffd",
        "url \ufffd",
        language="language \ufffd",
        meta={"file": str(tmp_path / "x.jsonl"), "position": "line 1"}
        | {"list \ufffd": ["\U0001f600", "\ufffd"], "key": "key \ufffd", "pair": "\U0001f600"},
    )


def test_files_choose_the_reader_by_name(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "from json"}\n')
    (tmp_path / "b.md").write_text("# from text")
    (tmp_path / "c.png").write_bytes(b"\x89PNG")
    documents, quarantined = read(Files([str(tmp_path)]))
    assert [item.text for item in documents] == ["from json", "# from text"]
    assert [item.reason for item in quarantined] == ["no reader for .png files"]


def test_a_file_that_cannot_be_opened_is_quarantined(tmp_path):
    (tmp_path / "x.txt").write_text("there")
    parts = TextFiles([str(tmp_path)]).parts()
    (tmp_path / "x.txt").unlink()  # it goes away between the listing and the reading
    (item,) = parts[0].read()
    assert isinstance(item, Quarantined)
    assert item.reason == "unreadable file"


def test_links_to_nothing_are_quarantined_and_pipes_are_no_files(tmp_path):
    (tmp_path / "a.txt").write_text("there")
    (tmp_path / "b.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "c.txt")
    documents, quarantined = read(Files([str(tmp_path)]))
    assert [item.text for item in documents] == ["there"]
    assert [(item.file, item.reason) for item in quarantined] == [(f"{tmp_path}/b.txt", "unreadable file")]


def test_a_reader_that_fails_on_a_file_does_not_end_the_run(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("there")

    def failing(*_):
        raise RuntimeError("out of order \ud800")

    monkeypatch.setattr("t5style.corpus.charset.decode", failing)
    documents, (item,) = read(Files([str(tmp_path)]))
    assert documents == []
    assert (item.reason, item.detail) == ("Files cannot read it", "RuntimeError: out of order \ufffd")


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no file or folder '.*nowhere"):
        TextFiles([f"{tmp_path}/nowhere.txt"]).parts()
    with pytest.raises(UserError, match=r"no file or folder '.*\*\.txt"):
        TextFiles([f"{tmp_path}/*.txt"]).parts()
    with pytest.raises(UserError, match="holds no files"):
        TextFiles([str(tmp_path)]).parts()
    with pytest.raises(UserError, match="must be a list"):
        TextFiles("x.txt")
    with pytest.raises(UserError, match=r"paths is empty"):
        JsonLines([])
    with pytest.raises(UserError, match="'runes' is no encoding"):
        TextFiles(["x"], encoding="runes")
    with pytest.raises(UserError, match="no sample 'koran'; there are bible-kjv"):
        Samples(["koran"])


def test_gutenberg_header_and_licence_go():
    book = "Chapter 1\n\nIt was a day.\n"
    for word in ("THE", "THIS"):
        text = (
            f"Project Gutenberg\n\n*** START OF {word} PROJECT GUTENBERG EBOOK X\nOF Y ***\n\n{book}"
            f"\n\n*** END OF {word} PROJECT GUTENBERG EBOOK X ***\nLicence"
        )
        assert strip_gutenberg(text) == book
        assert strip_gutenberg(text.replace("\n", "\r\n")).replace("\r\n", "\n") == book
    assert strip_gutenberg(book) == book


def test_the_gutenberg_stage_leaves_other_texts_alone():
    document = Document("*** START OF THE PROJECT GUTENBERG EBOOK X ***\nbook\n", "i", "s", meta={"n": 1})
    assert StripGutenberg()(document) == Document("book\n", "i", "s", meta={"n": 1})
    other = Document("a book\n", "i")
    assert StripGutenberg()(other) is other


def test_samples_are_whole_and_named():
    documents, quarantined = read(Samples())
    assert quarantined == []
    assert {item.source for item in documents} == {"bible-kjv", "python-doc", "apache-doc", "wordnet"}
    assert len({item.id for item in documents}) == len(documents) > 37_000
    assert all(item.license and item.language and item.text.strip() for item in documents)
    assert {item.language for item in documents} >= {"en", "de", "fr", "es", "ja", "ko", "tr"}
    by_id = {item.id: item for item in documents}
    assert {item.meta["file"] for item in documents} == {
        f"t5style/samples/{name}.jsonl.zst" for name in Samples().names
    }
    assert by_id["bible-kjv/Ge1"].text.startswith("In the beginning God created the heaven and the earth.\n")
    assert len([item for item in documents if item.source == "bible-kjv"]) == 1189
    dog = by_id["wordnet/n02084071"]
    assert dog.meta["term"] == "dog"
    assert dog.meta["lexname"] == "noun.animal"
    assert dog.meta["hypernym"] == "canine"
    assert dog.text.startswith("a member of the genus Canis")


def test_samples_are_small_and_their_licences_lie_beside_them():
    import importlib.resources

    folder = importlib.resources.files("t5style.samples")
    assert sum(len((folder / f"{name}.jsonl.zst").read_bytes()) for name in Samples().names) < 4_000_000
    provenance = (folder / "PROVENANCE.md").read_text()
    for name in Samples().names:
        assert f"`{name}.jsonl.zst`" in provenance
    for item in (folder / "licenses").iterdir():
        assert f"licenses/{item.name}" in provenance
        assert len(item.read_text()) > 500
    for name in Samples().names:
        documents = list(read_documents(str(folder / f"{name}.jsonl.zst")))
        characters = sum(len(item.text) for item in documents)
        assert f"| `{name}.jsonl.zst` | {len(documents):,} | {characters:,} |" in provenance
