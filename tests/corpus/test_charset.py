import contextlib
import pathlib

import hypothesis
import pytest
from hypothesis import strategies as st

from t5style.corpus import charset
from t5style.run_dir import UserError

SENTENCES = pathlib.Path(__file__).parents[2].parent / "shared/data/langid/lingua/sentences"
ENCODINGS = [
    *[("de", "cp1252"), ("fr", "cp1252"), ("pl", "cp1250"), ("cs", "iso8859_2"), ("hu", "cp1250")],
    *[("ru", "cp1251"), ("uk", "cp1251"), ("bg", "koi8_r"), ("el", "cp1253"), ("tr", "cp1254")],
    *[("ja", "cp932"), ("zh", "gb18030"), ("ko", "cp949"), ("ar", "cp1256"), ("he", "cp1255")],
    *[("lt", "cp1257"), ("vi", "cp1258"), ("th", "cp874"), ("sv", "cp1252"), ("ru", "cp866")],
]


@pytest.mark.skipif(not SENTENCES.exists(), reason="../shared/data is not there")
@pytest.mark.parametrize("count", [2, 30])
def test_encodings_of_real_sentences_are_found(count):
    wrong = []
    for language, encoding in ENCODINGS:
        lines = (SENTENCES / f"{language}.txt").read_text().splitlines()[:count]
        data = "\n".join(lines).encode(encoding, "ignore")
        if charset.decode(data).text != data.decode(encoding):
            wrong.append((language, encoding))
    assert wrong == []


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text())
def test_utf8_is_utf8_whatever_is_declared(text):
    hypothesis.assume("\0" not in text and "\x1b" not in text)
    for declared in ("", "latin-1", "no such thing", "shift_jis"):
        decoded = charset.decode(text.encode(), declared=declared)
        # a mark at the beginning is no part of the text
        assert decoded == charset.Decoded(text.removeprefix("\ufeff"), "utf-8")
        assert decoded.meta == {}


@hypothesis.settings(deadline=None)
@hypothesis.given(st.text(st.characters(codec="utf-16"), min_size=1))
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_is_believed(encoding, text):
    hypothesis.assume(not text.startswith(("\0", "\ufeff")))  # UTF-16-LE's mark and a zero is UTF-32-LE's
    decoded = charset.decode(("\ufeff" + text).encode(encoding))
    assert (decoded.text, decoded.encoding) == (text, encoding)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.binary(), st.sampled_from(["", "utf-8", "latin-1", "shift_jis", "utf-16"]), st.booleans()
)
def test_any_bytes_are_read_or_refused(data, declared, lenient):
    with contextlib.suppress(charset.Undecodable):  # and nothing else
        decoded = charset.decode(data, declared=declared, lenient=lenient)
        assert decoded.text.count("\ufffd") >= decoded.replaced
        assert lenient or not decoded.replaced


def test_damaged_utf8_is_not_taken_for_something_else():
    data = "schöne größere müde Füße ".encode() + b"\xff kaputt"
    with pytest.raises(charset.Undecodable) as error:
        charset.decode(data)
    assert (error.value.offset, error.value.reason) == (len(data) - 8, "not utf-8")
    decoded = charset.decode(data, lenient=True)
    assert decoded.text == "schöne größere müde Füße \ufffd kaputt"
    assert decoded.meta == {"replaced": 1}


def test_what_is_declared_is_believed_where_it_fits():
    assert charset.decode("día año".encode("cp1252"), declared="ISO-8859-1").text == "día año"
    assert charset.decode("“día”".encode("cp1252"), declared="latin1").text == "“día”"  # as in browsers
    assert charset.decode("汉字，简体".encode("gbk"), declared="gb2312").text == "汉字，简体"
    assert charset.decode("Ελλάδα".encode("iso8859_7"), declared="iso-8859-7").meta == {
        "encoding": "iso8859-7"
    }
    assert charset.decode("猫".encode("iso2022_jp"), declared="iso-2022-jp").text == "猫"
    nearly = "Привет, мир. ".encode("cp1251") * 20 + b"\x98"  # the one byte that is nothing in cp1251
    decoded = charset.decode(nearly, declared="windows-1251", lenient=True)
    assert (decoded.text[:6], decoded.replaced) == ("Привет", 1)


@pytest.mark.parametrize(
    ("html", "label"),
    [
        (b'<meta charset="utf-8">', "utf-8"),
        (b"<META CHARSET=Windows-1251 />", "Windows-1251"),
        (b"<meta http-equiv=Content-Type content='text/html; charset=euc-jp'>", "euc-jp"),
        (b"<p>charset=latin-1</p>", ""),
        (b"", ""),
    ],
)
def test_labels_of_pages(html, label):
    assert charset.html_charset(html) == label


def test_a_stream_is_told_by_its_beginning():
    data = "größer\n".encode() * 1000
    assert charset.sniff(data[:5003], False) == "utf-8"  # cut inside a character
    assert charset.sniff("größer\n".encode("utf-16"), True) == "utf-16-le"
    assert charset.sniff("ein größeres Übel\n".encode("cp1252") * 9, True) == "cp1252"
    assert charset.sniff("müde größere süße\n".encode() * 9 + b"\xff\n", True) == "utf-8"
    with pytest.raises(charset.Undecodable):
        charset.sniff(b"\0\1\2", True)


def test_settings():
    charset.check("detect", "X")
    charset.check("windows-1252", "X")
    for name in ("runes", "hex", "rot13"):
        with pytest.raises(UserError, match=rf"X\.encoding '{name}' is no encoding"):
            charset.check(name, "X")
