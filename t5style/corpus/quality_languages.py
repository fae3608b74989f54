"""What the quality rules know about single languages: thresholds, stop words, line ends.

Thresholds are those of FineWeb-2 (Penedo et al. 2025, "FineWeb2: One Pipeline to Scale Them All", the filter
configurations published with it), which were set on each language's own web and Wikipedia text. Stop words
are a language's commonest function words. Where something is missing here, the rule's published default
holds, or the rule is left out, as ``of`` says.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

# code, mean word length from and to (0: no bound), words with a letter, duplicate lines, most frequent 2- to
# 4-grams, duplicate 5- to 10-grams; and of FineWeb: lines that end in punctuation, line feeds per word.
_FINEWEB2 = """
ar 2 9 .787 .304 .197 .172 .146 .165 .153 .142 .131 .12 .109 .143 .189
bg 3 9 .756 .35 .086 .109 .127 .205 .185 .165 .149 .136 .126 .273 .18
bn 4 24 .8 .165 .084 .103 .134 .099 .083 .069 .058 .048 .04 .25 .268
ca 2 11 .832 .294 .216 .189 .168 .159 .149 .137 .126 .116 .105 .154 .118
cs 3 11 .781 .333 .095 .121 .144 .193 .175 .157 .144 .132 .121 .125 .233
da 3 11 .798 .305 .367 .297 .232 .169 .158 .147 .134 .123 .112 .1 .182
de 0 15 .774 .263 .169 .153 .137 .141 .134 .126 .117 .108 .098 0 .152
el 3 11 .809 .31 .194 .175 .156 .174 .163 .153 .142 .13 .119 .167 .116
es 4 14 .825 .265 .077 .097 .112 .152 .137 .123 .114 .107 .099 .3 .171
fa 2 9 .812 .246 .189 .164 .143 .157 .147 .137 .127 .117 .107 .2 .15
fi 4 13 .755 .333 .101 .132 .163 .171 .149 .131 .119 .106 .094 .25 .219
fr 2 11 .812 .264 .161 .149 .134 .15 .141 .131 .121 .111 .1 .1 .185
he 3 9 .799 .386 .1 .119 .14 .192 .174 .156 .143 .13 .12 .3 .158
hi 2 21 .837 .206 .208 .198 .161 .135 .125 .116 .108 .099 .09 .091 .316
hu 3 15 .766 .322 .226 .198 .172 .169 .159 .148 .136 .124 .112 .067 .231
id 3 11 .805 .25 .088 .104 .12 .176 .158 .142 .128 .119 .109 .25 .222
it 3 21 .807 .246 .198 .156 .133 .144 .136 .127 .118 .109 .1 .025 .2
ko 1 6 .791 .374 .282 .228 .185 .201 .184 .168 .154 .14 .127 .062 .196
nb 3 11 .783 .312 .087 .107 .131 .163 .153 .134 .122 .115 .112 .2 .219
nl 3 16 .828 .333 .093 .117 .14 .177 .16 .145 .133 .123 .112 .238 .194
pl 3 11 .726 .353 .096 .12 .144 .203 .182 .163 .15 .137 .126 .2 .209
pt 3 13 .814 .325 .093 .117 .139 .19 .172 .154 .142 .131 .12 .154 .23
ro 1 14 .779 .289 .161 .146 .131 .16 .149 .138 .127 .117 .106 .081 .207
ru 3 11 .713 .322 .184 .164 .146 .168 .156 .145 .133 .121 .109 .231 .139
sv 3 12 .841 .292 .242 .195 .174 .156 .147 .136 .125 .116 .105 .2 .135
sw 3 9 .802 .302 .396 .282 .231 .193 .17 .155 .14 .126 .113 .143 .167
tr 3 21 .773 .303 .094 .114 .136 .168 .151 .135 .123 .116 .107 .2 .273
uk 3 11 .694 .333 .086 .108 .129 .176 .157 .139 .125 .113 .102 .308 .211
vi 3 11 .803 .293 .223 .197 .171 .178 .163 .15 .136 .124 .111 .333 .103
"""

# The first are datatrove's for English, which are Gopher's.
_STOP_WORDS = """
en the be to of and that have with
af die van en is in het nie dat wat vir op te om met
ar في من على إلى أن عن مع هذا هذه التي الذي ما لا هو كان أو
az və bir bu üçün ilə da də o ki olan daha isə
be і ў на з не да што як за па для гэта
bg на и в е да за се от не с че по това като
bn এবং ও এই যে একটি করে না থেকে তার এর জন্য কিন্তু হয় আর আমি তিনি সে কি
bs i u je na se da za od su ne što o kao sa
ca de la i el que a en els les un una per amb no
cs a v je na se že to s z do i o si by ale jako
cy y yn a i o ar mae ei yr am gan wedi
da og i at det er en til på som for med af den ikke
de der die und in den von zu das mit sich des auf für ist im dem nicht ein eine
el και το η ο να του της με την που για από είναι τα δεν
eo la kaj de en al estas ke ne mi por li kun
es de la que el en y a los se del las un por con no una su para
et ja on ei et see ta oli kui ka oma ning mis
eu eta da ez bat ere du zen izan dira dela egin
fa و در به از که این را با است آن برای یک
fi ja on ei että se oli hän mutta kun joka myös ovat niin
fr de la le et les des en un une du que est dans il qui pour pas sur
ga an na agus ar is le go i do bhí
gl de a que o e en os un unha do da con non para se
gu અને છે આ એક તે પણ માટે કે હતી હતા
he של את על הוא לא זה עם כי גם היא אני או הם יש
hi के में है की और से का को एक हैं पर यह कि ने भी नहीं हो
hr i u je na se da za od su ne što o kao
hu a az és hogy nem is egy meg volt de ez csak
hy և է որ են մեջ այդ այս համար էր ու
id yang dan di dengan untuk dari ini itu dalam tidak pada ke adalah
is og að í á er sem það til við en um ekki var
it di e il la che in un per è non una del si i con le da della
ja の に は を た が で て と し れ も な い
ka და არ რომ ეს იყო მაგრამ თუ ამ რა ის
kk және бұл мен үшін да де бір деп бар ол
ko 이 그 수 및 한 것 있는 할 등 더 있다 그리고 또는 같은 대한 하는 위해 때
la et in est non ad ut cum sed quod qui ex ab
lt ir yra kad į su iš tai ne kaip bet už buvo
lv un ir ar no ka uz tas par bet kā nav
mk и на во да се од е за не со што ова
mr आहे आणि या तो हे की व ते होते नाही त्या
ms yang dan di untuk dengan ini itu dari dalam tidak pada ke
nb og i det er på som en til for med at av ikke den
nl de van het een en in is dat op te zijn met voor niet die aan
nn og i det er på som ein til for med at av ikkje den
pa ਦੇ ਦੀ ਹੈ ਵਿੱਚ ਨੂੰ ਤੇ ਅਤੇ ਦਾ ਨੇ ਇਹ ਹਨ ਕਿ
pl w i na z do się nie to że jest o jak po a od za
pt de a o que e do da em um para com não uma os no se na por
ro de și în a la cu pe nu că o un care este din mai
ru и в на не что с он как по но к из у за от это
sk a v je na sa že to s z do i o ale ako
sl in je v na se da za so ne ki z pa
so iyo oo waa ka ku in u la ee ay
sq të e në një dhe për me që nga është më
sr и у је на се да за од су не i u je na se da za od su ne
sv och i att det som en på är av för med till den inte
sw na ya wa kwa ni katika za la hii kuwa
ta ஒரு மற்றும் இந்த என்று என அந்த அவர் இது நான் இல்லை
te ఈ ఒక మరియు ఆ నేను అని కూడా కాదు ఇది
tl ang ng sa na at mga ay hindi ko si
tr ve bir bu da de için ile çok ne o ama daha olarak
uk і в на не що з у та до як за це від але
ur کے میں کی ہے اور سے کا کو ایک یہ پر ہیں نے نہیں
vi là và của một có không được cho trong các đã này người với những
zh 的 是 在 了 不 有 和 人 这 這 一 他 我 也 为 為
"""

# Scripts without spaces: letters count as words (Khmer, Lao, Myanmar, Thai, Tibetan: with the marks they
# bear), and a word of ours is about two of them. So word counts and n-grams are twice as long, ratios per
# word half as large, and word lengths are not looked at.
UNSPACED = frozenset({"zh", "ja", "th", "lo", "km", "my", "bo", "yue", "wuu"})
_UNSPACED_GOPHER: Mapping[str, Any] = {
    "min_words": 100,
    "max_words": 200_000,
    "min_mean_word_length": None,
    "max_mean_word_length": None,
    "max_symbol_ratio": 0.05,
    "max_top_ngrams": ((4, 0.20), (6, 0.18), (8, 0.16)),
    "max_duplicate_ngrams": ((10, 0.15), (12, 0.14), (14, 0.13), (16, 0.12), (18, 0.11), (20, 0.10)),
}
# Languages that FineWeb-2's values above leave out: about the loosest of those that they have for others, for
# English's drop a part of clean Belarusian, Kazakh and Lithuanian text.
_OTHER_GOPHER: Mapping[str, Any] = {
    "min_mean_word_length": 2,
    "max_mean_word_length": 15,
    "min_letter_words": 0.7,
}
_UNSPACED_FINEWEB: Mapping[str, Any] = {
    "max_short_lines": None,
    "max_duplicate_line_characters": 0.1,
    "max_line_feeds_per_word": 0.15,
}
_NO_FULL_STOP = frozenset({"th", "lo"})  # sentences end with a space
# What ends a line of text besides C4's . ? ! " ' in languages other than English, by script.
_QUOTES = "”’»“"
_LINE_ENDS = {
    "。！？」』）…": "zh ja yue wuu",
    "؟۔": "ar fa ur ps sd ug",
    "।॥": "hi bn mr ne pa gu as sa",
    ";\u037e": "el",
    "։": "hy",
    "።፧": "am ti",
    "။": "my",
    "។": "km",
    "།": "bo",
}


def base(code: str) -> str:
    """The language of a code with a region or a script: zh-CN, pt_BR."""
    return code.lower().replace("_", "-").split("-")[0]


@functools.cache
def stop_words(language: str) -> tuple[str, ...] | None:
    """A language's stop words, None where there are none here."""
    for line in _STOP_WORDS.split("\n"):
        code, *words = line.split() or [""]
        if code == {"no": "nb"}.get(language, language):
            return tuple(dict.fromkeys(words))
    return None


