"""Bytes become text: which encoding they are in, and what to do where they are in none.

UTF-8 is tried first whatever else is claimed, for text in another encoding is hardly ever valid UTF-8 (RFC
3629, section 1). A byte-order mark is believed, then what the file or its server declares, and only then is
there a guess among the encodings that are found on the web.
"""

from __future__ import annotations

import codecs
import contextlib
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
# What is guessed: the legacy encodings of the WHATWG Encoding Standard that are no subsets of others there,
# the more frequent first, each with the languages that are written in it.
_LEGACY = {
    "cp1252": "en de fr es pt it nl sv da no nb nn fi is ca gl eu af ga sq id ms sw tl oc br fo mt la eo et",
    "cp1251": "ru uk bg be mk sr kk ky mn tg",
    "cp1250": "pl cs sk hu sl hr bs ro sr sq",
    "cp932": "ja",
    "euc_jp": "ja",
    "gb18030": "zh",
    "big5hkscs": "zh",
    "cp949": "ko",
    "cp1253": "el",
    "cp1254": "tr az",
    "cp1255": "he",
    "cp1256": "ar fa ur ug ps ku",
    "cp1257": "lt lv et",
    "cp1258": "vi",
    "cp874": "th",
    "koi8_r": "ru uk bg be",
    "iso8859_2": "pl cs sk hu sl hr bs ro sr",
    "cp866": "ru uk be",
    "iso8859_5": "ru uk bg be mk sr",
    "iso8859_6": "ar fa ur",
}
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
_SAMPLE = 1 << 13
_CHAOS = 0.5  # charset-normalizer's measure of it: long mixed text reaches 0.2, wrong readings have more
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
    if lenient and label and label != "utf-8":
        text = data.decode(label, "replace")
        if (wrong := text.count("\ufffd")) * 100 <= len(text):
            return Decoded(text, label, wrong)
    for guess in _guesses(data, first.start):
        with contextlib.suppress(UnicodeDecodeError):
            return Decoded(data.decode(guess), guess)
    raise Undecodable(first.start, "unknown encoding", "no encoding fits all of it; set encoding")


def _strict(data: bytes, encoding: str) -> Decoded:
    wide = encoding.startswith(("utf-16", "utf-32"))
    if not wide and (zero := data.find(b"\0")) >= 0:
        raise Undecodable(zero, "binary file", "a zero byte")
    try:
        return Decoded(data.decode(encoding).removeprefix("\ufeff"), encoding)
    except UnicodeDecodeError as error:
        raise Undecodable(error.start, f"not {encoding}", f"{error.reason}; set encoding") from None


def _guesses(data: bytes, first: int) -> list[str]:
    """Legacy encodings, the likeliest first, from what lies around the first byte that is not ASCII.

    That is the one that charset-normalizer finds least chaotic and most like a language, in which the text is
    in a language that is written in this encoding, and its characters beyond ASCII are letters. Of 22
    languages of Lingua's sentences, each in a legacy encoding of its own, all are read rightly from two
    sentences on, as far as the text has letters that tell.
    """
    import charset_normalizer

    from t5style.corpus import language

    start = data.rfind(b"\n", 0, first) + 1 if first > _SAMPLE // 4 else 0
    sample = data[start : start + _SAMPLE]
    if len(sample) == _SAMPLE:
        # These bytes are never the second of a character, and nothing is cut before them.
        sample = sample[: max(sample.rfind(b"\n"), sample.rfind(b" "))] or sample
    found = charset_normalizer.from_bytes(
        sample,
        cp_isolation=list(_LEGACY),
        preemptive_behaviour=False,
        enable_fallback=False,
        threshold=_CHAOS,
    )
    ranked = []
    for match in found:
        text = str(match)
        if _CONTROLS.search(text):
            continue
        code, probability = language.identify(text)
        strange = [character for character in text if character > "\x7f"]
        letters = sum(map(str.isalpha, strange)) / max(len(strange), 1)  # few where š is read as ¹
        score = round(match.chaos - match.coherence / 4 - letters, 2)
        # Encodings that read the sample alike come as one match.
        for encoding in {match.encoding, *match.could_be_from_charset} & _LEGACY.keys():
            fits = round(probability, 6) if code in _LEGACY[encoding].split() else 0.0
            if fits or match.chaos <= 0.2:  # the library's own limit
                # Where little speaks for any, the more frequent encoding is the likelier.
                ranked.append((score - fits, list(_LEGACY).index(encoding), encoding))
    return [encoding for _, _, encoding in sorted(ranked)]


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
