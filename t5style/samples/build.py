"""Rebuilds the packaged samples from the Debian packages named in PROVENANCE.md.

    mkdir debs && cd debs && apt-get download bible-kjv-text python3.11-doc apache2-doc wordnet-base && cd ..
    python -m t5style.samples.build --debs=debs --output=t5style/samples

Needs ``dpkg-deb`` and ``gzip`` (on every Debian) and lxml. The same packages give the same bytes. Each
document names its package and file, so that any line of a sample can be traced to where it was published.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import pathlib
import re
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from t5style.corpus.document import Document, write_documents

# Books in order, by the abbreviations of the file.
_BOOKS = """
Ge Genesis, Exo Exodus, Lev Leviticus, Num Numbers, Deu Deuteronomy, Josh Joshua, Jdgs Judges, Ruth Ruth,
1Sm 1 Samuel, 2Sm 2 Samuel, 1Ki 1 Kings, 2Ki 2 Kings, 1Chr 1 Chronicles, 2Chr 2 Chronicles, Ezra Ezra, Neh
Nehemiah, Est Esther, Job Job, Psa Psalms, Prv Proverbs, Eccl Ecclesiastes, SSol Song of Solomon, Isa
Isaiah, Jer Jeremiah, Lam Lamentations, Eze Ezekiel, Dan Daniel, Hos Hosea, Joel Joel, Amos Amos, Obad
Obadiah, Jonah Jonah, Mic Micah, Nahum Nahum, Hab Habakkuk, Zep Zephaniah, Hag Haggai, Zec Zechariah, Mal
Malachi, Mat Matthew, Mark Mark, Luke Luke, John John, Acts Acts, Rom Romans, 1Cor 1 Corinthians, 2Cor 2
Corinthians, Gal Galatians, Eph Ephesians, Phi Philippians, Col Colossians, 1Th 1 Thessalonians, 2Th 2
Thessalonians, 1Tim 1 Timothy, 2Tim 2 Timothy, Titus Titus, Phmn Philemon, Heb Hebrews, Jas James, 1Pet 1
Peter, 2Pet 2 Peter, 1Jn 1 John, 2Jn 2 John, 3Jn 3 John, Jude Jude, Rev Revelation"""


def bible(root: pathlib.Path) -> Iterator[Document]:
    """The King James Version, one document per chapter, one verse per line."""
    raw = (root / "usr/lib/bible.data").read_bytes()
    # Header of the Bible Retrieval System's data: at byte 88 the number of windows, then where each begins
    # and the last ends, big-endian. Each window is one compress(1) stream without its three header bytes.
    (windows,) = struct.unpack_from(">I", raw, 88)
    bounds = struct.unpack_from(f">{windows + 1}I", raw, 92)
    data = b"".join(
        subprocess.run(
            ["gzip", "-dc"], input=b"\x1f\x9d\x90" + raw[begin:end], check=True, stdout=subprocess.PIPE
        ).stdout
        for begin, end in itertools.pairwise(bounds)
    )
    books = dict(entry.split(maxsplit=1) for entry in _BOOKS.split(","))
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in data.decode("ascii").splitlines()[1:]:
        if match := re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.+)", line.strip()):
            chapters.setdefault((match[1], int(match[2])), []).append(match[4].strip())
        elif line.strip():
            raise ValueError(f"a line of the Bible is not a verse: {line!r}")
    for (book, chapter), verses in chapters.items():
        yield Document(
            text="\n".join(verses) + "\n",
            id=f"bible-kjv/{book}{chapter}",
            source="bible-kjv",
            url=f"debian:bible-kjv-text/usr/lib/bible.data#{book}{chapter}",
            license="public-domain",
            language="en",
            meta={"title": f"{books[book]} {chapter}", "book": books[book], "chapter": chapter},
        )


def python_doc(root: pathlib.Path) -> Iterator[Document]:
    """Python 3.11's documentation: tutorial, how-tos, questions, language reference, and a third of the
    library.
    """
    html = root / "usr/share/doc/python3.11/html"
    for path in sorted(html.rglob("*.html")):
        name = path.relative_to(html).as_posix()
        section = name.split("/")[0]
        if section not in ("tutorial", "howto", "faq", "reference", "library", "glossary.html"):
            continue
        if section == "library" and hashlib.sha256(name.encode()).digest()[0] % 3:
            continue
        main = _parse(path).find(".//div[@class='body']")
        if main is None:
            continue
        text = html_text(main)
        url = f"https://docs.python.org/3.11/{name}"
        yield _page(text, f"python-doc/{name}", "python-doc", url, "PSF-2.0", "en")


# What is taken of each language of Apache's manual, in characters of text; pages go by a hash of their name.
_APACHE_CHARACTERS = {
    "en": 1_000_000, "de": 400_000, "es": 400_000, "fr": 600_000, "ja": 300_000, "ko": 250_000,
    "pt-br": 100_000, "ru": 100_000, "tr": 300_000, "zh-cn": 200_000,
}  # fmt: skip


def apache_doc(root: pathlib.Path) -> Iterator[Document]:
    """The Apache HTTP Server's manual in ten languages, only pages that are in fact translated."""
    manual = root / "usr/share/doc/apache2-doc/manual"
    for language, limit in _APACHE_CHARACTERS.items():
        pages = [path for path in (manual / language).rglob("*.html") if not path.is_symlink()]
        names = {path: path.relative_to(manual / language).as_posix() for path in pages}
        taken = 0
        # The hash does not depend on the language: a page that is in several is taken in several.
        for path in sorted(pages, key=lambda path: hashlib.sha256(names[path].encode()).digest()):
            tree = _parse(path)
            main = tree.find(".//*[@id='page-content']")
            if main is None or tree.get("lang") != language:
                continue
            text = html_text(main)
            if taken + len(text) > limit:
                continue
            taken += len(text)
            yield _page(
                text,
                f"apache-doc/{language}/{names[path]}",
                "apache-doc",
                f"https://httpd.apache.org/docs/2.4/{language}/{names[path]}",
                "Apache-2.0",
                language.split("-")[0],
                page=names[path],
            )


