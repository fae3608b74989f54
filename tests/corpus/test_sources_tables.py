import datetime
import gzip
import io
import json
import subprocess
import sys

import hypothesis
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from t5style.corpus import parts, records, table_sources
from t5style.corpus.document import Document, write_documents
from t5style.corpus.sources import CsvFiles, Files, JsonLines, ParquetFiles, Quarantined
from t5style.run_dir import UserError


def read(source):
    """(documents, quarantined) of all parts."""
    items = [item for part in source.parts() for item in part.read()]
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, Quarantined)]


def small_pieces(monkeypatch, size):
    for module in (parts, table_sources):
        monkeypatch.setattr(module, "PIECE_BYTES", size)
    monkeypatch.setattr(parts, "CUT_BYTES", 1)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    lines=st.lists(
        st.one_of(
            st.text(max_size=30).map(lambda text: json.dumps({"text": text})),
            st.sampled_from(["", "  ", "{broken", "[1]", '{"text": 1}']),
        ),
        max_size=20,
    ),
    size=st.integers(1, 100),
    last=st.sampled_from(["", "\n"]),
)
def test_pieces_of_a_file_hold_what_the_file_holds(tmp_path_factory, lines, size, last):
    path = tmp_path_factory.mktemp("x") / "x.jsonl"
    path.write_text("\n".join(lines) + last)
    with pytest.MonkeyPatch.context() as patch:
        whole = read(JsonLines([str(path)]))
        small_pieces(patch, size)
        pieces = JsonLines([str(path)]).parts()
        cut = read(JsonLines([str(path)]))
    assert cut[0] == whole[0]
    assert [item.reason for item in cut[1]] == [item.reason for item in whole[1]]
    if path.stat().st_size:
        assert sum(part.size for part in pieces) == path.stat().st_size
        assert len({part.start for part in pieces}) == len(pieces)


def test_ids_of_lines_do_not_depend_on_pieces_or_compression(tmp_path, monkeypatch):
    data = b"".join(json.dumps({"text": f"t{n}", "n": n}).encode() + b"\n" for n in range(1000))
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jsonl").write_bytes(data)
    whole, _ = read(Files([f"{tmp_path}/a"]))
    small_pieces(monkeypatch, 500)
    pieces = Files([f"{tmp_path}/a"]).parts()
    assert len(pieces) > 20
    assert {part.id for part in pieces} == {"files/x.jsonl"}
    cut, _ = read(Files([f"{tmp_path}/a"]))
    assert cut == whole
    for item in whole:
        start = int(item.id.rpartition(":byte")[2])
        assert json.loads(data[start:].splitlines()[0])["n"] == item.meta["n"]
    (tmp_path / "a/x.jsonl.gz").write_bytes(gzip.compress(data))
    packed, _ = read(Files([f"{tmp_path}/a/x.jsonl.gz"]))
    numbers = [item.id.rpartition(":")[2] for item in whole]
    assert [item.id.rpartition(":")[2] for item in packed] == numbers


def test_positions_in_a_file_that_was_cut_are_bytes(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "id": "A"}\n{bad}\n{"text": "b", "id": "B"}\n')
    documents, (item,) = read(JsonLines([str(tmp_path)]))
    assert item.position == "line 2"
    assert [item.meta["position"] for item in documents] == ["line 1", "line 3"]
    small_pieces(monkeypatch, 10)
    documents, (item,) = read(JsonLines([str(tmp_path)]))
    assert item.position == "line at byte 25"
    assert [item.meta["position"] for item in documents] == ["line at byte 0", "line at byte 31"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.zst", "x.txt", "x.txt.zst", "x.csv", "x.html"])
def test_a_line_of_a_gigabyte_or_so_is_quarantined_in_bounded_memory(tmp_path, name):
    script = (
        "import resource, sys, zstandard\n"
        "from t5style.corpus.sources import *\n"
        "path, kind = sys.argv[1:]\n"
        "with open(path, 'wb') as raw:\n"
        "    if path.endswith('.zst'):\n"
        "        raw = zstandard.ZstdCompressor().stream_writer(raw)\n"
        "    head = {'JsonLines': b'{\"text\": \"', 'CsvFiles': b'text\\n\"'}.get(kind, b'')\n"
        "    raw.write(head)\n"
        "    [raw.write(b'x' * 4_000_000) for _ in range(250 if path.endswith('.zst') else 50)]\n"
        '    raw.write(b\'"}\\n{"text": "after"}\\n\')\n'
        "    raw.flush()\n"
        "    if path.endswith('.zst'): raw.close()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "items = [item for part in eval(kind)([path], max_bytes=8 << 20).parts() for item in part.read()]\n"
        "for item in items: print(getattr(item, 'reason', None), getattr(item, 'text', None))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    kind = {"jsonl": "JsonLines", "txt": "TextFiles", "csv": "CsvFiles", "html": "HtmlFiles"}[
        name.split(".")[1]
    ]
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / name), kind], check=True, capture_output=True, text=True
    )
    *items, grown = result.stdout.splitlines()
    assert int(grown) < 200  # MB
    assert items[0] == "too large None"
    if kind == "JsonLines":
        assert items[1:] == ["None after"]
    (tmp_path / name).unlink()


