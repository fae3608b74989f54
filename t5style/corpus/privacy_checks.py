"""Check digits and validity rules of numbers that identify people: whether a string can be such a number.

Every function takes the bare characters (no separators, ASCII digits, capital letters) and answers yes or no.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence

Check = Callable[[str], bool]

# A digit's character, to that of twice the digit less 9 where that has two digits.
_DOUBLED = bytes.maketrans(b"0123456789", b"0246813579")


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1 annex B, the mod-10 sum of cards and many other numbers."""
    code = digits.encode()
    return (sum(code[::-2]) + sum(code[-2::-2].translate(_DOUBLED)) - 48 * len(code)) % 10 == 0


def _permutations() -> list[list[int]]:
    first = [1, 5, 7, 6, 2, 8, 3, 0, 9, 4]
    table = [list(range(10))]
    for _ in range(7):
        table.append([table[-1][value] for value in first])
    return table


def _product(a: int, b: int) -> int:
    """Multiplication in the dihedral group of order 10."""
    if a < 5:
        return (a + b) % 5 if b < 5 else (a + b) % 5 + 5
    return (a - b) % 5 + 5 if b < 5 else (a - b) % 5


_PERMUTED = _permutations()


def verhoeff(digits: str) -> bool:
    """Verhoeff, Error Detecting Decimal Codes (1969): the dihedral group's check digit comes last."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        total = _product(total, _PERMUTED[place % 8][ord(digit) - 48])
    return total == 0


def weighted(weights: Sequence[int], modulus: int, remainder: int = 0) -> Check:
    """A check that the weighted sum of the digits has this remainder."""

    def check(digits: str) -> bool:
        total = sum(weight * (ord(digit) - 48) for weight, digit in zip(weights, digits, strict=True))
        return total % modulus == remainder and len(set(digits)) > 1

    return check


def day_month(day: str, month: str) -> bool:
    """Whether two digits each can be a day and a month."""
    return "01" <= day <= "31" and "01" <= month <= "12"


# Issuer prefix, from ... to (inclusive, same number of digits), and the lengths in use; ISO/IEC 7812 and the
# networks' published ranges. Those of the second table are short, out of use or shared with much else: there
# the Luhn sum alone (1 in 10) says too little, and a word such as "card" must stand near.
_ISSUERS = (
    ("4", "4", {16, 19}),  # Visa
    ("51", "55", {16}),  # Mastercard
    ("2221", "2720", {16}),
    ("34", "34", {15}),  # American Express
    ("37", "37", {15}),
    ("300", "305", {14, 16, 19}),  # Diners Club
    ("3095", "3095", {14, 16, 19}),
    ("36", "36", {14, 16, 19}),
    ("38", "39", {14, 16, 19}),
    ("6011", "6011", {16, 19}),  # Discover
    ("644", "659", {16, 19}),  # Discover, RuPay, Elo
    ("3528", "3589", {16, 19}),  # JCB
    ("62", "62", {16, 19}),  # UnionPay
    ("2200", "2204", {16}),  # Mir
    ("508", "508", {16}),  # RuPay
    ("9792", "9792", {16}),  # Troy
)


def issued_card(digits: str) -> bool:
    """A payment card's number by its issuer's prefix, its length and the Luhn sum."""
    if not luhn(digits):
        return False
    return any(
        len(digits) in lengths and low <= digits[: len(low)] <= high for low, high, lengths in _ISSUERS
    )


def any_card(digits: str) -> bool:
    """12 to 19 digits with the Luhn sum, whoever issued them (ISO/IEC 7812 allows 8 to 19)."""
    return 12 <= len(digits) <= 19 and len(set(digits)) > 1 and luhn(digits)


# Length of an IBAN by country, from the registry that SWIFT keeps for ISO 13616.
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL SD FK",
        19: "MK SI",
        20: "AT BA EE KZ LT LU XK MN",
        21: "CH HR LI LV",
        22: "BG BH CR DE GB GE IE ME RS VA",
        23: "AE GI IL IQ TL SO OM",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU YE",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
    for country in countries.split()
}


def iban(code: str) -> bool:
    """ISO 13616: the country's length, and remainder 1 modulo 97."""
    if IBAN_LENGTHS.get(code[:2]) != len(code):
        return False
    return int("".join(str(int(character, 36)) for character in code[4:] + code[:4])) % 97 == 1


def us_ssn(digits: str) -> bool:
    """The numbers that the Social Security Administration gives out: no area 000, 666 or 9xx, no group 00, no
    serial 0000; nor the two that became known from advertisements.
    """
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    if area in ("000", "666") or area[0] == "9" or group == "00" or serial == "0000":
        return False
    return digits not in ("078051120", "219099999", "123456789") and len(set(digits)) > 1


