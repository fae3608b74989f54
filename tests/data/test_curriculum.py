"""Orders: what is easy comes first, exactly, once, and however many hosts there are."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data.curriculum import order_of_kept
from t5style.data.objectives import DECODER_ONLY, CausalLM, Objective, PrefixLM, SpanCorruption, Supervised
from t5style.data.pipeline import Batch, BatchSource
from t5style.data.task import Mixture, Task
from t5style.data.token_store import TokenStore, TokenStoreWriter
from t5style.run_dir import UserError

MakeStore = Callable[..., str]
LENGTHS = {"encoder": 96, "decoder": 48}
SETTINGS: dict[str, tuple[Objective, str, dict[str, int], bool]] = {
    "span": (SpanCorruption(), "encoder_decoder", LENGTHS, True),
    "causal": (CausalLM(), DECODER_ONLY, {"decoder": 40}, True),
    "causal-carry": (CausalLM(carry_over=True), DECODER_ONLY, {"decoder": 40}, True),
    "prefix": (PrefixLM(), "encoder_decoder", {"encoder": 40, "decoder": 48}, True),
    "packed": (Supervised(), "encoder_decoder", LENGTHS, True),
    "packed-decoder": (Supervised(), DECODER_ONLY, {"decoder": 96}, True),
    "one-per-row": (Supervised(), "encoder_decoder", LENGTHS, False),
}


def order_file(folder: pathlib.Path, store: str, seed: int = 7) -> str:
    path = folder / f"order{seed}.npy"
    np.save(path, np.random.default_rng(seed).permutation(TokenStore.open(store).num_examples("train")))
    return str(path)


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture(params=SETTINGS)
def make(
    request: pytest.FixtureRequest, text_store: str, pair_store: str, tmp_path: pathlib.Path
) -> Callable[..., BatchSource]:
    """make(order, **settings) → batches of a task with this order; None for a file's."""
    objective, architecture, lengths, pack = SETTINGS[request.param]
    store = pair_store if isinstance(objective, Supervised) else text_store
    path = order_file(tmp_path, store)

    def source(
        order: str | None = None, split: str = "train", batch_size: int = 8, **changes: Any
    ) -> BatchSource:
        task = Task("task", store, objective, order=path if order is None else order)
        changes = {"seed": 3, "pack": pack} | changes
        return BatchSource(task, split, batch_size, lengths, architecture, **changes)

    return source


def texts(source: BatchSource, rows: range, targets: bool = True) -> list[str]:
    """What is in the rows of training, segment by segment."""
    key = "decoder_target_tokens" if targets else "encoder_input_tokens"
    found = []
    for row in rows:
        batch = source.batch_at(row)
        ids = batch[f"{key.split('_')[0]}_segment_ids"][0]
        for segment in range(1, ids.max() + 1):
            found.append(source.vocabulary.decode(batch[key][0][ids == segment]))
    return found


# ------------------------------------------------------------------------------------------------- in order


@pytest.mark.parametrize("architecture", ["encoder_decoder", DECODER_ONLY])
@pytest.mark.parametrize("pack", [True, False])
def test_examples_come_in_order(
    pair_store: str, tmp_path: pathlib.Path, pack: bool, architecture: str
) -> None:
    path = order_file(tmp_path, pair_store)
    task = Task("t", pair_store, Supervised(), order=path)
    lengths = LENGTHS if architecture == "encoder_decoder" else {"decoder": 96}
    source = BatchSource(task, "train", 1, lengths, architecture, pack=pack)
    rows = round(source.batches_per_epoch)
    assert rows == 200 if not pack else rows < 130
    expected = [f"sum {n} " + "x" * (n % 7) for n in np.load(path)]
    found = texts(source, range(rows))
    if architecture == DECODER_ONLY:
        found = [text[text.index("sum") :] for text in found]
    assert found == expected
    # Afterwards shuffled, again and again: every example once in an epoch.
    orders = [texts(source, range(epoch * rows, (epoch + 1) * rows)) for epoch in (1, 2)]
    assert orders[0] != orders[1]
    for order in orders:
        order = [text[text.index("sum") :] for text in order]
        assert order != expected
        assert sorted(order) == sorted(expected)
    # Rows of packed examples stay what they are.
    assert source.statistics["t"]["rows"] == rows


