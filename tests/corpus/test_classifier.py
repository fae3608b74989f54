import csv
import dataclasses
import json
import pathlib
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus import classifier_kernels as kernels
from t5style.corpus.classifier import Classifier, Classify, Features, calibrate, fit, sigmoid
from t5style.corpus.document import Document, write_documents
from t5style.corpus.stages import Drop
from t5style.corpus.train_classifier import TrainClassifier, measure, roc_auc, wilson
from t5style.run_dir import RunDir, UserError

DATA = pathlib.Path(__file__).parents[2].parent / "shared/data"
GOOD = ("river", "mountain", "valley", "forest", "meadow", "island")
BAD = ("casino", "jackpot", "bonus", "poker", "winner", "slots")
BOTH = ("the", "of", "and", "a", "to", "in", "is", "near", "over", "this")


def texts(words, count, seed):
    generator = random.Random(seed)
    return [
        " ".join(generator.choice(words if generator.random() < 0.2 else BOTH) for _ in range(30))
        for _ in range(count)
    ]


def write(path, items, name):
    write_documents(path, [Document(text, f"{name}-{i}") for i, text in enumerate(items)])
    return str(path)


@pytest.fixture
def examples(tmp_path):
    return {
        "good": [write(tmp_path / "good.jsonl", texts(GOOD, 300, 0), "good")],
        "bad": [write(tmp_path / "bad.parquet", texts(BAD, 600, 1), "bad")],
    }


def run(job, folder):
    return job(RunDir(folder).create())


# ------------------------------------------------------------------------------------------------- features


_WEIGHTS = np.random.default_rng(0).normal(size=2**20).astype(np.float32)


def features_of(text, words, least, most):
    data = np.frombuffer(text.lower().encode(), np.uint8)
    out = np.zeros((2, kernels.room(len(data), words, least, most)), np.uint32)
    total, scales, counts = kernels.scan(data, words, least, most, 20, _WEIGHTS, out, True)
    assert (
        kernels.scan(data, words, least, most, 20, _WEIGHTS, np.empty((2, 0), np.uint32), False)[0] == total
    )
    indices = [row[:count] for row, count in zip(out, counts, strict=True)]
    sums = [_WEIGHTS[part].astype(float).sum() / max(len(part), 1) ** 0.5 for part in indices]
    assert total == pytest.approx(sum(sums), abs=1e-3)
    assert scales == pytest.approx([max(count, 1) ** -0.5 for count in counts])
    return sorted(np.concatenate(indices).tolist())


def expected_grams(text, words, least, most):
    """The same n-grams by plain Python, as strings."""
    tokens, run_of = [], None
    for character in text.lower():
        if character == "\n":
            kind = "end"
        elif ord(character) <= 32 or ord(character) == 127:
            kind = None
        else:
            kind = "word" if not character.isascii() or character.isalnum() else "sign"
        if kind is not None and kind == run_of:
            tokens[-1] += character
        elif kind is not None:
            tokens.append(character)
        run_of = kind
    grams = [
        ("w", *tokens[i - n : i]) for i in range(1, len(tokens) + 1) for n in range(1, min(words, i) + 1)
    ]
    for token in tokens if most else []:
        if not token[0].isascii() or token[0].isalnum():
            padded = f" {token} "
            grams += [
                ("c", padded[i : i + n])
                for i in range(len(padded) - 1)
                for n in range(least, most + 1)
                if i + n <= len(padded)
            ]
    return grams


@settings(max_examples=200, deadline=None)
@given(
    st.text("abcB19 .,\n\t\xe9糞\U0001f595", max_size=30),
    st.sampled_from([(2, 2, 4), (1, 0, 0), (0, 3, 5), (3, 1, 2)]),
)
def test_features_are_all_n_grams(text, shape):
    found = features_of(text, *shape)
    grams = expected_grams(text, *shape)
    assert len(found) == len(grams)
    # Equal n-grams have equal indices, and (nearly always, of a million) others have others.
    counts = sorted(grams.count(gram) for gram in set(grams))
    assert sorted(found.count(index) for index in set(found)) == counts


def test_an_empty_text_has_no_features():
    assert features_of("", 2, 2, 4) == features_of(" \t ", 2, 2, 4) == []


