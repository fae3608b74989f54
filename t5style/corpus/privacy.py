"""Personal data and secrets in text: found, and replaced by placeholders such as ``<EMAIL_ADDRESS>``.

A kind's placeholder is its name in capitals. Kinds:

- ``email_address``, ``phone_number``, ``ip_address`` (4 and 6), ``credit_card``, ``iban_code``;
- ``url_credentials``: the ``user:password`` of a URL;
- ``secret_key``: keys of known services, JSON web tokens, private keys in PEM, and values with mixed letters
  that are assigned to names such as ``api_key``;
- ``crypto_wallet``: Bitcoin addresses;
- numbers of states, named by country (ISO 3166) and number: ``us_ssn``, ``uk_nhs``, ``es_dni`` (also NIE),
  ``it_codice_fiscale``, and so on (``privacy_patterns.NATIONAL_IDS``).

Numbers are reported only where they pass their checks (privacy_checks.py). Where look and check together
still say little, a word that names the number must stand within 48 characters before it or 16 after it.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
import functools
import hashlib
import hmac
import ipaddress
import math
import os
import pathlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from t5style.corpus import privacy_checks as checks
from t5style.corpus import privacy_patterns as patterns
from t5style.corpus.document import Document
from t5style.corpus.privacy_patterns import KINDS
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

_BEFORE, _AFTER = 48, 16
_KEY_BYTES = 16


class Span(NamedTuple):
    """Where something is: ``text[start:end]``, and what."""

    start: int
    end: int
    kind: str


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
    plan = _plan(tuple(kinds), None if countries is None else tuple(countries), private_addresses)
    return _find(text, plan)


def redact(
    text: str,
    kinds: Sequence[str] = KINDS,
    countries: Sequence[str] | None = None,
    private_addresses: bool = False,
) -> str:
    """The text with what ``find`` finds replaced by placeholders. Doing it twice changes nothing more."""
    plan = _plan(tuple(kinds), None if countries is None else tuple(countries), private_addresses)
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
      key: where the secret key of the pseudonyms is, never the key itself: "env:NAME" or "file:PATH". With the
        key, who has a value can tell whether it is in the corpus.
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

    def _plan(self) -> _Plan:
        countries = None if self.countries is None else tuple(self.countries)
        return _plan(tuple(self.kinds), countries, self.private_addresses)

    def __call__(self, document: Document) -> Document | Drop:
        key = _read_key(self.key) if self.pseudonyms else None
        text, counts = _redact(document.text, self._plan(), key)
        if not counts:
            return document
        before = document.meta.get("pii", {})
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
            f"Redact.pseudonyms need a key of {_KEY_BYTES} bytes or more in {key!r}, which holds {len(value)}; "
            "make one with: openssl rand -hex 32"
        )
    return value


class _Rules(NamedTuple):
    """Rules that need no words, those that need some, and all words of these."""

    plain: tuple[patterns.Rule, ...]
    named: tuple[patterns.Rule, ...]
    words: frozenset[str]


def _rules(rules: Iterable[patterns.Rule]) -> _Rules:
    rules = tuple(rules)
    named = tuple(rule for rule in rules if rule.words)
    plain = tuple(rule for rule in rules if not rule.words)
    return _Rules(plain, named, frozenset().union(*(rule.words for rule in named)))


class _Plan(NamedTuple):
    kinds: frozenset[str]
    # Rules for a run of so many digits (the index), without separators and with.
    runs: tuple[_Rules, ...]
    grouped: tuple[_Rules, ...]
    phones: bool
    numbers: bool
    codes: bool
    private_addresses: bool


_LONGEST = 20  # digits; no number has as many


@functools.lru_cache(maxsize=64)
def _plan(kinds: tuple[str, ...], countries: tuple[str, ...] | None, private_addresses: bool) -> _Plan:
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
    runs = tuple(_rules(rule for rule in rules if n in rule.lengths) for n in range(_LONGEST))
    grouped = tuple(_rules(rule for rule in rules if min(rule.lengths) <= n) for n in range(_LONGEST + 1))
    phones = "phone_number" in wanted
    codes = patterns.CODE_CHECKS.keys() | {"iban_code", "ip_address"}
    return _Plan(
        wanted, runs, grouped, phones, bool(rules) or phones, bool(codes & wanted), private_addresses
    )


def _redact(text: str, plan: _Plan, key: bytes | None) -> tuple[str, Counter[str]]:
    counts: Counter[str] = Counter()
    # A placeholder is shorter or longer than what it replaces, which may bring a number and the word that
    # names it together: again until nothing is found. Each round takes something away, so there is an end.
    while spans := _find(text, plan):
        pieces = []
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


def _find(text: str, plan: _Plan) -> list[Span]:
    folded, gone = _fold(text)
    found = _candidates(folded, plan)
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
    if all(one.end <= other.start for one, other in zip(found, found[1:], strict=False)):
        return found
    # Groups of spans that hang together, resolved one by one.
    result: list[Span] = []
    group: list[Span] = []
    end = 0
    for span in [*found, Span(len(found) + max(span.end for span in found), 0, "")]:
        if group and span.start >= end:
            chosen: list[Span] = []
            for one in sorted(group, key=lambda one: (_RANK[one.kind], one.start - one.end, one.start)):
                if all(one.end <= other.start or other.end <= one.start for other in chosen):
                    chosen.append(one)
            result += sorted(chosen)
            group = []
        group.append(span)
        end = max(end, span.end)
    return result


def _candidates(text: str, plan: _Plan) -> list[Span]:
    kinds = plan.kinds
    found: list[Span] = []
    if "@" in text:
        if "email_address" in kinds:
            found += _emails(text)
        if "url_credentials" in kinds:
            found += _credentials(text)
    if plan.codes:
        found += _codes(text, plan)
    if plan.numbers:
        _numbers(text, plan, found)
    if "ip_address" in kinds and ("::" in text or text.count(":") > 6):
        found += _ipv6(text, plan.private_addresses)
    if "secret_key" in kinds:
        found += _secrets(text)
    if "crypto_wallet" in kinds:
        for start, end in _anchored(text, patterns.WALLETS):
            if checks.bech32_address(text[start:end]):
                found.append(Span(start, end, "crypto_wallet"))
    return found


def _places(text: str, part: str) -> Iterator[int]:
    place = text.find(part)
    while place >= 0:
        yield place
        place = text.find(part, place + 1)


def _emails(text: str) -> Iterator[Span]:
    for at in _places(text, "@"):
        domain = patterns.EMAIL_DOMAIN_ASCII.match(text, at + 1) or patterns.EMAIL_DOMAIN_ANY.match(
            text, at + 1
        )
        if not domain or domain[0].rpartition(".")[2].lower() in patterns.FILE_SUFFIXES:
            continue
        backwards = text[max(0, at - 64) : at][::-1]
        local = patterns.EMAIL_LOCAL.match(backwards) or patterns.EMAIL_LOCAL_ANY.match(backwards)
        if local and (name := local[0][::-1].lstrip(".+%&'~-")) and not name.endswith("."):
            # git@github.com:user/repository is nobody's address,
            # and n@app is a line's end, a backslash and n, before a decorator.
            repository = name == "git" and text[domain.end() : domain.end() + 1] in (":", "/")
            if not repository and not (len(name) == 1 and text[at - 2 : at - 1] == "\\"):
                yield Span(at - len(name), domain.end(), "email_address")


def _credentials(text: str) -> Iterator[Span]:
    for place in _places(text, "://"):
        match = patterns.CREDENTIALS.match(text, place + 3)
        if match:
            yield Span(*match.span(), "url_credentials")


_WORD = re.compile(r"\w+")


def _near(text: str, start: int, end: int) -> set[str]:
    """Words within reach of a number, in small letters."""
    words = set(_WORD.findall(text[max(0, start - _BEFORE) : start].lower()))
    words.update(_WORD.findall(text[end : end + _AFTER].lower()))
    return words


def _codes(text: str, plan: _Plan) -> Iterator[Span]:
    for match in patterns.CODES.finditer(text):
        name = match.lastgroup
        assert name is not None
        before = int(name[-1]) if name[-1].isdigit() else 0
        kind = name[:-1] if before else name
        if kind not in plan.kinds:
            continue
        start, end = match.start() - before, match.end()
        if kind == "ip_address":
            if _is_address(text, start, end, plan.private_addresses):
                yield Span(start, end, kind)
        elif kind == "iban_code":
            if (end := _iban_end(text, start, end)) > start:
                yield Span(start, end, kind)
        else:
            code = text[start:end]
            if kind != "crypto_wallet":
                code = code.replace(" ", "").replace("-", "") if kind != "fi_hetu" else code
                code = code.upper()
            if patterns.CODE_CHECKS[kind](code):
                words = patterns.CODE_WORDS.get(kind)
                # NINOs in their printed form, with spaces, are like nothing else.
                if not words or (kind == "uk_nino" and end - start > 12) or words & _near(text, start, end):
                    yield Span(start, end, kind)


def _iban_end(text: str, start: int, limit: int) -> int:
    """Where the IBAN that begins here ends, at most at ``limit``; ``start`` if there is none."""
    length = checks.IBAN_LENGTHS.get(text[start : start + 2].upper())
    if length is None:
        return start
    place, code = start, ""
    for character in text[start:limit]:
        place += 1
        if character != " ":
            code += character
            if len(code) == length:
                break
    if text[place : place + 1].isalnum() or not checks.iban(code.upper()):
        return start
    return place


def _is_address(text: str, start: int, end: int, private: bool) -> bool:
    try:
        address = ipaddress.ip_address(text[start:end])
    except ValueError:
        return False
    if not (private or (address.is_global and not address.is_multicast)) or patterns.VERSION.search(
        text, max(0, start - 24), start
    ):
        return False
    if address.version == 4:
        # All small: a section or version number, unless something says it is an address.
        return max(address.packed) > 20 or not patterns.IP_WORDS.isdisjoint(_near(text, start, end))
    # Of what is shortened, C++'s names for example, only addresses in 2000::/3, all that is given out, with
    # three groups or more.
    groups = [group for group in text[start:end].split(":") if group]
    return private or "::" not in text[start:end] or (address.packed[0] >> 5 == 1 and len(groups) >= 3)


def _ipv6(text: str, private: bool) -> Iterator[Span]:
    done = 0
    for match in patterns.IPV6.finditer(text):
        start = match.start()
        if start < done:
            continue
        while match.start() - start < 4 and start and text[start - 1] in "0123456789abcdefABCDEF":
            start -= 1
        whole = patterns.IPV6_REST.match(text, start, start + 60)
        if whole is None:
            continue
        end = whole.end()
        done = end
        if text[end - 1] == ":" and text[end - 2] != ":":
            end -= 1
        colons = text.count(":", start, end)
        if not 2 <= colons <= 8 or (colons < 6 and text.find("::", start, end) < 0):
            continue
        outside = text[start - 1 : start] + text[end : end + 1]
        if not any(character.isalnum() or character == "_" for character in outside):
            if _is_address(text, start, end, private):
                yield Span(start, end, "ip_address")


# A run of digits and what may stand between those of one number, at most 24 groups at a time.
_RUN = re.compile(r"[0-9](?<!\w.)(?=[0-9 ./()\-]{6})[0-9]*+(?:[ ./()\-]{1,3}+[0-9]++){0,24}+")
_NO_DIGIT = re.compile(r"[^0-9]+")
_NO_CODE = re.compile(r"[^0-9Xx]+")


def _numbers(text: str, plan: _Plan, found: list[Span]) -> None:
    for run in _RUN.finditer(text):
        start, end = run.span()
        length = end - start
        if length < patterns.MIN_DIGITS:
            continue
        digits = run[0]
        alone = digits.isdecimal()
        if alone:
            if length >= _LONGEST:
                continue
            rules = plan.runs[length]
        else:
            length = len(_NO_DIGIT.sub("", digits))
            if length < patterns.MIN_DIGITS:
                continue
            rules = plan.grouped[min(length, _LONGEST)]
        count = len(found)
        for rule in rules.plain:
            for match in rule.pattern.finditer(text, start, end + 24):
                if rule.check(_NO_CODE.sub("", match[0]).upper()):
                    found.append(Span(*match.span(), rule.kind))
        if rules.named and not (alone and len(found) > count):
            words = _near(text, start, end)
            if not rules.words.isdisjoint(words):
                for rule in rules.named:
                    if not rule.words.isdisjoint(words):
                        for match in rule.pattern.finditer(text, start, end + 24):
                            if rule.check(_NO_CODE.sub("", match[0]).upper()):
                                found.append(Span(*match.span(), rule.kind))
        if plan.phones and not (alone and len(found) > count):
            _phones(text, start, end, length, found)


def _phones(text: str, start: int, end: int, digits: int, found: list[Span]) -> None:
    """Telephone numbers in a run of so many digits from ``start`` to ``end``."""
    first = start - 1 if start and text[start - 1] in "+(" else start
    if first < start and first and text[first - 1] == "+":
        first -= 1
    if text[first] == "+" or text.startswith("00", start):
        match = patterns.INTERNATIONAL.match(text, first)
        if match and (last := _international(match[0])):
            found.append(Span(first, first + last, "phone_number"))
            return
    count = len(found)
    if digits >= 10:
        for match in patterns.NORTH_AMERICAN.finditer(text, first, end + 12):
            found.append(Span(*match.span(), "phone_number"))
    if len(found) == count:
        grouped = patterns.GROUPED.match(text, first) or patterns.GROUPED.match(text, start)
        if grouped and _is_phone(text, grouped):
            start, end = grouped.span()
            unbalanced = grouped[0][0] == "(" and ")" not in grouped[0]
            found.append(Span(start + unbalanced, end, "phone_number"))


_LAST_GROUP = re.compile(r"[^0-9]+[0-9]+[^0-9]*\Z")


def _international(number: str) -> int:
    """How many characters are an international number; 0 if it is none."""
    while True:
        main = re.split("[xXeE]", number, maxsplit=1)[0].replace("(0)", "")
        digits = _NO_DIGIT.sub("", main)
        if not number.startswith("+"):
            digits = digits[2:]
        most = 11 if digits.startswith("1") else 15
        if len(digits) <= most:
            break
        # What follows after a space is another number.
        shorter = _LAST_GROUP.sub("", number)
        if shorter == number:
            return 0
        number = shorter
    if digits.startswith("1"):
        return len(number) if len(digits) == 11 and digits[1] > "1" else 0
    return len(number) if len(digits) >= 8 and checks.country_code(digits) else 0


def _is_phone(text: str, match: re.Match[str]) -> bool:
    """Whether groups of digits are a number as dialled inside a country."""
    main = match["main"]
    groups = _NO_DIGIT.split(main)
    count = len(groups)
    total = sum(map(len, groups))
    if not 7 <= total <= 13 or count > 6 or patterns.DATE.match(main) or patterns.YEARS.search(main):
        return False
    pairs = all(len(group) == 2 for group in groups)
    if min(map(len, groups[1:]), default=2) < 2 or (pairs and count > 5):
        return False
    if "." in main and not (pairs and count == 5) and not (count == 3 and min(map(len, groups)) > 2):
        return False
    if count > 1 and 9 <= total <= 12 and main[0] == "0" and main[1] != "0" and 2 <= len(groups[0]) <= 5:
        # The digit 0 dials out of the own area: 0341 8387176, 01.84.17.61.18, (08) 8747 6301.
        if count > 2 or len(groups[1]) >= 6:
            return True
    if patterns.THOUSANDS.fullmatch(main) or "/" in main:
        return False
    start, end = match.span()
    if patterns.PHONE_LABEL.match(text, end) or patterns.PHONE_PREFIX.search(text, max(0, start - 16), start):
        return True
    # Five words back, three for digits with nothing between.
    last = _WORD.findall(text[max(0, start - _BEFORE) : start].lower())[-5 if count > 1 else -3 :]
    if not patterns.PHONE_WORDS.isdisjoint(last):
        return patterns.OTHER_NUMBERS.isdisjoint(last[-2:]) or not patterns.PHONE_WORDS.isdisjoint(last[-2:])
    before = text[max(0, start - 12) : start]
    return not before.isascii() and any(mark in before for mark in patterns.PHONE_MARKS)


def _anchored(text: str, secrets: Sequence[patterns.Secret]) -> Iterator[tuple[int, int]]:
    for anchor, lead, pattern in secrets:
        if anchor in text:
            for place in _places(text, anchor):
                if place >= lead and (match := pattern.match(text, place - lead)):
                    yield match.span()


def _secrets(text: str) -> Iterator[Span]:
    for rare, secrets in patterns.SECRETS:
        if rare in text:
            for start, end in _anchored(text, secrets):
                yield Span(start, end, "secret_key")
    if "-----BEGIN" in text:
        yield from _pem(text)
    for sign, pattern in patterns.ASSIGNED:
        if sign in text:
            for match in pattern.finditer(text):
                if patterns.SECRET_NAME.search(text, max(0, match.start() - 48), match.start()):
                    if _is_random(match["value"]):
                        yield Span(*match.span("value"), "secret_key")


def _pem(text: str) -> Iterator[Span]:
    end = 0
    for begin in patterns.PEM_BEGIN.finditer(text):
        if begin.start() < end:
            continue
        closing = patterns.PEM_END.search(text, begin.end())
        if closing is None:
            return
        end = closing.end()
        yield Span(begin.start(), end, "secret_key")


def _is_random(value: str) -> bool:
    """Letters and digits mixed, with 3 bits of entropy for each character or more: not words, not a path."""
    if not any(character.isdigit() for character in value) or not any(map(str.isalpha, value)):
        return False
    counts = Counter(value).values()
    return -sum(count / len(value) * math.log2(count / len(value)) for count in counts) >= 3.0
