"""Conversations and answers to compare as batches: laid out by hand, cut, packed, the same for any hosts."""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from t5style.corpus.vocabulary import CharacterVocabulary
from t5style.data.objectives import Chat, Preferences, Supervised, Unpaired, objective_for
from t5style.data.pair_rows import margin_tokens
from t5style.data.pipeline import BatchSource
from t5style.data.replay import describe
from t5style.data.task import Mixture, Task
from t5style.data.token_store import TokenStoreWriter
from t5style.run_dir import UserError

VOCABULARY = CharacterVocabulary("abcdefgh", extra_ids=0)
A, B, C, D, E = VOCABULARY.encode("abcde")
END = VOCABULARY.eos_id


def store(folder: pathlib.Path, examples: list[dict[str, list[int]]]) -> str:
    with TokenStoreWriter(str(folder), tuple(examples[0]), VOCABULARY) as writer:
        for example in examples:
            writer.add("train", example)
    return str(folder)


def source(folder: str, objective: Any, rows: int, decoder: int, **fields: Any) -> BatchSource:
    lengths = {"encoder": 4, "decoder": decoder}
    given = {"architecture": "decoder_only", "shuffle": False} | fields
    return BatchSource(Task("t", folder, objective), "train", rows, lengths, **given)


def test_conversations_share_rows_and_learn_what_the_mask_says(tmp_path: pathlib.Path) -> None:
    folder = store(
        tmp_path,
        [
            {"tokens": [A, B, C], "mask": [0, 0, 1]},
            {"tokens": [D, E, END], "mask": [1, 1, 1]},  # the first token is read only, whatever its mask
            {"tokens": [A, B, C, D, E, A], "mask": [0, 0, 0, 0, 0, 1]},  # cut, and nothing learnt is left
        ],
    )
    batch = source(folder, Chat(), 1, 4).batch_at(0)
    rows = {name: values[0].tolist() for name, values in batch.items()}
    order = 0 if rows["decoder_input_tokens"][0] == A else 2
    assert rows["decoder_input_tokens"][order : order + 2] == [A, B]
    assert rows["decoder_target_tokens"][order : order + 2] == [B, C]
    assert rows["decoder_loss_weights"][order : order + 2] == [0, 1]
    assert rows["decoder_target_tokens"][2 - order : 4 - order] == [E, END]
    assert rows["decoder_loss_weights"][2 - order : 4 - order] == [1, 1]
    assert rows["decoder_segment_ids"] == [1, 1, 2, 2]
    assert rows["decoder_positions"] == [0, 1, 0, 1]
    statistics = source(folder, Chat(), 1, 4).statistics["t"]
    assert (statistics["dropped"], statistics["rows"]) == (1, 1)
    with pytest.raises(UserError, match=r"example 2 of split 'train' has 5 tokens, more than"):
        source(folder, Chat(on_overlong="error"), 1, 4)
    with pytest.raises(UserError, match="all 3 examples of split 'train' are longer"):
        source(folder, Chat(on_overlong="drop"), 1, 1)
    with pytest.raises(UserError, match="for a decoder-only model"):
        source(folder, Chat(), 1, 4, architecture="encoder_decoder")


PAIRS = [
    {"prompt": [A, B], "chosen": [C, END], "rejected": [D, E, END]},
    {"prompt": [], "chosen": [B, END], "rejected": [C, END]},
    {"prompt": [A, B, C, D, E], "chosen": [A, END], "rejected": [B, C, D, END]},
]


def test_pairs_of_a_decoder_only_model(tmp_path: pathlib.Path) -> None:
    made = source(store(tmp_path, PAIRS), Preferences(), 3, 4)
    batch = made.batch_at(0)
    assert batch["example"].tolist() == [0, 1, 2]
    tokens, weights = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
    assert tokens.shape == (3, 2, 4)
    assert batch["decoder_input_tokens"][0].tolist() == [[A, B, C, 0], [A, B, D, E]]
    assert tokens[0].tolist() == [[B, C, END, 0], [B, D, E, END]]
    assert weights[0].tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]
    assert batch["decoder_segment_ids"][0].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    # Without a prompt an answer begins as texts do.
    assert batch["decoder_input_tokens"][1].tolist() == [
        [VOCABULARY.bos_id, B, 0, 0],
        [VOCABULARY.bos_id, C, 0, 0],
    ]
    assert weights[1].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0]]
    # Answers keep half of the row, the prompt keeps its end, and both answers the same prompt.
    assert batch["decoder_input_tokens"][2].tolist() == [[C, D, E, A], [C, D, E, B]]
    assert tokens[2].tolist() == [[D, E, A, END], [D, E, B, C]]
    shown = describe(batch, made.vocabulary)
    assert [shown[0].targets, shown[1].targets] == ["⟦b⟧c</s>", "⟦b⟧de</s>"]
    parts = [made.batch_at(5, shard, 3) for shard in range(3)]
    for name, values in made.batch_at(5).items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), values)


def test_margins_of_pairs(tmp_path: pathlib.Path) -> None:
    said = [1.5, -0.25, 1e-3]
    examples = [
        {**pair, "margin": margin_tokens(value).tolist()} for pair, value in zip(PAIRS, said, strict=True)
    ]
    folder = store(tmp_path, examples)
    assert objective_for(tuple(examples[0]), folder) == Preferences()
    batch = source(folder, Preferences(), 3, 4).batch_at(0)
    np.testing.assert_array_equal(batch["margin"], np.float32(said))
    assert batch["margin"].dtype == np.float32


