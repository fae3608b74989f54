"""The text of web pages: what an article or manual says, without menus, advertisements and scripts.

trafilatura (Barbaresi, ACL 2021; Apache-2.0) finds the main text. Its fast mode that favours recall is the
best of its settings both on news (article-extraction-benchmark) and on manuals, where others leave more pages
empty. Where it finds nothing at all, the page's tags are stripped, so that no page with text on it is lost.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import html as entities
import re
from typing import Any, NamedTuple

from t5style.corpus.document import Document, valid
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

# Pages of more characters, or of more tags, have them stripped: trafilatura takes some 50 us for an element,
# which would be minutes. News pages have 3,000 tags, and Common Crawl, for one, cuts pages off after 5 MiB.
LONGEST = 5 << 20
MOST_TAGS = 200_000
# What lxml refuses in text.
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\ufffe\uffff]")
# Every pattern ends at the next "<", its own end or the end of the page, where browsers too end what is not
# closed: no page takes quadratic time.
_UNSEEN = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style|title|textarea|iframe|noframes)\b[^<>]*>.*?(?:</\1\s*>|\Z)",
    re.I | re.S,
)
_BREAK = re.compile(
    r"</?(?:address|article|aside|blockquote|body|br|caption|center|dd|details|dialog|div|dl|dt|fieldset|"
    r"figcaption|figure|form|h[1-6]|header|hr|html|li|main|ol|p|pre|section|summary|table|td|th|title|tr|ul)"
    r"\b[^<>]*>",
    re.I,
)
_TAG = re.compile(r"<[a-z/!?][^<>]*>", re.I)


def html_to_text(html: str) -> str:
    """The main text of a page, with a line for each paragraph, heading, list item and row of a table.

    List items are marked "- ", cells of a table "|". Readers' comments are left out. Of a page in which no
    main text is found, as of one too long (``LONGEST``, ``MOST_TAGS``) or too deeply nested to be
    parsed, all text is returned (``strip_tags``).

    Args:
      html: a page, already decoded: what it says about its encoding is ignored. Any string will do.

    Returns:
      The text; empty only where there is none.

    Raises:
      UserError: trafilatura is not installed.
    """
    return _text(html, _parse(html), comments=False, tables=True)


# A piece of HTML with less text than this and no layout is no page: trafilatura would cut its sentences at
# each inline tag.
_FRAGMENT = 500
_LAYOUT = re.compile(r"<(?:article|aside|div|footer|form|header|main|nav|section|table|ul)\b", re.I)


def strip_tags(html: str) -> str:
    """All text of a page that a reader would see, menus and all; a line for each block."""
    text = _BREAK.sub("\n", _UNSEEN.sub("\n", _CONTROLS.sub("", valid(html))))
    lines = (" ".join(line.split()) for line in entities.unescape(_TAG.sub("", text)).split("\n"))
    return "\n".join(line for line in lines if line)


def _parse(html: str) -> Any:
    """The page as an lxml tree, or None where it is empty, too long or too deep."""
    from lxml import etree
    from lxml.html import HTMLParser, document_fromstring

    if len(html) > LONGEST or html.count("<") > MOST_TAGS:
        return None
    # Bytes, for lxml refuses a str that declares an encoding; a parser for each page holds its own errors.
    parser = HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, collect_ids=False, default_doctype=False
    )
    try:
        tree = document_fromstring(_CONTROLS.sub("", valid(html)).encode(), parser=parser)
    except (etree.LxmlError, ValueError, AssertionError):
        return None
    # libxml2 leaves out what is nested more than 256 deep, and says so last.
    if any("depth" in entry.message for entry in parser.error_log.filter_from_fatals()):
        return None
    return tree


def _text(html: str, tree: Any, comments: bool, tables: bool) -> str:
    extract = _trafilatura()
    small = len(html) < 20 * _FRAGMENT and not _LAYOUT.search(html)
    if small and len(visible := strip_tags(html)) < _FRAGMENT:
        return visible
    text = None
    if tree is not None:
        try:
            text = extract(
                tree, fast=True, favor_recall=True, include_comments=comments, include_tables=tables
            )
        except Exception:
            # Whatever its hundreds of rules stumble over, the text is not lost.
            text = None
    return text or strip_tags(html)


@functools.cache
def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError as error:
        raise UserError(
            f"extracting text from HTML needs trafilatura: pip install 't5style[corpus]' ({error})"
        ) from error
    import logging

    # It logs an error for each page without text, which here is counted and reported as a dropped document.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)
    return trafilatura.extract


class Metadata(NamedTuple):
    """What a page says about itself; empty where it does not."""

    title: str = ""
    author: str = ""
    time: str = ""
    language: str = ""


# Names of meta elements, the more specific first.
_TITLES = ("og:title", "citation_title", "dc.title", "twitter:title")
_AUTHORS = ("author", "article:author", "citation_author", "dc.creator", "parsely-author", "sailthru.author")
_TIMES = (
    "article:published_time",
    "datepublished",
    "og:published_time",
    "citation_publication_date",
    "citation_date",
    "dc.date.issued",
    "dc.date",
    "dcterms.created",
    "parsely-pub-date",
    "sailthru.date",
    "pubdate",
    "publish-date",
    "date",
)
_JSON_TIME = re.compile(r'"datePublished"\s*:\s*"([^"]{8,40})"')
_DATE = re.compile(r"\d{4}-\d\d-\d\d")


def metadata(tree: Any) -> Metadata:
    """What the head of a page says about it: meta elements, title, JSON-LD's date, the language attribute.

    Args:
      tree: the page as lxml parsed it.
    """
    named: dict[str, str] = {}
    title = ""
    time = ""
    for element in tree.iter("meta", "title", "time", "script"):
        if element.tag == "meta":
            name = element.get("property") or element.get("name") or element.get("itemprop")
            if name is None and (element.get("http-equiv") or "").lower() == "content-language":
                name = "content-language"
            if name and (content := " ".join((element.get("content") or "").split())):
                named.setdefault(name.lower(), content)
        elif element.tag == "title":
            title = title or " ".join((element.text or "").split())
        elif element.tag == "time":
            time = time or _iso(element.get("datetime") or "")
        elif element.get("type") == "application/ld+json" and (
            found := _JSON_TIME.search(element.text or "")
        ):
            named.setdefault("datepublished", found[1])
    root = tree.getroottree().getroot()
    language = root.get("lang") or root.get("{http://www.w3.org/XML/1998/namespace}lang") or ""
    language = re.split("[-_,; ]", (language or named.get("content-language", "")).strip().lower())[0]
    author = next((named[name] for name in _AUTHORS if name in named), "")
    return Metadata(
        next((named[name] for name in _TITLES if name in named), title),
        "" if author.startswith(("http://", "https://")) else author,
        next((iso for name in _TIMES if (iso := _iso(named.get(name, "")))), time),
        language if re.fullmatch("[a-z]{2,3}", language) else "",
    )


def _iso(text: str) -> str:
    """A time as ISO 8601 has it, the day alone where the rest is not a time, or nothing."""
    text = text.strip()
    try:
        return datetime.datetime.fromisoformat(text).isoformat() if len(text) > 10 else _day(text)
    except ValueError:
        return _day(text[:10])


def _day(text: str) -> str:
    text = text.replace("/", "-")
    try:
        return datetime.date.fromisoformat(text).isoformat() if _DATE.fullmatch(text) else ""
    except ValueError:
        return ""


@dataclasses.dataclass(frozen=True)
class Html:
    """The stage that turns pages into text: documents whose ``meta['format']`` is ``html``; others pass.

    The title and the author that the page gives go to ``meta``, its date and language to ``time`` and
    ``language`` where these are empty; ``meta['format']`` becomes ``page``.

    Attributes:
      comments: keep what readers wrote below an article.
      tables: keep the text of tables.
    """

    comments: bool = False
    tables: bool = True

    def __call__(self, document: Document) -> Document | Drop:
        if document.meta.get("format") != "html":
            return document
        tree = _parse(document.text)
        # Before trafilatura, which prunes the tree.
        page = Metadata() if tree is None else metadata(tree)
        text = _text(document.text, tree, self.comments, self.tables)
        if not text:
            return Drop("no text in the page", f"{len(document.text)} characters of HTML")
        meta = {**document.meta, "format": "page"}
        for key in ("title", "author"):
            if value := getattr(page, key):
                meta.setdefault(key, value)
        return dataclasses.replace(
            document,
            text=text,
            meta=meta,
            time=document.time or page.time,
            language=document.language or page.language,
        )
