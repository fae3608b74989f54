"""Overlap with evaluation data."""

import gzip
import io
import json
import pathlib
import pickle
import zipfile

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from t5style.corpus import decontaminate
from t5style.corpus.decontaminate import Decontaminate
from t5style.corpus.document import Document
from t5style.corpus.stages import Drop
from t5style.run_dir import UserError

QUESTION = "Which of the four largest rivers of the old kingdom flows north through two deserts?"
SHORT = "Nine small foxes jumped over one lazy dog"
DATA = pathlib.Path(__file__).parents[2].parent / "shared/data"


def test_overlaps_says_where() -> None:
    index = decontaminate.build([QUESTION, SHORT], names=["quiz", "foxes"])
    text = f"Été. {QUESTION.upper()} Nobody knew that nine small foxes jumped over one LAZY dog!"
    found = decontaminate.overlaps(text, index)
    assert [(text[start:end], source) for start, end, source in found] == [
        (QUESTION.upper()[:-1], "quiz"),
        ("nine small foxes jumped over one LAZY dog", "foxes"),
    ]


def test_twelve_words_in_common_are_no_overlap_and_thirteen_are() -> None:
    index = decontaminate.build([QUESTION])
    words = QUESTION.split()
    assert decontaminate.overlaps("x " + " ".join(words[:12]) + " y", index) == []
    assert len(decontaminate.overlaps("x " + " ".join(words[:13]) + " y", index)) == 1


def test_short_texts_are_left_out() -> None:
    index = decontaminate.build(["yes", "one two three four five six seven"])
    assert decontaminate.overlaps("yes: one two three four five six seven eight", index) == []
    assert decontaminate.overlaps("", index) == []


