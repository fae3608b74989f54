import itertools
import json
import pathlib
import pickle
import random
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus import privacy, privacy_checks
from t5style.corpus.document import Document
from t5style.corpus.privacy import KINDS, Redact, Span, find, redact
from t5style.corpus.privacy_patterns import NATIONAL_IDS
from t5style.run_dir import UserError

DATA = pathlib.Path(__file__).parents[2].parent / "shared/data"

FOUND = {
    "email_address": [
        "john.doe+news@mail.example.co.uk",
        "o'brien_99@x-y.io",
        "jürgen@müller.de",
        "ivan@пример.рф",
        "a@xn--bcher-kva.example",
    ],
    "phone_number": [
        "+1-984-182-0190",
        "+46 (0)8 928 571 38",
        "+447700921916",
        "(898)666-3621x0135",
        "(602) 272-9781 ext. 12",
        "905-674-3793",
        "001-518-640-0854",
        "0044 20 7946 0958",
        "01.84.17.61.18",
        "0341 8387176",
        "(08) 8747 6301",
        "07700 063 966",
        "phone: [467 3395]",
        "please call me on [9472 7916]",
        "Fax: [9498777106]",
        "T: [60-56-85-91]",
        "[432 03 163] office\n",
        "Telefon [416 60 039]",
        "电话：[6552 9988]",
    ],
    "ip_address": [
        "41.173.96.26",
        "http://[160.153.234.103]/index",
        "[195.206.132.199]:8080",
        "6e40:4041:c617:e898:c11:40d2:c669:2eb4",
        "[[2a00:1450:4001:81b::200e]]:443",
        "2001:4860:4860::8888",
        "host [8.8.8.8]",
        "2a00:1450:4001:81b::93.184.216.34",
    ],
    "credit_card": [
        "4111111111111111",
        "4111 1111 1111 1111",
        "5500-0000-0000-0004",
        "378282246310005",
        "3782 822463 10005",
        "30569309025904",
        "6011111111111117",
        "3530111333300000",
        "card no [4222222222222]",
        "Maestro [630427373398]",
    ],
    "iban_code": [
        "GB82WEST12345698765432",
        "DE89 3704 0044 0532 0130 00",
        "gb82west12345698765432",
        "NO9386011117947",
        "MT84MALT011000012345MTLCAST001S",
    ],
    "us_ssn": ["460-89-9847", "SSN [460899847]", "social security number [460 89 9847]"],
    "us_itin": ["900-70-1234"],
    "uk_nhs": ["NHS number [943 476 5919]", "patient [9434765919]"],
    "uk_nino": ["AB 12 34 56 C", "National Insurance: [AB123456C]"],
    "es_dni": ["12345678Z", "X1234567L", "X-1234567-L"],
    "it_codice_fiscale": ["RSSMRA85T10A562S", "rssmra85t10a562s"],
    "fr_nir": ["2 55 08 14 168 025 38", "255081416802538"],
    "de_steuer_id": ["Steuer-ID [86095742719]", "IdNr. [86 095 742 719]"],
    "nl_bsn": ["BSN [111222333]", "burgerservicenummer [1112.22.333]"],
    "pl_pesel": ["PESEL [44051401359]"],
    "se_personnummer": ["811218-9876", "19811218-9876", "personnummer [8112189876]"],
    "fi_hetu": ["131052-308T", "010100A123D"],
    "br_cpf": ["529.982.247-25", "CPF [52998224725]"],
    "in_aadhaar": ["Aadhaar [2341 2341 2346]"],
    "in_pan": ["PAN [ABCPE1234F]"],
    "cn_resident_id": ["11010519491231002X"],
    "ca_sin": ["SIN [046 454 286]"],
    "au_tfn": ["TFN [123 456 782]"],
    "za_id": ["ID [8001015009087]"],
    "tr_kimlik": ["TC kimlik [10000000146]"],
    "be_nrn": ["85.07.30-033.28"],
    "ch_ahv": ["756.9217.0769.85"],
    "kr_rrn": ["900101-1234568"],
    "mx_curp": ["HEGG560427MVZRRL04"],
    "no_fnr": ["fødselsnummer [01010750160]"],
    "dk_cpr": ["CPR [070761-4285]"],
    "ie_pps": ["PPS [1234567T]"],
    "sg_nric": ["S1234567D"],
    "url_credentials": [
        "postgres://[user:p@ssw0rd]@db.example.com/x",
        "http://[me:secret]@host/",
    ],
    "secret_key": [
        "AKIAIOSFODNN7EXAMPLE",
        "ghp_" + "aB3dE6gH9jK2mN5pQ8sT1vW4yZ7bC0eF3hI6",
        "xoxb-123456789012-abcdefGHIJKL",
        "AIzaSyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q",
        "sk_live_4eC39HqLyjWDarjtT1zdp7dc",
        "sk-proj-abcDEF123456ghiJKL789012mnoPQR",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow+/=\n-----END RSA PRIVATE KEY-----",
        'api_key = "[9f86d081884c7d659a2feaa0c55ad015]"',
        "PASSWORD=[x7Kd93mQpL02vRtYzz]",
    ],
    "crypto_wallet": [
        "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNa",
        "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4",
    ],
}