@pytest.mark.parametrize("length", [61, 150])
def test_windows_are_cut_from_the_examples_in_order(
    text_store: str, tmp_path: pathlib.Path, length: int
) -> None:
    path = order_file(tmp_path, text_store)
    store = TokenStore.open(text_store)
    stream = np.concatenate(store.examples("train", "text", np.load(path)))
    rows = len(stream) // length
    lengths = {"decoder": length}
    source = BatchSource(Task("t", text_store, CausalLM(), order=path), "train", rows, lengths, DECODER_ONLY)
    first, second = source.batch_at(0), source.batch_at(1)
    assert first["decoder_target_tokens"].reshape(-1).tolist() == stream[: rows * length].tolist()
    # The second epoch begins anywhere and is shuffled; it is the same stream in other windows.
    joined = np.tile(stream, 2).astype("<u2").tobytes()
    places = [joined.find(row.astype("<u2").tobytes()) // 2 for row in second["decoder_target_tokens"]]
    assert min(places) >= 0
    assert len(set(places)) == rows
    assert places != sorted(places)
    carried = Task("t", text_store, CausalLM(carry_over=True), order=path)
    batch = BatchSource(carried, "train", rows, lengths, DECODER_ONLY).batch_at(0)
    assert batch["decoder_input_tokens"].reshape(-1).tolist() == [0, *stream[: rows * length - 1].tolist()]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any),
    st.integers(1, 40),
    st.randoms(use_true_random=False),
)
def test_any_lengths(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], length: int, random: Any
) -> None:
    """Also examples of no tokens, and windows longer than all."""
    folder = tmp_path_factory.mktemp("any")
    order = random.sample(range(len(sizes)), len(sizes))
    examples = [[3 + k] * size for k, size in enumerate(sizes)]
    with TokenStoreWriter(folder / "s", ["text"], ByteVocabulary()) as writer:
        for tokens in examples:
            writer.add("train", {"text": tokens})
        writer.set_curriculum("train", np.array(order))
    task = Task("t", str(folder / "s"), CausalLM(), order="curriculum")
    source = BatchSource(task, "train", 1, {"decoder": length}, DECODER_ONLY)
    rows = round(source.batches_per_epoch)
    batches = [source.batch_at(n) for n in range(rows)]
    found = np.concatenate([b["decoder_target_tokens"][b["decoder_segment_ids"] > 0] for b in batches])
    stream = [token for k in order for token in examples[k]]
    assert found.tolist() == stream[: len(found)]
    assert len(stream) - len(found) < length


# -------------------------------------------------------------------------------------------- pure function


def test_any_number_of_hosts_and_any_start_give_the_same_batches(make: Callable[..., BatchSource]) -> None:
    source = make()
    last_of_first_epoch = int(source.batches_per_epoch)
    for n in (0, last_of_first_epoch, last_of_first_epoch + 1, 1000):
        whole = source.batch_at(n)
        for hosts in (2, 8):
            parts = [make().batch_at(n, host, hosts) for host in range(hosts)]
            assert equal(whole, {key: np.concatenate([part[key] for part in parts]) for key in whole})
    straight = [source.batch_at(n) for n in range(6)]
    with make().iter(start=3) as batches:
        assert all(equal(next(batches), straight[n]) for n in range(3, 6))


def test_what_depends_on_the_seed(make: Callable[..., BatchSource]) -> None:
    """The order of the first epoch does not, that of the others does; `stored` never."""
    far = int(make().batches_per_epoch) + 1
    assert make().fingerprint == make(seed=4).fingerprint
    for order, n, same in ((None, 0, True), (None, far, False), ("stored", 0, True), ("stored", far, True)):
        sources = [make(order, seed=seed) for seed in (3, 4)]
        places = [[source._order[n * 8 + k] for k in range(8)] for source in sources]
        assert (places[0] == places[1]) == same


