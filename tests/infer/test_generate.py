"""The job Generate: what it writes, that it goes on where it was stopped, and what it refuses."""

import dataclasses
import json

import pytest

import t5style
from t5style.infer.generate import Generate
from t5style.run_dir import RunDir, UserError
from tests.infer.conftest import tiny

PROMPTS = [{"prompt": "hello", "id": 7}, {"inputs": "two words"}, {"prompt": "third"}, {"prompt": "hello"}]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "saved"
    tiny("encoder_decoder").save(folder)
    return str(folder)


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_writes_an_answer_for_each_prompt_and_resumes(saved, tmp_path, monkeypatch):
    settings = {"max_new_tokens": 6, "temperature": 0.8, "seed": 4, "batch_size": 3}
    job = Generate(saved, write(tmp_path / "prompts.jsonl", PROMPTS), **settings)
    figures = job(RunDir(tmp_path / "whole").create())
    whole = lines(tmp_path / "whole" / "generations.jsonl")
    texts = [record.get("prompt") or record["inputs"] for record in PROMPTS]
    assert [line["prompt"] for line in whole] == texts
    assert [line["seed"] for line in whole] == [4, 5, 6, 7]
    assert whole[0]["fields"] == {"id": 7}
    assert whole[0]["settings"] == {"max_new_tokens": 6, "temperature": 0.8}
    assert {line["finish_reason"] for line in whole} <= {"stop", "length"}
    assert figures == {"prompts": 4, "new_tokens": sum(line["new_tokens"] for line in whole)}
    m = t5style.load(saved)
    for i, text in enumerate(texts):
        assert m.generate([text], 6, temperature=0.8, seed=4 + i) == [whole[i]["output"]]

    # Stopped while the second line was written: one whole line and a part of another.
    cut = tmp_path / "cut"
    cut.mkdir()
    content = (tmp_path / "whole" / "generations.jsonl").read_text()
    first = content.index("\n") + 1
    (cut / "generations.partial.jsonl").write_text(content[: first + 9])
    asked, sizes = [], set()
    original = t5style.infer.model.Model.complete

    def complete(self, prompts, *args, **kwargs):
        asked.extend(prompts)
        sizes.add(kwargs["batch_size"])
        return original(self, prompts, *args, **kwargs)

    monkeypatch.setattr(t5style.infer.model.Model, "complete", complete)
    job(RunDir(cut))
    assert (asked, sizes) == (texts[1:], {3})
    assert (cut / "generations.jsonl").read_text() == content
    assert not (cut / "generations.partial.jsonl").exists()
    job(RunDir(cut))  # done: nothing is asked again
    assert asked == texts[1:]

    with pytest.raises(UserError, match="holds answers to other prompts"):
        Generate(saved, prompts=["other"], **settings)(RunDir(cut))
    with pytest.raises(UserError, match="holds 4 answers, but there are only 1 prompts"):
        Generate(saved, prompts=["hello"], **settings)(RunDir(cut))


def test_a_line_may_have_settings_of_its_own(saved, tmp_path):
    records = [
        {"prompt": "hello", "temperature": 0.0, "max_new_tokens": 3, "id": "x"},
        {"prompt": "hello", "n": 3, "seed": 20},
        {"prompt": "hello", "stop": "a", "logprobs": 1, "temperature": None, "logit_bias": {"100": 8.5}},
    ]
    job = Generate(
        saved, write(tmp_path / "prompts.jsonl", records), max_new_tokens=6, temperature=0.8, stop_tokens=()
    )
    figures = job(RunDir(tmp_path / "run").create())
    first, several, told = lines(tmp_path / "run" / "generations.jsonl")
    m = t5style.load(saved)
    assert first["output"] == m.generate(["hello"], 3, stop_tokens=())[0]
    assert (first["new_tokens"], first["finish_reason"], first["fields"]) == (3, "length", {"id": "x"})
    answers = m.generate(["hello"], 6, temperature=0.8, n=3, seed=20, stop_tokens=())
    assert [answer["output"] for answer in several["answers"]] == answers
    assert "output" not in several
    assert several["seed"] == 20
    assert told["output"] == ""  # token 100 is the letter a
    assert told["finish_reason"] == "stop"
    assert told["settings"]["logit_bias"] == {"100": 8.5}
    assert len(told["logprobs"]) == len(told["top_logprobs"]) == len(told["tokens"]) == told["new_tokens"]
    assert figures["new_tokens"] == 3 + 18 + told["new_tokens"]
    (tmp_path / "run" / "generations.jsonl").rename(tmp_path / "run" / "generations.partial.jsonl")
    job(RunDir(tmp_path / "run"))  # the settings are read back as the same
    with pytest.raises(UserError, match=r"other prompts or settings \(number 0 differs\)"):
        dataclasses.replace(job, min_p=0.1)(RunDir(tmp_path / "run"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"prompt": "a"}\n{"prompt": \n', r"p.jsonl:2: not JSON"),
        (b'{"prompt": "a"}\n\n["b"]\n', r"p.jsonl:3: .* is not a JSON object"),
        (b'{"text": "a"}\n', r"p.jsonl:1: neither \"prompt\" nor \"inputs\" among \['text'\]"),
        (b'{"prompt": ""}\n', r"p.jsonl:1: 'prompt' is ''"),
        (b'{"prompt": 5}\n', r"p.jsonl:1: 'prompt' is 5"),
        (b"\n", "is empty"),
        (b'{"prompt": "a"}\n{"prompt": "a", "temperature": -2}\n', "p.jsonl:2: temperature is -2"),
        (b'{"prompt": "a", "stop": ""}\n', "p.jsonl:1: stop holds ''"),
        (b'{"prompt": "\xff"}', "byte 12 is not UTF-8"),
    ],
)
def test_malformed_prompts_are_named_by_file_and_line(saved, tmp_path, content, message):
    (tmp_path / "p.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        Generate(saved, str(tmp_path / "p.jsonl"))(RunDir(tmp_path / "run").create())


def test_bad_settings_are_refused_before_anything_runs(tmp_path):
    for fields, message in (
        ({}, "give either prompts_file"),
        ({"prompts": ["a"], "prompts_file": "b"}, "give either prompts_file"),
        ({"prompts": "a"}, "single string"),
        ({"prompts": ["a"], "temperature": -1.0}, "temperature is -1"),
        ({"prompts": ["a"], "top_p": 1.5}, "top_p is 1.5"),
        ({"prompts": ["a"], "min_p": -1.0}, "min_p is -1"),
        ({"prompts": ["a"], "repetition_penalty": -1.0}, "repetition_penalty is -1"),
        ({"prompts": ["a"], "stop": [""]}, "stop holds ''"),
        ({"prompts": ["a"], "n": 500}, "n is 500"),
        ({"prompts": ["a"], "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompts": ["a"], "batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Generate("model", **fields)
    with pytest.raises(UserError, match="there is no prompts file"):
        Generate("model", str(tmp_path / "absent"))(RunDir(tmp_path))