def bare(text):
    """Text with its marked value; where nothing is marked all of it is the value."""
    match = re.search(r"\[(\[.*?\]|.*?)\]", text, re.S)
    if match is None or text.startswith("[2a"):
        return text, 0, len(text)
    if match[1].startswith("["):  # an address in its own brackets
        return text[1:-5] + text[-4:], 1, len(match[1]) - 1
    return text[: match.start()] + match[1] + text[match.end() :], match.start(), match.end() - 2


@pytest.mark.parametrize(("kind", "text"), [(kind, text) for kind, texts in FOUND.items() for text in texts])
def test_finds(kind, text):
    if text == "[[2a00:1450:4001:81b::200e]]:443":
        text, start, end = "[2a00:1450:4001:81b::200e]:443", 1, 25
    else:
        text, start, end = bare(text)
    for before, after in (("", ""), ("x, ", ". And so on"), ("«", "»\n")):
        spans = find(before + text + after)
        assert Span(start + len(before), end + len(before), kind) in spans, (before, spans)
        assert len(spans) == 1


def test_every_kind_has_a_case_here():
    assert set(KINDS) == set(FOUND)


@pytest.mark.parametrize(
    "text",
    [
        "no@host and @user, user@ and a@b",
        "logo@2x.png",
        "git@github.com:user/repository.git",
        "a date 2015-12-22 04:34:22 and 22.12.2015 04:34, call it 2015/12/22",
        "call 01-02-2003 12 a date",
        "1939-1945, 1914-1918 and 1990 - 1995: phone",
        "pp. 1234567-1234590",
        "ISBN 978-3-16-148410-0 and ISBN 0-306-40615-2 and 0306406152",
        "pi is 3.14159265358979 or 3,141,592",
        "call 1 234 567 and 1.234.567 and 12.345678 people",
        "5000-2800=2200 phones, 3000/200",
        "my driver's license number is 6940579",
        "phone model 12345678",
        "$ 905-674-379",
        "4111111111111112 and 1234567812345678 and 0000000000000000",
        "GB82WEST12345698765431 and XX82WEST12345698765432",
        "000-12-3456, 666-12-3456, 900-12-3456, 123-00-4567, 123-45-0000",
        "2270-66-1551",
        "version 41.173.96.26, v41.173.96.26, release: 41.173.96.26, Chrome/41.173.96.26",
        "version 1.2.3.4",
        "see section 1.2.3.4 and 1.2.3.4.5 and 300.1.2.3",
        "at 127.0.0.1, 10.1.2.3, 192.168.0.1, 172.16.4.5, ::1, fe80::1, 224.0.0.1",
        "std::cout << dead::beef << Face::Bad << a::b; at 12:34:56",
        "12345678A and X1234567A and RSSMRA85T10A562T",
        "9434765919 without a word; 946454286, 111222333, 44051401359, 2341 2341 2346",
        "529.982.247-26",
        "11010519491231002Y and 110105194913310021",
        "a sk-learn task-force and risk-averse-people-who-have-no-keys-at-all",
        "api_key = your_api_key_goes_here, token: aaaaaaaaaaaaaaaaaaaaaaaa1",
        "http://example.com:8080/a@b and http://example.com/x:y@z",
        "1A1zP1eP5QGefi2DMPTfTL5SLmv7DivfNb bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t5",
        "AKIA and ghp_short and eyJhbGciOi.only",
        "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----",
    ],
)
def test_near_misses(text):
    assert find(text) == []


