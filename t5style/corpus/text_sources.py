"""Files that are one document each: plain text, Markdown, source code, and the text of PDF files."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterator, Sequence
from typing import Any

from t5style.corpus import charset
from t5style.corpus.document import Document, open_lines, valid
from t5style.corpus.locations import Entry
from t5style.corpus.parts import FileSource, Quarantined, check_paths, check_positive, plain_name, suffix
from t5style.run_dir import UserError

PLAIN = ("", ".txt", ".text", ".rst", ".org", ".adoc", ".log", ".srt")
MARKDOWN = (".md", ".markdown", ".mkd", ".qmd", ".rmd")
# Ends of file names, and their languages as GitHub's linguist calls them.
_LANGUAGES = {
    "Ada": "adb ads", "Assembly": "asm s", "Awk": "awk", "Batchfile": "bat cmd", "C": "c h",
    "C#": "cs", "C++": "cc cpp cxx hh hpp hxx", "CMake": "cmake", "CSS": "css", "Clojure": "clj cljs",
    "CoffeeScript": "coffee", "Common Lisp": "lisp lsp", "Cuda": "cu cuh", "D": "d", "Dart": "dart",
    "Elixir": "ex exs", "Elm": "elm", "Emacs Lisp": "el", "Erlang": "erl hrl", "F#": "fs fsi fsx",
    "Fortran": "f f03 f08 f77 f90 f95 for", "GLSL": "frag glsl vert", "Go": "go", "GraphQL": "graphql",
    "Groovy": "gradle groovy", "HCL": "hcl tf", "Haskell": "hs lhs", "INI": "cfg ini", "Java": "java",
    "JavaScript": "cjs js jsx mjs", "Julia": "jl", "Kotlin": "kt kts", "Less": "less", "Lua": "lua",
    "MATLAB": "m", "Makefile": "mak mk", "Nim": "nim", "Nix": "nix", "OCaml": "ml mli", "PHP": "php",
    "Pascal": "pas pp", "Perl": "pl pm", "PowerShell": "ps1 psm1", "Prolog": "pro",
    "Protocol Buffer": "proto", "Python": "gin py pyi pyx", "R": "r", "Racket": "rkt", "Ruby": "rake rb",
    "Rust": "rs", "SCSS": "scss",
    "SQL": "sql", "Scala": "sbt scala", "Scheme": "scm ss", "Shell": "bash sh zsh", "Solidity": "sol",
    "Stan": "stan", "Swift": "swift", "SystemVerilog": "sv svh", "TOML": "toml", "Tcl": "tcl",
    "TeX": "bib cls sty tex", "TypeScript": "cts mts ts tsx", "VHDL": "vhd vhdl", "Verilog": "v vh",
    "Vim Script": "vim", "Visual Basic": "bas vb", "Vue": "vue", "WebAssembly": "wat", "XML": "xml xsd xsl",
    "YAML": "yaml yml", "Zig": "zig",
}  # fmt: skip
CODE = {f".{end}": language for language, ends in _LANGUAGES.items() for end in ends.split()}
_CODE_NAMES = {"makefile": "Makefile", "gnumakefile": "Makefile", "dockerfile": "Dockerfile"} | {
    "cmakelists.txt": "CMake", "rakefile": "Ruby", "gemfile": "Ruby", "jenkinsfile": "Groovy"
}  # fmt: skip


def programming_language(path: str) -> str:
    """The language that the file's name says its code is in; empty where it is no name of code."""
    return _CODE_NAMES.get(plain_name(path)) or CODE.get(suffix(path), "")


def is_text(path: str) -> bool:
    """Whether the file's name is one of text, Markdown or code."""
    end = suffix(path)
    return end in PLAIN or end in MARKDOWN or bool(programming_language(path))


