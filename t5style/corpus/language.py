"""Which language a text is in.

Two detectors that are wrong about different things are asked, the second only where the first is in doubt:

1. CLD2 (R. Sites, Compact Language Detector 2; package ``pycld2``, Apache-2.0): naive Bayes over letter
   quadgrams, and for some scripts the script alone.
2. py3langid's model (BSD-3-Clause; Lui and Baldwin, langid.py, ACL 2012): naive Bayes over chosen byte
   n-grams, computed here by a compiled loop.

Their answers are pooled log-linearly. The constants below were chosen on the translations of the messages of
Django and of system programs into 90 languages, cut and joined to lengths of 40 to 1,000 characters.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from t5style.corpus.document import Document
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

UNDETERMINED = "und"  # ISO 639-2
# What identify can answer besides "und": ISO 639-1 where it has a code, else 639-3.
LANGUAGES = frozenset(
    """
    aa ab ace af ak am an ar ary arz as ay az ba bcl be bg bh bi bn bo br bs ca ceb chr co crh crs cs cy da
    de dv dz el en eo es et eu ext fa ff fi fj fo fr fy ga gcf gcr gd gl gn gom grc gu guw gv ha haw he hi
    hmn hr ht hu hy ia id ie ig ik is it iu ja jv ka kab kha ki kk kl km kn ko ks ku ky la lb lg lif lij ln
    lo lt ltg lv mfe mg mi mk ml mn mr ms mt my na nb ne nl nn nr nso ny oc om or pa pcm pl ps pt qu rm rn ro
    ru rw sa sco sd sdh se sg si sk sl sm sn so sq sr ss st su sv sw syr ta te tg th ti tk tl tn to tr ts tt
    ug uk ur uz ve vec vi vo wa war wo xh yi yo za zh zu
    """.split()  # noqa: SIM905 (182 quoted codes would fill the page)
)
_SAMPLE = 1000
# Codes of the detectors that are withdrawn, or name a script, a variety or a macrolanguage.
_CODES = {
    "no": "nb",
    "iw": "he",
    "jw": "jv",
    "zh-Hant": "zh",
    "wuu": "zh",
    "yue": "zh",
    "uzs": "uz",
    "hbo": "he",
    "gug": "gn",
    "kik": "ki",
    "fuv": "ff",
    "zxx": UNDETERMINED,  # no linguistic content
}
# CLD2's score is how well the text fits the language, per 1,024 bytes; real text has 500 to 2,000. Below
# _SURE_SCORE, or where less than _SURE_PERCENT of the text is in one language, there is a second opinion: on
# 7 % of Lingua's sentences. With 500, and on hr, bs, id and ms too, it is 14 % of them, and 0.959 right for
# 0.958; a second opinion takes 20 us, CLD2 10.
_SURE_SCORE, _SURE_PERCENT = 400, 90
# CLD2 takes Macedonian and Bulgarian for Serbian, however high its score.
_UNSURE = frozenset(("sr",))
# From CLD2's codes to ours, where its word is enough.
_SURE = {code: code for code in LANGUAGES - _UNSURE} | {
    theirs: ours for theirs, ours in _CODES.items() if ours in LANGUAGES - _UNSURE
}
# Pool: log p(language) = _SHARPNESS * (log of the second opinion / sqrt(bytes) + _CLD2_WEIGHT * CLD2's share
# of the text). A language that only CLD2 knows counts as _UNKNOWN below the second opinion's best.
_CLD2_WEIGHT, _UNKNOWN, _SHARPNESS = 4.0, 3.0, 0.65
# A probability for the answers of CLD2 that stand alone: logistic in its score and the length.
_ALONE = (-8.7, 3.4, 2.3)


def identify(text: str) -> tuple[str, float]:
    """The language that most of a text is in, and the probability that this is right.

    Of a long text, 500 characters at its beginning and 500 from its middle are looked at. The answer depends
    on the text alone. See the module for the method.

    Args:
      text: any string, natural language for an answer that means something.

    Returns:
      A code of ``LANGUAGES``, two letters (ISO 639-1) where there is such a code and three (ISO 639-3)
      otherwise; Norwegian is ``nb`` or ``nn``. The probability is from 0 to 1. ``("und", 0.0)`` for a text
      without a letter, such as the empty one, or that neither detector can tell anything about.

    Raises:
      UserError: pycld2, numba or py3langid is not installed.
    """
    sample = text if len(text) <= _SAMPLE else _ends(text)
    data = sample.encode("utf-8", "replace")
    found = _cld2(data)
    _, code, percent, score = found[0]
    if score >= _SURE_SCORE and percent >= _SURE_PERCENT and (code := _SURE.get(code, "")):
        bias, per_score, per_size = _ALONE
        logit = bias + per_score * min(score, 2000.0) / 1000 + per_size * math.log(len(data))
        return code, 1 / (1 + math.exp(-logit))
    if not any(map(str.isalpha, sample)):
        return UNDETERMINED, 0.0
    return _pool(sample, found)


def _ends(text: str) -> str:
    """The beginning of a long text and a part of its middle."""
    half, middle = _SAMPLE // 2, len(text) // 2
    return text[:half] + "\n" + text[middle : middle + half]


def _cld2(data: bytes) -> Sequence[tuple[str, str, int, float]]:
    """CLD2's three languages at most: name, code, per cent of the text, and score; "un" where it has none."""
    detect, error = _detector()
    try:
        return detect(data, isPlainText=True, bestEffort=True)[2]
    except error:
        # CLD2 calls the controls and the characters that Unicode leaves unused invalid.
        data = "".join(c if c.isprintable() else " " for c in data.decode()).encode()
    try:
        return detect(data, isPlainText=True, bestEffort=True)[2]
    except error:
        return [("Unknown", "un", 0, 0.0)]