def test_utf16_json_lines_are_quarantined_once(tmp_path):
    (tmp_path / "x.jsonl").write_bytes('{"text": "a"}\n{"text": "b"}\n'.encode("utf-16"))
    documents, quarantined = read(JsonLines([str(tmp_path)]))
    assert documents == []
    assert [(item.reason, item.position) for item in quarantined] == [("not utf-8", "byte 0")]
    (tmp_path / "x.jsonl").write_bytes('{"text": "a"}\n'.encode("utf-8-sig"))
    assert read(JsonLines([str(tmp_path)]))[0][0].text == "a"


@pytest.mark.parametrize(
    ("value", "time"),
    [
        ("2020-01-02", "2020-01-02"),
        ("2020-01-02T03:04:05Z", "2020-01-02T03:04:05Z"),
        ("Thu, 02 Jan 2020 03:04:05 GMT", "2020-01-02T03:04:05+00:00"),
        (1577934245, "2020-01-02T03:04:05+00:00"),
        (1577934245000, "2020-01-02T03:04:05+00:00"),
        ("1577934245", "2020-01-02T03:04:05+00:00"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
        (2020, ""),
        ("yesterday", ""),
        (float("nan"), ""),
        (True, ""),
        (None, ""),
        ([], ""),
    ],
)
def test_times(value, time):
    assert records.iso_time(value) == time


def test_a_time_is_taken_and_what_is_none_stays_in_meta(tmp_path):
    rows = [
        {"text": "a", "date": "2020-01-02"},
        {"text": "b", "date": "soon", "published": 1577934245},
        {"text": "c", "timestamp": "never"},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    documents, _ = read(JsonLines([str(tmp_path)]))
    assert [item.time for item in documents] == ["2020-01-02", "2020-01-02T03:04:05+00:00", ""]
    file = str(tmp_path / "x.jsonl")
    assert [item.meta for item in documents] == [
        {"file": file},
        {"file": file, "date": "soon"},
        {"file": file, "timestamp": "never"},
    ]


def table(path, rows=10, **columns):
    columns = {"text": [f"text {n}" for n in range(rows)]} | columns
    pyarrow.parquet.write_table(pa.table(columns), path, row_group_size=3)


def test_parquet_rows_become_documents(tmp_path):
    stamps = pa.array([1577934245] * 10, pa.timestamp("s"))
    table(
        tmp_path / "x.parquet",
        score=[float("nan"), *[0.5] * 9],
        timestamp=stamps,
        picture=[b"\xff"] * 10,
        lang=[None, *["x"] * 9],
        tags=[["a", None]] * 10,
    )
    documents, quarantined = read(ParquetFiles([str(tmp_path)], license="CC0-1.0"))
    assert quarantined == []
    assert [item.id for item in documents] == [f"parquet/x.parquet:row{n}" for n in range(10)]
    assert documents[0].time == "2020-01-02T03:04:05"
    file = str(tmp_path / "x.parquet")
    assert documents[1] == Document(
        "text 1",
        "parquet/x.parquet:row1",
        "parquet",
        license="CC0-1.0",
        meta={"file": file, "score": 0.5, "lang": "x", "tags": ["a", None]},
        time="2020-01-02T03:04:05",
    )
    json.dumps(documents[0].meta, allow_nan=False)


def test_a_prepared_corpus_can_be_a_source_again(tmp_path):
    before = Document(
        "t", "i", "s", "u", "L", "de", {"file": "old", "position": "line 3", "n": 1}, "2020-01-01"
    )
    for name in ("x.parquet", "y.jsonl.zst"):
        write_documents(tmp_path / name, [before])
    for item in read(Files([str(tmp_path)]))[0]:
        assert item == before


def test_compressed_parquet_is_held_whole_up_to_a_limit(tmp_path, monkeypatch):
    table(tmp_path / "x.parquet")
    (tmp_path / "x.parquet.gz").write_bytes(gzip.compress((tmp_path / "x.parquet").read_bytes()))
    assert len(read(Files([f"{tmp_path}/*.gz"]))[0]) == 10
    monkeypatch.setattr(table_sources, "_UNPACKED", 100)
    documents, (item,) = read(Files([f"{tmp_path}/*.gz"]))
    assert (documents, item.reason) == ([], "too large")


def test_large_parquet_files_are_read_in_row_groups(tmp_path, monkeypatch):
    table(tmp_path / "x.parquet", 100)
    whole, _ = read(Files([str(tmp_path)]))
    small_pieces(monkeypatch, 150)
    pieces = Files([str(tmp_path)]).parts()
    assert len(pieces) > 10
    assert read(Files([str(tmp_path)]))[0] == whole
    assert len(whole) == 100


def test_bad_parquet_is_quarantined(tmp_path):
    table(tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes(whole[: len(whole) // 2])  # no footer
    (tmp_path / "c.parquet").write_bytes(whole[:8] + b"\xff" * 60 + whole[68:])  # damaged pages
    table(tmp_path / "d.parquet", body=["x"] * 10)
    bad = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"\xff\xfek")]
    )
    table(tmp_path / "e.parquet", 2, text=bad)
    table(tmp_path / "f.parquet", 2, text=["x" * 2000, None])
    documents, quarantined = read(ParquetFiles([str(tmp_path)], max_bytes=1000))
    by_file = {item.file[-9]: item for item in quarantined}
    assert by_file["b"].reason == by_file["c"].reason == "damaged Parquet"
    assert by_file["c"].position == "after row -1" or by_file["c"].position.startswith("after row")
    assert by_file["e"].position == "row 0"
    assert by_file["e"].reason == "not utf-8"
    assert [(i.position, i.reason) for i in quarantined if i.file[-9] == "f"] == [
        ("row 0", "too large"),
        ("row 1", "no text"),
    ]
    assert len(documents) >= 21
    _, (item, *_) = read(ParquetFiles([f"{tmp_path}/d.parquet"], text_field="content"))
    assert item.reason == "no text column"
    assert item.detail == "'content' is none of text, body"


CSV = 'id,text,date\n1,"hello, ""you""\nthere",2020-01-02\n2,plain,\n'


def test_csv_and_tsv_rows_become_documents(tmp_path):
    (tmp_path / "x.csv").write_text(CSV)
    (tmp_path / "y.tsv").write_text("body\ttext\nb\thello\tx\n\nb\tfine\n")
    documents, quarantined = read(Files([str(tmp_path)]))
    assert [(item.id, item.text, item.time) for item in documents] == [
        ("1", 'hello, "you"\nthere', "2020-01-02"),
        ("2", "plain", ""),
        ("files/y.tsv:line4", "fine", ""),
    ]
    assert documents[1].meta == {"file": str(tmp_path / "x.csv"), "position": "line 4"}
    assert [(item.position, item.reason) for item in quarantined] == [("line 2", "wrong number of fields")]
    documents, _ = read(CsvFiles([f"{tmp_path}/y.tsv"], columns=["body", "text"]))
    assert [item.text for item in documents] == ["text", "fine"]


def test_encodings_of_csv(tmp_path):
    text = "id,text\n" + "".join(f"{n},größer naïve Übung\n" for n in range(30))
    for name in ("utf-8-sig", "utf-16", "cp1252"):
        (tmp_path / "x.csv").write_bytes(text.encode(name))
        documents, quarantined = read(CsvFiles([str(tmp_path)]))
        assert quarantined == []
        assert {item.text for item in documents} == {"größer naïve Übung"}
    assert documents[0].meta["encoding"] == "cp1252"


def test_bad_rows_cost_only_themselves(tmp_path):
    rows = [
        b"id,text",
        b"1,one",
        b'2,"open',
        b"3,three",
        b'4,"four" more',
        b"5,z\0ero",
        b"6,\xff",
        b"7," + b"x" * 5000,
        b"8,eight",
    ]
    (tmp_path / "x.csv").write_bytes(b"\n".join(rows) + b"\n")
    documents, quarantined = read(CsvFiles([str(tmp_path)], max_bytes=1000, encoding="utf-8"))
    assert [item.reason for item in quarantined] == ["binary file"]
    rows[5] = b"5,five"
    (tmp_path / "x.csv").write_bytes(b"\n".join(rows) + b"\n")
    documents, quarantined = read(CsvFiles([str(tmp_path)], max_bytes=1000, encoding="utf-8"))
    assert [item.text for item in documents] == ["one", "three", "five", "eight"]
    assert [(item.position, item.reason) for item in quarantined] == [
        ("line 3", "broken quoting"),
        ("line 5", "broken quoting"),
        ("line 7", "not utf-8"),
        ("line 8", "too large"),
    ]


def test_a_stray_quote_costs_linear_time(tmp_path):
    calls = 0
    lines = ["text\n", '"open\n', *["row\n"] * 20_000]

    class Lines(io.StringIO):
        def readline(self, limit=-1):
            nonlocal calls
            calls += 1
            return super().readline(limit)

    found = list(CsvFiles(["-"], max_bytes=50_000)._rows(Lines("".join(lines)), "x.csv"))
    assert len([item for _, item in found if isinstance(item, dict)]) == 20_000
    assert [item.reason for _, item in found if isinstance(item, Quarantined)] == ["too large"]
    assert calls <= 20_003


def test_csv_without_a_text_column_and_other_kinds_are_named(tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n1,2\n3,4\n")
    documents, quarantined = read(CsvFiles([str(tmp_path)]))
    assert documents == []
    assert [(item.reason, item.detail) for item in quarantined] == [
        ("no text column", "'text' is none of a, b")
    ]
    (tmp_path / "x.csv").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    _, quarantined = read(CsvFiles([str(tmp_path)]))
    assert [item.reason for item in quarantined] == ["binary file"]
    (tmp_path / "x.csv.gz").write_bytes(gzip.compress(CSV.encode() * 1000)[:-20])
    _, quarantined = read(CsvFiles([f"{tmp_path}/*.gz"]))
    assert quarantined[-1].reason == "broken compression"


def test_json_files_are_json_lines_or_quarantined(tmp_path):
    (tmp_path / "a.json").write_text('{"text": "c4"}\n{"text": "style"}\n')
    (tmp_path / "b.json").write_text(json.dumps([{"text": "x"}], indent=1))
    documents, quarantined = read(Files([str(tmp_path)]))
    assert [item.text for item in documents] == ["c4", "style"]
    assert [(item.file[-6:], item.reason) for item in quarantined] == [("b.json", "not JSON lines")]


def test_wrong_settings_are_refused():
    with pytest.raises(UserError, match="text_field is empty"):
        ParquetFiles(["x"], text_field="")
    with pytest.raises(UserError, match="max_bytes must be 1 or more, not 0"):
        JsonLines(["x"], max_bytes=0)
    with pytest.raises(UserError, match="delimiter must be one character, not '::'"):
        CsvFiles(["x"], delimiter="::")
    with pytest.raises(UserError, match="'text' is none of columns a, b"):
        CsvFiles(["x"], columns=["a", "b"])
    with pytest.raises(UserError, match="'runes' is no encoding"):
        CsvFiles(["x"], encoding="runes")


def test_memory_for_a_large_parquet_file_is_bounded(tmp_path):
    path = tmp_path / "x.parquet"
    schema = pa.schema([("text", pa.string())])
    with pyarrow.parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        for _ in range(2):
            rows = ["word " * 2000] * 8_000  # 80 MB in one row group
            writer.write_table(pa.table({"text": rows}, schema), row_group_size=8_000)
    script = (
        "import resource, sys, pyarrow\n"
        "import pyarrow.parquet\n"
        "from t5style.corpus.sources import ParquetFiles\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(sum(1 for part in ParquetFiles([sys.argv[1]]).parts() for item in part.read()))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], check=True, capture_output=True, text=True
    )
    count, grown = map(int, result.stdout.split())
    assert count == 16_000
    assert grown < 70  # MB, of 160