def test_other_scripts_and_invisible_characters_hide_nothing():
    text = "４１１１\u00a0１１１１\u202f１１１１ １１１１ and 4111\u200b1111\u200b1111\u200b1111"
    assert redact(text) == "<CREDIT_CARD> and <CREDIT_CARD>"
    assert redact("٤١١١١١١١١١١١١١١١") == "<CREDIT_CARD>"
    assert redact("x\u200b jo\u00adhn@exam\u200bple.com\u200b!") == "x\u200b <EMAIL_ADDRESS>\u200b!"
    assert redact("460\u201189\u20119847") == "<US_SSN>"
    assert redact("𝟒𝟔𝟎-𝟖𝟗-𝟗𝟖𝟒𝟕") == "<US_SSN>"
    assert redact("请联系support@example.com谢谢") == "请联系<EMAIL_ADDRESS>谢谢"


def test_placeholders_keep_what_stands_around():
    assert redact("https://me:pw@example.com/x?y") == "https://<URL_CREDENTIALS>@example.com/x?y"
    assert redact("a <j@x.org>; +41 (0)96 471 07 95, 905-674-3793.") == (
        "a <<EMAIL_ADDRESS>>; <PHONE_NUMBER>, <PHONE_NUMBER>."
    )
    assert redact("nothing") == "nothing"
    assert redact("") == ""


def test_choices():
    text = "j@x.org, 10.1.2.3, 8.8.4.44, 12345678Z, 460-89-9847"
    assert {span.kind for span in find(text)} == {"email_address", "ip_address", "es_dni", "us_ssn"}
    assert [span.kind for span in find(text, ["us_ssn"])] == ["us_ssn"]
    assert [span.kind for span in find(text, countries=["ES"])] == ["email_address", "ip_address", "es_dni"]
    assert len(find(text, ["ip_address"], private_addresses=True)) == 2
    assert find(text, []) == []


def test_bad_choices_are_refused():
    with pytest.raises(UserError, match="no kind 'email' of personal data; did you mean 'email_address'"):
        find("", ["email"])
    with pytest.raises(UserError, match="did you mean 'phone_number'"):
        Redact(kinds=["phone_nunber"])
    with pytest.raises(UserError, match=r"kinds must be a list, not the string 'us_ssn': write \['us_ssn'\]"):
        find("", "us_ssn")
    with pytest.raises(UserError, match="no numbers of the country 'xx'; there are au, be, br"):
        Redact(countries=["xx"])


def test_stage_counts_by_kind_and_adds_to_what_is_there():
    document = Document("j@x.org k@x.org 460-89-9847", "1", "s", meta={"k": 1, "pii": {"us_ssn": 2}})
    stage = pickle.loads(pickle.dumps(Redact()))
    result = stage(document)
    assert result == Document(
        "<EMAIL_ADDRESS> <EMAIL_ADDRESS> <US_SSN>",
        "1",
        "s",
        meta={"k": 1, "pii": {"email_address": 2, "us_ssn": 3}},
    )
    assert document.meta["pii"] == {"us_ssn": 2}
    assert stage(result) is result