def _pool(sample: str, found: Sequence[tuple[str, str, int, float]]) -> tuple[str, float]:
    import numpy as np

    try:
        from t5style.corpus.language_kernels import naive_bayes, pool
    except ImportError as error:
        raise _missing("numba") from error
    model = _model()
    # As the model was trained: composed, and capitals only where there are small letters too.
    text = unicodedata.normalize("NFC", sample.lower() if sample.isupper() else sample)
    data = np.frombuffer(text.encode("utf-8", "replace"), np.uint8)
    votes = [(model.places.get(_CODES.get(code, code), -1), percent) for _, code, percent, _ in found]
    logits, seen = naive_bayes(data, *model.arrays)  # [languages]
    best, probability = pool(logits, seen, np.array(votes), _CLD2_WEIGHT, _UNKNOWN, _SHARPNESS)
    code = model.codes[best] if best >= 0 else UNDETERMINED
    return (UNDETERMINED, 0.0) if code == UNDETERMINED else (code, probability)


class _Model(NamedTuple):
    """py3langid's model, its classes put in the order of ours.

    Attributes:
      codes: ``LANGUAGES`` and "und", sorted.
      places: where each code is in codes.
      arrays: what ``naive_bayes`` takes after the text.
    """

    codes: list[str]
    places: dict[str, int]
    arrays: tuple[Any, ...]


@functools.cache
def _model() -> _Model:
    """py3langid's model; some 70 MB once loaded, which takes a second, so only where it is needed."""
    import numpy as np

    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise _missing("py3langid") from error
    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    weights = np.asarray(model.nb_ptc, np.float32)
    scale = np.float32(np.abs(weights).max() / np.iinfo(np.int16).max)
    codes = sorted((*LANGUAGES, UNDETERMINED))
    places = {code: place for place, code in enumerate(codes)}
    arrays = (
        np.asarray(model.tk_nextmove),
        np.asarray(model.tk_row),
        np.asarray(model.tk_output, np.int32),
        np.rint(weights / scale).astype(np.int16),
        scale,
        np.asarray(model.nb_pc, np.float32),
        np.array([places[_CODES.get(code, code)] for code in model.nb_classes], np.int32),
        len(codes),
    )
    return _Model(codes, places, arrays)


@functools.cache
def _detector() -> tuple[Any, type[Exception]]:
    try:
        import pycld2
    except ImportError as error:
        raise _missing("pycld2") from error
    return pycld2.detect, pycld2.error


def _missing(package: str) -> UserError:
    return UserError(f"identifying languages needs the package {package}: pip install 't5style[corpus]'")


@dataclasses.dataclass(frozen=True)
class Identify:
    """The stage that sets a document's language, and drops the languages that are not wanted.

    ``meta['language_probability']`` is set to the probability, in three decimals.

    Attributes:
      keep: codes of the languages to keep, of ``LANGUAGES``; None for all.
      thresholds: the least probability, for languages that need another than the default.
      default_threshold: the least probability; FineWeb (Penedo et al., 2024) and RefinedWeb take 0.65, of
        another model. 0 for any.
      trust: documents that already have a language keep it, and only ``keep`` is asked.
    """

    keep: Sequence[str] | None = None
    thresholds: Mapping[str, float] = dataclasses.field(default_factory=dict)
    default_threshold: float = 0.65
    trust: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.keep, str):
            raise UserError(
                f"Identify.keep must be a list of codes, not {self.keep!r}: write [{self.keep!r}]"
            )
        if self.keep is not None and not self.keep:
            raise UserError(
                "Identify.keep is empty, which would drop every document; None keeps all languages"
            )
        for code in (*(self.keep or ()), *self.thresholds):
            if code not in LANGUAGES:
                raise UserError(
                    f"Identify knows no language {code!r}{_hint(code)}; codes are ISO 639-1 (en, de, nb), or "
                    "639-3 where that has none: see t5style.corpus.language.LANGUAGES"
                )
        for code in self.thresholds:
            if self.keep is not None and code not in self.keep:
                raise UserError(f"Identify.thresholds has {code!r}, which is not in Identify.keep")
        for name, value in (("default_threshold", self.default_threshold), *self.thresholds.items()):
            if not 0 <= value <= 1:
                raise UserError(f"Identify: the threshold {name} must be from 0 to 1, not {value}")

    def __call__(self, document: Document) -> Document | Drop:
        if self.trust and document.language:
            if self.keep is not None and document.language not in self.keep:
                return Drop("language not wanted", document.language)
            return document
        code, probability = identify(document.text)
        detail = f"{code} {probability:.3f}"
        if code == UNDETERMINED:
            return Drop("language uncertain", detail)
        least = self.thresholds.get(code, self.default_threshold)
        if self.keep is not None and code not in self.keep:
            return Drop("language not wanted", detail)
        if probability < least:
            return Drop("language uncertain", f"{detail}, below {least}")
        meta = {**document.meta, "language_probability": round(probability, 3)}
        return dataclasses.replace(document, language=code, meta=meta)


def _hint(code: str) -> str:
    wanted = _CODES.get(code) or re.split("[-_]", code.lower())[0]
    return f" (did you mean {wanted!r}?)" if wanted in LANGUAGES and wanted != code else ""
