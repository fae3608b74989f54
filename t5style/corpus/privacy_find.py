"""Finds candidates for personal data in folded text (privacy.py), by the expressions of privacy_patterns.py
and the checks of privacy_checks.py.

Every search starts from something rare and fast to find ("@", "://", a run of digits, a key's first letters),
so that text without any costs next to nothing; time is linear in the text.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from t5style.corpus import privacy_checks as checks
from t5style.corpus import privacy_patterns as patterns

_BEFORE, _AFTER = 48, 16
LONGEST = 20  # digits; no number has as many


class Span(NamedTuple):
    """Where something is: ``text[start:end]``, and what."""

    start: int
    end: int
    kind: str


class Rules(NamedTuple):
    """Rules that need no words, those that need some, and all words of these."""

    plain: tuple[patterns.Rule, ...]
    named: tuple[patterns.Rule, ...]
    words: frozenset[str]


def rules_of(rules: Iterable[patterns.Rule]) -> Rules:
    """Sorts rules into those that need words and those that do not."""
    rules = tuple(rules)
    named = tuple(rule for rule in rules if rule.words)
    plain = tuple(rule for rule in rules if not rule.words)
    return Rules(plain, named, frozenset().union(*(rule.words for rule in named)))


class Plan(NamedTuple):
    """What to look for (privacy.find)."""

    kinds: frozenset[str]
    # Rules for a run of so many digits (the index), without separators and with.
    runs: tuple[Rules, ...]
    grouped: tuple[Rules, ...]
    phones: bool
    numbers: bool
    codes: bool
    private_addresses: bool


def candidates(text: str, plan: Plan) -> list[Span]:
    """All spans of the kinds wanted, in no order; they may overlap."""
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
    done = 0
    for at in _places(text, "@"):
        domain = patterns.EMAIL_DOMAIN_ASCII.match(text, at + 1) or patterns.EMAIL_DOMAIN_ANY.match(
            text, at + 1
        )
        if not domain or domain[0].rpartition(".")[2].lower() in patterns.FILE_SUFFIXES:
            continue
        backwards = text[max(done, at - 64) : at][::-1]
        local = patterns.EMAIL_LOCAL.match(backwards) or patterns.EMAIL_LOCAL_ANY.match(backwards)
        if local and (name := local[0][::-1].lstrip(".+%&'~-")) and not name.endswith("."):
            # git@github.com:user/repository is nobody's address,
            # and n@app is a line's end, a backslash and n, before a decorator.
            repository = name == "git" and text[domain.end() : domain.end() + 1] in (":", "/")
            if not repository and not (len(name) == 1 and text[at - 2 : at - 1] == "\\"):
                done = domain.end()
                yield Span(at - len(name), done, "email_address")


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


def _codes(text: str, plan: Plan) -> Iterator[Span]:
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
        if private and not address.is_global:
            return True
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
        word = any(character.isalnum() or character == "_" for character in outside)
        if not word and _is_address(text, start, end, private):
            yield Span(start, end, "ip_address")


# A run of digits and what may stand between those of one number, at most 24 groups at a time.
_RUN = re.compile(r"[0-9](?<!\w.)(?=[0-9 ./()\-]{6})[0-9]*+(?:[ ./()\-]{1,3}+[0-9]++){0,24}+")
_NO_DIGIT = re.compile(r"[^0-9]+")
_NO_CODE = re.compile(r"[^0-9Xx]+")


def _numbers(text: str, plan: Plan, found: list[Span]) -> None:
    for run in _RUN.finditer(text):
        start, end = run.span()
        length = end - start
        if length < patterns.MIN_DIGITS:
            continue
        digits = run[0]
        alone = digits.isdecimal()
        if alone:
            if length >= LONGEST:
                continue
            rules = plan.runs[length]
        else:
            length = len(_NO_DIGIT.sub("", digits))
            if length < patterns.MIN_DIGITS:
                continue
            rules = plan.grouped[min(length, LONGEST)]
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
    # The digit 0 dials out of the own area: 0341 8387176, 01.84.17.61.18, (08) 8747 6301.
    trunk = main[0] == "0" and main[1] != "0" and 2 <= len(groups[0]) <= 5
    if trunk and 9 <= total <= 12 and (count > 2 or (count == 2 and len(groups[1]) >= 6)):
        return True
    if patterns.THOUSANDS.fullmatch(main) or "/" in main:
        return False
    start, end = match.span()
    if patterns.PHONE_LABEL.match(text, end) or patterns.PHONE_PREFIX.search(text, max(0, start - 16), start):
        return True
    # Five words back, three for digits with nothing between.
    last = _WORD.findall(text[max(0, start - _BEFORE) : start].lower())[-5 if count > 1 else -3 :]
    for word in reversed(last):
        if word in patterns.PHONE_WORDS:
            return True
        if word in patterns.OTHER_NUMBERS:
            return False
    before = text[max(0, start - 12) : start]
    return not before.isascii() and any(mark in before for mark in patterns.PHONE_MARKS)


def _anchored(text: str, secrets: Sequence[patterns.Secret]) -> Iterator[tuple[int, int]]:
    for anchor, lead, pattern in secrets:
        if anchor in text:
            done = lead
            for place in _places(text, anchor):
                if place >= done and (match := pattern.match(text, place - lead)):
                    yield match.span()
                    done = match.end() + lead


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
                value = match["value"].rstrip(".")
                named = patterns.SECRET_NAME.search(text, max(0, match.start() - _BEFORE), match.start())
                if named and _is_random(value):
                    start = match.start("value")
                    yield Span(start, start + len(value), "secret_key")


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