@settings(deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abc"), max_size=9), max_size=4),
    st.lists(st.sampled_from("abc"), max_size=30),
)
def test_overlaps_are_those_of_a_search_for_every_ngram(texts: list[list[str]], words: list[str]) -> None:
    index = decontaminate.build([" ".join(text) for text in texts], ngram=4, min_words=2)
    grams = set()
    for text in texts:
        n = min(4, len(text))
        if n >= 2:
            grams |= {tuple(text[i : i + n]) for i in range(len(text) - n + 1)}
    covered = [False] * len(words)
    for n in (2, 3, 4):
        for i in range(len(words) - n + 1):
            if tuple(words[i : i + n]) in grams:
                covered[i : i + n] = [True] * n
    found = [False] * len(words)
    for start, end, _ in decontaminate.overlaps(" ".join(words), index):
        found[start // 2 : end // 2 + 1] = [True] * (end // 2 + 1 - start // 2)
    assert found == covered


def _write(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The question in a file of each kind."""
    path = folder / name
    line = json.dumps({"question": QUESTION, "id": 1, "choices": ["a", "b"]}).encode() + b"\n"
    squad = {"data": [{"paragraphs": [{"context": QUESTION, "qas": [{"question": "Who?"}]}]}]}
    table = f'id,question\n1,"{QUESTION}"\n'.encode()
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("data/a.jsonl", line)
        archive.writestr("README", "nothing")
    contents = {
        "a.jsonl": line,
        "a.jsonl.gz": gzip.compress(line),
        "a.jsonl.zst": zstandard.compress(line),
        "squad.json": json.dumps(squad).encode(),
        "a.csv": table,
        "a.tsv": table.replace(b",", b"\t"),
        "a.txt": f"First.\n\n{QUESTION}\n\nLast.\n".encode(),
        "a.zip": memory.getvalue(),
    }
    if name == "a.parquet":
        pyarrow.parquet.write_table(pa.table({"question": [QUESTION]}), path)
    else:
        path.write_bytes(contents[name])
    return path


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "squad.json", "a.csv", "a.tsv", "a.txt", "a.zip", "a.parquet"],
)
def test_stage_reads_every_kind_of_file(tmp_path: pathlib.Path, name: str) -> None:
    stage = Decontaminate(files=[str(_write(tmp_path, name))])
    dropped = stage(Document(f"He asked: {QUESTION.lower()}", "1"))
    assert isinstance(dropped, Drop)
    assert dropped.reason == "overlaps evaluation data"
    assert name in dropped.detail
    assert "which of the four" in dropped.detail
    clean = Document("Nothing of the kind is asked here, in none of these words, on no day at all.", "2")
    assert stage(clean) is clean


def test_stage_takes_named_fields_only(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"question": QUESTION, "note": SHORT}))
    stage = Decontaminate(files=[str(path)], fields=["question"])
    assert isinstance(stage(Document(QUESTION, "1")), Drop)
    assert not isinstance(stage(Document(SHORT, "1")), Drop)
    with pytest.raises(UserError, match="no text in the fields answer"):
        Decontaminate(files=[str(path)], fields=["answer"])(Document("x", "1"))


def test_stage_removes_passages_with_their_surroundings(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path, "a.jsonl")
    before, after = "b" * 30 + " " + "c" * 9 + " ", " " + "d" * 9 + " " + "e" * 30
    stage = Decontaminate(files=[str(path)], action="remove", context=11)
    changed = stage(Document(before + QUESTION + after, "1"))
    assert isinstance(changed, Document)
    assert changed.text == before[:-11].strip() + "\n\n" + "e" * 30
    many = (before + QUESTION + after) * 20
    dropped = stage(Document(many, "1"))
    assert isinstance(dropped, Drop)
    assert "21 pieces" in dropped.detail
    assert isinstance(stage(Document(QUESTION, "1")), Drop)  # nothing would be left


def test_max_overlap_allows_that_many_ngrams(tmp_path: pathlib.Path) -> None:
    path = _write(tmp_path, "a.jsonl")
    ngrams = len(QUESTION.split()) - 13 + 1
    document = Document(QUESTION, "1")
    assert Decontaminate(files=[str(path)], max_overlap=ngrams)(document) is document
    assert isinstance(Decontaminate(files=[str(path)], max_overlap=ngrams - 1)(document), Drop)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"files": []}, "empty"),
        ({"files": "a.jsonl"}, "list of strings"),
        ({"files": ["a"], "action": "keep"}, "'drop' or 'remove'"),
        ({"files": ["a"], "ngram": 5}, "min_words is 8"),
        ({"files": ["a"], "max_overlap": -1}, "0 or more"),
    ],
)
def test_settings_that_cannot_be(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Decontaminate(**settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": "b"}\n{"a"\n', "line 2: not JSON"),
        ("a.json", b"{", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b"{}\n" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.zip", b"PK", "cannot be read"),
        ("a.parquet", b"PAR1", "cannot be read"),
        ("a.txt", b"\xff\xfe\xff", "cannot be read"),
        ("a.doc", b"x", "must end in"),
        ("a.txt", b"too short\n", "8 words or more"),
        ("a.txt", b"", "no text"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: pathlib.Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        Decontaminate(files=[str(tmp_path / name)])(Document("x", "1"))


@pytest.mark.skipif(not DATA.exists(), reason="shared data is absent")
def test_real_evaluation_data() -> None:
    stage = Decontaminate(files=[str(DATA / "eval/xquad_*.json"), str(DATA / "eval/HumanEval.jsonl.gz")])
    squad = json.loads((DATA / "eval/xquad_zh.json").read_text())
    context = squad["data"][0]["paragraphs"][0]["context"]
    assert isinstance(stage(Document(context[5:60], "1")), Drop)
    novel = (DATA / "pretrain/tinyshakespeare.txt").read_text()
    assert not isinstance(stage(Document(novel, "2")), Drop)


def test_stage_travels_to_other_processes(tmp_path: pathlib.Path) -> None:
    stage = Decontaminate(files=[str(_write(tmp_path, "a.jsonl"))], fields=["question"])
    assert pickle.loads(pickle.dumps(stage)) == stage
    assert isinstance(pickle.loads(pickle.dumps(stage))(Document(QUESTION, "1")), Drop)