def test_near_identical_texts_share_their_smallest_shingle():
    generator = random.Random(0)
    together = 0
    for _ in range(300):
        words = [f"word{generator.randrange(500):x}" for _ in range(200)]
        edited = words.copy()
        edited[generator.randrange(200)] = "changed"
        keys = [
            kernels.smallest_shingle(np.frombuffer(text.encode(), np.uint8), 5)
            for text in (" ".join(words), ",\n".join(edited))
        ]
        together += keys[0] == keys[1]
    # One word changed of 200 leaves 191 of 201 runs of five words in both: 0.95 of 300, give or take 4.
    assert 270 <= together <= 299
    one, other = (
        kernels.smallest_shingle(np.frombuffer(text, np.uint8), 5)
        for text in (b"sold 12 of them, and 7", b"sold 34 of them and 9!")
    )
    assert one == other


# -------------------------------------------------------------------------------------------------- fitting


def test_fitting_separates_and_repeats():
    items = texts(GOOD, 200, 0) + texts(BAD, 200, 1)
    targets = np.repeat([1, 0], 200)
    first, second, third = (fit(items, targets, Features(), seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], second[0])
    assert first[1] == second[1]
    assert not np.array_equal(first[0], third[0])
    model = Classifier("quality", Features(), *first)
    held_out = texts(GOOD, 100, 2) + texts(BAD, 100, 3)
    scores = np.array([model.score(text) for text in held_out])
    assert roc_auc(scores, np.repeat([1, 0], 100)) > 0.99


def test_training_follows_the_gradient():
    """One AdaGrad step from nothing moves every weight of the text by the whole rate."""
    weights, bias = fit(
        ["a b"], np.array([1]), Features(words=1, characters=(0, 0)), epochs=1, learning_rate=0.5
    )
    assert np.sort(weights)[-2:] == pytest.approx([0.5, 0.5])
    assert np.count_nonzero(weights) == 2
    assert bias == pytest.approx(0.5)


def test_calibration_recovers_probabilities():
    generator = np.random.default_rng(0)
    margins = generator.normal(size=20000)
    targets = (generator.random(20000) < sigmoid(2 * margins - 1)).astype(float)
    slope, intercept = calibrate(margins, targets, np.ones(20000))
    assert slope == pytest.approx(2, abs=0.1)
    assert intercept == pytest.approx(-1, abs=0.1)
    # Margins that separate the classes give a finite slope.
    assert np.isfinite(calibrate(np.array([-9.0, -8, 8, 9]), np.array([0.0, 0, 1, 1]), np.ones(4))).all()


# -------------------------------------------------------------------------------------------------- figures


def test_areas_and_intervals():
    assert roc_auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])) == 0.75
    assert roc_auc(np.array([0.5, 0.5]), np.array([0, 1])) == 0.5
    # Newcombe (1998), table I: 81 of 263.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    assert wilson(5, 5)[1] == 1


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.2, 0.5, 0.7, 1.0]), st.integers(0, 1)), min_size=2, max_size=50
    )
)
def test_figures_agree_with_each_other(pairs):
    scores, targets = np.array([[0.3, 0], [0.6, 1], *pairs]).T
    figures = measure(scores, targets)
    confusion = figures["confusion"]
    assert sum(confusion.values()) == len(scores)
    assert confusion["true_positive"] + confusion["false_negative"] == targets.sum()
    half = next(row for row in figures["thresholds"] if row["threshold"] == 0.5)
    assert half["precision"] == pytest.approx(figures["precision"])
    assert half["recall"] == pytest.approx(figures["recall"])
    assert half["f1"] == pytest.approx(figures["f1"])
    wins = [np.sign(a - b) for a in scores[targets == 1] for b in scores[targets == 0]]
    assert figures["roc_auc"] == pytest.approx((np.mean(wins) + 1) / 2)
    for name, (low, high) in figures["intervals"].items():
        assert 0 <= low <= high <= 1, name
    assert [row["kept"] for row in figures["thresholds"]] == sorted(
        (row["kept"] for row in figures["thresholds"]), reverse=True
    )


# ------------------------------------------------------------------------------------------------------ job


def test_the_job_learns_measures_and_saves(examples, tmp_path):
    figures = run(TrainClassifier(**examples), tmp_path / "run")
    assert figures["roc_auc"] > 0.99
    counted = [figures[name] for name in ("learnt_from", "calibrated_on", "measured_on")]
    assert sum(counts["good"] for counts in counted) == 300
    assert sum(counts["bad"] for counts in counted) == 600
    assert 0.1 * 900 < sum(figures["measured_on"].values()) < 0.3 * 900
    model = Classifier.load(tmp_path / "run")
    assert model.fingerprint == figures["fingerprint"]
    assert model.score("the river near the forest and the valley") > 0.8
    assert model.score("jackpot bonus of the casino and poker") < 0.2
    again = run(TrainClassifier(**examples), tmp_path / "again")
    assert again["fingerprint"] == figures["fingerprint"]
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert evaluation["thresholds"][0]["threshold"] == 0.05
    for line in (tmp_path / "run/errors.jsonl").read_text().splitlines():
        error = json.loads(line)
        assert (error["score"] >= 0.5) == (error["is"] == "bad")


