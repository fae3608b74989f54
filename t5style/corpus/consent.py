"""Filter by what owners say about the use of their pages: robots.txt, ai.txt, TDM reservation, page tags."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import html
import json
import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from t5style.corpus.document import Document, document_files, open_lines, read_documents
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

# Names that site owners use to refuse the training of models (Longpre et al. 2024, "Consent in Crisis"); a
# file that names none of them speaks to them by "*".
AGENTS = ("CCBot", "GPTBot", "ClaudeBot", "Google-Extended", "Applebot-Extended", "meta-externalagent")

_FILES = {"robots.txt": "robots.txt", "ai.txt": "ai.txt", "tdmrep.json": "tdm-reservation"}
_PAGE = ("noai", "noimageai", "noindex", "noarchive", "nosnippet")
_KNOWN = ("robots.txt", "ai.txt", "tdm-reservation", "content-usage", *_PAGE)
_HEAD = 1 << 17  # characters of a page in which its tags are looked for
_META = re.compile(r"<meta\s[^>]{1,1000}>", re.I)
_ATTRIBUTE = re.compile(r"""([\w:-]+)\s*=\s*("[^"]*"|'[^']*')""")


@dataclasses.dataclass(frozen=True)
class Consent:
    """Drops documents whose owners do not want them used to train models.

    What was saved beside the crawl is read from ``files``: a folder with a folder of each host's files
    (``example.com/robots.txt``, ``ai.txt``, ``tdmrep.json``) or with ``example.com.txt`` for its robots.txt;
    or files of documents (Parquet, JSON lines) whose URLs end in these names. What came with the page is read
    from its meta tags, where the document is still markup, and from ``meta``: "robots" (the tag's content),
    "tdm-reservation", and "headers" (HTTP headers, for X-Robots-Tag, TDM-Reservation and Content-Usage); keys
    in either case, with "-" or "_". Nothing is fetched.

    Attributes:
      files: see above. A host's ``www.`` is the same host.
      agents: names by which robots.txt is asked; one refusal is enough.
      honour: which signals count. "robots.txt" (RFC 9309); "ai.txt" (Spawning: the same format, asked for
        "*"); "tdm-reservation" (W3C TDMRep: file, header or tag); "content-usage" (IETF AIPREF:
        ``train-ai=n``); and page directives: "noai", "noimageai" (images only), "noindex", "noarchive",
        "nosnippet".
      unknown: "keep" or "drop" documents of hosts without a robots.txt in ``files``, and those without a URL.
    """

    files: Sequence[str] = ()
    agents: Sequence[str] = AGENTS
    honour: Sequence[str] = ("robots.txt", "ai.txt", "tdm-reservation", "content-usage", "noai", "noindex")
    unknown: str = "keep"

    def __post_init__(self) -> None:
        for name in ("files", "agents", "honour"):
            value = getattr(self, name)
            if isinstance(value, str):
                raise UserError(f"Consent.{name} must be a list, not the string {value!r}: write [{value!r}]")
        if not self.honour:
            raise UserError(f"Consent.honour is empty; choose from {', '.join(_KNOWN)}")
        if strange := [signal for signal in self.honour if signal not in _KNOWN]:
            raise UserError(
                f"Consent.honour: there is no signal {strange[0]!r}; there are {', '.join(_KNOWN)}"
            )
        if "robots.txt" in self.honour and not self.agents:
            raise UserError("Consent.agents is empty: robots.txt must be asked by some name, such as 'CCBot'")
        if self.unknown not in ("keep", "drop"):
            raise UserError(f"Consent.unknown must be 'keep' or 'drop', not {self.unknown!r}")
        if self.unknown == "drop" and not (self.files and "robots.txt" in self.honour):
            raise UserError(
                "Consent.unknown='drop' needs files, and 'robots.txt' in honour: it would drop all"
            )

    def inputs(self) -> Sequence[str]:
        """What decides the result besides the fields."""
        return self.files

    def __call__(self, document: Document) -> Document | Drop:
        if refusal := self._page(_said(document)):
            return refusal
        host, url = _host(document.url), document.url
        found = False
        for place in self.files:
            for name, signal in _FILES.items():
                if signal not in self.honour or (content := _site_file(place, host, name)) is None:
                    continue
                found = found or name == "robots.txt"
                if name == "tdmrep.json":
                    if location := _reserved(content, url):
                        return Drop("tdm reservation", f"tdmrep.json of {host}, {location}")
                    continue
                for agent in self.agents if name == "robots.txt" else ("*",):
                    if not _robots(content).can_fetch(url, agent):
                        return Drop(f"disallowed by {name}", f"{agent} at {url}")
        if self.unknown == "drop" and not found:
            return Drop("no robots.txt known", host)
        return document

    def _page(self, values: Mapping[str, str]) -> Drop | None:
        for name in ("robots", "x-robots-tag"):
            if refused := sorted(self._directives(values.get(name, "")) & set(self.honour)):
                return Drop(f"page says {refused[0]}", f"{name}: {values[name]}")
        if "tdm-reservation" in self.honour and re.search(
            r"\b1\b|^true$", values.get("tdm-reservation", ""), re.I
        ):
            return Drop("tdm reservation", f"of the page: {values['tdm-reservation']}")
        usage = values.get("content-usage", "")
        if "content-usage" in self.honour and re.search(r"\btrain-ai\s*=\s*n\b", usage, re.I):
            return Drop("content usage", usage)
        return None

    def _directives(self, value: str) -> set[str]:
        """Those of a robots tag or header that speak to all or to ``agents``: "noai, ccbot: noindex"."""
        agents = {"*", *(agent.lower() for agent in self.agents)}
        result = set()
        speaks = True
        for item in re.split(r"[,;\n]", value.lower()):
            name, colon, rest = item.partition(":")
            # "unavailable_after: date" and "max-snippet: 5" are directives with a value, no agents.
            if colon and not name.strip().startswith(("unavailable", "max-")):
                speaks, item = name.strip() in agents, rest
            if speaks:
                result |= {item.strip()}
        return result | {"noindex"} if "none" in result else result


