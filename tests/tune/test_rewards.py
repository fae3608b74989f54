"""Verifiable rewards, and what becomes of rewards that fail."""

import math
import time

import numpy as np
import pytest

from t5style.run_dir import UserError
from t5style.tune import rewards, scoring
from t5style.tune.rewards import (
    ExactMatch,
    JsonSchema,
    Matches,
    NumericAnswer,
    UnitTests,
    Weighted,
    WordCount,
)
from t5style.tune.sandbox import Sandbox
from tests.tune import reward_functions


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("So she pays $1,234.50 in all.\n#### 1,234.5", 1234.5),
        ("3 apples, then 5. The answer is 42.", 42),
        ("#### -7", -7),
        ("it falls by \u22123 degrees", -3),
        ("1,2,3", 3),
        ("12,345,678 people", 12345678),
        (r"hence \boxed{3/4}, not 5", 0.75),
        ("about 6.02e23", 6.02e23),
        ("$18", 18),
        ("7%", 7),
        ("a=10-3", 3),
        ("1/0 and 2", 2),
        ("#### none", None),
        ("no number", None),
        ("1e999999999", None),
        ("", None),
    ],
)
def test_numbers_of_texts(text, value):
    found = rewards.number(text)
    assert found is None if value is None else float(found) == value


def test_matching_rewards():
    assert NumericAnswer()({"answer": "worked out... #### 72"}, ["it is 72", "#### 71\n72", "dunno"]) == [
        1,
        0,
        0,
    ]
    assert NumericAnswer(wrong=-0.5, missing=-1, tolerance=0.01)({"answer": 100}, ["100.9", "98", ""]) == [
        1,
        -0.5,
        -1,
    ]
    with pytest.raises(ValueError, match="holds no number"):
        NumericAnswer()({"answer": "x"}, ["1"])
    assert ExactMatch()({"answer": "the cat"}, [" the  cat\n", "The cat", "a cat"]) == [1, 0, 0]
    tagged = ExactMatch(ignore_case=True, pattern="<answer>(.*?)</answer>")
    texts = ["<answer>no</answer> <answer>Yes</answer>", "yes", "<answer>\nyes\n</answer>"]
    assert tagged({"answer": ["yes", "ja"]}, texts) == [1, 0, 1]
    with pytest.raises(KeyError, match="the prompt's record has no 'answer', only 'a'"):
        ExactMatch()({"a": 1}, ["x"])
    assert Matches(r"<think>.*</think>\s*\d+")({}, ["<think>a\nb</think> 12", "12"]) == [1, 0]
    assert Matches(r"\d\d", search=True)({}, ["ab12c", "1"]) == [1, 0]
    np.testing.assert_allclose(WordCount(3)({}, ["a b c", "a b", "a b c d e"]), [1, 0.9, 0.8])
    assert WordCount("n", slope=1)({"n": 1}, ["a", "a b"]) == [1, 0]
    with pytest.raises(ValueError, match="no regular expression"):
        Matches("(")
    with pytest.raises(ValueError, match="it needs a group"):
        ExactMatch(pattern="x")
    both = Weighted([Matches("a+"), WordCount(1)], [2.0, 0.5])
    assert both({}, ["aa", "b"]) == [2.5, 0.5]
    with pytest.raises(ValueError, match="one for each"):
        Weighted([Matches("a")], [1, 2])


def test_json_schema():
    pytest.importorskip("jsonschema")
    schema = {"type": "object", "required": ["city"], "properties": {"city": {"type": "string"}}}
    reward = JsonSchema(schema, json_only=0.25)
    texts = [
        '{"city": "Bonn"}',
        'Here:\n```json\n{"city": "Bonn"}\n```',
        '{"city": 3}',
        '{"city": NaN}',
        "Bonn",
        "[" * 100_000,
    ]
    assert reward({}, texts) == [1, 1, 0.25, 0, 0, 0]
    assert JsonSchema("schema")({"schema": {"type": "integer"}}, ["3", "x"]) == [1, 0]
    with pytest.raises(Exception, match="nowhere"):  # not fetched
        JsonSchema({"$ref": "https://nowhere.example/schema.json"})({}, ["3"])


def test_unit_tests_of_code():
    reward = UnitTests(before="prompt", entry="entry", partial=0.1, sandbox=Sandbox(seconds=1))
    record = {
        "prompt": "def add(a, b):\n",
        "tests": "def check(f):\n    assert f(1, 2) == 3\n",
        "entry": "add",
    }
    texts = ["    return a + b\n", "    return a - b\n", "    while True: pass\n", "    return import\n"]
    try:
        assert reward(record, texts) == [1, 0.1, 0, 0]
    except UserError as error:
        pytest.skip(f"this machine allows no sandbox: {error}")
    listed = UnitTests()(
        {"tests": ["assert f() == 1", "assert f() > 0"]}, ["```python\ndef f(): return 1\n```"]
    )
    assert listed == [1]


def test_failures_are_counted_and_the_rest_is_scored():
    calls = {"picky": reward_functions.picky, "length": reward_functions.length}
    texts = [["good", "raise", "nan", "inf"], ["hang", "die", "exit", "good"]]
    began = time.monotonic()
    with scoring.Scorer(calls, {"length": 0.5}, on_failure=-1.0, seconds=0.5) as scorer:
        scores = scorer.score([{}, {}], ["a", "b"], texts)
        process = scorer._process
        assert process is not None
    assert process.poll() is not None
    assert time.monotonic() - began < 30
    np.testing.assert_array_equal(scores.failed, [[0, 1, 1, 1], [1, 1, 1, 0]])
    np.testing.assert_allclose(scores.total, [[3, -1, -1, -1], [-1, -1, -1, 3]])
    assert math.isnan(scores.parts["picky"][0, 1])
    assert scores.parts["length"][0, 1] == 5
    said = {(i, j): happened for i, j, _, happened in scores.failures}
    assert said[0, 1].startswith("RuntimeError: no such luck (reward_functions.py, line")
    assert said[0, 2] == "it gave nan"
    assert said[1, 0] == "it did not return within 0.5 s"
    assert said[1, 1] == "its process ended"


def test_a_reward_that_always_fails_ends_the_run_with_its_first_exception():
    with (
        scoring.Scorer({"broken": reward_functions.broken}) as scorer,
        pytest.raises(
            UserError, match=r"'broken' failed for all 2 completions .* KeyError: 'there is nothing"
        ),
    ):
        scorer.score([{}], ["a"], [["x", "y"]])
    with (
        scoring.Scorer({"short": reward_functions.short}) as scorer,
    ):
        assert not scorer.score([{}], ["a"], [["x", "y"]]).failed.any()  # one at a time it is right
    with (
        scoring.Scorer({"local": lambda record, texts: [0.0]}) as scorer,
        pytest.raises(UserError, match="use a function that can be imported"),
    ):
        scorer.score([{}], ["a"], [["x"]])


def test_a_reward_that_never_returns_ends_the_run_soon(monkeypatch):
    monkeypatch.setattr(scoring, "MAX_HANGS", 2)
    with (
        scoring.Scorer({"picky": reward_functions.picky}, seconds=0.2) as scorer,
        pytest.raises(UserError, match="did not return for 2 completions in a row"),
    ):
        scorer.score([{}, {}], ["a", "b"], [["hang", "hang", "hang"], ["good", "good", "good"]])
