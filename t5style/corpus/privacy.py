"""Personal data and secrets in text: found, and replaced by placeholders such as ``<EMAIL_ADDRESS>``.

A kind's placeholder is its name in capitals. Kinds:

- ``email_address``, ``phone_number``, ``ip_address`` (4 and 6), ``credit_card``, ``iban_code``;
- ``url_credentials``: the ``user:password`` of a URL;
- ``secret_key``: keys of known services, JSON web tokens, private keys in PEM, and values with mixed letters
  that are assigned to names such as ``api_key``;
- ``crypto_wallet``: Bitcoin addresses;
- numbers of states, named by country and number: ``us_ssn``, ``uk_nhs``, ``es_dni`` (also NIE),
  ``it_codice_fiscale``, and so on (``privacy_patterns.NATIONAL_IDS``).

Numbers are reported only where they pass their checks (privacy_checks.py). Where look and check together
still say little, a word that names the number must stand within 48 characters before it or 16 after it; a
telephone number without country or area code needs one among the five words before it.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import functools
import hashlib
import hmac
import ipaddress
import itertools
import os
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence

from t5style.corpus import privacy_patterns as patterns
from t5style.corpus.document import Document
from t5style.corpus.privacy_find import LONGEST, Plan, candidates, rules_of
from t5style.corpus.privacy_find import Span as Span
from t5style.corpus.privacy_patterns import KINDS
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

_KEY_BYTES = 16


def find(
    text: str,
    kinds: Sequence[str] = KINDS,
    countries: Sequence[str] | None = None,
    private_addresses: bool = False,
) -> list[Span]:
    """Finds personal data.

    Invisible characters inside (zero-width space, soft hyphen and the like) and other scripts' digits, dashes
    and spaces hide nothing.

    Args:
      text: any text; time is linear in its length.
      kinds: what to look for.
      countries: two letters each, such as "us", "uk": of the numbers of states only theirs; None: all.
      private_addresses: report IP addresses of private, loopback and other special networks too.

    Returns:
      Spans sorted by place, none overlapping.

    Raises:
      UserError: there is no such kind or country.
    """
    plan = _chosen(kinds, countries, private_addresses)
    return _find(text, plan)


def redact(
    text: str,
    kinds: Sequence[str] = KINDS,
    countries: Sequence[str] | None = None,
    private_addresses: bool = False,
) -> str:
    """The text with what ``find`` finds replaced by placeholders. Doing it twice changes nothing more."""
    plan = _chosen(kinds, countries, private_addresses)
    return _redact(text, plan, None)[0]


@dataclasses.dataclass(frozen=True)
class Redact:
    """The stage that redacts. It adds what it replaced to ``meta["pii"]``, a count for each kind.

    Attributes:
      kinds: what to replace.
      countries: two letters each: of the numbers of states only theirs; None: all.
      private_addresses: replace IP addresses of private, loopback and other special networks too.
      pseudonyms: the same value gets the same placeholder throughout every corpus with this key, and another
        value another one: ``<EMAIL_ADDRESS_3f2a91bc04de>`` (48 bits of HMAC-SHA256).
      key: where the secret key of the pseudonyms is, never the key itself: "env:NAME" or "file:PATH". Who
        has the key and a value can tell whether the value is in the corpus.
    """

    kinds: Sequence[str] = KINDS
    countries: Sequence[str] | None = None
    private_addresses: bool = False
    pseudonyms: bool = False
    key: str = "env:T5STYLE_PSEUDONYM_KEY"

    def __post_init__(self) -> None:
        self._plan()
        if self.pseudonyms:
            _read_key(self.key)

    def _plan(self) -> Plan:
        return _chosen(self.kinds, self.countries, self.private_addresses)

    def __call__(self, document: Document) -> Document | Drop:
        key = _read_key(self.key) if self.pseudonyms else None
        text, counts = _redact(document.text, self._plan(), key)
        if not counts:
            return document
        before = document.meta.get("pii")
        if isinstance(before, Mapping):
            counts.update(before)
        return dataclasses.replace(
            document, text=text, meta={**document.meta, "pii": dict(sorted(counts.items()))}
        )


@functools.cache
def _read_key(key: str) -> bytes:
    where, _, name = key.partition(":")
    if where not in ("env", "file") or not name:
        raise UserError(
            "Redact.key must say where the key is, 'env:NAME' or 'file:PATH', and never be the key itself"
        )
    if where == "env":
        value = os.environ.get(name, "").encode()
    else:
        try:
            value = pathlib.Path(name).expanduser().read_bytes().strip()
        except OSError as error:
            raise UserError(f"Redact.key: cannot read {name}: {error}") from error
    if len(value) < _KEY_BYTES:
        raise UserError(
            f"Redact.pseudonyms need a key of {_KEY_BYTES} bytes or more in {key!r}, which holds "
            f"{len(value)}; make one with: openssl rand -hex 32"
        )
    return value


def _chosen(kinds: Sequence[str], countries: Sequence[str] | None, private_addresses: bool) -> Plan:
    for name, value in (("kinds", kinds), ("countries", countries)):
        if isinstance(value, str):
            raise UserError(f"{name} must be a list, not the string {value!r}: write [{value!r}]")
    return _plan(tuple(kinds), None if countries is None else tuple(countries), private_addresses)


@functools.lru_cache(maxsize=64)
def _plan(kinds: tuple[str, ...], countries: tuple[str, ...] | None, private_addresses: bool) -> Plan:
    for kind in kinds:
        if kind not in KINDS:
            nearest = difflib.get_close_matches(kind, KINDS, 1, 0)[0]
            raise UserError(f"there is no kind {kind!r} of personal data; did you mean {nearest!r}?")
    wanted = frozenset(kinds)
    if countries is not None:
        known = sorted({kind[:2] for kind in patterns.NATIONAL_IDS})
        for country in countries:
            if country.lower() not in known:
                raise UserError(
                    f"there are no numbers of the country {country!r}; there are {', '.join(known)}"
                )
        chosen = {country.lower() for country in countries}
        wanted -= {kind for kind in patterns.NATIONAL_IDS if kind[:2] not in chosen}
    rules = tuple(rule for rule in patterns.NUMBERS if rule.kind in wanted)
    runs = tuple(rules_of(rule for rule in rules if n in rule.lengths) for n in range(LONGEST))
    grouped = tuple(rules_of(rule for rule in rules if min(rule.lengths) <= n) for n in range(LONGEST + 1))
    phones = "phone_number" in wanted
    codes = patterns.CODE_CHECKS.keys() | {"iban_code", "ip_address"}
    return Plan(wanted, runs, grouped, phones, bool(rules) or phones, bool(codes & wanted), private_addresses)


def _redact(text: str, plan: Plan, key: bytes | None) -> tuple[str, Counter[str]]:
    counts: Counter[str] = Counter()
    # A placeholder is shorter or longer than what it replaces, which may bring a number and the word that
    # names it together: again until nothing is found. Each round takes something away, so there is an end.
    while spans := _find(text, plan):
        pieces: list[str] = []
        place = 0
        for start, end, kind in spans:
            counts[kind] += 1
            pieces += (text[place:start], _placeholder(kind, text[start:end], key))
            place = end
        text = "".join(pieces) + text[place:]
    return text, counts


_SEPARATORS = re.compile(r"[\W_]+")
_VERBATIM = {"secret_key", "crypto_wallet", "url_credentials", "ip_address"}


def _placeholder(kind: str, value: str, key: bytes | None) -> str:
    if key is None:
        return f"<{kind.upper()}>"
    value = _fold(value)[0]
    if kind == "email_address":
        value = value.lower()
    elif kind == "ip_address":
        value = str(ipaddress.ip_address(value))
    elif kind not in _VERBATIM:
        value = _SEPARATORS.sub("", value).upper()
    digest = hmac.digest(key, f"{kind}\0{value}".encode("utf-8", "surrogatepass"), hashlib.sha256)
    return f"<{kind.upper()}_{digest[:6].hex()}>"


_INVISIBLE = re.compile("[\u00ad\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")


# Mathematical digits, apart from the others: a class within U+FFFF is a table, and fast.
_STYLED = re.compile("[\U0001d7ce-\U0001d7ff]")


@functools.cache
def _folding() -> tuple[re.Pattern[str], dict[str, str]]:
    """Characters that stand for an ASCII digit, space, dash or other sign, each with that."""
    table = {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
    table |= dict.fromkeys(
        "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000", " "
    )
    table |= dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63", "-")
    for code in range(0x660, 0x10000):
        if (digit := unicodedata.decimal(chr(code), None)) is not None:
            table[chr(code)] = str(digit)
    return re.compile("[" + "".join(map(re.escape, table)) + "]"), table


def _fold(text: str) -> tuple[str, list[int]]:
    """The text as patterns see it, and where something was left out (see ``_restore``)."""
    if text.isascii():
        return text, []
    gone: list[int] = []
    if _INVISIBLE.search(text):
        gone = [match.start() - count for count, match in enumerate(_INVISIBLE.finditer(text))]
        text = _INVISIBLE.sub("", text)
    pattern, table = _folding()
    text = pattern.sub(lambda match: table[match[0]], text)
    return _STYLED.sub(lambda match: str(unicodedata.decimal(match[0])), text), gone


def _find(text: str, plan: Plan) -> list[Span]:
    folded, gone = _fold(text)
    found = candidates(folded, plan)
    if not found:
        return []
    if len(found) > 1:
        found = _without_overlaps(found)
    if gone:
        return [
            Span(start + bisect.bisect_right(gone, start), end + bisect.bisect_right(gone, end - 1), kind)
            for start, end, kind in found
        ]
    return found


_RANK = {
    kind: rank
    for rank, kind in enumerate(
        (
            "secret_key",
            "url_credentials",
            "crypto_wallet",
            "email_address",
            "iban_code",
            "ip_address",
            "credit_card",
            *patterns.NATIONAL_IDS,
            "phone_number",
        )
    )
}


def _without_overlaps(found: list[Span]) -> list[Span]:
    """Sorted; of overlapping spans the one whose kind says more, then the longer."""
    found.sort()
    if all(one.end <= other.start for one, other in itertools.pairwise(found)):
        return found
    # Groups of spans that hang together, resolved one by one.
    result: list[Span] = []
    group: list[Span] = []
    end = 0
    for span in [*found, Span(len(found) + max(span.end for span in found), 0, "")]:
        if group and span.start >= end:
            chosen: list[Span] = []  # sorted
            for one in sorted(group, key=lambda one: (_RANK[one.kind], one.start - one.end, one.start)):
                place = bisect.bisect(chosen, one)
                after = place == len(chosen) or one.end <= chosen[place].start
                if after and (place == 0 or chosen[place - 1].end <= one.start):
                    chosen.insert(place, one)
            result += chosen
            group = []
        group.append(span)
        end = max(end, span.end)
    return result
