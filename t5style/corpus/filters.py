"""Filters by what is known about a document: its licence, its URL, and the words that it uses.

See also consent.py (whose owners do not want it used), spam.py and classifier.py.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import functools
import hashlib
import ipaddress
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
from etils import epath

from t5style.corpus.document import Document, open_lines
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError, expand

# ------------------------------------------------------------------------------------------------- licences

_UNKNOWN = {"", "unknown", "none", "noassertion", "other", "n/a", "na", "null", "unspecified", "?", "-"}
_NUMBER = re.compile(r"(\d+)(?:\.(\d+))?")
# SPDX identifiers by what their usual names hold; the first that matches. "{}" stands for the version.
_NAMES = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"\bcc[ -]?(0|zero)\b|publicdomain/zero|creative commons zero", "CC0-1.0"),
        (r"public ?domain|^pd$", "public-domain"),
        (r"apache", "Apache-{}"),
        (r"\bmit\b|\bexpat\b", "MIT"),
        (r"\b0bsd\b|zero.?clause bsd", "0BSD"),
        (r"(?=.*\bbsd\b)(?=.*(\b4\b|original))", "BSD-4-Clause"),
        (r"(?=.*\bbsd\b)(?=.*(\b3\b|new|revised|modified))", "BSD-3-Clause"),
        (r"(?=.*bsd\b)(?=.*(\b2\b|simplified|freebsd))", "BSD-2-Clause"),
        (r"\bmpl|mozilla public", "MPL-{}"),
        (r"\bepl\b|eclipse public", "EPL-{}"),
        (r"\bodc[ -]?by\b|open data commons attribution", "ODC-By-1.0"),
        (r"\bodbl\b|open database licen", "ODbL-1.0"),
        (r"\bpddl\b", "PDDL-1.0"),
        (r"\bunlicen[sc]e\b", "Unlicense"),
        (r"\bisc\b", "ISC"),
        (r"\bpsf\b|python software foundation", "PSF-2.0"),
        (r"\bpostgresql\b", "PostgreSQL"),
        (r"\bzlib\b", "Zlib"),
        (r"\bwtfpl\b", "WTFPL"),
        (r"\bartistic\b", "Artistic-{}"),
    )
]
_GPL = re.compile(
    r"\b(a|l)?gpl(?=[\s\dv.-]|$)|\bgnu\b.*?\b(affero|lesser|library)?\b ?general public licen[sc]e"
)
_CC = re.compile(r"\bcc[ -]?by|creative commons(?! zero)|creativecommons\.org/licenses")
_CC_PARTS = (
    ("BY", re.compile(r"\bby|cc-?by|attribution")),
    ("NC", re.compile(r"\bnc\b|non[ -]?commercial")),
    ("ND", re.compile(r"\bnd\b|no[ -]?deriv")),
    ("SA", re.compile(r"\b(by)?sa\b|share[ -]?alike")),
)
_LATER = re.compile(r",?[ -]+or[ -](any[ -])?(later|newer)([ -]versions?)?|\+")


def spdx(name: str) -> str:
    """The SPDX identifier of a licence by its usual name ('Apache 2.0', 'CC BY-SA 4.0', 'GPLv3+', a URL of
    Creative Commons); an unknown name as it is, with hyphens for spaces. Licences of Creative
    Commons lose their country, and 'GPL-3.0' is 'GPL-3.0-only'.
    """
    plain = " ".join(name.replace("_", " ").split())
    text = plain.lower()
    number = _NUMBER.search(text)
    version = f"{number[1]}.{number[2] or 0}" if number else ""
    if _CC.search(text):
        parts = ["CC", *(part for part, words in _CC_PARTS if words.search(text))]
        return "-".join([*parts, version] if version else parts)
    if match := _GPL.search(text):
        letter = match[1] or {"affero": "a", "lesser": "l", "library": "l"}.get(match[2], "")
        kind = f"{letter.upper()}GPL"
        if not version:
            return kind
        return f"{kind}-{version}-{'or-later' if _LATER.search(text) else 'only'}"
    for pattern, identifier in _NAMES:
        if pattern.search(text):
            return identifier.format(version).rstrip("-")
    return plain.replace(" ", "-")


def _holds(expression: str, test: Callable[[str], bool]) -> bool:
    """Whether a licence expression (SPDX 2.3, annex D) passes: one side of OR must, both sides of AND; an
    exception after WITH only adds permissions. 'MIT/Apache-2.0' is OR, as in the Rust registry; ';' is AND.
    """
    text = expression if "://" in expression else re.sub(r"(?<=\w)/(?=\w)", " OR ", expression)
    text = _LATER.sub("+", text).replace(";", " AND ")
    words = re.split(r"(\(|\)|\b(?:AND|OR|WITH)\b)", text, flags=re.I)
    tokens = [word.strip() for word in words if word.strip()]

    def either() -> bool:
        result = both()
        while tokens and tokens[0].upper() == "OR":
            tokens.pop(0)
            result = both() or result
        return result

    def both() -> bool:
        result = one()
        while tokens and tokens[0].upper() in ("AND", "WITH"):
            adds = tokens.pop(0).upper() == "WITH" and "exception" in "".join(tokens[:1]).lower()
            result = (one() or adds) and result
        return result

    def one() -> bool:
        token = tokens.pop(0) if tokens else ""
        if token != "(":
            return test(spdx(token))
        result = either()
        if tokens and tokens[0] == ")":
            tokens.pop(0)
        return result

    return either()


@functools.lru_cache(maxsize=4096)
def _license_problem(license: str, allow: tuple[str, ...], deny: tuple[str, ...]) -> str:
    def among(identifier: str, patterns: tuple[str, ...]) -> bool:
        found = identifier.lower()
        for pattern in patterns:
            wanted = (pattern if "*" in pattern else spdx(pattern)).lower()
            # A name without a version stands for all of them.
            versions = rf"{re.escape(wanted)}-\d[\d.]*(-only|-or-later)?"
            if fnmatch.fnmatchcase(found, wanted) or re.fullmatch(versions, found):
                return True
        return False

    # A user of "A or B" chooses, so a denied licence beside another one denies nothing.
    if deny and not _holds(license, lambda identifier: not among(identifier, deny)):
        return "license denied"
    if allow and not _holds(license, lambda identifier: among(identifier, allow)):
        return "license not allowed"
    return ""


@dataclasses.dataclass(frozen=True)
class Licenses:
    """Keeps documents by their licence.

    Attributes:
      allow: names of licences, as SPDX or as usually written; empty: all. A name without a version stands for
        all versions; ``*`` stands for anything ('CC-BY*').
      deny: those to drop, written likewise ('*-NC*').
      unknown: "keep" or "drop" documents that do not say.
    """

    allow: Sequence[str] = ()
    deny: Sequence[str] = ()
    unknown: str = "drop"

    def __post_init__(self) -> None:
        _check_lists(self, "allow", "deny")
        if self.unknown not in ("keep", "drop"):
            raise UserError(f"Licenses.unknown must be 'keep' or 'drop', not {self.unknown!r}")
        if not self.allow and not self.deny and self.unknown == "keep":
            raise UserError("Licenses drops nothing: give allow, deny or unknown='drop'")
        if both := sorted({spdx(name) for name in self.allow} & {spdx(name) for name in self.deny}):
            raise UserError(f"Licenses both allows and denies {both[0]}")

    def __call__(self, document: Document) -> Document | Drop:
        if document.license.strip().lower() in _UNKNOWN:
            return document if self.unknown == "keep" else Drop("license unknown")
        problem = _license_problem(document.license, tuple(self.allow), tuple(self.deny))
        return Drop(problem, document.license) if problem else document


# ----------------------------------------------------------------------------------------------------- URLs


def _host_and_path(url: str) -> tuple[str, str]:
    """Host in lower case, punycode, without ``www.``, port and user; path and query. Both empty if none."""
    try:
        parts = urllib.parse.urlsplit(url if "://" in url else f"//{url}")
        host = (parts.hostname or "").rstrip(".").removeprefix("www.")
        if not host.isascii():
            host = host.encode("idna").decode()
    except ValueError:  # UnicodeError, of a label that is empty or too long, is one
        return "", ""
    return host, parts.path + (f"?{parts.query}" if parts.query else "")


def _keys(host: str, path: str) -> Iterator[str]:
    """What may be on a block list: the host, the domains it is in, each with each beginning of the path."""
    segments = [match.end() for match in re.finditer(r"[^/?]+(?=[/?]|$)", path)]
    labels = host.split(".")
    address = host.replace(".", "").isdigit()
    for first in range(1 if address else len(labels) - 1):
        domain = ".".join(labels[first:])
        yield domain
        for end in (*segments, len(path)):
            if path[:end].strip("/"):
                yield domain + path[:end].rstrip("/")


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()


def _entries(line: str) -> Iterator[str]:
    """Keys in a line of a block list: domain, URL, ``0.0.0.0 domain`` (hosts) or ``||domain^`` (Adblock)."""
    words = line.split("#", 1)[0].split()
    if not words or words[0][0] in "![":
        return
    if len(words) > 1:
        try:
            ipaddress.ip_address(words[0])
            words = words[1:]
        except ValueError:
            words = words[:1]
    for word in words:
        host, path = _host_and_path(word.lstrip("|*.").rstrip("^"))
        if "." in host:  # not localhost, and no list blocks all of .com
            yield host + path.rstrip("/")


@functools.lru_cache(maxsize=4)
def _block_list(files: tuple[str, ...], domains: tuple[str, ...]) -> np.ndarray:
    """Sorted 64-bit hashes of all keys: 8 bytes for each, where a set of strings takes 100 and more."""
    digests = bytearray()
    for domain in domains:
        for key in _entries(domain):
            digests += _digest(key)
    for file in files:
        for path in _block_files(file):
            with open_lines(path) as lines:
                for line in lines:
                    for key in _entries(line.decode("utf-8", "replace")):
                        digests += _digest(key)
    return np.unique(np.frombuffer(bytes(digests), np.uint64))


def _block_files(name: str) -> list[epath.Path]:
    path = epath.Path(os.path.expanduser(name))
    if path.is_dir():
        files = [path / part for part in ("domains", "urls") if (path / part).exists()]
    else:
        files = [path] if path.exists() else expand(name)
    if not files:
        raise UserError(
            f"Urls.files: there is no block list at {name!r}: a file with a domain or URL on each line, or a "
            "folder with the files 'domains' and 'urls'"
        )
    return files


@dataclasses.dataclass(frozen=True)
class Urls:
    """Drops documents by their URL, as RefinedWeb does (Penedo et al. 2023, appendix G.1). Documents without
    a URL pass.

    Attributes:
      domains: domains ('example.com', with all below it) or URLs ('example.com/forum', with all below it).
      files: block lists of such lines, also in the format of hosts files or Adblock, .gz and .zst too; or
        folders with files ``domains`` and ``urls``, such as a category of the UT1 blacklists.
      words: any of these words in a URL drops it; words are what stands between signs.
      soft_words: so many of these, ``max_soft_words`` + 1, drop it.
      parts: any of these drops it wherever it stands, inside words too.
      max_soft_words: see above.
    """

    domains: Sequence[str] = ()
    files: Sequence[str] = ()
    words: Sequence[str] = ()
    soft_words: Sequence[str] = ()
    parts: Sequence[str] = ()
    max_soft_words: int = 1

    def __post_init__(self) -> None:
        _check_lists(self, "domains", "files", "words", "soft_words", "parts")
        if not (self.domains or self.files or self.words or self.soft_words or self.parts):
            raise UserError("Urls drops nothing: give domains, files, words, soft_words or parts")
        for domain in self.domains:
            if not any(_entries(domain)):
                raise UserError(f"Urls.domains: {domain!r} is neither a domain nor a URL")
        if self.max_soft_words < 0:
            raise UserError(f"Urls.max_soft_words must be 0 or more, not {self.max_soft_words}")

    def inputs(self) -> Sequence[str]:
        """What decides the result besides the fields."""
        return self.files

    def __call__(self, document: Document) -> Document | Drop:
        host, path = _host_and_path(document.url) if "://" in document.url else ("", "")
        if not host:
            return document
        blocked = _block_list(tuple(self.files), tuple(self.domains))
        if len(blocked):
            keys = list(_keys(host, path))
            hashes = np.frombuffer(b"".join(map(_digest, keys)), np.uint64)
            places = np.minimum(np.searchsorted(blocked, hashes), len(blocked) - 1)
            if (hit := np.flatnonzero(blocked[places] == hashes)).size:
                return Drop("url on a block list", f"{keys[hit[0]]} blocks {document.url}")
        if self.words or self.soft_words or self.parts:
            url = urllib.parse.unquote(document.url).lower()
            words = set(re.findall(r"[^\W_]+", url))
            if found := sorted(words & {word.lower() for word in self.words}):
                return Drop("word in the url", f"{found[0]} in {document.url}")
            if len(found := sorted(words & {word.lower() for word in self.soft_words})) > self.max_soft_words:
                return Drop("words in the url", f"{', '.join(found)} in {document.url}")
            if found := [part for part in self.parts if part.lower() in url]:
                return Drop("word in the url", f"{found[0]} in {document.url}")
        return document


# ---------------------------------------------------------------------------------------------------- words

# Languages that put no space between words: C4 (Raffel et al. 2020) takes ja, th and zh, these are written so
# too.
_UNSPACED = {"zh", "ja", "th", "lo", "km", "my", "bo", "yue", "wuu"}
_WORDS = re.compile(r"\w+")
_LATIN = re.compile(r"[a-z0-9]+")


class _Matcher:
    """Finds terms in lower-case text.

    A term stands apart: no letter, digit or sign that belongs to a word touches it. In languages without
    spaces terms of their own signs are found wherever they are, and Latin ones stand apart from Latin
    letters.
    """

    def __init__(self, terms: Iterable[str], unspaced: bool) -> None:
        self._pattern = _LATIN if unspaced else None
        self._by_word = collections.defaultdict(list)  # first word -> terms that stand apart
        anywhere = []
        for term in sorted(set(terms), key=lambda term: (-len(term), term)):
            words = self._words(term)
            if words and (term.isascii() or not unspaced):
                self._by_word[words[0]].append(term)
            else:
                anywhere.append(re.escape(term))
        self._anywhere = re.compile("|".join(anywhere)) if anywhere else None

    def _words(self, text: str) -> list[str]:
        return (self._pattern or (_WORDS if text.isascii() else _marked_words())).findall(text)

    def find(self, text: str) -> tuple[int, int]:
        """The number of occurrences, and of characters in them; a term within another counts too."""
        found = self._anywhere.findall(text) if self._anywhere else []
        count, characters = len(found), sum(map(len, found))
        if self._by_word:
            words = self._words(text)
            # Most texts are done after the intersection, and nearly all of the work so far is C's.
            for word in self._by_word.keys() & set(words):
                for term in self._by_word[word]:
                    times = words.count(term) if term == word else self._apart(text, term)
                    count, characters = count + times, characters + times * len(term)
        return count, characters

    def _apart(self, text: str, term: str) -> int:
        """Occurrences of a term of several words or with other signs."""
        count = 0
        place = text.find(term)
        while place >= 0:
            end = place + len(term)
            touched = self._joins(text[max(place - 1, 0) : place]) or self._joins(text[end : end + 1])
            count += not touched
            place = text.find(term, end)
        return count

    def _joins(self, character: str) -> bool:
        """Whether a character (or none) belongs to a word."""
        return bool(self._words(character))


@functools.cache
def _marked_words() -> re.Pattern[str]:
    """Words with vowel signs and the like, at which Python's \\w would end them."""
    marks = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "M")
    return re.compile(rf"[\w{marks}]+")