def test_pseudonyms(monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_KEY_ONE", "k" * 32)
    stage = Redact(pseudonyms=True, key="env:TEST_KEY_ONE")
    text = "J@x.org, j@X.org, k@x.org, 4111 1111 1111 1111, 4111111111111111"
    once = stage(Document(text, "1")).text
    names = re.findall(r"<[A-Z_]+_[0-9a-f]{12}>", once)
    assert len(names) == 5
    assert names[0] == names[1] != names[2]
    assert names[3] == names[4]
    assert stage(Document("call: j@x.org", "2")).text == f"call: {names[0]}"
    assert stage(Document(once, "1")).text == once
    path = tmp_path / "key"
    path.write_text("another key, long enough\n")
    other = Redact(pseudonyms=True, key=f"file:{path}")(Document("j@x.org", "1")).text
    assert other != names[0]
    assert "long enough" not in repr(Redact(pseudonyms=True, key=f"file:{path}"))


def test_bad_keys_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TEST_KEY_TWO", "short")
    for key, message in (
        ("env:TEST_KEY_TWO", "a key of 16 bytes or more in 'env:TEST_KEY_TWO', which holds 5"),
        ("env:TEST_KEY_NONE", "which holds 0"),
        (f"file:{tmp_path}/none", "cannot read"),
        ("env:", "must say where the key is"),
    ):
        with pytest.raises(UserError, match=message):
            Redact(pseudonyms=True, key=key)
    with pytest.raises(UserError) as error:
        Redact(pseudonyms=True, key="0123456789abcdef0123456789abcdef")
    assert "0123456789" not in str(error.value)
    Redact(key="env:TEST_KEY_NONE")  # of no use, hence not looked at


def test_a_word_that_comes_near_by_redaction_counts():
    text = "call a.very.long.name+of+somebody@with.a.long.domain.example.com 123 4567"
    assert [span.kind for span in find(text)] == ["email_address"]
    assert redact(text) == "call <EMAIL_ADDRESS> <PHONE_NUMBER>"
    assert Redact()(Document(text, "1")).meta["pii"] == {"email_address": 1, "phone_number": 1}


WORDS = [bare(text)[0] for texts in FOUND.values() for text in texts] + [
    *"+()-./:=@#,\n\t\u200b\u00a0<>07x",
    *(
        "12",
        "345",
        "1234567",
        "٣",
        "phone",
        "call",
        "card",
        "IP",
        "NHS",
        "SSN",
        "ssn:",
        "api_key=",
        "http://",
    ),
    *("<EMAIL_ADDRESS>", "-----BEGIN", " "),
]
MIXED = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=12).flatmap(
    lambda parts: st.sampled_from(["", " "]).map(lambda between: between.join(parts))
)


@settings(max_examples=300, deadline=None)
@given(MIXED)
def test_redacting_twice_is_redacting_once(text):
    spans = find(text)
    assert spans == sorted(spans)
    assert all(0 <= span.start < span.end <= len(text) for span in spans)
    assert all(one.end <= other.start for one, other in itertools.pairwise(spans))
    once = redact(text)
    assert redact(once) == once
    assert find(once) == []


@given(st.text())
def test_any_text(text):
    once = redact(text)
    assert redact(once) == once


HARD = {
    "digits": "1234567890",
    "sevens and spaces": "7 ",
    "groups": "123 456-789.",
    "cards": "4111111111111112 ",
    "dots": "1.",
    "pluses": "+4",
    "at signs": "a@",
    "addresses": "a@b.c",
    "domains": "a.b@a-",
    "colons": ":a",
    "double colons": "a::",
    "letters": "abcdefghij",
    "codes": "GB12 ABCD",
    "iban": "GB82WEST",
    "equals": "key=a",
    "urls": "http://a:b",
    "pem": "-----BEGIN PRIVATE KEY-----",
    "jwt": "eyJaaaaaaaa.",
    "keys": "sk-a-",
    "base58": "1abc",
    "brackets": "(0)",
    "phones": "905-674-3793 ",
    "invisible": "4\u200b",
    "found": "460-89-9847 j@x.org ",
}


