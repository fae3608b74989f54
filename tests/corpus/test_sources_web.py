import gzip
import json
import pathlib
import subprocess
import sys

import pytest
import zstandard

from t5style.corpus.document import Document
from t5style.corpus.sources import Files, HtmlFiles, PdfFiles, Quarantined, TextFiles, WarcFiles
from t5style.run_dir import UserError

EXTRACT = pathlib.Path(__file__).parents[2].parent / "shared/data/extract/html"


def read(source):
    """(documents, quarantined) of all parts."""
    items = [item for part in source.parts() for item in part.read()]
    documents = [item for item in items if isinstance(item, Document)]
    return documents, [item for item in items if isinstance(item, Quarantined)]


def record(number, body, kind="response", http="Content-Type: text/html", status="200 OK", more=""):
    """A WARC record."""
    if http is not None and kind in ("response", "request"):
        body = f"HTTP/1.1 {status}\r\n{http}\r\n\r\n".encode() + body
        more += f"Content-Type: application/http; msgtype={kind}\r\n"
    return (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Record-ID: <urn:uuid:{number:032d}>\r\n"
        f"WARC-Target-URI: http://x.example/{number}\r\nWARC-Date: 2020-01-02T03:04:0{number % 10}Z\r\n"
        f"{more}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + (body + b"\r\n\r\n")


PAGES = [
    record(0, b"software: x\r\n", "warcinfo", more="Content-Type: application/warc-fields\r\n"),
    record(1, "<p>größer".encode("cp1252"), http="Content-Type: text/html; charset=iso-8859-1"),
    record(2, '<meta charset="shift_jis"><p>吾輩は猫である'.encode("cp932")),
    record(3, b"GET", "request"),
    record(4, b"plain \xc3\xa9", http="Content-Type: text/plain"),
    record(5, b"\x89PNG\0", http="Content-Type: image/png"),
    record(6, b"gone", status="404 Not Found"),
    record(7, gzip.compress(b"<p>packed"), http="Content-Type: text/html\r\nContent-Encoding: gzip"),
    record(
        8,
        b"5\r\n<p>ch\r\n4\r\nunky\r\n0\r\n\r\n",
        http="Content-Type: text/html\r\nTransfer-Encoding: chunked",
    ),
    record(9, "the text of a page: été".encode(), "conversion", more="Content-Type: text/plain\r\n"),
    record(10, b"<p>already unpacked", http="Content-Type: text/html\r\nContent-Encoding: gzip"),
]
TEXTS = {
    1: "<p>größer",
    2: '<meta charset="shift_jis"><p>吾輩は猫である',
    4: "plain é",
    7: "<p>packed",
    8: "<p>chunky",
    9: "the text of a page: été",
    10: "<p>already unpacked",
}


def pack(records, suffix):
    """The records of a file, compressed each on its own."""
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    return [compress(item) for item in records]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_warc_pages_become_documents(tmp_path, suffix):
    members = pack(PAGES, suffix)
    (tmp_path / f"x.warc{suffix}").write_bytes(b"".join(members))
    documents, quarantined = read(Files([str(tmp_path)]))
    assert quarantined == []
    assert {int(item.id.removeprefix("urn:uuid:")): item.text for item in documents} == TEXTS
    first = documents[0]
    assert first.url == "http://x.example/1"
    assert first.time == "2020-01-02T03:04:01+00:00"
    assert first.meta == {
        "file": str(tmp_path / f"x.warc{suffix}"),
        "position": f"record at byte {len(members[0])}" if suffix != ".zst" else first.meta["position"],
        "format": "html",
        "encoding": "cp1252",
    }
    assert [item.meta["format"] for item in documents].count("page") == 2


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_warc_that_is_cut_anywhere_is_never_silently_short(tmp_path, suffix):
    members = pack(PAGES[:3], suffix)
    whole = b"".join(members)
    first, second = len(members[0]), len(members[0]) + len(members[1])
    end = 12  # bytes that may be missing without loss: line ends, or the compression's checksum
    for cut in range(first + 1, len(whole), 1 if suffix else 3):
        (tmp_path / f"x.warc{suffix}").write_bytes(whole[:cut])
        documents, quarantined = read(WarcFiles([str(tmp_path)]))
        assert [item.text for item in documents] == [TEXTS[1], TEXTS[2]][: len(documents)]
        assert len(documents) >= (cut >= second) + (cut >= len(whole))
        if cut != second and len(documents) < 1 + (cut > second):
            assert 1 <= len(quarantined) <= 2, cut
            assert "byte" in quarantined[0].position
        elif cut < len(whole) - end and cut not in range(second - end, second + 1):
            assert quarantined, cut


def test_damaged_warcs_are_quarantined(tmp_path):
    (tmp_path / "a.warc").write_bytes(b"this is no archive at all\n" * 50)
    (tmp_path / "b.warc").write_bytes(PAGES[1] + b"JUNK\r\nmore junk\r\n\r\n" + PAGES[2])
    packed = bytearray(b"".join(pack(PAGES, ".gz")))
    packed[len(packed) // 2] ^= 0xFF
    (tmp_path / "c.warc.gz").write_bytes(packed)
    broken = gzip.compress(b"<p>packed" * 500)[:-9]
    broken = broken[:20] + b"\xff" * 20
    (tmp_path / "d.warc").write_bytes(
        record(1, broken, http="Content-Type: text/html\r\nContent-Encoding: gzip")
        + record(2, b"\0\1\2\xff" * 10)
        + record(3, b"<p>" + b"x" * 2000)
        + record(
            4, gzip.compress(b"<p>" + b"x" * 5000), http="Content-Type: text/html\r\nContent-Encoding: gzip"
        )
        + record(5, b"")
        + record(6, b"<p>good")
    )
    documents, quarantined = read(WarcFiles([str(tmp_path)], max_bytes=1000))
    by_file = {name: [item.reason for item in quarantined if f"/{name}.warc" in item.file] for name in "abcd"}
    assert by_file["a"] == by_file["b"] == ["damaged WARC"]
    assert len(by_file["c"]) == 1
    assert by_file["d"][1:] == ["binary file", "too large", "too large", "empty record"]
    assert by_file["d"][0] in ("broken HTTP encoding", "binary file")
    assert [item.text for item in documents if item.meta["file"].endswith("d.warc")] == ["<p>good"]
    assert [item.text for item in documents if item.meta["file"].endswith("b.warc")] == [TEXTS[1]]
    assert all(item.position for item in quarantined)


def test_a_record_of_half_a_gigabyte_is_passed_in_bounded_memory(tmp_path):
    script = (
        "import resource, sys\n"
        "from t5style.corpus.sources import WarcFiles\n"
        "small = open(sys.argv[2], 'rb').read()\n"
        "with open(sys.argv[1], 'wb') as file:\n"
        "    head = b'HTTP/1.1 200 OK\\r\\nContent-Type: text/html\\r\\n\\r\\n'\n"
        "    file.write(b'WARC/1.0\\r\\nWARC-Type: response\\r\\nContent-Type: application/http\\r\\n')\n"
        "    file.write(b'Content-Length: %d\\r\\n\\r\\n' % (500_000_000 + len(head)) + head)\n"
        "    [file.write(b'x' * 5_000_000) for _ in range(100)]\n"
        "    file.write(b'\\r\\n\\r\\n' + small)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for part in WarcFiles([sys.argv[1]]).parts():\n"
        "    for item in part.read(): print(getattr(item, 'reason', None) or item.text)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)\n"
    )
    (tmp_path / "small").write_bytes(record(1, b"<p>after"))
    path = tmp_path / "big.warc"
    result = subprocess.run(
        [sys.executable, "-c", script, str(path), str(tmp_path / "small")],
        check=True,
        capture_output=True,
        text=True,
    )
    path.unlink()
    *items, grown = result.stdout.splitlines()
    assert items == ["too large", "<p>after"]
    assert int(grown) < 60  # MB


def test_html_keeps_its_markup_and_finds_its_encoding(tmp_path):
    pages = {
        "utf8": "<p>größer".encode(),
        "meta": '<meta charset="windows-1251"><p>Привет'.encode("cp1251"),
        "http-equiv": (
            '<meta http-equiv="Content-Type" content="text/html; charset=iso-8859-2"><p>Příliš'
        ).encode("iso8859_2"),
        "wrong": '<meta charset="iso-8859-1"><p>größer'.encode(),
        "wrong2": '<meta charset="utf-8"><p>größer und schöner, süß und müde'.encode("cp1252"),
        "mark": "<p>größer".encode("utf-16"),
        "damaged": "<p>größer und schöner ".encode() + b"\xc3",
        "unknown": '<meta charset="no-such-thing"><p>größer'.encode(),
        "escaped": '<meta charset="iso-2022-jp"><p>猫'.encode("iso2022_jp"),
    }
    for name, data in pages.items():
        (tmp_path / f"{name}.html").write_bytes(data)
    (tmp_path / "packed.htm.gz").write_bytes(gzip.compress(b"<p>packed"))
    (tmp_path / "binary.html").write_bytes(b"\x89PNG\0\0\0\0\xff\xff")
    documents, quarantined = read(Files([str(tmp_path)], license="CC0-1.0"))
    assert [(item.file[-11:], item.reason) for item in quarantined] == [("binary.html", "binary file")]
    found = {pathlib.Path(item.url).name.split(".")[0]: item for item in documents}
    assert all(item.meta["format"] == "html" and item.license == "CC0-1.0" for item in documents)
    assert found["utf8"].text == "<p>größer"
    assert found["utf8"].meta == {"file": str(tmp_path / "utf8.html"), "format": "html"}
    assert found["meta"].text.endswith("Привет")
    assert found["http-equiv"].text.endswith("Příliš")
    assert found["wrong"].text.endswith("größer")
    assert found["wrong2"].text.endswith("größer und schöner, süß und müde")
    assert found["mark"].text == "<p>größer"
    assert found["damaged"].text == "<p>größer und schöner \ufffd"
    assert found["damaged"].meta["replaced"] == 1
    assert found["unknown"].text.endswith("größer")
    assert found["escaped"].text.endswith("猫")
    assert found["packed"].text == "<p>packed"


@pytest.mark.skipif(not EXTRACT.exists(), reason="../shared/data is not there")
def test_real_pages_are_all_read():
    documents, quarantined = read(HtmlFiles([str(EXTRACT)]))
    assert quarantined == []
    assert len(documents) == len(list(EXTRACT.iterdir()))
    assert sum(item.meta.get("replaced", 0) for item in documents) == 0


def test_markdown_and_code_say_what_they_are(tmp_path):
    names = {
        "a.md": {"format": "markdown"},
        "b.py": {"format": "code", "programming_language": "Python"},
        "c.CPP.gz": {"format": "code", "programming_language": "C++"},
        "Makefile": {"format": "code", "programming_language": "Makefile"},
        "CMakeLists.txt": {"format": "code", "programming_language": "CMake"},
        "d.txt": {},
        "e": {},
        ".git": None,
        "x.exe": None,
    }
    for name in names:
        data = b"x = 1\n"
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    documents, quarantined = read(Files([str(tmp_path)]))
    found = {pathlib.Path(item.url).name: dict(item.meta) for item in documents}
    assert {name: meta.pop("file") for name, meta in found.items()} == {
        name: str(tmp_path / name) for name in found
    }
    assert found == {name: meta for name, meta in names.items() if meta is not None}
    assert [item.reason for item in quarantined] == ["no reader for .exe files"]


def pdf(text, title="A title"):
    """A PDF file of one page."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Kids[3 0 R]/Count 1>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 612 792]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        b"<</Length %d>>stream\n%s\nendstream" % (len(stream), stream),
        b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
        f"<</Title({title})/CreationDate(D:20200102030405Z)>>".encode(),
    ]
    data, places = b"%PDF-1.4\n", []
    for number, item in enumerate(objects, start=1):
        places.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, item)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    head = b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    end = b"trailer<</Size %d/Root 1 0 R/Info 6 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, len(data))
    return data + head + table + end


def test_pdf_text(tmp_path):
    pytest.importorskip("pypdf", reason="t5style[pdf] is not installed")
    (tmp_path / "a.pdf").write_bytes(pdf("Hello world"))
    (tmp_path / "b.pdf").write_bytes(pdf(""))
    (tmp_path / "c.pdf").write_bytes(b"no pdf")
    (tmp_path / "d.pdf").write_bytes(pdf("cut off")[:300])
    documents, quarantined = read(Files([str(tmp_path)]))
    (item,) = documents
    assert item.text.strip() == "Hello world"
    assert item.time == "2020-01-02T03:04:05+00:00"
    file = str(tmp_path / "a.pdf")
    assert item.meta == {"file": file, "format": "pdf", "pages": 1, "title": "A title"}
    reasons = {pathlib.Path(item.file).name: item.reason for item in quarantined}
    assert reasons["b.pdf"] == "PDF without text"
    assert reasons["c.pdf"] == "damaged PDF"
    assert set(reasons) == {"b.pdf", "c.pdf", "d.pdf"}


@pytest.mark.parametrize(
    ("package", "name", "source"), [("pypdf", "x.pdf", PdfFiles), ("fastwarc", "x.warc.gz", WarcFiles)]
)
def test_a_missing_package_is_named_at_the_start(tmp_path, monkeypatch, package, name, source):
    real = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == package else real(n))
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "fine.txt").write_bytes(b"x")
    for each in (source([f"{tmp_path}/{name}"]), Files([str(tmp_path)])):
        with pytest.raises(UserError, match=f"{name}.*{package}.*pip install"):
            each.parts()
    assert len(TextFiles([f"{tmp_path}/*.txt"]).parts()) == 1


def test_meta_of_pages_is_json(tmp_path):
    (tmp_path / "x.warc").write_bytes(b"".join(PAGES))
    for item in read(WarcFiles([str(tmp_path)]))[0]:
        assert json.loads(json.dumps(item.meta)) == item.meta