def _parse(path: pathlib.Path) -> Any:
    import lxml.html

    return lxml.html.parse(str(path), lxml.html.HTMLParser(encoding="utf-8")).getroot()


def _page(text: str, id: str, source: str, url: str, license: str, language: str, **meta: Any) -> Document:
    meta = {"title": text.split("\n", 1)[0].strip(), **meta}
    return Document(text=text, id=id, source=source, url=url, license=license, language=language, meta=meta)


_SKIPPED_TAGS = {"script", "style", "svg", "button", "img", "form"}
_SKIPPED_CLASSES = {"headerlink", "permalink", "toplang", "bottomlang", "top", "related", "contents"}
_SKIPPED_IDS = {"quickview", "topic", "contents"}
_TIGHT = {"li", "tr", "dt", "dd"}  # no blank line around
_BLOCKS = {
    "address", "article", "blockquote", "dd", "div", "dl", "dt", "figure", "h1", "h2", "h3", "h4", "h5",
    "h6", "hr", "li", "ol", "p", "pre", "section", "table", "tbody", "thead", "tr", "ul",
}  # fmt: skip


def html_text(element: Any) -> str:
    """Text of an lxml element: paragraphs apart by a blank line, list items and table rows on lines of their
    own.

    Made for the tidy pages of these two manuals, whose main part is known; for the web at large see DESIGN
    §10.
    """
    blocks: list[str] = []  # finished lines; "" parts paragraphs
    line: list[str] = []

    def finish(gap: bool) -> None:
        text = re.sub(r"\s+", " ", "".join(line)).strip()
        if text == "-":  # an item's mark waits for its text
            return
        line.clear()
        if text:
            blocks.append(text)
        if gap and blocks and blocks[-1]:
            blocks.append("")

    def walk(node: Any) -> None:
        tag = node.tag if isinstance(node.tag, str) else ""
        skipped = (
            not tag
            or tag in _SKIPPED_TAGS
            or set((node.get("class") or "").split()) & _SKIPPED_CLASSES
            or node.get("id") in _SKIPPED_IDS
        )
        if skipped:
            return
        if tag == "pre":
            finish(gap=True)
            blocks.extend((node.text_content().strip("\n"), ""))
            return
        block = tag in _BLOCKS
        parent = node.getparent()
        tight = tag in _TIGHT or (tag == "p" and parent is not None and parent.tag in _TIGHT)
        if block:
            finish(gap=not tight)
        if tag == "li":
            line[:] = ["- "]
        line.append(node.text or "")
        for child in node:
            walk(child)
            if child.tag in ("td", "th"):
                line.append(" ")
            if child.tag == "br":
                finish(gap=False)
            line.append(child.tail or "")
        if block:
            finish(gap=not tight)
        if tag == "li":
            line.clear()

    walk(element)
    finish(gap=False)
    return "\n".join(blocks).strip() + "\n"


_PARTS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
_TYPES = {"n": 1, "v": 2, "a": 3, "r": 4, "s": 5}
# Lexicographer files in the order of their numbers (WordNet's lexnames(5WN)).
_LEXNAMES = """adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body
noun.cognition noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive
noun.object noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation
noun.shape noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication
verb.competition verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception
verb.possession verb.social verb.stative verb.weather adj.ppl"""