@functools.cache
def of(stage: str, language: str) -> Mapping[str, Any]:
    """Settings in which a language differs from the published defaults, which are those for English.

    Args:
      stage: Gopher, C4 or FineWeb.
      language: ISO 639-1 code.
    """
    settings: dict[str, Any] = {}
    language = {"no": "nb"}.get(language, language)
    if stage == "Gopher":
        if language in UNSPACED:
            settings |= _UNSPACED_GOPHER
        elif language != "en":
            settings |= _OTHER_GOPHER
        words = stop_words(language)
        settings["stop_words"] = words
        if words is None:
            settings["min_stop_words"] = None
    elif stage == "FineWeb" and language in UNSPACED:
        settings |= _UNSPACED_FINEWEB
        if language in _NO_FULL_STOP:
            settings["min_ended_lines"] = None
    elif stage == "C4" and language != "en":
        ends = [*".?!\"'", *_QUOTES]
        for more, codes in _LINE_ENDS.items():
            if language in codes.split():
                ends += more
        settings["line_ends"] = tuple(ends)
        if language in UNSPACED:
            settings["min_words_per_line"] = None
        if language in _NO_FULL_STOP:
            settings |= {"line_ends": None, "min_sentences": None}
    for line in _FINEWEB2.split("\n"):
        if line.startswith(f"{language} "):
            shortest, longest, letters, lines, *rest = map(float, line.split()[1:])
            if stage == "Gopher":
                settings |= {
                    "min_mean_word_length": shortest or None,
                    "max_mean_word_length": longest or None,
                    "min_letter_words": letters,
                    "max_duplicate_lines": lines,
                    "max_top_ngrams": tuple(zip((2, 3, 4), rest[:3], strict=True)),
                    "max_duplicate_ngrams": tuple(zip(range(5, 11), rest[3:9], strict=True)),
                }
            elif stage == "FineWeb":
                settings |= {
                    "min_ended_lines": rest[9] or None,
                    "max_line_feeds_per_word": rest[10],
                    "max_short_lines": None,
                    "max_duplicate_line_characters": 0.1,
                }
    return settings
