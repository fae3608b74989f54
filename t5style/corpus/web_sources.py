"""Web pages: HTML files, and WARC archives of crawls. Pages are yielded as markup (``meta["format"] =
"html"``); a later stage takes the text out.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import io
from collections.abc import Iterator, Sequence
from typing import IO, Any

from t5style.corpus import charset
from t5style.corpus.document import BROKEN_COMPRESSION, Document, valid
from t5style.corpus.locations import Entry, open_binary
from t5style.corpus.parts import FileSource, Quarantined, check_paths, check_positive
from t5style.corpus.text_sources import read_whole
from t5style.run_dir import UserError

_STEP = 1 << 20
_HTML = ("text/html", "application/xhtml+xml")


@dataclasses.dataclass(frozen=True)
class HtmlFiles(FileSource):
    """HTML files, each a document. May be compressed (.gz, .zst).

    A page is read as UTF-8 if it can be, else as it declares itself, else as is likeliest; a few wrong bytes
    become U+FFFD, as in browsers, and are counted in ``meta["replaced"]``.

    Attributes:
      paths: files, folders or patterns; of a folder, all it holds.
      source: name of the collection.
      license: licence of the pages.
      language: ISO 639-1 code.
      encoding: of the files; "detect" finds it out for each.
      max_bytes: larger files are quarantined.
    """

    paths: Sequence[str]
    source: str = "html"
    license: str = ""
    language: str = ""
    encoding: str = charset.DETECT
    max_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        check_paths(self.paths, "HtmlFiles")
        check_positive(self.max_bytes, "HtmlFiles.max_bytes")
        charset.check(self.encoding, "HtmlFiles")

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        data = read_whole(path, self.max_bytes)
        if isinstance(data, Quarantined):
            yield data
            return
        try:
            decoded = charset.decode(data, self.encoding, declared=charset.html_charset(data), lenient=True)
        except charset.Undecodable as error:
            yield Quarantined(path, f"byte {error.offset}", error.reason, error.detail)
            return
        yield Document(
            valid(decoded.text),
            id,
            source=self.source,
            url=path,
            license=self.license,
            language=self.language,
            meta={"file": path, "format": "html"} | decoded.meta,
        )


@dataclasses.dataclass(frozen=True)
class WarcFiles(FileSource):
    """WARC archives (ISO 28500; .warc, .wet, also .gz or .zst): successful responses that are HTML or plain
    text, resources of these kinds, and conversions (the text of Common Crawl's WET files) are documents.

    Other records (requests, metadata, revisits, pictures, errors of the server) are no documents and are
    passed over. A document's id is its WARC-Record-ID, its url the WARC-Target-URI, its time the WARC-Date.

    Attributes:
      paths: files, folders or patterns; of a folder, all it holds.
      source: name of the collection.
      license: licence of the pages.
      language: ISO 639-1 code.
      max_bytes: larger pages are quarantined.
    """

    paths: Sequence[str]
    source: str = "warc"
    license: str = ""
    language: str = ""
    max_bytes: int = 32 << 20

    def __post_init__(self) -> None:
        check_paths(self.paths, "WarcFiles")
        check_positive(self.max_bytes, "WarcFiles.max_bytes")

    def check_installed(self, entries: Sequence[Entry]) -> None:
        if importlib.util.find_spec("fastwarc") is None:
            raise UserError(f"{entries[0].path}: WARC files need the package fastwarc: pip install fastwarc")

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        from fastwarc.warc import ArchiveIterator, WarcRecordType

        at: int | None = None
        try:
            with open_binary(path) as file:
                records = ArchiveIterator(
                    file, record_types=WarcRecordType.any_type, parse_http=False, auto_decode="none"
                )
                for record in records:
                    at = record.stream_pos
                    item = self._record(record, path, id)
                    if item is not None:
                        yield item
                    if isinstance(item, Quarantined) and item.reason == _CUT:
                        return
                _check_end(file, path, at or 0)
        except BROKEN_COMPRESSION as error:
            yield Quarantined(path, _place(at), "broken compression", str(error))
        except OSError as error:
            yield Quarantined(path, _place(at), "damaged WARC", str(error))

    def _record(self, record: Any, path: str, id: str) -> Document | Quarantined | None:
        at = record.stream_pos
        place = f"record at byte {at}"
        headers = record.headers
        kind = headers.get("WARC-Type", "")
        if "Content-Length" not in headers:
            return Quarantined(path, place, _CUT, "its header has no Content-Length")
        if kind not in ("response", "resource", "conversion"):
            return None
        content_type, label = headers.get("Content-Type", "") or "", ""
        encodings: list[str] = []
        if kind == "response" and record.is_http:
            record.parse_http()
            status = getattr(record.http_headers, "status_code", None) if record.http_headers else None
            if status is None or not 200 <= status < 300:
                return None if status is not None else Quarantined(path, place, "damaged HTTP header")
            content_type = record.http_content_type or ""
            label = record.http_charset or ""
            for name in ("Transfer-Encoding", "Content-Encoding"):
                value = record.http_headers.get(name) or ""
                encodings += [word.strip().lower() for word in value.split(",")]
        elif "charset=" in content_type.lower():
            label = content_type.lower().rpartition("charset=")[2]
        content_type = content_type.partition(";")[0].strip().lower()
        if kind == "conversion":
            page = False
        elif content_type in _HTML or (not content_type and kind == "response"):
            page = True
        elif content_type == "text/plain":
            page = False
        else:
            return None
        expected = record.content_length
        if expected > self.max_bytes:
            return Quarantined(path, place, "too large", f"{expected:,} bytes, over {self.max_bytes:,}")
        data = record.reader.read(expected)
        if len(data) < expected:
            return Quarantined(path, place, _CUT, f"{len(data):,} of {expected:,} bytes are there")
        try:
            data = _decoded(data, encodings, self.max_bytes)
        except (OSError, ValueError) as error:
            return Quarantined(path, place, "broken HTTP encoding", valid(str(error)))
        if len(data) > self.max_bytes:
            return Quarantined(path, place, "too large", f"over {self.max_bytes:,} bytes when decoded")
        if not data:
            return Quarantined(path, place, "empty record")
        try:
            declared = label or (charset.html_charset(data) if page else "")
            decoded = charset.decode(data, declared=declared, lenient=True)
        except charset.Undecodable as error:
            return Quarantined(path, f"{place}, its byte {error.offset}", error.reason, error.detail)
        date = record.record_date
        name = (record.record_id or "").strip("<>")
        meta: dict[str, Any] = {"file": path, "position": place, "format": "html" if page else "page"}
        return Document(
            valid(decoded.text),
            valid(name) or f"{id}:byte{at}",
            source=self.source,
            url=valid(headers.get("WARC-Target-URI", "") or "").strip("<>"),
            license=self.license,
            language=self.language,
            meta=meta | decoded.meta,
            time=date.isoformat() if date else "",
        )


_CUT = "truncated record"


def _place(at: int | None) -> str:
    return "byte 0" if at is None else f"after record at byte {at}"


def _decoded(data: bytes, encodings: Sequence[str], limit: int) -> bytes:
    """The body without its HTTP transfer and content encodings (RFC 9110, section 8.4), at most ``limit`` + 1
    bytes of it. Archives often say an encoding that the crawler has already taken off: then it stays as it
    is.
    """
    from fastwarc import stream_io

    for encoding in encodings:
        raw = io.BytesIO(data)
        if encoding == "chunked":
            head = data[:32].partition(b"\r\n")[0].partition(b";")[0].strip()
            if not head or not all(byte in b"0123456789abcdefABCDEF" for byte in head):
                continue
            stream: Any = stream_io.ChunkedReader(raw)
        elif encoding in ("gzip", "x-gzip"):
            if not data.startswith(b"\x1f\x8b"):
                continue
            stream = stream_io.GzipReader(raw)
        elif encoding == "deflate":
            if not data.startswith((b"\x78\x01", b"\x78\x5e", b"\x78\x9c", b"\x78\xda")):
                continue
            stream = stream_io.GzipReader(raw, zlib=True)
        elif encoding == "br" and data[:512].lstrip()[:1] != b"<":
            stream = stream_io.BrotliReader(raw)
        elif encoding == "zstd" and data.startswith(b"\x28\xb5\x2f\xfd"):
            stream = stream_io.ZstdReader(raw)
        else:
            continue
        pieces, size = [], 0
        while size <= limit and (piece := stream.read(min(_STEP, limit + 1 - size))):
            pieces.append(piece)
            size += len(piece)
        data = b"".join(pieces)
    return data


def _check_end(file: IO[bytes], path: str, at: int) -> None:
    """Raises EOFError where the file ends inside its last record, which begins at byte ``at``: fastwarc says
    nothing of a record that is passed over, nor of one that is cut inside its compressed header.
    """
    if path.endswith(".zst"):
        return  # whose reader does say it
    file.seek(at)
    if path.endswith(".gz"):
        with gzip.GzipFile(fileobj=file) as stream:
            while stream.read(_STEP):
                pass
        return
    from fastwarc.warc import ArchiveIterator

    for record in ArchiveIterator(file, parse_http=False):
        missing = record.content_length
        while piece := record.reader.read(_STEP):
            missing -= len(piece)
        if missing:
            raise EOFError(f"{missing:,} bytes are missing")