def _said(document: Document) -> dict[str, str]:
    """What a page's headers and tags say, by name; several values of a name joined by commas."""
    headers = document.meta.get("headers")
    pairs = [*document.meta.items(), *(headers.items() if isinstance(headers, Mapping) else ())]
    if document.meta.get("format") == "html":
        for tag in _META.findall(document.text[:_HEAD]):
            attributes = {name.lower(): html.unescape(value[1:-1]) for name, value in _ATTRIBUTE.findall(tag)}
            pairs.append((attributes.get("name", ""), attributes.get("content", "")))
    values: dict[str, str] = {}
    for key, value in pairs:
        name = key.lower().replace("_", "-")
        if name in ("robots", "x-robots-tag", "tdm-reservation", "content-usage"):
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            values[name] = f"{values[name]}, {text}" if name in values else text
    return values


def _host(url: str) -> str:
    try:
        return (urllib.parse.urlsplit(url).hostname or "").removeprefix("www.") if "://" in url else ""
    except ValueError:
        return ""


@functools.lru_cache(maxsize=16384)
def _site_file(place: str, host: str, name: str) -> str | None:
    """What a host's file says; None if it is not there."""
    # A host is used as a file name: it must not lead elsewhere.
    if not host or "/" in host or host.startswith("."):
        return None
    folder = epath.Path(os.path.expanduser(place))
    if not _is_folder(place):
        return _by_host(place).get((host, name))
    names = [f"{prefix}{host}/{name}" for prefix in ("", "www.")]
    if name == "robots.txt":
        names += [f"{prefix}{host}.txt" for prefix in ("", "www.")]
    for candidate in names:
        if (file := folder / candidate).exists():
            with open_lines(file) as stream:
                # RFC 9309, section 2.5: at least 500 KiB are to be read.
                return stream.read(1 << 20).decode("utf-8", "replace")
    return None


@functools.lru_cache(maxsize=64)
def _is_folder(place: str) -> bool:
    """Whether the files are one by one in a folder; else they are documents."""
    path = epath.Path(os.path.expanduser(place))
    if path.is_dir():
        try:
            return not document_files(path)
        except UserError:
            return True
    return False


@functools.lru_cache(maxsize=4)
def _by_host(place: str) -> dict[tuple[str, str], str]:
    return {
        (_host(document.url), name): document.text
        for document in read_documents(place)
        if (name := urllib.parse.urlsplit(document.url).path.rpartition("/")[2].lower()) in _FILES
    }


@functools.lru_cache(maxsize=4096)
def _robots(content: str) -> Any:
    try:
        import protego
    except ImportError as error:
        raise UserError("to read robots.txt the package protego is needed: pip install protego") from error
    return protego.Protego.parse(content)


def _reserved(content: str, url: str) -> str:
    """The location of a tdmrep.json (W3C TDM Reservation Protocol, section 6.1) that reserves a URL's path;
    the first that fits decides. Empty if none does.
    """
    try:
        rules = json.loads(content)
    except ValueError:
        return ""
    path = urllib.parse.urlsplit(url).path or "/"
    for rule in rules if isinstance(rules, list) else []:
        location = str(rule.get("location", "")) if isinstance(rule, dict) else ""
        pattern = location if "*" in location or location.endswith("$") else f"{location}*"
        if location and fnmatch.fnmatchcase(path, pattern.rstrip("$")):
            return location if str(rule.get("tdm-reservation")) == "1" else ""
    return ""