def test_pairs_of_an_encoder_decoder(tmp_path: pathlib.Path) -> None:
    examples = [{**pair, "prompt": [*pair["prompt"], END]} for pair in PAIRS]
    batch = source(store(tmp_path, examples), Preferences(), 3, 3, architecture="encoder_decoder").batch_at(0)
    assert batch["encoder_input_tokens"][0].tolist() == [[A, B, END, 0]] * 2
    assert batch["encoder_input_tokens"][2].tolist() == [[A, B, C, END]] * 2  # cut, and closed again
    assert batch["decoder_target_tokens"][2].tolist() == [[A, END, 0], [B, C, D]]
    assert batch["decoder_loss_weights"][0].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_unpaired_answers_stand_beside_those_of_others(tmp_path: pathlib.Path) -> None:
    examples = [
        {"prompt": [token], "completion": [token, END], "desirable": [int(token != B)]}
        for token in (A, B, C, D)
    ]
    made = source(store(tmp_path, examples), Unpaired(), 4, 4)
    batch = made.batch_at(0)
    assert batch["desirable"].tolist() == [1, 0, 1, 1]
    own, other = batch["decoder_target_tokens"][:, 0], batch["decoder_target_tokens"][:, 1]
    assert own[:, 0].tolist() == [A, B, C, D]
    assert sorted(other[:, 0].tolist()) == [A, B, C, D]
    assert not (own == other).all(axis=1).any()
    np.testing.assert_array_equal(
        batch["decoder_input_tokens"][:, 0, 0], batch["decoder_input_tokens"][:, 1, 0]
    )
    part = made.evaluation_batch_at(0, 1, 2)
    np.testing.assert_array_equal(part["decoder_target_tokens"], batch["decoder_target_tokens"][2:])


def test_what_a_store_is_for(tmp_path: pathlib.Path) -> None:
    assert objective_for(("targets", "inputs"), "x") == Supervised()
    assert objective_for(("prompt", "chosen", "rejected"), "x") == Preferences()
    with pytest.raises(UserError, match="the token store x has the features text, which no objective"):
        objective_for(("text",), "x")
    pairs = Task("pairs", store(tmp_path / "pairs", PAIRS), Preferences())
    single = {"prompt": [A], "completion": [B], "desirable": [1]}
    other = Task("other", store(tmp_path / "other", [single]), Unpaired())
    with pytest.raises(ValueError, match="A mixture of tasks that compare answers"):
        BatchSource(Mixture("m", [pairs, other]), "train", 2, {"decoder": 8}, "decoder_only")


def test_a_curriculum_of_lengths(tmp_path: pathlib.Path) -> None:
    examples = [{"tokens": [A] * n, "mask": [1] * n} for n in (5, 2, 4, 3)]
    task = Task("t", store(tmp_path, examples), Chat(), order="length")
    made = BatchSource(task, "train", 4, {"decoder": 8}, "decoder_only", pack=False)
    sizes = [(made.batch_at(n)["decoder_segment_ids"] > 0).sum(axis=1).tolist() for n in (0, 1)]
    assert sizes[0] == [1, 2, 3, 4]
    assert sorted(sizes[1]) == [1, 2, 3, 4]


@hypothesis.settings(deadline=None, max_examples=5, derandomize=True)
@hypothesis.given(st.lists(st.tuples(st.integers(2, 9), st.integers(1, 8)), min_size=1, max_size=12))
def test_packed_conversations_and_pairs_keep_every_token(sizes: list[tuple[int, int]]) -> None:
    """Sizes: of conversations and of the part that is not learnt, cut to leave something."""
    random = np.random.default_rng(len(sizes))
    chats, pairs = [], []
    for size, unlearnt in sizes:
        tokens, other = random.integers(3, VOCABULARY.vocab_size, (2, size)).tolist()
        learnt = min(unlearnt, size - 1)
        chats.append({"tokens": tokens, "mask": [0] * learnt + [1] * (size - learnt)})
        pairs.append({"prompt": tokens[:learnt], "chosen": tokens[learnt:], "rejected": other[:-1] or other})
    with tempfile.TemporaryDirectory() as folder:
        made = source(store(pathlib.Path(folder) / "chats", chats), Chat(), 3, 9, shuffle=True)
        found = []
        for batch in map(made.evaluation_batch_at, range(made.evaluation_batches)):
            for row, ids in enumerate(batch["decoder_segment_ids"]):
                for segment in range(1, ids.max(initial=0) + 1):
                    where = ids == segment
                    first = batch["decoder_input_tokens"][row][where][0]
                    tokens = [first, *batch["decoder_target_tokens"][row][where]]
                    np.testing.assert_array_equal(batch["decoder_input_tokens"][row][where], tokens[:-1])
                    found.append((tokens, [0, *batch["decoder_loss_weights"][row][where]]))
        expected = [(chat["tokens"], chat["mask"]) for chat in chats]
        assert sorted(found) == sorted(expected)
        made = source(store(pathlib.Path(folder) / "pairs", pairs), Preferences(), 2, 17)
        for n in range(made.evaluation_batches):
            batch = made.evaluation_batch_at(n)
            for row, number in enumerate(batch["example"]):
                real = batch["decoder_segment_ids"][row].any(axis=1)
                for side, name in enumerate(("chosen", "rejected")):
                    if real[side]:
                        weights = batch["decoder_loss_weights"][row, side] > 0
                        answer = batch["decoder_target_tokens"][row, side][weights]
                        assert answer.tolist() == pairs[number][name]
