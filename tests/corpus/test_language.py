import pathlib
import statistics
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5style.corpus.document import Document
from t5style.corpus.language import LANGUAGES, Identify, identify
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

pytest.importorskip("pycld2")
pytest.importorskip("py3langid")

SENTENCES = pathlib.Path(__file__).parents[2].parent / "shared/data/langid/lingua/sentences"
EXAMPLES = {
    "en": "The ferry had left before we reached the harbour, so we slept under the old bridge.",
    "de": "Die Fähre war schon weg, als wir am Hafen ankamen, also schliefen wir unter der Brücke.",
    "fr": "Le bateau était déjà parti quand nous sommes arrivés au port, alors nous avons dormi dehors.",
    "es": "El barco ya había salido cuando llegamos al puerto, así que dormimos debajo del puente.",
    "nb": "Fergen hadde allerede gått da vi kom til havnen, så vi sov ikke før klokken var tre.",
    "nn": "Ferja hadde alt gått då vi kom til hamna, så vi sov ikkje før klokka var tre.",
    "ru": "Паром уже ушёл, когда мы добрались до гавани, и поэтому мы ночевали под мостом.",
    "mk": "Бродот веќе замина кога стигнавме до пристаништето, па спиевме под стариот мост.",
    "el": "Το πλοίο είχε ήδη φύγει όταν φτάσαμε στο λιμάνι και κοιμηθήκαμε κάτω από τη γέφυρα.",
    "ja": "港に着いたときには船はもう出ていたので、私たちは橋の下で眠りました。",
    "zh": "我们到达港口的时候船已经开走了，所以我们在桥下睡了一夜。",
    "ko": "우리가 항구에 도착했을 때 배는 이미 떠나서 다리 밑에서 잠을 잤습니다.",
    "ar": "كانت السفينة قد غادرت عندما وصلنا إلى الميناء فنمنا تحت الجسر القديم.",
    "he": "הספינה כבר יצאה כשהגענו לנמל, ולכן ישנו מתחת לגשר הישן.",
    "hi": "जब हम बंदरगाह पहुँचे तब तक जहाज़ जा चुका था, इसलिए हम पुराने पुल के नीचे सो गए।",
    "mi": "Kua wehe kē te waka i mua i tō mātou taenga atu ki te whanga, nō reira i moe mātou i konei.",
}


@pytest.mark.parametrize("code", EXAMPLES)
def test_identify(code):
    found, probability = identify(EXAMPLES[code])
    assert found == code
    assert 0.5 < probability <= 1


def test_short_and_long():
    assert identify(EXAMPLES["de"])[1] > identify("Und nun?")[1]
    # The language of most of what is looked at, which is at the beginning and in the middle.
    book = "Produced by volunteers, for anyone anywhere at no cost. " + EXAMPLES["ja"] * 500
    assert identify(book)[0] == "ja"


@pytest.mark.parametrize("text", ["", " \n\t", "12 345,6 -- !?", "🙂🙂", "\x00\x01", "²³¼"])
def test_text_without_letters_is_in_no_language(text):
    assert identify(text) == ("und", 0.0)


@given(st.text(alphabet=st.characters(exclude_categories=[]), max_size=60))
def test_identify_takes_any_string(text):
    code, probability = identify(text)
    assert code in LANGUAGES or (code, probability) == ("und", 0.0)
    assert 0 <= probability <= 1


def test_invalid_characters_do_not_hide_the_language():
    for character in ("\x00", "\ud800", "\ufdd0", "\U000e0fff", "\x85"):
        assert identify(character.join(EXAMPLES["de"].split(" ")[:8]) + EXAMPLES["de"])[0] == "de"


@pytest.fixture(scope="module")
def py3langid():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def test_languages_are_those_that_the_detectors_know(py3langid):
    import pycld2

    from t5style.corpus.language import _CODES

    names = dict(pycld2.LANGUAGES)
    theirs = {names[name] for name in pycld2.DETECTED_LANGUAGES if not name.startswith("X_")}
    theirs |= set(py3langid.nb_classes)
    assert {_CODES.get(code, code) for code in theirs} - {"und"} == LANGUAGES