class _Synset(NamedTuple):
    terms: list[str]
    counts: list[int]  # how often each term occurs in this sense in WordNet's tagged texts
    lexname: str
    gloss: str
    hypernym: str  # name of a synset, or ""


def wordnet(root: pathlib.Path) -> Iterator[Document]:
    """WordNet 3.0, one document per synset: its definition.

    Taken are the synsets of which a sense occurs in WordNet's tagged texts, and, so that rarer things are
    there too, every fourth (by its offset) of the other noun synsets whose first term is one lower-case word.
    """
    folder = root / "usr/share/wordnet"
    # Sense keys without their last two parts, the head of a satellite, which data files do not hold.
    tagged: dict[str, int] = {}
    for line in (folder / "cntlist.rev").read_text("ascii").splitlines():
        key, _, count = line.split(" ")
        tagged[":".join(key.split(":")[:3])] = int(count)
    synsets: dict[str, _Synset] = {}
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text("ascii").splitlines():
            if not line.startswith("  "):  # the licence at the top
                name, synset = _synset(line, tagged)
                synsets[name] = synset
    for name, synset in synsets.items():
        terms, counts = synset.terms, synset.counts
        rare = name[0] == "n" and terms[0].isalpha() and terms[0].islower() and int(name[1:]) % 4 == 0
        definition, examples = _gloss(synset.gloss)
        if not (any(counts) or rare) or not definition:
            continue
        best = max(range(len(terms)), key=lambda index: counts[index])
        yield Document(
            text=definition,
            id=f"wordnet/{name}",
            source="wordnet",
            license="WordNet-3.0",
            language="en",
            meta={
                "term": terms[best],
                "part_of_speech": _PARTS[name[0]],
                "lexname": synset.lexname,
                "synonyms": [term for index, term in enumerate(terms) if index != best],
                "hypernym": synsets[synset.hypernym].terms[0] if synset.hypernym else "",
                "examples": examples[:2],
            },
        )


def _synset(line: str, tagged: dict[str, int]) -> tuple[str, _Synset]:
    """Reads a line of a data file: ``offset lexfile type words (word lex_id)* pointers (pointer)* | gloss``
    (wndb(5WN))."""
    head, _, gloss = line.partition(" | ")
    fields = head.split(" ")
    offset, lexfile, kind, words = fields[0], int(fields[1]), fields[2], int(fields[3], 16)
    terms, counts = [], []
    for index in range(4, 4 + 2 * words, 2):
        term = re.sub(r"\((?:a|p|ip)\)$", "", fields[index])  # where an adjective may stand
        key = f"{term.lower()}%{_TYPES[kind]}:{lexfile:02d}:{int(fields[index + 1], 16):02d}"
        terms.append(term.replace("_", " "))
        counts.append(tagged.get(key, 0))
    pointers = fields[4 + 2 * words :]
    above = [
        pointers[index + 2] + pointers[index + 1]
        for index in range(1, 4 * int(pointers[0]), 4)
        if pointers[index] in ("@", "@i")
    ]
    name = ("a" if kind == "s" else kind) + offset
    return name, _Synset(terms, counts, _LEXNAMES.split()[lexfile], gloss.strip(), above[0] if above else "")


def _gloss(gloss: str) -> tuple[str, list[str]]:
    """Definition and quoted examples of a gloss: ``definition; more of it; "an example"; "another"``."""
    examples = [example.strip() for example in re.findall(r'"([^"]+)"', gloss)]
    definition = re.split(r';?\s*"', gloss, maxsplit=1)[0]
    return definition.strip(" ;,"), examples


_BUILDERS = {
    "bible-kjv": ("bible-kjv-text", bible),
    "python-doc": ("python3.11-doc", python_doc),
    "apache-doc": ("apache2-doc", apache_doc),
    "wordnet": ("wordnet-base", wordnet),
}


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--debs", type=pathlib.Path, required=True, help="folder with the .deb files")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent)
    arguments = parser.parse_args()
    for name, (package, build) in _BUILDERS.items():
        found = sorted(arguments.debs.glob(f"{package}_*.deb"))
        if not found:
            raise SystemExit(f"no {package}_*.deb in {arguments.debs}: apt-get download {package}")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg-deb", "-x", found[-1], folder], check=True)
            path = arguments.output / f"{name}.jsonl.zst"
            documents = list(build(pathlib.Path(folder)))
            write_documents(path, documents, level=19)
        characters = sum(len(document.text) for document in documents)
        sizes = f"{len(documents)} documents, {characters} characters, {path.stat().st_size} bytes"
        print(f"{name}: {sizes} from {found[-1].name}")


if __name__ == "__main__":
    main()