def us_itin(digits: str) -> bool:
    """An individual taxpayer's number: 9xx, group 50-65, 70-88, 90-92 or 94-99."""
    group = int(digits[3:5])
    return digits[0] == "9" and (50 <= group <= 65 or (70 <= group <= 99 and group not in (89, 93)))


uk_nhs = weighted((10, 9, 8, 7, 6, 5, 4, 3, 2, 1), 11)


def uk_nino(code: str) -> bool:
    """Prefix letters that are given out (HMRC manual NIM39110)."""
    return (
        code[0] not in "DFIQUV"
        and code[1] not in "DFIOQUV"
        and code[:2] not in ("BG", "GB", "KN", "NK", "NT", "TN", "ZZ")
    )


def es_dni(code: str) -> bool:
    """Spanish DNI and NIE: the letter is the number modulo 23."""
    number = code[:-1].translate(_NIE)
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == code[-1]


_NIE = str.maketrans("XYZ", "012")
_OMOCODIA = str.maketrans("LMNPQRSTUV", "0123456789")
# Value of each character in an odd place of the codice fiscale, 0-9 and A-Z (decree of 23 December 1976).
_ODD_DIGITS = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21)
_ODD_LETTERS = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)


def it_codice_fiscale(code: str) -> bool:
    """Month letter, day (women's plus 40) and check letter."""
    day = code[9:11].translate(_OMOCODIA)
    if not day.isdigit() or not 1 <= int(day) % 40 <= 31:
        return False
    total = 0
    for place, character in enumerate(code[:15]):
        if place % 2:
            total += int(character) if character.isdigit() else ord(character) - 65
        elif character.isdigit():
            total += _ODD_DIGITS[int(character)]
        else:
            total += _ODD_LETTERS[ord(character) - 65]
    return total % 26 == ord(code[15]) - 65


def fr_nir(code: str) -> bool:
    """Sex, month (20: unknown), and the key: 97 less the number modulo 97, Corsica's 2A and 2B counted as 19
    and 18.
    """
    number = code[:13].replace("2A", "19").replace("2B", "18")
    month = code[3:5]
    if not ("01" <= month <= "12" or month == "20"):
        return False
    return 97 - int(number) % 97 == int(code[13:])


def mod11_10(digits: str) -> bool:
    """ISO 7064, MOD 11,10."""
    product = 10
    for digit in digits[:-1]:
        total = (ord(digit) - 48 + product) % 10 or 10
        product = total * 2 % 11
    return (11 - product) % 10 == ord(digits[-1]) - 48


def de_steuer_id(digits: str) -> bool:
    """§ 139b AO: of the first ten digits exactly one comes twice or three times; ISO 7064 MOD 11,10."""
    counts = sorted(digits.count(digit, 0, 10) for digit in set(digits[:10]))
    return digits[0] != "0" and counts[-1] in (2, 3) and counts[-2] == 1 and mod11_10(digits)


nl_bsn = weighted((9, 8, 7, 6, 5, 4, 3, 2, -1), 11)
_pesel_sum = weighted((1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1), 10)


def pl_pesel(digits: str) -> bool:
    """Date of birth (the century is added to the month in twenties) and weighted sum."""
    return day_month(digits[4:6], f"{int(digits[2:4]) % 20:02}") and _pesel_sum(digits)


def se_personnummer(digits: str) -> bool:
    """Date of birth (coordination numbers: day plus 60) and Luhn sum of the last ten digits."""
    digits = digits[-10:]
    return day_month(f"{int(digits[4:6]) % 60:02}", digits[2:4]) and luhn(digits)


def fi_hetu(code: str) -> bool:
    """Date of birth and check character: the nine digits modulo 31."""
    number = int(code[:6] + code[-4:-1])
    return day_month(code[:2], code[2:4]) and "0123456789ABCDEFHJKLMNPRSTUVWXY"[number % 31] == code[-1]


def br_cpf(digits: str) -> bool:
    """Two check digits modulo 11."""
    for length in (9, 10):
        total = sum((length + 1 - place) * int(digits[place]) for place in range(length))
        if total * 10 % 11 % 10 != int(digits[length]):
            return False
    return len(set(digits)) > 1


def in_aadhaar(digits: str) -> bool:
    """Does not begin with 0 or 1; Verhoeff's check digit."""
    return digits[0] > "1" and verhoeff(digits)


def cn_resident_id(code: str) -> bool:
    """GB 11643-1999: region, date of birth, ISO 7064 MOD 11-2."""
    if not ("1" <= code[0] <= "8" and code[6:8] in ("19", "20") and day_month(code[12:14], code[10:12])):
        return False
    total = sum(int(digit) * pow(2, 17 - place, 11) for place, digit in enumerate(code[:17]))
    return "10X98765432"[total % 11] == code[17]