def test_stored_order_is_that_of_the_store(make: Callable[..., BatchSource]) -> None:
    stored = make("stored")
    rows = round(stored.batches_per_epoch * 8)
    assert [stored._order[n] for n in range(2 * rows)] == [(0, n) for n in range(2 * rows)]
    unordered = make("", shuffle=False, pack=False)
    assert equal(make("stored", pack=False).batch_at(1), unordered.batch_at(1))


def test_the_fingerprint_knows_the_order_and_its_content(
    make: Callable[..., BatchSource], text_store: str, tmp_path: pathlib.Path
) -> None:
    orders = ["", "stored", None, order_file(tmp_path, make("").tasks[0].store, seed=8)]
    assert len({make(order).fingerprint for order in orders}) == 4
    before = make().fingerprint
    path = make().tasks[0].order
    assert isinstance(path, str)
    np.save(path, np.load(path)[::-1])
    assert make().fingerprint != before


def test_evaluation_is_as_without_an_order(make: Callable[..., BatchSource]) -> None:
    ours, plain = make(split="validation"), make("", split="validation")
    for n in range(plain.evaluation_batches):
        assert equal(ours.evaluation_batch_at(n), plain.evaluation_batch_at(n))
    # Of the split that has the order, too, everything comes once.
    source = make()
    with source.evaluation_iter() as batches:
        total = sum(int((b["decoder_segment_ids"] > 0).sum()) for b in batches)
    with make("", pack=source.pack).evaluation_iter() as batches:
        assert total == sum(int((b["decoder_segment_ids"] > 0).sum()) for b in batches)


def test_in_a_mixture_every_task_keeps_its_order(
    pair_store: str, text_store: str, tmp_path: pathlib.Path
) -> None:
    ordered = Task("a", pair_store, Supervised(), order=order_file(tmp_path, pair_store))
    mixture = Mixture("m", [ordered, Task("b", text_store, SpanCorruption())], rates=[2, 1])
    source = BatchSource(mixture, "train", 8, LENGTHS)
    alone = BatchSource(ordered, "train", 8, LENGTHS)
    rows = round(alone.batches_per_epoch * 8)
    drawn = [row for task, row in (source._order[n] for n in range(2 * rows)) if task == 0]
    assert drawn[:rows] == list(range(rows))
    assert len(drawn) > rows
    assert drawn == [alone._order[n][1] for n in range(len(drawn))]


# ---------------------------------------------------------------------------------------------- what is wrong


def test_orders_that_do_not_fit_are_refused(text_store: str, tmp_path: pathlib.Path) -> None:
    def source(order: str) -> BatchSource:
        return BatchSource(
            Task("t", text_store, CausalLM(), order=order), "train", 8, {"decoder": 8}, DECODER_ONLY
        )

    with pytest.raises(
        UserError, match=r"has order 'curriculum', but split 'train' .* has none: give the corpus"
    ):
        source("curriculum")
    np.save(tmp_path / "o.npy", np.arange(59))
    with pytest.raises(UserError, match="has 59 entries for 60"):
        source(str(tmp_path / "o.npy"))
    with pytest.raises(UserError, match=r"nowhere\.npy cannot be read"):
        source(str(tmp_path / "nowhere.npy"))


@given(st.lists(st.booleans(), max_size=30), st.randoms(use_true_random=False))
def test_order_of_kept(kept: list[bool], random: Any) -> None:
    order = random.sample(range(len(kept)), len(kept))
    names = [n for n, keep in enumerate(kept) if keep]
    found = order_of_kept(np.array(order, np.int64), np.array(kept, bool))
    assert [names[k] for k in found] == [n for n in order if kept[n]]
