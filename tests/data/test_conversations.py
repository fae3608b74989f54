"""Records of every shape that is known, and those that are not."""

from __future__ import annotations

import gzip
import json
import pathlib
from typing import Any

import hypothesis
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st

from t5style.data import conversations
from t5style.data.conversations import example, kind_of
from t5style.run_dir import UserError

ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASKED, ANSWERED]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [ASKED], "completion": "Hello"},
        {"inputs": "Hi", "targets": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "context": "", "response": "Hello", "category": "open_qa"},
        {"instruction": "Hi", "instances": [{"input": "", "output": "Hello"}]},
    ],
    ids=lambda record: " ".join(record),
)
def test_chats(record: dict[str, Any]) -> None:
    assert kind_of(record) == "chat"
    (made,) = example(record, "chat", "x:1")
    assert made.messages == (ASKED, ANSWERED)
    assert made.id == "x:1"


def test_more_than_one_turn_and_more_than_one_text() -> None:
    (alpaca,) = example({"instruction": "Sum up.", "input": "A text.", "output": "T."}, "chat", "")
    assert alpaca.messages[0]["content"] == "Sum up.\n\nA text."
    record = {"id": "s", "instruction": "Do", "instances": [{"input": n, "output": n} for n in "ab"]}
    assert [made.id for made in example(record, "chat", "")] == ["s", "s/1"]
    (spoken,) = example({"system": "Be brief.", "messages": [ASKED, ANSWERED]}, "chat", "")
    assert [message["role"] for message in spoken.messages] == ["system", "user", "assistant"]
    rows = [
        {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Hi"},
        {"message_id": "3", "parent_id": "2", "role": "prompter", "text": "And?"},
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "Hello"},
        {"message_id": "4", "parent_id": "3", "role": "assistant", "text": "Nothing"},
    ]
    assert [[m["content"] for m in made.messages] for made in conversations.tree(rows)] == [
        ["Hi", "Hello"],
        ["Hi", "Hello", "And?", "Nothing"],
    ]
    whole = {"text": "Hi", "role": "prompter", "replies": [{"text": t, "role": "assistant"} for t in "ab"]}
    assert kind_of({"prompt": whole}) == "chat"
    made = example({"message_tree_id": "t", "prompt": whole}, "chat", "")
    assert [answer.messages[1]["content"] for answer in made] == ["a", "b"]


def test_trees_that_are_not_whole() -> None:
    rows = [
        {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "to nothing"},
        {"message_id": "3", "parent_id": "4", "role": "assistant", "text": "round"},
        {"message_id": "4", "parent_id": "3", "role": "prompter", "text": "and round"},
        {"message_id": "5", "parent_id": None, "role": "assistant", "text": "first"},
    ]
    found = list(conversations.tree(rows))
    assert [(one.file, one.reason.split()[0]) for one in found] == [("2", "a"), ("3", "a"), ("5", "an")]
    assert (
        conversations.row_of_tree({"message_id": "6", "role": "assistant", "text": None}) == "text is empty"
    )
    assert conversations.row_of_tree({"message_id": "6", "text": "a"}) == "a message without a role"
    broken = {"prompt": {"text": "Hi", "role": "prompter", "replies": [{"role": "assistant"}]}}
    assert example(broken, "chat", "") == "text is empty"


def test_texts_in_parts() -> None:
    parts = [{"type": "text", "text": "He"}, {"type": "text", "text": "llo"}]
    record = {"messages": [ASKED, {"role": "assistant", "content": parts}]}
    (made,) = example(record, "chat", "")
    assert made.messages == (ASKED, ANSWERED)
    parts.append({"type": "image_url", "image_url": {}})
    assert example(record, "chat", "") == "a message with parts that are not text"


