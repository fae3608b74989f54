"""Bytes become text: which encoding they are in, and what to do where they are in none.

UTF-8 is tried first whatever else is claimed, for text in another encoding is hardly ever valid UTF-8 (RFC
3629, section 1). A byte-order mark is believed, then what the file or its server declares, and only then is
there a guess among the encodings that are found on the web.
"""

from __future__ import annotations

import codecs
import dataclasses
import re

from t5style.run_dir import UserError

DETECT = "detect"
# Four bytes before two: the mark of UTF-32-LE begins with that of UTF-16-LE.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# What is guessed, the more frequent first: the legacy encodings of the WHATWG Encoding Standard that are no
# subsets of others there.
_LEGACY = [
    *("cp1252", "cp1251", "cp1250", "cp932", "euc_jp", "gb18030", "big5hkscs", "cp949", "cp1253", "cp1254"),
    *("cp1255", "cp1256", "cp1257", "cp1258", "cp874", "koi8_r", "iso8859_2", "cp866"),
]
# Labels that mean a larger encoding (WHATWG Encoding Standard, section 4.2).
_SUPERSETS = {
    "ascii": "cp1252",
    "iso8859-1": "cp1252",
    "iso8859-9": "cp1254",
    "iso8859-11": "cp874",
    "tis-620": "cp874",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
}
_WHATWG_NAMES = {"x-sjis": "cp932", "windows-874": "cp874", "x-gbk": "gb18030", "x-euc-jp": "euc_jp"}
# Bytes that are ASCII to the eye and text only to the declared encoding.
_ESCAPED = {"iso2022_jp", "hz", "utf-7"}
_SAMPLE = 1 << 16
# Controls that no text has: all of C0 but tab, line ends, form feed and escape; all of C1 but next line.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f\x80-\x84\x86-\x9f]")
_META = re.compile(rb"<meta[^>]{0,300}?charset\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.I)


class Undecodable(ValueError):
    """Bytes that are no text, or not in the encoding they should be in.

    Attributes:
      offset: of the first byte that is wrong.
      reason: a few words, the same for all of its kind.
      detail: what is wrong here.
    """

    def __init__(self, offset: int, reason: str, detail: str = ""):
        super().__init__(f"byte {offset}: {reason} ({detail})")
        self.offset, self.reason, self.detail = offset, reason, detail


@dataclasses.dataclass(frozen=True)
class Decoded:
    """Text and how it was read.

    Attributes:
      text: without a byte-order mark; may hold lone surrogates where the encoding can say them (UTF-7).
      encoding: Python's name of it.
      replaced: places that were not in it, U+FFFD in the text.
    """

    text: str
    encoding: str
    replaced: int = 0

    @property
    def meta(self) -> dict[str, str | int]:
        """What a document's meta says of it: nothing where it was plain UTF-8."""
        meta: dict[str, str | int] = {} if self.encoding == "utf-8" else {"encoding": self.encoding}
        return meta | ({"replaced": self.replaced} if self.replaced else {})


def check(encoding: str, name: str) -> None:
    """Raises UserError where ``encoding`` is neither "detect" nor an encoding of text that Python knows."""
    if encoding != DETECT and codec(encoding) is None:
        raise UserError(f"{name}.encoding {encoding!r} is no encoding Python knows; 'detect' finds it out")


def codec(label: str) -> str | None:
    """Python's name of the encoding that a page or a server means by a label; None where there is none."""
    label = label.strip().strip("\"'").lower()
    try:
        name = codecs.lookup(_WHATWG_NAMES.get(label, label)).name
        "".encode(name)
    except (LookupError, ValueError):  # hex and the like are no encodings of text
        return None
    return name


def html_charset(data: bytes) -> str:
    """The label that a page gives in a meta element among its first 4096 bytes; empty without one.

    The HTML standard looks at 1024 bytes; real pages have comments and scripts before it.
    """
    match = _META.search(data[:4096])
    return match[1].decode("ascii", "replace") if match else ""


def decode(data: bytes, encoding: str = DETECT, *, declared: str = "", lenient: bool = False) -> Decoded:
    """The text in ``data``.

    Args:
      data: all of it.
      encoding: what it must be in; "detect" to find out.
      declared: label that the file or its server gives, believed where the data can be read so.
      lenient: for pages, as browsers do: a few wrong bytes in UTF-8 or the declared encoding become U+FFFD.

    Raises:
      Undecodable: the data is in no known encoding, not in the one that it must be in, or not text.
    """
    if encoding != DETECT:
        return _strict(data, codec(encoding) or encoding)
    for mark, name in _MARKS:
        if data.startswith(mark):
            return _strict(data, name)
    label = codec(declared) or ""
    # A zero byte is in no text of any ASCII-like encoding, and in nearly every other file.
    if (zero := data.find(b"\0")) >= 0 and not label.startswith(("utf-16", "utf-32")):
        if not lenient or data.count(b"\0") > len(data) // 1000:
            raise Undecodable(zero, "binary file", "a zero byte")
        data = data.replace(b"\0", b" ")
    if label.replace("-", "") in {name.replace("-", "") for name in _ESCAPED}:
        return _strict(data, label)
    try:
        return Decoded(data.decode(), "utf-8")
    except UnicodeDecodeError as error:
        first = error
    label = _SUPERSETS.get(label, label)
    if label and label != "utf-8":
        try:
            decoded = Decoded(data.decode(label), label)
            if not _CONTROLS.search(decoded.text[:_SAMPLE]):
                return decoded
        except UnicodeDecodeError:
            pass
    text = data.decode(errors="replace")
    wrong, right = text.count("\ufffd"), len(re.findall("[^\x00-\x7f\ufffd]", text))
    # Damaged UTF-8: by accident at most some 18 % of the characters of other encodings (GB 2312) pass for it.
    if right >= 2 * wrong:
        if lenient:
            return Decoded(text, "utf-8", wrong)
        raise Undecodable(first.start, "not utf-8", f"{first.reason}; {wrong} such places; set encoding")
    if guess := _guess(data, first.start):
        try:
            return Decoded(data.decode(guess), guess)
        except UnicodeDecodeError as error:
            first = error
    if lenient and label:
        text = data.decode(label, "replace")
        wrong = text.count("\ufffd")
        if wrong * 100 <= len(text):
            return Decoded(text, label, wrong)
    raise Undecodable(first.start, "unknown encoding", "no encoding fits all of it; set encoding")


def _strict(data: bytes, encoding: str) -> Decoded:
    wide = encoding.startswith(("utf-16", "utf-32"))
    if not wide and (zero := data.find(b"\0")) >= 0:
        raise Undecodable(zero, "binary file", "a zero byte")
    try:
        return Decoded(data.decode(encoding).removeprefix("\ufeff"), encoding)
    except UnicodeDecodeError as error:
        raise Undecodable(error.start, f"not {encoding}", f"{error.reason}; set encoding") from None


def _guess(data: bytes, first: int) -> str | None:
    """The likeliest legacy encoding, from what lies around the first byte that is not ASCII."""
    import charset_normalizer

    start = data.rfind(b"\n", 0, first) + 1 if first > _SAMPLE // 4 else 0
    sample = data[start : start + _SAMPLE]
    matches = charset_normalizer.from_bytes(
        sample, cp_isolation=list(_LEGACY), preemptive_behaviour=False, enable_fallback=False
    )
    # Where little speaks for any, the more frequent encoding is the likelier.
    ranked = sorted(
        (round(match.chaos, 2) - round(match.coherence, 2), _LEGACY.index(match.encoding), match)
        for match in matches
        if match.encoding in _LEGACY
    )
    for _, _, match in ranked:
        if not _CONTROLS.search(str(match)):
            return str(match.encoding)
    return None


def sniff(head: bytes, whole: bool) -> str:
    """The encoding of a stream of text that begins with ``head``, for reading it piece by piece.

    Args:
      head: its first bytes, the more the better.
      whole: whether there is nothing after them; else the last character may be cut.

    Raises:
      Undecodable: as `decode`.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if not whole:
        head = head[: head.rfind(b"\n") + 1] or head
    try:
        return decode(head).encoding
    except Undecodable as error:
        # What is damaged in places is still the encoding to read the rest with.
        if error.reason == "not utf-8":
            return "utf-8"
        raise