def test_errors_are_listed_worst_first(tmp_path):
    swapped = texts(GOOD, 60, 5)
    good = write(tmp_path / "good.jsonl", texts(GOOD, 300, 0), "good")
    bad = write(tmp_path / "bad.jsonl", texts(BAD, 300, 1) + swapped, "bad")
    run(TrainClassifier([good], [bad], holdout=0.4), tmp_path / "run")
    errors = [json.loads(line) for line in (tmp_path / "run/errors.jsonl").read_text().splitlines()]
    taken = [error for error in errors if error["is"] == "bad"]
    assert len(taken) <= 25
    assert len({error["text"] for error in taken} & set(swapped)) >= 10
    assert [error["score"] for error in taken] == sorted((error["score"] for error in taken), reverse=True)


def test_the_score_can_be_of_the_bad_class_and_for_another_prior(examples, tmp_path):
    run(TrainClassifier(**examples, score_of="bad", label="harm"), tmp_path / "bad")
    run(TrainClassifier(**examples, score_of="bad", label="harm", prior=0.01), tmp_path / "rare")
    models = [Classifier.load(tmp_path / name) for name in ("bad", "rare")]
    scores = [model.score("the casino is near the river") for model in models]
    assert models[0].score("jackpot bonus of the casino and poker") > 0.8
    assert scores[1] < scores[0]


def test_the_largest_class_is_sampled_by_text(examples, tmp_path):
    figures = run(TrainClassifier(**examples, max_examples=200), tmp_path / "run")
    counted = [figures[name] for name in ("learnt_from", "calibrated_on", "measured_on")]
    assert sum(counts["bad"] for counts in counted) == sum(counts["good"] for counts in counted) == 200


def test_the_same_text_in_both_classes_is_named(tmp_path):
    good, bad = texts(GOOD, 100, 0), texts(BAD, 100, 1)
    bad[7] = good[3].upper() + "  "
    paths = [
        [write(tmp_path / "g.jsonl", good, "good")],
        [write(tmp_path / "b.jsonl", [*bad, bad[0]], "bad")],
    ]
    with pytest.raises(UserError, match="1 texts are both good and bad examples: 'good-3' and 'bad-7'"):
        run(TrainClassifier(*paths), tmp_path / "run")
    figures = run(TrainClassifier(*paths, contradictions="drop"), tmp_path / "run2")
    assert figures["contradictions"] == 1
    assert figures["bad"] == {"examples": 101, "repeated": 1, "unreadable": 0}


def test_too_few_examples(examples, tmp_path):
    few = write(tmp_path / "few.jsonl", texts(BAD, 1, 0) * 80 + texts(BAD, 10, 1), "few")
    with pytest.raises(UserError, match="11 different bad examples are too few"):
        run(TrainClassifier(examples["good"], [few]), tmp_path / "run")
    empty = write(tmp_path / "empty.jsonl", ["", " "], "empty")
    with pytest.raises(UserError, match="0 different good examples"):
        run(TrainClassifier([empty], examples["bad"]), tmp_path / "run")
    alike = write(tmp_path / "alike.jsonl", [f"number {i} of them all, here" for i in range(90)], "alike")
    with pytest.raises(UserError, match="too much like each other"):
        run(TrainClassifier(examples["good"], [alike]), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"good": "a.jsonl"}, "good must be a list"),
        ({"bad": []}, "bad is empty"),
        ({"score_of": "ugly"}, "score_of must be 'good' or 'bad'"),
        ({"holdout": 0}, "holdout must lie between"),
        ({"holdout": 0.9, "calibration": 0.05}, "less than 0.1 to learn from"),
        ({"epochs": 0}, "must be positive"),
        ({"max_examples": 5}, "max_examples must be 50 or more"),
        ({"label": ""}, "label is empty"),
        ({"contradictions": "ask"}, "contradictions must be"),
    ],
)
def test_bad_settings_of_the_job(change, message):
    with pytest.raises(UserError, match=message):
        TrainClassifier(**{"good": ["g"], "bad": ["b"], **change})