def ca_sin(digits: str) -> bool:
    """Luhn sum; nobody's begins with 8."""
    return digits[0] != "8" and len(set(digits)) > 1 and luhn(digits)


au_tfn = weighted((1, 4, 3, 7, 5, 8, 6, 9, 10), 11)


def za_id(digits: str) -> bool:
    """Date of birth, citizenship 0, 1 or 2, Luhn sum."""
    return day_month(digits[4:6], digits[2:4]) and digits[10] in "012" and luhn(digits)


def kr_rrn(digits: str) -> bool:
    """Date of birth and weighted sum (numbers given since October 2020 have none)."""
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    total = sum(weight * int(digit) for weight, digit in zip(weights, digits[:12], strict=True))
    return day_month(digits[4:6], digits[2:4]) and (11 - total % 11) % 10 == int(digits[12])


def tr_kimlik(digits: str) -> bool:
    """Two check digits."""
    values = [int(digit) for digit in digits]
    tenth = (7 * sum(values[0:9:2]) - sum(values[1:8:2])) % 10
    return values[0] > 0 and values[9] == tenth and values[10] == sum(values[:10]) % 10


def be_nrn(digits: str) -> bool:
    """97 less the number modulo 97, a 2 before it for who was born since 2000; month 0 where unknown."""
    key = int(digits[9:])
    return digits[2:4] <= "12" and key in (97 - int(digits[:9]) % 97, 97 - int("2" + digits[:9]) % 97)


ch_ahv = weighted((1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1, 3, 1), 10)


def dk_cpr(digits: str) -> bool:
    """Date of birth (numbers given since 2007 have no check digit)."""
    return day_month(digits[:2], digits[2:4])


_no_first = weighted((3, 7, 6, 1, 8, 9, 4, 5, 2, 1), 11)
_no_second = weighted((5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1), 11)


def no_fnr(digits: str) -> bool:
    """Date of birth (D numbers: day plus 40) and two check digits."""
    day = f"{int(digits[:2]) % 40:02}"
    return day_month(day, digits[2:4]) and _no_first(digits[:10]) and _no_second(digits)


def ie_pps(code: str) -> bool:
    """Check letter modulo 23, the second letter (since 2013) counted nine times."""
    total = sum((8 - place) * int(digit) for place, digit in enumerate(code[:7]))
    if len(code) == 9:
        total += 9 * (ord(code[8]) - 64)
    return "WABCDEFGHIJKLMNOPQRSTUV"[total % 23] == code[7]


def sg_nric(code: str) -> bool:
    """Check letter modulo 11 for the series S, T, F and G."""
    total = sum(weight * int(digit) for weight, digit in zip((2, 7, 6, 5, 4, 3, 2), code[1:8], strict=True))
    total += 4 if code[0] in "TG" else 0
    return ("JZIHGFEDCBA" if code[0] in "ST" else "XWUTRQPNMLK")[total % 11] == code[8]


_BASE58 = {
    character: value
    for value, character in enumerate("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz")
}
_BECH32 = {character: value for value, character in enumerate("qpzry9x8gf2tvdw0s3jn54khce6mua7l")}


def base58_address(text: str) -> bool:
    """A Bitcoin address of 25 bytes whose last four are of SHA-256 twice over the others (Base58Check)."""
    number = 0
    for character in text:
        number = number * 58 + _BASE58[character]
    if number >= 1 << 200:
        return False
    data = number.to_bytes(25, "big")
    return data[0] in (0, 5) and hashlib.sha256(hashlib.sha256(data[:21]).digest()).digest()[:4] == data[21:]


def bech32_address(text: str) -> bool:
    """A segregated-witness address: BIP 173 (bech32) or BIP 350 (bech32m)."""
    text = text.lower()
    prefix, _, data = text.rpartition("1")
    values = (
        [ord(character) >> 5 for character in prefix] + [0] + [ord(character) & 31 for character in prefix]
    )
    values += [_BECH32[character] for character in data]
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FFFFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            check ^= generator if top >> bit & 1 else 0
    return check in (1, 0x2BC830A3)


# ITU-T E.164's country codes: 1 and 7, these of two digits, and those of three that begin so.
_COUNTRIES = re.compile(
    r"1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]"
    r"|2[1-69][0-9]|3[578][0-9]|42[0-9]|5[09][0-9]|6[7-9][0-9]|8[0578][0-9]|9[679][0-9]"
)


def country_code(digits: str) -> bool:
    """Whether an international number begins with a country code that ITU-T E.164 gives out."""
    return _COUNTRIES.match(digits) is not None
