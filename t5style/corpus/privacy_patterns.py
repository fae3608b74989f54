"""What numbers, addresses and secrets that identify people look like: expressions, words that stand near, and
which check each must pass (privacy_checks.py). privacy.py searches with them.

All expressions take time linear in the text: repetition is possessive or bounded.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from t5style.corpus import privacy_checks as checks


class Rule(NamedTuple):
    """One way of writing one kind of number.

    Attributes:
      kind: what is reported.
      pattern: matches one, with its separators.
      check: of the bare characters.
      lengths: how many digits one has (17 for an X in the place of the 18th).
      words: one of them must stand near where the look and the check say too little on their own.
    """

    kind: str
    pattern: re.Pattern[str]
    check: checks.Check
    lengths: frozenset[int]
    words: frozenset[str] = frozenset()


# Neither part of a word nor of a longer number.
_LEFT = r"(?<!\w)(?<![0-9][-./+])"
_RIGHT = r"(?!\w)(?![-./+][0-9])"


def _number(kind: str, lengths: str, shape: str, check: checks.Check, words: str = "") -> Rule:
    pattern = re.compile(_LEFT + f"(?:{shape})" + _RIGHT)
    return Rule(kind, pattern, check, frozenset(map(int, lengths.split())), frozenset(words.split()))


_CARD_WORDS = (
    "card cards creditcard debitcard cc cvv cvc visa mastercard amex maestro diners discover jcb debit "
    "credit payment "
    "karte kreditkarte carte tarjeta carta cartão cartao kaart karta kort kortti карта карты"
)
# Separated as printed on the card; a second number just before would make the groups another's.
_CARD = (
    r"[0-9]{12,19}|(?<![0-9] )(?:[0-9]{4}(?P<s>[ -])[0-9]{4}(?P=s)[0-9]{4}(?P=s)[0-9]{4}(?:(?P=s)[0-9]{3})?"
    r"|[0-9]{4}(?P<t>[ -])[0-9]{6}(?P=t)[0-9]{4,5})"
)
_SSN_WORDS = "ssn ssns social itin taxpayer tin"

# Numbers of digits and separators; each has at least MIN_DIGITS digits.
MIN_DIGITS = 7
NUMBERS: tuple[Rule, ...] = (
    _number("credit_card", "12 13 14 15 16 17 18 19", r"(?<!/)(?:" + _CARD + ")", checks.issued_card),
    _number("credit_card", "12 13 14 15 16 17 18 19", _CARD, checks.any_card, _CARD_WORDS),
    _number("us_ssn", "9", r"[0-9]{3}-[0-9]{2}-[0-9]{4}", checks.us_ssn),
    _number("us_ssn", "9", r"[0-9]{3} ?[0-9]{2} ?[0-9]{4}", checks.us_ssn, _SSN_WORDS),
    _number("us_itin", "9", r"[0-9]{3}-[0-9]{2}-[0-9]{4}", checks.us_itin),
    _number("us_itin", "9", r"[0-9]{3} ?[0-9]{2} ?[0-9]{4}", checks.us_itin, _SSN_WORDS),
    _number("uk_nhs", "10", r"[0-9]{3}[ -]?[0-9]{3}[ -]?[0-9]{4}", checks.uk_nhs, "nhs patient patients"),
    _number(
        "fr_nir",
        "15",
        r"[12] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}",
        checks.fr_nir,
    ),
    _number(
        "de_steuer_id",
        "11",
        r"[0-9]{2} ?[0-9]{3} ?[0-9]{3} ?[0-9]{3}",
        checks.de_steuer_id,
        "steuer steuerid idnr steuernummer steueridentifikationsnummer identifikationsnummer tax tin",
    ),
    _number(
        "nl_bsn",
        "9",
        r"[0-9]{4}[. ]?[0-9]{2}[. ]?[0-9]{3}|[0-9]{3}[. ][0-9]{3}[. ][0-9]{3}",
        checks.nl_bsn,
        "bsn burgerservicenummer sofi sofinummer",
    ),
    _number("pl_pesel", "11", r"[0-9]{11}", checks.pl_pesel, "pesel"),
    _number("se_personnummer", "10 12", r"(?:19|20)?[0-9]{6}[-+][0-9]{4}", checks.se_personnummer),
    _number(
        "se_personnummer",
        "10 12",
        r"(?:19|20)?[0-9]{10}",
        checks.se_personnummer,
        "personnummer personnr samordningsnummer",
    ),
    _number("br_cpf", "11", r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}", checks.br_cpf),
    _number("br_cpf", "11", r"[0-9]{9}-?[0-9]{2}", checks.br_cpf, "cpf"),
    _number(
        "in_aadhaar",
        "12",
        r"[0-9]{4}[ -]?[0-9]{4}[ -]?[0-9]{4}",
        checks.in_aadhaar,
        "aadhaar aadhar adhaar uid uidai आधार",
    ),
    _number("cn_resident_id", "17 18", r"[0-9]{17}[0-9Xx]", checks.cn_resident_id),
    _number("ca_sin", "9", r"[0-9]{3}[ -]?[0-9]{3}[ -]?[0-9]{3}", checks.ca_sin, "sin nas social sociale"),
    _number("au_tfn", "9", r"[0-9]{3} ?[0-9]{3} ?[0-9]{3}", checks.au_tfn, "tfn tax"),
    _number("za_id", "13", r"[0-9]{6} ?[0-9]{4} ?[0-9]{3}", checks.za_id, "id identity identiteit rsa"),
    _number("kr_rrn", "13", r"[0-9]{6}-[1-8][0-9]{6}", checks.kr_rrn),
    _number("tr_kimlik", "11", r"[0-9]{11}", checks.tr_kimlik, "kimlik tc tckn"),
    _number("be_nrn", "11", r"[0-9]{2}\.[0-9]{2}\.[0-9]{2}-[0-9]{3}\.[0-9]{2}", checks.be_nrn),
    _number(
        "be_nrn", "11", r"[0-9]{11}", checks.be_nrn, "rijksregister rijksregisternummer registre niss insz"
    ),
    _number("ch_ahv", "13", r"756\.?[0-9]{4}\.?[0-9]{4}\.?[0-9]{2}", checks.ch_ahv),
    _number("dk_cpr", "10", r"[0-9]{6}[- ]?[0-9]{4}", checks.dk_cpr, "cpr personnummer"),
    _number(
        "no_fnr", "11", r"[0-9]{6} ?[0-9]{5}", checks.no_fnr, "fødselsnummer fodselsnummer fnr personnummer"
    ),
)

# Codes with letters. One scan stops at the first digit of each run of digits and looks back at the letters
# before it. The groups' names are the kinds; a number after them marks another way of writing the same.
_CODE_SHAPES = (
    r"(?<!\w.)(?:"
    r"(?P<ip_address>(?<![-.].)(?<![A-Za-z]/.)[0-9]{0,2}(?:\.[0-9]{1,3}){3}(?!\w|\.[0-9]))"
    r"|(?P<es_dni>[0-9]{7}-?[A-Z](?!\w))"
    r"|(?P<fi_hetu>[0-9]{5}[-+A-FU-Y][0-9]{3}[0-9A-FHJ-NPR-Y](?!\w))"
    r"|(?P<ie_pps>[0-9]{6}[A-W][A-IW]?(?!\w))"
    r"|(?P<fr_nir>(?<=[12]) ?[0-9]{2} ?[0-9]{2} ?2[AB] ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}(?!\w))"
    r"|(?P<crypto_wallet>(?<=[13])[1-9A-HJ-NP-Za-km-z]{25,34}(?!\w))"
    r")"
    r"|(?<=\w.)(?:"
    r"(?P<uk_nino2>(?<=\b[A-Z]{2}.)[0-9](?: ?[0-9]{2}){2} ?[A-D](?!\w))"
    r"|(?P<iban_code2>(?<=\b[A-Za-z]{2}.)[0-9](?: ?[0-9A-Za-z]){11,34})"
    r"|(?P<es_dni1>(?<=\b[XYZ].)[0-9]{6}-?[A-Z](?!\w))"
    r"|(?P<sg_nric1>(?<=\b[STFG].)[0-9]{6}[A-Z](?!\w))"
    r"|(?P<in_pan5>(?<=\b[A-Z]{3}[ABCFGHJLPT][A-Z].)[0-9]{3}[A-Z](?!\w))"
    r"|(?P<it_codice_fiscale6>(?<=\b[A-Za-z]{6}.)[0-9LMNPQRSTUVlmnpqrstuv][A-EHLMPR-Ta-ehlmpr-t]"
    r"[0-9LMNPQRSTUVlmnpqrstuv]{2}[A-Za-z][0-9LMNPQRSTUVlmnpqrstuv]{3}[A-Za-z](?!\w))"
    r"|(?P<mx_curp4>(?<=\b[A-Z]{4}.)[0-9]{5}[HM][A-Z]{5}[0-9A-Z][0-9](?!\w))"
    r")"
    r"|(?P<uk_nino3>(?<=\b[A-Z]{2} .)[0-9](?: [0-9]{2}){2} [A-D](?!\w))"
    r"|(?P<es_dni2>(?<=\b[XYZ]-.)[0-9]{6}-?[A-Z](?!\w))"
)
CODES = re.compile(r"[0-9](?<![0-9].)(?:" + _CODE_SHAPES + ")")
CODE_CHECKS: dict[str, checks.Check] = {
    "es_dni": checks.es_dni,
    "fi_hetu": checks.fi_hetu,
    "fr_nir": checks.fr_nir,
    "ie_pps": checks.ie_pps,
    "uk_nino": checks.uk_nino,
    "sg_nric": checks.sg_nric,
    "in_pan": lambda code: True,
    "it_codice_fiscale": checks.it_codice_fiscale,
    "mx_curp": lambda code: checks.day_month(code[8:10], code[6:8]),
    "crypto_wallet": checks.base58_address,
}
CODE_WORDS: dict[str, frozenset[str]] = {
    "ie_pps": frozenset({"pps", "ppsn"}),
    "uk_nino": frozenset({"nino", "insurance", "ni"}),
    "in_pan": frozenset({"pan", "permanent", "tax"}),
}

NATIONAL_IDS: tuple[str, ...] = tuple(
    sorted(
        {rule.kind for rule in NUMBERS if rule.kind != "credit_card"} | CODE_CHECKS.keys() - {"crypto_wallet"}
    )
)

# Telephone numbers. Extensions count as part of the number.
_EXTENSION = r"(?:[ ]?(?:[xX]|[eE]xt\.?)[ ]?[0-9]{1,6}+)?+"
# "+" or "00", country code, groups. 00 only where the groups are separated.
INTERNATIONAL = re.compile(
    r"(?<![\w+)\]])(?:\+[ ]?+\(?+[1-9][0-9]*+\)?+|(?<![-.,/])(?<![0-9] )00[ ]?+[1-9][0-9]{0,2}+(?=[ .\-/(]))"
    r"(?:(?:(?: ?+[.\-/] ?+| )\(?+|\(|(?<=\)))[0-9]++\)?+){0,7}+" + _EXTENSION + r"(?!\w)"
)
# The North American plan: [2-9]xx [2-9]xx xxxx.
NORTH_AMERICAN = re.compile(
    r"(?<![\w+/$€£#])(?<![0-9][-./ ])(?:1[-. ])?(?:\([2-9][0-9]{2}\)[ -]?|[2-9][0-9]{2}(?P<s>[-. ]))"
    r"[2-9][0-9]{2}(?(s)(?P=s)|[-. ])[0-9]{4}" + _EXTENSION + _RIGHT
)
# Any other groups of digits, the first perhaps in brackets; matched where a run begins.
GROUPED = re.compile(
    r"(?<![\w+/=#%$€£¥-])(?<![0-9][.,:])\(?+"
    r"(?P<main>[0-9]++(?:(?:\)[ ]?+-?+|[ .\-/](?![ .\-/]))\(?+[0-9]++){0,8}+)"
    + _EXTENSION
    + r"(?![%°€£$¥]|\w|[,:][0-9])"
)
DATE = re.compile(
    r"(?:(?:1[5-9]|20)[0-9]{2}(?P<a>[-/. ])[0-9]{1,2}(?P=a)[0-9]{1,2}|[0-9]{1,2}(?P<b>[-/. ])[0-9]{1,2}(?P=b)"
    r"(?:(?:1[5-9]|20)[0-9]{2}|[0-9]{2})|(?:19|20)[0-9]{2}(?:0[1-9]|1[0-2])[0-3][0-9])(?![0-9])"
    r"(?!(?P=a)[0-9])(?!(?P=b)[0-9])"
)
YEARS = re.compile(r"(?<![0-9])(?:1[0-9]|20)[0-9]{2} ?[-/ ] ?(?:1[0-9]|20)[0-9]{2}(?![0-9])")
# 1 234 567 and 1.234.567
THOUSANDS = re.compile(r"[1-9](?: [0-9]{3})+|[1-9][0-9]{0,2}(?:\.[0-9]{3})+")
_PHONE_WORDS = (
    "phone phones telephone telephones tel ph mobile mobiles cell cellphone cellular landline fax telefax "
    "call calls calling dial ring sms whatsapp message messages voicemail answering "
    "hotline helpline contact reach "
    "telefon handy mobil mobiltelefon rufnummer anrufen anruf durchwahl "
    "téléphone portable appel appeler appelez tél télécopie gsm "
    "teléfono telefono móvil movil celular llamar llame llama contacto "
    "cellulare chiamare chiamate telefone telemóvel ligue telefoon mobiel bellen bel "
    "komórka komórkowy zadzwoń telefonu mobilnummer telefonnummer puhelin puh matkapuhelin "
    "телефон телефона телефону тел факс звоните звонить моб τηλέφωνο τηλ κινητό "
    "هاتف تلفن موبایل טלפון נייד फ़ोन फोन मोबाइल"
)
PHONE_WORDS = frozenset(_PHONE_WORDS.split())
# Right before a number, these say that it is something else.
_OTHER_NUMBERS = (
    "isbn issn doi pmid pmc order invoice account acct license licence case patent serial zip version "
    "page pages pp vol volume model item ticket reference ref"
)
OTHER_NUMBERS = frozenset(_OTHER_NUMBERS.split())
# Scripts without spaces: looked for as parts of what stands before.
PHONE_MARKS = ("电话", "電話", "手机", "手機", "携帯", "致电", "전화", "휴대", "☎", "📞", "📱", "โทร")
# Right before it.
PHONE_PREFIX = re.compile(r"\b(?:(?:office|desk|home|work|direct)[ ]?[:.]|[TMFPH]:)\s{0,3}\(?\Z", re.I)
# After the number, and the end of what is said there.
PHONE_LABEL = re.compile(
    r"[ -]{1,3}\(?(?:office|home|work|desk|fax|mobile|cell|tel|phone|landline)\)?(?=[ \t]*+(?:[\n,;)\\]|\Z))"
    r"|[ ,;]{1,2}(?:text|txt|call) me\b",
    re.I,
)

# IP addresses. What stands before a version's number, and before an address.
VERSION = re.compile(
    r"\b(?:versions?|ver|vers|release[sd]?|build|firmware|revision|rev|driver|patch|update|section|sections|"
    r"chapter|clause|paragraph|figure|table|item|kernel|§)[ .:=#(v]{0,4}\Z",
    re.I,
)
IPV6 = re.compile(r":[0-9A-Fa-f]{0,4}:")
IPV6_REST = re.compile(
    r"[0-9A-Fa-f:]++(?:(?<=:)[0-9]{1,3}(?:\.[0-9]{1,3}){3}|(?<=[0-9])(?:\.[0-9]{1,3}){3})?"
)
IP_WORDS = frozenset({"ip", "ips", "ipv4", "ipv6", "address", "addr", "host", "server", "client", "dns"})

# E-mail. The local part is matched backwards from the "@". Letters of scripts that put no spaces between
# words (U+0E00 and above) belong to it only where there is nothing else.
EMAIL_LOCAL = re.compile(r"(?:[.+%&'~-]|(?![\u0e00-\U0010ffff])\w){1,64}+")
EMAIL_LOCAL_ANY = re.compile(r"[\w.+%&'~-]{1,64}+")
EMAIL_DOMAIN_ASCII = re.compile(
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8}(?:[A-Za-z]{2,24}|xn--[A-Za-z0-9-]{2,59})(?![A-Za-z0-9_-])"
)
EMAIL_DOMAIN_ANY = re.compile(r"(?:\w(?:[\w-]{0,61}\w)?\.){1,8}(?:[^\W\d_]{2,24}|xn--[A-Za-z0-9-]{2,59})")
# names of files, not of hosts: logo@2x.png
_FILE_SUFFIXES = "png jpg jpeg gif svg webp css js ts html htm md py json"
FILE_SUFFIXES = frozenset(_FILE_SUFFIXES.split())

# user:password in a URL, up to the last @ before the path
CREDENTIALS = re.compile(r"[^\s/@:<>\"'\\]{0,64}:[^\s/<>\"'\\]{1,128}(?=@[\w\[])")


class Secret(NamedTuple):
    """A key of a known form.

    Attributes:
      anchor: what every one contains, for a fast search.
      lead: how many characters stand before it.
      pattern: the whole.
    """

    anchor: str
    lead: int
    pattern: re.Pattern[str]


def _secret(anchor: str, rest: str, lead: str = "") -> Secret:
    pattern = rf"(?<![A-Za-z0-9]){lead}{re.escape(anchor)}{rest}(?![A-Za-z0-9_])"
    return Secret(anchor, bool(lead), re.compile(pattern))


# By a character or two that all of a group contain, and most text does not.
SECRETS: tuple[tuple[str, tuple[Secret, ...]], ...] = (
    (
        "_",
        (
            *(_secret(f"gh{letter}_", r"[A-Za-z0-9]{36,255}") for letter in "pousr"),  # GitHub
            _secret("github_pat_", r"[A-Za-z0-9_]{40,255}"),
            _secret("k_live_", r"[0-9A-Za-z]{16,255}", "[srp]"),  # Stripe
            _secret("k_test_", r"[0-9A-Za-z]{16,255}", "[srp]"),
            _secret("hf_", r"[A-Za-z]{34}"),  # Hugging Face
            _secret("npm_", r"[A-Za-z0-9]{36}"),
        ),
    ),
    (
        "-",
        (
            _secret("glpat-", r"[A-Za-z0-9_-]{20,64}"),  # GitLab
            # OpenAI, Anthropic and others; without a digit it may be words with hyphens
            _secret("sk-", r"(?=[A-Za-z_-]{0,40}[0-9])[A-Za-z0-9_-]{20,255}"),
            _secret("xox", r"[abeoprs]-[A-Za-z0-9-]{10,250}"),  # Slack
        ),
    ),
    (
        "",
        (
            _secret("AKIA", r"[0-9A-Z]{16}"),  # AWS
            _secret("ASIA", r"[0-9A-Z]{16}"),
            _secret("AIza", r"[0-9A-Za-z_-]{35}"),  # Google
            _secret("ya29.", r"[0-9A-Za-z_-]{20,255}"),
            _secret("hooks.slack.com", r"/services/[A-Za-z0-9/_]{20,100}"),
            _secret("SG.", r"[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),  # SendGrid
            # JSON web token, RFC 7519
            _secret("eyJ", r"[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]{8,}+"),
        ),
    ),
)
PEM_BEGIN = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
PEM_END = re.compile(r"-----END (?:[A-Z0-9]{1,16} ){0,4}PRIVATE KEY(?: BLOCK)?-----")
# name = value, of names that say the value is secret; the value's letters must be mixed (privacy.py).
ASSIGNED = tuple(
    (
        sign,
        re.compile(
            sign + r">?[ \t]{0,2}[\"'`]?(?P<value>[A-Za-z0-9_\-+/.~]{16,256}+={0,2}+)(?![A-Za-z0-9_(\[])"
        ),
    )
    for sign in "=:"
)
SECRET_NAME = re.compile(
    r"(?:(?:api|access|account|encryption|signing|private|auth(?:entication|orization)?)[_\- ]?(?:key|token)"
    r"|(?:api|access)[_\- ]?key[_\- ]?id|(?:access|bearer|refresh|session|id)?[_\- ]?token"
    r"|secret(?:[_\- ]?(?:access|api))?[_\- ]?(?:key|token)?|passw(?:or)?d|passphrase|pwd|credential)s?"
    r"[\"'`\]]{0,2}[ \t]{0,3}\Z",
    re.I,
)
WALLETS: tuple[Secret, ...] = (
    Secret("bc1", 0, re.compile(r"(?<![A-Za-z0-9])bc1[02-9ac-hj-np-z]{11,87}(?![A-Za-z0-9])")),
    Secret("BC1", 0, re.compile(r"(?<![A-Za-z0-9])BC1[02-9AC-HJ-NP-Z]{11,87}(?![A-Za-z0-9])")),
)

KINDS: tuple[str, ...] = (
    "email_address",
    "phone_number",
    "ip_address",
    "credit_card",
    "iban_code",
    "url_credentials",
    "secret_key",
    "crypto_wallet",
    *NATIONAL_IDS,
)