@functools.lru_cache(maxsize=64)
def _matcher(file: str, language: str, allow: tuple[str, ...]) -> _Matcher:
    path = epath.Path(os.path.expanduser(file))
    try:
        lines = path.read_bytes().decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise UserError(f"WordList.files: there is no file {file!r} for {language!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"WordList.files: {file!r} cannot be read as UTF-8 text ({error})") from error
    harmless = {_folded(term) for term in allow}
    terms = [term for line in lines if (term := _folded(line)) and term not in harmless]
    if not terms:
        raise UserError(f"WordList.files: {file!r} holds no words; it should have one on each line")
    return _Matcher(terms, language in _UNSPACED)


def _folded(term: str) -> str:
    return " ".join(unicodedata.normalize("NFC", term).lower().split())


@dataclasses.dataclass(frozen=True)
class WordList:
    """Drops documents that use words of a list, such as LDNOOBW's obscene ones.

    With the defaults a single word drops a document, as in C4 (Raffel et al. 2020, section 2.2); C4's lists
    drop much that is harmless (Dodge et al. 2021), so both limits may be raised. Both must be exceeded.

    Attributes:
      files: language (ISO 639-1) -> file of terms, one on each line, of one or more words.
      max_count: so many occurrences are let pass.
      max_share: so large a share of the text's characters may be such terms.
      allow: terms to leave out of the lists.
      default: language whose list is used for documents that do not say theirs; empty: they pass. Documents
        in a language without a list pass.
    """

    files: Mapping[str, str]
    max_count: int = 0
    max_share: float = 0.0
    allow: Sequence[str] = ()
    default: str = ""

    def __post_init__(self) -> None:
        _check_lists(self, "allow")
        if not isinstance(self.files, Mapping) or not self.files:
            raise UserError(
                f"WordList.files must map languages to files, as {{'en': 'en.txt'}}, not {self.files!r}"
            )
        if self.max_count < 0:
            raise UserError(f"WordList.max_count must be 0 or more, not {self.max_count}")
        if not 0 <= self.max_share < 1:
            raise UserError(f"WordList.max_share must be at least 0 and less than 1, not {self.max_share}")
        if self.default and self.default not in self.files:
            raise UserError(
                f"WordList.default={self.default!r} has no file; there are {', '.join(self.files)}"
            )

    def inputs(self) -> Sequence[str]:
        """What decides the result besides the fields."""
        return list(self.files.values())

    def __call__(self, document: Document) -> Document | Drop:
        language = re.split("[-_]", document.language.lower(), maxsplit=1)[0] or self.default
        if language not in self.files:
            return document
        matcher = _matcher(self.files[language], language, tuple(self.allow))
        count, characters = matcher.find(document.text.lower())
        share = characters / max(len(document.text), 1)
        if count <= self.max_count or share <= self.max_share:
            return document
        return Drop(f"words of the list for {language}", f"{count} occurrences, {share:.2%} of the text")


def _check_lists(stage: object, *names: str) -> None:
    for name in names:
        value = getattr(stage, name)
        if isinstance(value, str):
            raise UserError(
                f"{type(stage).__name__}.{name} must be a list, not the string {value!r}: write [{value!r}]"
            )
