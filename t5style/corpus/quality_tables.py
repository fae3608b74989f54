"""What the quality kernels look up: classes of characters, units, special cases of word splitting.

Facts about spaCy 3.8's English tokenizer and datatrove 0.10's punctuation, which decide where words begin and
end, and so what the rules count. Built once per process (0.1 s).
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

# Bits of a character's class.
(
    SPACE,  # white space
    ALPHA,  # letters next to which hyphens, commas and colons cut
    LOWER,  # letters of these that are lower case or have none
    UPPER,
    QUOTE,
    PREFIX,  # split off where it begins a chunk
    SUFFIX,  # and where it ends one
    INFIX,  # and anywhere inside
    CURRENCY,
    BEFORE_DOT,  # after which a final full stop is split off
    SYMBOL,  # a word of nothing else is none (Gopher)
    LETTER,  # str.isalpha
    TERMINAL,  # ends a sentence
    LINE_END,  # str.splitlines
    HOST,  # of domain names
    UNSPACED,  # letters of scripts that write no spaces between words
    MARK,  # combining characters
    PLAIN,  # plays no part in splitting
    CATEGORY_P,  # Unicode's punctuation
    CUTS,  # may be, or begin, an infix
) = (np.uint32(1 << bit) for bit in range(20))

_SIZE = 0x32400  # beyond the last letter there are only tags, variation selectors and private characters

_LATIN = (
    "AZ az \uff21\uff3a \uff41\uff5a \u00c0\u00d6 \u00d8\u00f6 \u00f8\u01bf \u01c4\u02af \u1d00\u1d25 "
    "\u1d6b\u1d77 \u1d79\u1d9a \u1e00\u1eff \u2c60\u2c7b \u2c7e\u2c7f \ua722\ua76f \ua771\ua787 "
    "\ua78b\ua78e \ua790\ua7b9 \ua7fa\ua7fa \uab30\uab5a \uab60\uab64"
)
_GREEK_CYRILLIC = (
    "αω ΑΩ άά έέ ίί όό ώώ ήή ύύ ΆΆ ΈΈ ΊΊ ΌΌ ΏΏ ΉΉ ΎΎ ая АЯ ёё ЁЁ әә өө үү җҗ ңң һһ ӘӘ ӨӨ ҮҮ ҖҖ ҢҢ ҺҺ іі "
    "її єє ґґ ІІ ЇЇ ЄЄ ҐҐ ѓѓ ѕѕ јј љљ њњ ќќ ѐѐ ѝѝ ЃЃ ЅЅ ЈЈ ЉЉ ЊЊ ЌЌ ЀЀ ЍЍ"
)
_UNCASED = (
    "\u1200\u137f \u0980\u09ff \u0591\u05f4 \ufb1d\ufb4f \u0620\u064a \u066e\u06d5 \u06e5\u06ff "
    "\u0750\u077f \u08a0\u08bd \ufb50\ufbb1 \ufbd3\ufd3d \ufd50\ufdc7 \ufdf0\ufdfb \ufe70\ufefc "
    "\U0001ee00\U0001eebb \u0d80\u0dff \u0900\u097f \u0c80\u0cff \u0b80\u0bff \u0c00\u0c7f \uac00\ud7af "
    "\u1100\u11ff \u3040\u30ff \u4e00\u9fff \u3400\u4dbf \U00020000\U0002a6df \U0002a700\U0002ebef "
    "\u2e80\u2fdf \u2ff0\u303f \u31c0\u31ef \u3200\u33ff \uf900\ufaff \ufe30\ufe4f \U0001f200\U0001f2ff "
    "\U0002f800\U0002fa1f"
)
# Han, kana, Thai, Lao, Tibetan, Myanmar, Khmer.
_UNSPACED = (
    "\u3005\u3007 \u3041\u3096 \u30a1\u30fa \u30fc\u30fe \u3400\u4dbf \u4e00\u9fff \uf900\ufaff "
    "\uff66\uff9d \U00020000\U000323af \u0e01\u0e30 \u0e32\u0e33 \u0e40\u0e46 \u0e81\u0eb0 \u0eb2\u0eb3 "
    "\u0ebd\u0ec6 \u0edc\u0edf \u0f40\u0f6c \u1000\u102a \u103f\u103f \u1050\u1055 \u1780\u17b3"
)
_PUNCTUATION = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪"
_QUOTES = "'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_CURRENCIES = "$£€¥฿₽﷼₴₠₡₢₣₤₥₦₧₨₩₪₫₭₮₯₰₱₲₳₵₶₷₸₹₺₻₼₾₿"
UNITS = (
    "km km² km³ m m² m³ dm dm² dm³ cm cm² cm³ mm mm² mm³ ha µm nm yd in ft kg g mg µg t lb oz m/s km/h "
    "kmh mph hPa Pa mbar mb MB kb KB gb GB tb TB T G M K % км км² км³ м м² м³ дм дм² дм³ см см² см³ мм "
    "мм² мм³ нм кг г мг м/с км/ч кПа Па мбар Кб КБ кб Мб МБ мб Гб ГБ гб Тб ТБ م م² م³ سم سم² سم³ مم مم² "
    "مم³ كم غرام جرام جم كغ ملغ كوب اكواب"
)
_SYMBOLS = "!/—”:％１〈&(、━\\【#%「」，】；+^]~“《„';’{|∶´[=-`*．（–？！：$～«〉,><》)?）。…@_.\"}►»"
# Sentence ends of all scripts: Unicode's property Sentence_Terminal as of 15.0, as datatrove has it.
_TERMINALS = (
    "!! .. ?? ։։ \u061d\u061f ۔۔ \u0700\u0702 ߹߹ ࠷࠷ ࠹࠹ \u083d\u083e ।॥ ၊။ ።። \u1367\u1368 ᙮᙮ "
    "\u1735\u1736 ᠃᠃ ᠉᠉ \u1944\u1945 \u1aa8\u1aab \u1b5a\u1b5b \u1b5e\u1b5f \u1b7d\u1b7e \u1c3b\u1c3c "
    "\u1c7e\u1c7f \u203c\u203d \u2047\u2049 \u2e2e\u2e2e \u2e3c\u2e3c \u2e53\u2e54 。。 \ua4ff\ua4ff "
    "\ua60e\ua60f \ua6f3\ua6f3 \ua6f7\ua6f7 \ua876\ua877 \ua8ce\ua8cf \ua92f\ua92f \ua9c8\ua9c9 "
    "\uaa5d\uaa5f \uaaf0\uaaf1 \uabeb\uabeb ﹒﹒ \ufe56\ufe57 ！！ ．． ？？ ｡｡ ។៕ ៖៖ ៙៚"
)
# Symbols of Unicode 12 and later are no icons to spaCy.
_LATER_ICONS = (
    "\u166d\u166d \u2b97\u2b97 \u2bc9\u2bc9 \u2bff\u2bff \u2e50\u2e51 \u32ff\u32ff \ufd40\ufd4f "
    "\ufdcf\ufdcf \ufdfe\ufdff \U00011fd5\U00011ff1 \U0001cf50\U0001cfc3 \U0001d1e9\U0001d1ea "
    "\U0001f10d\U0001f10f \U0001f16c\U0001f16f \U0001f1ad\U0001f1ad \U0001f6d5\U0001f6df "
    "\U0001f6fa\U0001f6ff \U0001f7e0\U0001f7ff \U0001f8b0\U0001f8b1 \U0001f90c\U0001f90f "
    "\U0001f93f\U0001f93f \U0001f971\U0001f972 \U0001f977\U0001f979 \U0001f97b\U0001f97b "
    "\U0001f9a3\U0001f9af \U0001f9ba\U0001f9bf \U0001f9c3\U0001f9cf \U0001fa00\U0001fa53 "
    "\U0001fa70\U0001fbff"
)

# Special cases of word splitting; a bar is where one is cut. Those with apostrophes are cases without, too
# (do|n't, do|nt), and all also with the typographic apostrophe.
_EMOTICONS = r"""
:) :-) :)) :-)) :))) :-))) (: (-: =) (= :] :-] [: [-: [= =] :o) (o: :} :-} 8) 8-) (-8 ;) ;-) (; (-; :(
:-( :(( :-(( :((( :-((( ): )-: =( >:( :') :'-) :'( :'-( :/ :-/ =/ =| :| :-| ]= =[ :1 :P :-P :p :-p :O
:-O :o :-o :0 :-0 :() >:o :* :-* :3 :-3 =3 :> :-> :X :-X :x :-x :D :-D ;D ;-D =D xD XD xDD XDD 8D 8-D
^_^ ^__^ ^___^ >.< >.> <.< ._. ;_; -_- -__- v.v V.V v_v V_V o_o o_O O_o O_O 0_o o_0 0_0 o.O O.o O.O o.o
0.0 o.0 0.o @_@ <3 <33 <333 </3 (^_^) (-_-) (._.) (>_<) (*_*) (¬_¬) ಠ_ಠ ಠ︵ಠ (ಠ_ಠ) ¯\(ツ)/¯ (╯°□°）╯︵┻━┻
><(((*>
"""
_ANYWHERE = r"""\t \n — ' \") <space> '' C++ ä. ö. ü. °|c|. °|f|. °|k|. °|C|. °|F|. °|K|."""
_WHOLE = """
'S 's \u2018S \u2018s and/or w/o 're 'Cause 'cause 'cos 'Cos 'coz 'Coz 'cuz 'Cuz 'bout ma'am Ma'am
o'clock O'clock lovin' Lovin' lovin Lovin havin' Havin' havin Havin doin' Doin' doin Doin goin' Goin'
goin Goin nothin' Nothin' nothin Nothin nuthin' Nuthin' nuthin Nuthin ol' Ol' ol Ol somethin' Somethin'
somethin Somethin 'em 'll 'nuff em ll nuff 'd Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec.
Del. Feb. Fla. Ga. Ia. Id. Ill. Ind. Jan. Jul. Jun. Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C.
N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis.
a.m. Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. Messrs.
Mo. Mont. Mr. Mrs. Ms. p.m. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. y'|all y|all how|'d|'y How|'d|'y
can|not Can|not gon|na Gon|na got|ta Got|ta let|'s Let|'s c'm|on C'm|on
"""
_PRONOUNS = "i you he she it we they"
_QUESTIONS = "who what when where why how there that this these those"
_CONTRACTIONS = (  # words, and what is joined to them, with and without the apostrophes
    ("i", "'m 'm|a"),
    (f"{_PRONOUNS} {_QUESTIONS}", "'ll 'll|'ve 'd 'd|'ve"),
    ("you we they who what when where why how there these those", "'ve 're"),
    ("i could might must should would not", "'ve"),
    ("he she it who what when where why how there that this", "'s"),
    ("ca could do does did had may might must need ought sha should wo would", "n't n't|'ve"),
    ("ai are is was were have has dare", "n't"),
)
_NO_CONTRACTIONS = "ill its hell shell shed were well whore"  # words in their own right


def _ranges(text: str) -> set[int]:
    return {code for pair in text.split() for code in range(ord(pair[0]), ord(pair[1]) + 1)}


@functools.cache
def classes() -> np.ndarray:
    """uint32 by code point: the bits above; code points past its end have none."""
    everything = [chr(code) for code in range(_SIZE)]
    latin, named, uncased = _ranges(_LATIN), _ranges(_GREEK_CYRILLIC), _ranges(_UNCASED)
    categories = [unicodedata.category(character) for character in everything]
    icons = {code for code, category in enumerate(categories) if category == "So"} - _ranges(_LATER_ICONS)
    lower = {code for code in latin | named if everything[code].islower()} | uncased
    upper = {code for code in latin | named if everything[code].isupper()} | uncased

    def codes(characters: str) -> set[int]:
        return set(map(ord, characters))

    quotes, punctuation, currencies = codes(_QUOTES), codes(_PUNCTUATION), codes(_CURRENCIES)
    terminals = _ranges(_TERMINALS)
    controls = {*range(9), *range(11, 32), *range(127, 160)}
    bits: dict[Any, Iterable[int]] = {
        SPACE: (code for code, character in enumerate(everything) if character.isspace()),
        LETTER: (code for code, character in enumerate(everything) if character.isalpha()),
        ALPHA: latin | named | uncased,
        LOWER: lower,
        UPPER: upper,
        QUOTE: quotes,
        PREFIX: codes("§%=—–") | punctuation | quotes | currencies | icons,
        SUFFIX: codes("—–") | punctuation | quotes | icons,
        INFIX: icons | codes("…"),
        CURRENCY: currencies,
        BEFORE_DOT: lower | punctuation | quotes | codes("0123456789%²-+|?:()"),
        SYMBOL: codes(_SYMBOLS) | terminals | controls,
        TERMINAL: terminals,
        LINE_END: codes("\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"),
        HOST: {*range(0xA1, 0x10000), *codes("0123456789"), *latin & set(range(128))},
        UNSPACED: _ranges(_UNSPACED),
        MARK: (code for code, category in enumerate(categories) if category[0] == "M"),
        CATEGORY_P: (code for code, category in enumerate(categories) if category[0] == "P"),
        CUTS: icons | codes("….+-*^,–—~:<>=/"),
    }
    table = np.zeros(_SIZE, np.uint32)
    for bit, members in bits.items():
        table[[code for code in members if code < _SIZE]] |= bit
    # A chunk of these alone is a word, unless it is a special case.
    table[(table & LETTER > 0) & (table & (PREFIX | SUFFIX | CUTS | SPACE) == 0)] |= PLAIN
    table.flags.writeable = False
    return table


@functools.cache
def special_cases(english: bool) -> Mapping[str, tuple[str, ...]]:
    """Chunks that are split in a way of their own; those of English, and those of all languages alone."""
    marked = [*_ANYWHERE.split(), *(f"{chr(code)}." for code in range(97, 123))]
    if english:
        for words, endings in _CONTRACTIONS:
            for word in words.split():
                for start in (word, word.title()):
                    for ending in endings.split():
                        marked += [f"{start}|{ending}", f"{start}|{ending}".replace("'", "")]
        for hour in range(1, 13):
            marked += [f"{hour}|{half}" for half in ("a.m.", "am", "p.m.", "pm")]
    cases: dict[str, tuple[str, ...]] = {case: (case,) for case in _EMOTICONS.split()}
    cases |= {case.replace("|", ""): tuple(case.split("|")) for case in marked}
    if english:
        for word in _NO_CONTRACTIONS.split():
            cases.pop(word, None)
            cases.pop(word.title(), None)
        cases |= {case.replace("|", ""): tuple(case.split("|")) for case in _WHOLE.split()}
    for case in list(cases):
        if "'" in case:
            cases[case.replace("'", "’")] = tuple(piece.replace("'", "’") for piece in cases[case])
    return cases


def codes_of(text: str) -> np.ndarray:
    """The code points of a text, uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