@pytest.mark.parametrize(
    "change",
    [
        {"words": 9},
        {"characters": (4, 2)},
        {"characters": (1,)},
        {"bits": 40},
        {"words": 0, "characters": (0, 0)},
    ],
)
def test_bad_features(change):
    with pytest.raises(UserError, match="Features"):
        Features(**change)


# ---------------------------------------------------------------------------------------------------- stage


@pytest.fixture
def model(tmp_path):
    weights, bias = fit(texts(GOOD, 200, 0) + texts(BAD, 200, 1), np.repeat([1, 0], 200), Features(bits=14))
    Classifier("quality", Features(bits=14), weights, bias).save(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_stage_scores_and_drops(model):
    good, bad = Document("river and valley", "1", meta={"scores": {"x": 1}}), Document("poker jackpot", "2")
    scored = Classify(model)(good)
    assert isinstance(scored, Document)
    assert scored.meta["scores"] == {"x": 1, "quality": round(Classifier.load(model).score(good.text), 6)}
    keep, drop = Classify(model, keep_above=0.5), Classify(model, drop_above=0.5, label="nature")
    assert isinstance(keep(good), Document)
    assert keep(bad).reason == "quality score below 0.5"
    assert drop(good).reason == "nature score 0.5 or above"
    assert drop(bad).meta["scores"].keys() == {"nature"}
    english = dataclasses.replace(keep, languages=["en"])
    assert english(bad) == bad
    assert isinstance(english(dataclasses.replace(bad, language="en")), Drop)
    assert pickle.loads(pickle.dumps(keep))(bad) == keep(bad)
    assert isinstance(keep(Document("", "3")), Document | Drop)
    assert isinstance(keep(Document("\ud800 lone", "4")), Document | Drop)


def test_a_model_trained_again_is_used(model):
    text = Document("river and valley", "1")
    before = Classify(model)(text).meta["scores"]["quality"]
    loaded = Classifier.load(model)
    dataclasses.replace(loaded, weights=-loaded.weights, bias=-loaded.bias).save(model)
    assert Classify(model)(text).meta["scores"]["quality"] == pytest.approx(1 - before, abs=1e-5)


def test_bad_models(model, tmp_path):
    with pytest.raises(UserError, match=r"no classifier.json"):
        Classifier.load(tmp_path / "nowhere")
    file = pathlib.Path(model) / "classifier.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"bias": manifest["bias"] + 1}))
    with pytest.raises(UserError, match="is damaged"):
        Classifier.load(model)
    file.write_text(json.dumps(manifest | {"features": manifest["features"] | {"version": 0}}))
    with pytest.raises(UserError, match="of version 0"):
        Classifier.load(model)
    file.write_text(json.dumps(manifest))
    weights = pathlib.Path(model) / "classifier.npz"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        Classifier.load(model)
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        Classifier.load(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": ""}, "Classify.model is empty"),
        ({"keep_above": 0.5, "drop_above": 0.6}, "contradict"),
        ({"keep_above": 1.5}, "keep_above is a probability"),
        ({"languages": "en"}, "languages must be a list"),
    ],
)
def test_bad_settings_of_the_stage(change, message):
    with pytest.raises(UserError, match=message):
        Classify(**{"model": "m", **change})


def test_importing_stays_light():
    names = "classifier", "train_classifier", "filters", "consent", "spam"
    code = "import sys, " + ", ".join(f"t5style.corpus.{name}" for name in names)
    code += "; print([name for name in ('numba', 'protego', 'jax', 'trafilatura') if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


# ------------------------------------------------------------------------------------------------ real text


def test_offensive_tweets(tmp_path):
    """Davidson et al. (2017), every third tweet: hate and offence against neither."""
    if not (DATA / "safety").exists():
        pytest.skip("no ../shared/data/safety")
    with open(DATA / "safety/davidson_hate_offensive.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[::3]
    good = write(tmp_path / "g.jsonl", [row["tweet"] for row in rows if row["class"] == "2"], "neither")
    bad = write(tmp_path / "b.jsonl", [row["tweet"] for row in rows if row["class"] != "2"], "offensive")
    figures = run(TrainClassifier([good], [bad], label="harm", score_of="bad"), tmp_path / "run")
    assert figures["roc_auc"] > 0.96
    assert figures["precision"] > 0.97
    assert figures["recall"] > 0.85
    assert figures["calibration_error"] < 0.05
