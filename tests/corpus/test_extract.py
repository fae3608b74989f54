import pathlib
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus.document import Document
from t5style.corpus.extract import LONGEST, MOST_TAGS, Html, html_to_text, strip_tags
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

pytest.importorskip("trafilatura")

DATA = pathlib.Path(__file__).parents[2].parent / "shared/data"
PARAGRAPHS = [
    "The council voted on Monday to repair the old stone bridge, which has been closed since the spring.",
    "Engineers found that two of its five arches had moved, and said that the work would take two years.",
    "Until then a ferry will cross the river every twenty minutes, free of charge for those on foot.",
]
PAGE = f"""<?xml version="1.0" encoding="iso-8859-1"?><!DOCTYPE html>
<html lang="en-GB"><head><meta charset="iso-8859-1"><title>Bridge closed | The Echo</title>
<meta property="og:title" content="Bridge  closed"><meta name="author" content="J. Ferry">
<script type="application/ld+json">{{"@type": "Article", "datePublished": "2024-05-06T07:08:09Z"}}</script>
<script>var hidden = "<p>not text</p>";</script><style>p {{ color: red }}</style></head>
<body><nav><ul><li><a href="/">Home</a><li><a href="/sport">Sport</a></ul></nav>
<article><h1>Bridge closed</h1><p>{PARAGRAPHS[0]}</p><p>{PARAGRAPHS[1]}</p>
<ul><li>Café – £3</li><li>Boat</li></ul><p>{PARAGRAPHS[2]}</p></article>
<div class="comments" id="comments"><p>First!!! What a waste of money this is, as all here say.</p></div>
<footer>Copyright The Echo</footer></body></html>"""


def test_the_article_and_nothing_else():
    text = html_to_text(PAGE)
    assert text.split("\n") == [
        "Bridge closed",
        *PARAGRAPHS[:2],
        "- Café – £3",
        "- Boat",
        PARAGRAPHS[2],
    ]


def test_comments_and_tables_can_be_chosen():
    table = "<table><tr><td>Monday</td><td>closed</td></tr><tr><td>Tuesday</td><td>open</td></tr></table>"
    page = Document(PAGE.replace("<ul><li>Café", table + "<ul><li>Café"), "x", meta={"format": "html"})
    default, without = Html()(page), Html(tables=False)(page)
    assert isinstance(default, Document)
    assert isinstance(without, Document)
    assert "Tuesday | open" in default.text
    assert "Tuesday" not in without.text
    assert "First!!!" not in default.text
    with_comments = Html(comments=True)(page)
    assert isinstance(with_comments, Document)
    assert "First!!!" in with_comments.text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("", ""),
        (" \n", ""),
        ("<p>Hi", "Hi"),
        ("no markup at all", "no markup at all"),
        ("<p>one</p>\x00\x1b<p>two</p>", "one\ntwo"),
        ("<p>a\ud800b</p>", "a\ufffdb"),
        ("&#0;&#xd800;&#99999999;", "\ufffd" * 3),
        ("<!-- never closed", ""),
        ("<script>var never = 'closed'", ""),
        ("<frameset><frame src=x></frameset>", ""),
        ("<head><title>t</title><body>no end tags<p>at all", "no end tags\nat all"),
    ],
)
def test_odd_pages(page, text):
    assert html_to_text(page) == text


@pytest.mark.parametrize("tag", ["div", "b", "ul><li", "table><tr><td", "blockquote"])
def test_deep_nesting_loses_no_text(tag):
    page = f"<{tag}>" * 100_000 + PARAGRAPHS[0]
    assert PARAGRAPHS[0] in html_to_text(page)