@pytest.mark.parametrize("name", HARD)
def test_time_is_linear_in_one_long_line(name):
    def seconds(size):
        text = (HARD[name] * (size // len(HARD[name]) + 1))[:size]
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            find(text)
            best = min(best, time.process_time() - start)
        return best

    small, large = seconds(5_000), seconds(40_000)
    # 8 times the text; quadratic would be 64 times the time.
    assert large < 24 * small + 0.01


def test_much_of_digits():
    generator = random.Random(0)
    text = "".join(generator.choice("0123456789    .-") for _ in range(200_000))
    start = time.process_time()
    once = redact(text)
    assert time.process_time() - start < 10
    assert find(once) == []


@pytest.mark.parametrize(
    ("check", "good"),
    [
        (privacy_checks.luhn, "79927398713"),
        (privacy_checks.verhoeff, "2363"),
        (privacy_checks.mod11_10, "86095742719"),
        (privacy_checks.uk_nhs, "9434765919"),
        (privacy_checks.nl_bsn, "111222333"),
        (privacy_checks.ca_sin, "046454286"),
        (privacy_checks.br_cpf, "52998224725"),
        (privacy_checks.pl_pesel, "44051401359"),
        (privacy_checks.tr_kimlik, "10000000146"),
        (privacy_checks.ch_ahv, "7569217076985"),
        (privacy_checks.iban, "GB82WEST12345698765432"),
        (privacy_checks.iban, "NO9386011117947"),
        (privacy_checks.cn_resident_id, "110105194912310021"[:17] + "X"),
        (privacy_checks.se_personnummer, "8112189876"),
        (privacy_checks.no_fnr, "01010750160"),
        (privacy_checks.za_id, "8001015009087"),
        (privacy_checks.fr_nir, "255081416802538"),
        (privacy_checks.be_nrn, "85073003328"),
    ],
)
def test_checks_refuse_every_single_wrong_digit(check, good):
    assert check(good)
    for place, character in enumerate(good):
        for wrong in "0123456789":
            if character.isdigit() and wrong != character:
                assert not check(good[:place] + wrong + good[place + 1 :])


def test_published_bech32_addresses():
    good = [
        "BC1QW508D6QEJXTDG4Y5R3ZARVARY0C5XW7KV8F3T4",
        "bc1p0xlxvlhemja6c4dqv22uapctqupfhlxm9h8z3k2e72q4k9hcz7vqzk5jj0",
    ]
    for address in good:
        assert redact(f"to {address}.") == "to <CRYPTO_WALLET>."


def test_importing_brings_nothing_heavy():
    assert "phonenumbers" not in vars(privacy)
    assert set(NATIONAL_IDS) <= set(KINDS)


@pytest.mark.skipif(not (DATA / "pii").exists(), reason=f"no labelled texts in {DATA / 'pii'}")
def test_labelled_texts():
    kinds = {"EMAIL_ADDRESS", "PHONE_NUMBER", "CREDIT_CARD", "IBAN_CODE", "IP_ADDRESS", "US_SSN"}
    labelled = dict.fromkeys(kinds, 0)
    missed, false = dict(labelled), dict(labelled)
    for record in json.loads((DATA / "pii/presidio_synth_dataset_v2.json").read_text("utf-8")):
        spans = [(start, end, kind.upper()) for start, end, kind in find(record["full_text"])]
        labels = [(s["start_position"], s["end_position"], s["entity_type"]) for s in record["spans"]]
        for start, end, kind in labels:
            if kind in kinds:
                labelled[kind] += 1
                missed[kind] += not any(s <= start and end <= e and k == kind for s, e, k in spans)
        for start, end, kind in spans:
            false[kind] += not any(s < end and start < e and k == kind for s, e, k in labels)
    assert labelled["PHONE_NUMBER"] == 92
    assert labelled["CREDIT_CARD"] == 136
    assert missed == dict.fromkeys(kinds, 0)
    assert false == dict.fromkeys(kinds, 0)