def test_preferences() -> None:
    well = {"role": "user", "content": "Well?"}
    fine, rude = ({"role": "assistant", "content": text} for text in ("Fine.", "Go away.\n\nNow."))
    before = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Well?\n\nAssistant:"
    for record in (
        {"chosen": f"{before} Fine.", "rejected": f"{before} Go away.\n\nNow."},
        {"prompt": [ASKED, ANSWERED, well], "chosen": "Fine.", "rejected": "Go away.\n\nNow."},
        {"prompt": [ASKED, ANSWERED, well], "chosen": [fine], "rejected": [rude]},
        {"chosen": [ASKED, ANSWERED, well, fine], "rejected": [ASKED, ANSWERED, well, rude]},
    ):
        assert kind_of(record) == "pairs"
        (made,) = example(record, "pairs", "")
        assert [message["content"] for message in made.messages] == ["Hi", "Hello", "Well?"]
        assert made.answers == ("Fine.", "Go away.\n\nNow.")
    pair = {"prompt": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Well?\n\nAssistant:", "chosen": "a"}
    (made,) = example({**pair, "rejected": "b", "score_chosen": 3, "score_rejected": 1.5}, "pairs", "")
    assert made.messages == (ASKED, ANSWERED, well)
    assert made.margin == 1.5
    assert example({**pair, "rejected": "b", "margin": float("nan")}, "pairs", "").startswith("a margin")
    (single,) = example({"prompt": "Hi", "completion": "Hello", "label": False}, "unpaired", "")
    assert (single.messages, single.answers, single.desirable) == ((ASKED,), ("Hello",), False)
    (sum_,) = example({"question": "1+1?", "answer": "#### 2"}, "prompts", "")
    assert sum_.messages == ({"role": "user", "content": "1+1?"},)
    assert sum_.record == {"answer": "#### 2"}


@pytest.mark.parametrize(
    ("record", "kind", "words"),
    [
        ({"prompt": "Hi", "chosen": "a ", "rejected": "a"}, "pairs", "chosen and rejected are the same"),
        ({"chosen": "no turns", "rejected": "none"}, "pairs", "neither a prompt nor a transcript"),
        ({"prompt": "Hi", "chosen": "a"}, "pairs", "no rejected"),
        ({"messages": [ASKED]}, "chat", "no answer of the assistant"),
        ({"messages": [{"role": "user", "content": ""}]}, "chat", "a message is empty"),
        ({"messages": "Hi"}, "chat", "the messages are no list"),
        ({"prompt": "Hi", "completion": ""}, "chat", "completion is empty"),
        ({"prompt": 3, "completion": "a"}, "chat", "the messages are no list"),
        ({"instruction": "a", "instances": [1]}, "chat", "its fields have another form"),
        ({"prompt": {"text": "a", "role": "prompter", "replies": [5]}}, "chat", "its fields have another"),
        ({"chosen": [ANSWERED], "rejected": [{**ANSWERED, "content": "b"}]}, "pairs", "no prompt before"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": "big"}, "pairs", "no finite number"),
        ({"prompt": "Hi", "completion": "a", "label": "yes"}, "unpaired", "label is 'yes'"),
    ],
)
def test_what_says_nothing(record: dict[str, Any], kind: str, words: str) -> None:
    made = example(record, kind, "")
    assert isinstance(made, str)
    assert words in made


VALUES = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(-1, 1), st.sampled_from(["", "a", "user", "\n\nHuman: "])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "replies", "input", "output"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)
KEYS = ("messages", "conversations", "prompt", "completion", "chosen", "rejected", "label", "instruction")
MORE_KEYS = ("instances", "input", "output", "system", "margin", "id", "question", "answer")


@hypothesis.settings(deadline=None, max_examples=200, derandomize=True)
@hypothesis.given(
    st.dictionaries(st.sampled_from(KEYS + MORE_KEYS), VALUES, max_size=5),
    st.sampled_from(conversations.KINDS),
)
def test_no_record_is_more_than_set_aside(record: dict[str, Any], kind: str) -> None:
    made = example(record, kind_of(record) or kind, "x:1")
    if isinstance(made, str):
        assert made
    else:
        assert all(one.messages and all(m["content"].strip() for m in one.messages) for one in made)
    example(record, kind, "x:1")


def test_files(tmp_path: pathlib.Path) -> None:
    lines = ['{"prompt": "a"}', "", "{broken", "[1]"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps({"prompt": "b"}).encode()))
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["c", "d"]}), tmp_path / "c.parquet")
    found = list(conversations.records([str(tmp_path)]))
    assert [(pathlib.Path(file).name, line) for file, line, _ in found] == [
        ("a.jsonl", 1), ("a.jsonl", 3), ("a.jsonl", 4), ("b.jsonl.gz", 1), ("c.parquet", 1), ("c.parquet", 2),
    ]  # fmt: skip
    assert [record if isinstance(record, dict) else record[:10] for _, _, record in found] == [
        {"prompt": "a"}, "not JSON: ", "not a JSON", {"prompt": "b"}, {"prompt": "c"}, {"prompt": "d"},
    ]  # fmt: skip
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "b"}\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"d\.jsonl\.gz cannot be read to its end"):
        list(conversations.records([str(tmp_path / "d.jsonl.gz")]))
    (tmp_path / "list.json").write_text('[\n {"prompt":\n "e"},\n 5\n]')
    listed = list(conversations.records([str(tmp_path / "list.json")]))
    assert [item for _, _, item in listed] == [{"prompt": "e"}, "not a JSON object"]
    (tmp_path / "list.json").write_text("[1, ")
    with pytest.raises(UserError, match=r"list\.json is not JSON"):
        list(conversations.records([str(tmp_path / "list.json")]))
    (tmp_path / "e.txt").write_text("text")
    with pytest.raises(UserError, match="is no file of examples"):
        list(conversations.records([str(tmp_path / "e.txt")]))