@pytest.mark.parametrize(
    "page",
    [
        "<!--",
        "<script ",
        "</script ",
        '<a href="',
        "<title>",
        "<",
        "&",
        "&#",
        "<p",
        "<p>x",
        "<td>x",
        "<b>x</i>",
    ],
)
def test_time_is_linear_in_the_page(page):
    """Text that is the worst for one pattern or another; quadratic time would be minutes for a megabyte."""
    page = page * (50_000 // len(page))
    for function in (html_to_text, strip_tags):
        start = time.process_time()
        function(page)
        assert time.process_time() - start < 10


@pytest.mark.parametrize(
    "page", ["<p>" + "word and " * (LONGEST // 9), "<b>word</b> and " * (MOST_TAGS // 2 + 1)]
)
def test_very_long_pages_are_stripped(page):
    start = time.process_time()
    text = html_to_text(page + "<p>the end")
    assert time.process_time() - start < 5
    assert text.startswith("word and word and")
    assert text.endswith("and\nthe end")
    assert text.count("word") == page.count("word")


MARKUP = st.sampled_from(
    [
        "<p>",
        "</p>",
        "<div",
        ">",
        "<table><tr><td>",
        "</table>",
        "<ul><li>",
        "<a href='x'>",
        "</a>",
        "<!--",
        "-->",
        "<script>",
        "</script>",
        "<article>",
        "<h1>",
        "&amp;",
        "&#x1F600;",
        "<br/>",
        "<![CDATA[",
        "]]>",
        "<?xml ?>",
        "\x00",
        "\ud800",
        "<meta charset=utf-16>",
        "<base href='http://[::1'>",
        "<html lang=''>",
        "<time datetime=x>",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(MARKUP, st.text(alphabet=st.characters(exclude_categories=[]))), max_size=25))
def test_any_string_gives_text_that_can_be_written(parts):
    document = Html()(Document("".join(parts), "x", meta={"format": "html"}))
    assert isinstance(document, Drop) or document.text.encode()
    strip_tags("".join(parts)).encode()


@given(st.lists(st.text("abc xyz", min_size=1).filter(str.strip), min_size=1, max_size=5))
def test_no_page_with_text_becomes_empty(paragraphs):
    page = "<html><body>" + "".join(f"<div><p>{text}</p></div>" for text in paragraphs)
    assert set("".join(html_to_text(page).split())) <= set("abcxyz")
    assert html_to_text(page)


def test_stage():
    page = Document(PAGE, "x", "s", meta={"format": "html", "k": 1})
    document = Html()(page)
    assert isinstance(document, Document)
    assert document.text == html_to_text(PAGE)
    assert document.meta == {"k": 1, "format": "page", "title": "Bridge closed", "author": "J. Ferry"}
    assert (document.time, document.language) == ("2024-05-06T07:08:09+00:00", "en")
    assert (document.id, document.source) == ("x", "s")


def test_stage_keeps_what_is_known():
    page = Document(PAGE, "x", time="2020", language="fr", meta={"format": "html", "title": "mine"})
    document = Html()(page)
    assert isinstance(document, Document)
    assert (document.time, document.language, document.meta["title"]) == ("2020", "fr", "mine")


def test_stage_passes_what_is_no_page_and_drops_what_has_no_text():
    plain = Document("<p>about markup</p>", "x", meta={"format": "markdown"})
    assert Html()(plain) is plain
    assert Html()(Document("<p>", "x")) == Document("<p>", "x")
    empty = Document("<script>x()</script>", "x", meta={"format": "html"})
    assert Html()(empty) == Drop("no text in the page", "20 characters of HTML")


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ('<meta name="date" content="2023-02-01">', "2023-02-01"),
        ('<meta name="citation_date" content="2023/02/01">', "2023-02-01"),
        ('<meta name="date" content="2023-02-01 10:00 PST">', "2023-02-01"),
        ('<meta name="date" content="2023-02-31">', ""),
        ('<meta name="date" content="yesterday">', ""),
        ('<meta itemprop="datePublished" content="2023-02-01T10:00">', "2023-02-01T10:00:00"),
        ('<time datetime="2023-02-01">1 Feb</time>', "2023-02-01"),
        ('<time datetime="x">1 Feb</time>', ""),
    ],
)
def test_dates(head, expected):
    document = Html()(Document(f"<head>{head}</head><p>{PARAGRAPHS[0]}", "x", meta={"format": "html"}))
    assert isinstance(document, Document)
    assert document.time == expected


def test_trafilatura_failing_loses_no_page(monkeypatch):
    def fail(*args, **settings):
        raise RecursionError

    monkeypatch.setattr("t5style.corpus.extract._trafilatura", lambda: fail)
    assert PARAGRAPHS[2] in html_to_text(PAGE)


def test_missing_trafilatura_names_the_extra(monkeypatch):
    from t5style.corpus import extract

    extract._trafilatura.cache_clear()
    monkeypatch.setitem(sys.modules, "trafilatura", None)
    with pytest.raises(UserError, match=r"trafilatura: pip install 't5style\[corpus\]'"):
        html_to_text(PAGE)


def test_benchmark_f1():
    if not (DATA / "extract").is_dir():
        pytest.skip("no ../shared/data/extract (article-extraction-benchmark)")
    from experiments.benchmarks.corpus_text import extraction_scores, read_pages

    pages, articles = read_pages(DATA)
    assert len(pages) == 90
    f1, precision, recall = extraction_scores([html_to_text(page) for page in pages], articles)
    assert f1 >= 0.95
    assert min(precision, recall) >= 0.93


def test_a_fragment_is_no_page():
    assert html_to_text("<p>Write to <b>Ada</b>, please.</p><p>Two <i>lines</i></p>") == (
        "Write to Ada, please.\nTwo lines"
    )