def read_whole(path: str, limit: int) -> bytes | Quarantined:
    """What is in a plain or compressed file, if it is something and no more than ``limit`` bytes."""
    with open_lines(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        return Quarantined(path, f"byte {limit}", "too large", f"more than max_bytes={limit}")
    return data or Quarantined(path, "byte 0", "empty file")


@dataclasses.dataclass(frozen=True)
class TextFiles(FileSource):
    """Text: each file is a document. May be compressed (.gz, .zst).

    Where the name says so, meta has ``format`` "markdown", or "code" with ``programming_language``.

    Attributes:
      paths: files, folders or patterns (``**`` goes through folders); folders are read with all they hold.
      source: name of the collection.
      license: licence of the texts.
      language: ISO 639-1 code.
      encoding: of the files; "detect" finds it out for each: UTF-8, what a byte-order mark says, or the
        likeliest of the web's legacy encodings. Other than UTF-8 it is noted in meta, because it may be a
        guess. What cannot be read so is quarantined.
      max_bytes: larger files, which would have to be held in memory whole, are quarantined.
    """

    paths: Sequence[str]
    source: str = "text"
    license: str = ""
    language: str = ""
    encoding: str = charset.DETECT
    max_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        check_paths(self.paths, "TextFiles")
        check_positive(self.max_bytes, "TextFiles.max_bytes")
        charset.check(self.encoding, "TextFiles")

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        data = read_whole(path, self.max_bytes)
        if isinstance(data, Quarantined):
            yield data
            return
        try:
            decoded = charset.decode(data, self.encoding)
        except charset.Undecodable as error:
            yield Quarantined(path, f"byte {error.offset}", error.reason, error.detail)
            return
        meta: dict[str, Any] = {"file": path} | decoded.meta
        if suffix(path) in MARKDOWN:
            meta["format"] = "markdown"
        elif program := programming_language(path):
            meta |= {"format": "code", "programming_language": program}
        yield Document(
            valid(decoded.text),  # UTF-7 can say lone surrogates
            id,
            source=self.source,
            url=path,
            license=self.license,
            language=self.language,
            meta=meta,
        )


@dataclasses.dataclass(frozen=True)
class PdfFiles(FileSource):
    """The text of PDF files, each a document, its pages parted by form feeds; needs ``t5style[pdf]``.

    The file's own creation date becomes the time, its title ``meta["title"]``. Files whose text is a picture
    of text, and encrypted ones, are quarantined.

    Attributes:
      paths: files, folders or patterns; of a folder, all it holds.
      source: name of the collection.
      license: licence of the texts.
      language: ISO 639-1 code.
      max_bytes: larger files are quarantined.
    """

    paths: Sequence[str]
    source: str = "pdf"
    license: str = ""
    language: str = ""
    max_bytes: int = 256 << 20

    def __post_init__(self) -> None:
        check_paths(self.paths, "PdfFiles")
        check_positive(self.max_bytes, "PdfFiles.max_bytes")

    def check_installed(self, entries: Sequence[Entry]) -> None:
        if importlib.util.find_spec("pypdf") is None:
            raise UserError(
                f"{entries[0].path} is a PDF file, whose text the package pypdf reads: "
                "pip install 't5style[pdf]', or name only other files"
            )

    def read(self, path: str, id: str) -> Iterator[Document | Quarantined]:
        self.check_installed([Entry(path, id, 0, 0)])
        import io
        import logging

        import pypdf

        logging.getLogger("pypdf").setLevel(logging.ERROR)
        data = read_whole(path, self.max_bytes)
        if isinstance(data, Quarantined):
            yield data
            return
        pages: list[str] = []
        try:
            reader = pypdf.PdfReader(io.BytesIO(data))
            if reader.is_encrypted and not reader.decrypt(""):
                yield Quarantined(path, "", "encrypted PDF", "it opens only with a password")
                return
            for page in reader.pages:
                pages.append(page.extract_text())
        except Exception as error:  # pypdf lets through whatever a damaged file makes fail
            yield Quarantined(path, f"page {len(pages) + 1}", "damaged PDF", valid(repr(error)))
            return
        if not any(page.strip() for page in pages):
            yield Quarantined(path, "", "PDF without text", f"{len(pages)} pages of pictures: needs OCR")
            return
        meta: dict[str, Any] = {"file": path, "format": "pdf", "pages": len(pages)}
        time = ""
        try:
            information = reader.metadata
            if information and information.title:
                meta["title"] = valid(str(information.title))
            if information and information.creation_date:
                time = information.creation_date.isoformat()
        except Exception:  # a date or a title in no known form is no reason to lose the text
            pass
        yield Document(
            valid("\f".join(pages)), id, self.source, path, self.license, self.language, meta, time
        )
