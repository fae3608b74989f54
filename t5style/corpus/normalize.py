"""One spelling for the same text: Unicode NFC, one kind of line end, no control characters."""

from __future__ import annotations

import dataclasses
import re
import unicodedata

from t5style.corpus.document import Document, valid
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

# C0 and C1 controls but tab and line feed, delete, the byte-order mark, and what is no character at all.
_REMOVED = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff]")
# Unicode's other line ends (annex 14): carriage return, form feed, next line, line and paragraph separator.
_LINE_ENDS = re.compile("\r\n?|[\x0c\x85\u2028\u2029]")
_SURROGATES = re.compile("[\ud800-\udfff]")
# Any character that one of the three would change: nearly every text is done after this one look.
_ANY = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")


def normalize(text: str) -> str:
    """NFC (Unicode annex 15), every line end a line feed, control characters removed, lone surrogates U+FFFD.

    White space and everything visible stay as they are. Doing it twice changes nothing more.
    """
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    if not _ANY.search(text):
        return text
    text = _SURROGATES.sub("\ufffd", text)
    # Removal after line ends: "\r\x00\n" is two line ends, not one.
    text = _REMOVED.sub("", _LINE_ENDS.sub("\n", text))
    # Characters that a removed one kept apart may now compose.
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def fix_mojibake(text: str) -> str:
    """Text that was decoded as what it is not ("schÃ¶n" for "schön"), put right where that is certain.

    ftfy.fix_encoding (Speer, ftfy, 2019), line by line, since often only parts of a text are damaged. ftfy's
    other repairs, which change quotation marks, ligatures and widths, are not made.

    Raises:
      UserError: ftfy is not installed.
    """
    try:
        import ftfy
    except ImportError as error:
        raise UserError("repairing mojibake needs the package ftfy: pip install 't5style[corpus]'") from error
    if text.isascii():
        return text
    return "\n".join(line if line.isascii() else ftfy.fix_encoding(line) for line in valid(text).split("\n"))


@dataclasses.dataclass(frozen=True)
class Normalize:
    """The stage that applies ``normalize``.

    Attributes:
      fix_mojibake: repair wrongly decoded text first (``fix_mojibake``; needs ftfy).
    """

    fix_mojibake: bool = False

    def __call__(self, document: Document) -> Document | Drop:
        # Before normalize, which removes the control characters that damaged text can be told by.
        text = normalize(fix_mojibake(document.text) if self.fix_mojibake else document.text)
        return document if text == document.text else dataclasses.replace(document, text=text)