@pytest.mark.parametrize("code", EXAMPLES)
def test_the_compiled_loop_computes_what_py3langid_computes(code, py3langid):
    import numpy as np

    from t5style.corpus.language import _CODES, _model
    from t5style.corpus.language_kernels import naive_bayes

    model = _model()
    data = EXAMPLES[code].encode()
    logits, seen = naive_bayes(np.frombuffer(data, np.uint8), *model.arrays)
    assert seen > 10
    expected = np.full(len(model.codes), -np.inf)
    scores = np.asarray(py3langid._raw_score(data), np.float64)
    for name, score in zip(py3langid.nb_classes, (scores - scores.max()) / len(data) ** 0.5, strict=True):
        place = model.places[_CODES.get(name, name)]
        expected[place] = max(expected[place], score)
    np.testing.assert_allclose(logits, expected, atol=0.01)


def test_accuracy_and_calibration():
    if not SENTENCES.is_dir():
        pytest.skip("no ../shared/data/langid (lingua's test sentences)")
    right: dict[str, list[bool]] = {}
    probabilities = []
    for path in sorted(SENTENCES.glob("*.txt")):
        for text in path.read_text("utf-8").splitlines()[::25]:
            code, probability = identify(text)
            right.setdefault(path.stem, []).append(code == path.stem)
            probabilities.append(probability)
    assert len(right) == 75
    assert statistics.mean(map(statistics.mean, right.values())) >= 0.94
    accuracy = statistics.mean(answer for answers in right.values() for answer in answers)
    assert abs(accuracy - statistics.mean(probabilities)) < 0.02


@pytest.mark.parametrize("package", ["pycld2", "py3langid", "numba"])
def test_missing_packages_name_the_extra(package, monkeypatch):
    from t5style.corpus import language

    for cached in (language._detector, language._model):
        cached.cache_clear()
    monkeypatch.delitem(sys.modules, "t5style.corpus.language_kernels", raising=False)
    monkeypatch.delitem(sys.modules, "py3langid.langid", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}: pip install 't5style\[corpus\]'"):
        identify("Ja, si.")


def test_stage():
    german = Document(EXAMPLES["de"], "a", language="en", meta={"k": 1})
    kept = Identify()(german)
    assert isinstance(kept, Document)
    assert kept.language == "de"
    assert set(kept.meta) == {"k", "language_probability"}
    assert kept.meta["language_probability"] > 0.9
    assert kept.text == german.text
    assert Identify(keep=("de", "en"))(german) == kept
    dropped = Identify(keep=("fr",))(german)
    assert isinstance(dropped, Drop)
    assert dropped.reason == "language not wanted"
    assert dropped.detail.startswith("de 0.9")
    assert Identify(thresholds={"de": 1.0})(german) == Drop(
        "language uncertain", f"de {kept.meta['language_probability']:.3f}, below 1.0"
    )
    assert Identify(thresholds={"fr": 1.0})(german) == kept
    assert Identify()(Document("123", "b")) == Drop("language uncertain", "und 0.000")
    assert Identify(default_threshold=0)(Document("Ja.", "b")) != Identify(default_threshold=1)(
        Document("Ja.", "b")
    )


def test_stage_trusts_what_documents_say():
    labelled = Document(EXAMPLES["de"], "a", language="en")
    assert Identify(trust=True, keep=("en",))(labelled) is labelled
    assert Identify(trust=True, keep=("de",))(labelled) == Drop("language not wanted", "en")
    unlabelled = Identify(trust=True, keep=("de",))(Document(EXAMPLES["de"], "a"))
    assert isinstance(unlabelled, Document)
    assert unlabelled.language == "de"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": "en"}, r"must be a list of codes, not 'en'"),
        ({"keep": ()}, "keep is empty"),
        ({"keep": ["no"]}, r"no language 'no' \(did you mean 'nb'\?\)"),
        ({"keep": ["en-US"]}, r"no language 'en-US' \(did you mean 'en'\?\)"),
        ({"keep": ["klingon"]}, r"no language 'klingon'; codes are ISO 639-1"),
        ({"thresholds": {"xx": 0.5}}, "no language 'xx'"),
        ({"keep": ["en"], "thresholds": {"de": 0.5}}, "has 'de', which is not in Identify.keep"),
        ({"thresholds": {"de": 1.5}}, "the threshold de must be from 0 to 1, not 1.5"),
        ({"default_threshold": -0.1}, "default_threshold must be from 0 to 1, not -0.1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(UserError, match=message):
        Identify(**settings)
