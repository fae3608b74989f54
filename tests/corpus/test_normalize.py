import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style.corpus.document import Document
from t5style.corpus.normalize import Normalize, fix_mojibake
from t5style.run_dir import UserError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("schÃ¶n", "schön"),
        ("âœ” gut\nгород\nplain", "✔ gut\nгород\nplain"),
        ("l\x92eau", "l’eau"),
        ("“so” ﬁ ｗｉｄｅ &amp;", "“so” ﬁ ｗｉｄｅ &amp;"),
        ("half \ud800 Ã¶", "half \ufffd ö"),
        ("ascii &lt;b&gt;", "ascii &lt;b&gt;"),
    ],
)
def test_fix_mojibake(text, expected):
    pytest.importorskip("ftfy")
    assert fix_mojibake(text) == expected


@given(st.text(alphabet=st.characters(exclude_categories=[])))
def test_fix_mojibake_takes_any_string(text):
    pytest.importorskip("ftfy")
    fix_mojibake(text).encode()


@given(st.text(alphabet="abc йцукенשלוםあいう你好\n", max_size=80))
def test_damage_is_undone_and_sound_text_left_alone(text):
    pytest.importorskip("ftfy")
    assert fix_mojibake(text) == text
    damaged = "für " + text
    assert fix_mojibake(damaged.encode().decode("latin-1")).replace("\xa0", " ") == damaged


def test_stage():
    pytest.importorskip("ftfy")
    damaged = Document("l\x92eau\r\nschÃ¶n", "x", meta={"k": 1})
    assert Normalize(fix_mojibake=True)(damaged) == Document("l’eau\nschön", "x", meta={"k": 1})
    assert Normalize()(damaged) == Document("leau\nschÃ¶n", "x", meta={"k": 1})


def test_missing_ftfy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(UserError, match=r"ftfy: pip install 't5style\[corpus\]'"):
        Normalize(fix_mojibake=True)(Document("a", "x"))
    assert Normalize()(Document("a\r", "x")).text == "a\n"
