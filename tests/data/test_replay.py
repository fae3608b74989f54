"""Replay: batches as text, with what the loss skips marked."""

from __future__ import annotations

import pathlib

import numpy as np
import pytest

from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data.objectives import DECODER_ONLY, CausalLM, SpanCorruption, Supervised
from t5style.data.pipeline import BatchSource
from t5style.data.replay import Replay, as_text, describe
from t5style.data.task import Task
from t5style.data.token_store import TokenStore
from t5style.run_dir import RunDir, UserError


def test_pairs_read_as_they_were_written(pair_store: str) -> None:
    source = BatchSource(Task("t", pair_store, Supervised()), "train", 4, {"encoder": 96, "decoder": 48})
    batch = source.batch_at(7)
    segments = describe(batch, source.vocabulary)
    assert len(segments) == batch["decoder_segment_ids"].max(axis=1).sum() > 4
    for segment in segments:
        assert segment.inputs is not None
        assert segment.inputs.startswith("add ")
        assert segment.inputs.endswith("</s>")
        number = segment.inputs.split()[1]
        assert segment.targets.startswith(f"sum {number} ")
        assert segment.learned_tokens == segment.target_tokens
    assert sum(s.learned_tokens for s in segments) == batch["decoder_loss_weights"].sum()
    assert describe(batch, source.vocabulary, [2]) == [s for s in segments if s.row == 2]
    with pytest.raises(ValueError, match="Row 4 was asked for; the batch has rows 0 to 3"):
        describe(batch, source.vocabulary, [4])


def test_what_has_no_loss_is_marked(pair_store: str) -> None:
    source = BatchSource(Task("t", pair_store, Supervised()), "train", 2, {"decoder": 96}, DECODER_ONLY)
    for segment in describe(source.batch_at(0), source.vocabulary):
        assert segment.inputs is None
        assert segment.targets.startswith("⟦add ")
        assert "⟧sum " in segment.targets
        assert segment.learned_tokens < segment.target_tokens


def test_marks_stand_where_the_weights_change() -> None:
    vocabulary = ByteVocabulary()
    tokens = np.array([vocabulary.encode("abcdef")], np.int32)
    batch = {
        "decoder_target_tokens": tokens,
        "decoder_segment_ids": np.ones_like(tokens),
        "decoder_loss_weights": np.array([[1, 0, 0, 1, 1, 0]], np.int32),
    }
    assert describe(batch, vocabulary)[0].targets == "a⟦bc⟧de⟦f⟧"


def test_span_corruption_shows_sentinels_and_document_ends(text_store: str) -> None:
    source = BatchSource(Task("t", text_store, SpanCorruption()), "train", 2, {"encoder": 256, "decoder": 64})
    first = describe(source.batch_at(0), source.vocabulary)[0]
    assert first.inputs is not None
    assert "<extra_id_0>" in first.inputs
    assert first.targets.startswith("<extra_id_0>")
    assert first.inputs.endswith("</s>")


def test_the_job_replays_any_step(text_store: str, tmp_path: pathlib.Path) -> None:
    task = Task("t", text_store, CausalLM())
    source = BatchSource(task, "train", 4, {"decoder": 40}, DECODER_ONLY, seed=9)
    job = Replay(task, 4, {"decoder": 40}, steps=(3, 1234), architecture=DECODER_ONLY, seed=9)
    figures = job(RunDir(str(tmp_path / "run")).create())
    text = (tmp_path / "run" / "batches.txt").read_text()
    assert as_text(describe(source.batch_at(3), source.vocabulary)) in text
    assert as_text(describe(source.batch_at(1234), source.vocabulary)) in text
    assert figures == {"batches": 2, "learned_tokens": 2 * 4 * 40, "data_fingerprint": source.fingerprint}
    assert job.inputs() == [text_store]
    other = Replay(
        task, 4, {"decoder": 41}, architecture=DECODER_ONLY, seed=9, fingerprint=source.fingerprint
    )
    with pytest.raises(
        UserError, match=f"but the run had {source.fingerprint}: the store or a setting differs"
    ):
        other(RunDir(str(tmp_path / "other")).create())


def test_a_text_without_ends_reads_whole(text_store: str) -> None:
    store = TokenStore.open(text_store)
    task = Task("t", text_store, CausalLM())
    source = BatchSource(task, "validation", 4, {"decoder": 64}, DECODER_ONLY, shuffle=False)
    shown = "".join(
        segment.targets
        for n in range(source.evaluation_batches)
        for segment in describe(source.evaluation_batch_at(n), source.vocabulary)
    )
    documents = [store.vocabulary.decode(ids) for ids in store.examples("validation", "text", range(11))]
    assert shown == "</s>".join(documents) + "</s>"
