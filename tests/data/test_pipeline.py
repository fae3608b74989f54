"""The batch at step n: a pure function, the same on any number of hosts, with everything in its place."""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from t5style.corpus.vocabulary import ByteVocabulary, CharacterVocabulary
from t5style.data import token_store
from t5style.data.objectives import DECODER_ONLY, CausalLM, Objective, PrefixLM, SpanCorruption, Supervised
from t5style.data.pipeline import Batch, BatchSource, ReadAhead
from t5style.data.task import Mixture, Task
from t5style.run_dir import UserError

MakeStore = Callable[..., str]

ENCODER_DECODER_LENGTHS = {"encoder": 96, "decoder": 48}
SETTINGS: dict[str, tuple[Objective, str, dict[str, int]]] = {
    "span": (SpanCorruption(), "encoder_decoder", ENCODER_DECODER_LENGTHS),
    "span-decoder": (SpanCorruption(), DECODER_ONLY, {"decoder": 80}),
    "causal": (CausalLM(), DECODER_ONLY, {"decoder": 40}),
    "causal-carry": (CausalLM(carry_over=True), DECODER_ONLY, {"decoder": 40}),
    "prefix": (PrefixLM(), "encoder_decoder", {"encoder": 40, "decoder": 48}),
    "prefix-decoder": (PrefixLM(), DECODER_ONLY, {"decoder": 40}),
    "supervised": (Supervised(), "encoder_decoder", ENCODER_DECODER_LENGTHS),
    "supervised-decoder": (Supervised(), DECODER_ONLY, {"decoder": 96}),
}
EOS = 1


@pytest.fixture(params=SETTINGS)
def source(request: pytest.FixtureRequest, text_store: str, pair_store: str) -> BatchSource:
    objective, architecture, lengths = SETTINGS[request.param]
    store = pair_store if isinstance(objective, Supervised) else text_store
    return BatchSource(Task("task", store, objective), "train", 8, lengths, architecture, seed=3)


def equal(a: Batch, b: Batch) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def segments(batch: Batch, side: str = "decoder") -> list[dict[str, list[int]]]:
    """Each segment's arrays, row by row."""
    found = []
    ids = batch[f"{side}_segment_ids"]
    for row in range(len(ids)):
        for segment in range(1, ids[row].max(initial=0) + 1):
            where = ids[row] == segment
            found.append({key: batch[key][row][where].tolist() for key in batch if key.startswith(side)})
    return found


# -------------------------------------------------------------------------------------------- pure function


def test_resume_at_any_step_gives_the_same_batches(source: BatchSource, text_store: str) -> None:
    straight = [source.batch_at(n) for n in range(12)]
    task = source.task
    assert isinstance(task, Task)
    again = BatchSource(task, "train", 8, source.lengths, source.architecture, seed=3)
    for n in (11, 4, 0, 7):  # in any order, by a source that made no other batch
        assert equal(again.batch_at(n), straight[n])
    with again.iter(start=5, prefetch=3, threads=2) as batches:
        for n in range(5, 12):
            assert equal(next(batches), straight[n])
    assert again.fingerprint == source.fingerprint
    # Epochs go on without end, and do not repeat one another.
    far = int(source.batches_per_epoch * 1000)
    assert equal(source.batch_at(far), again.batch_at(far))
    assert not equal(source.batch_at(far), source.batch_at(far + 1))


def test_any_number_of_hosts_gives_the_same_global_batch(source: BatchSource) -> None:
    for n in (0, 9, 1000):
        whole = source.batch_at(n)
        for hosts in (2, 4, 8):
            parts = [source.batch_at(n, host, hosts) for host in range(hosts)]
            assert equal(whole, {key: np.concatenate([part[key] for part in parts]) for key in whole})


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n=st.integers(0, 10_000), seed=st.integers(0, 2**40), hosts=st.sampled_from([1, 2, 4, 8]))
def test_any_step_seed_and_hosts(text_store: str, pair_store: str, n: int, seed: int, hosts: int) -> None:
    mixture = Mixture("m", [Task("a", text_store, SpanCorruption()), Task("b", pair_store, Supervised())])

    def make() -> BatchSource:
        return BatchSource(mixture, "train", 8, ENCODER_DECODER_LENGTHS, seed=seed)

    parts = [make().batch_at(n, host, hosts) for host in range(hosts)]
    assert equal(make().batch_at(n), {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})


def test_seed_and_epoch_change_the_batches(source: BatchSource) -> None:
    assert isinstance(source.task, Task)
    other = BatchSource(source.task, "train", 8, source.lengths, source.architecture, seed=4)
    assert not equal(source.batch_at(0), other.batch_at(0))
    assert source.fingerprint == other.fingerprint  # the seed stands beside it
    rows = int(source.batches_per_epoch * 8)
    same_order = [source._order[i][1] % rows for i in range(rows)]
    next_epoch = [source._order[i + rows][1] % rows for i in range(rows)]
    assert sorted(same_order) == sorted(next_epoch) == list(range(rows))
    assert same_order != next_epoch


def test_fingerprint_tells_settings_apart(text_store: str, make_store: MakeStore) -> None:
    def source(task: Task | None = None, **changes: object) -> BatchSource:
        arguments: dict[str, object] = {"batch_size": 8, "lengths": ENCODER_DECODER_LENGTHS} | changes
        return BatchSource(task or Task("t", text_store, SpanCorruption()), "train", **arguments)  # type: ignore[arg-type]

    other_text = make_store({"train": {"text": ["another text altogether"]}}, name="other")
    sources = [
        source(),
        source(batch_size=4),
        source(lengths={"encoder": 96, "decoder": 49}),
        source(shuffle=False),
        source(Task("t", text_store, SpanCorruption(noise_density=0.2))),
        source(Task("u", text_store, SpanCorruption())),
        source(Task("t", other_text, SpanCorruption())),
    ]
    assert len({s.fingerprint for s in sources}) == len(sources)
    assert (
        source(Task("t", text_store, SpanCorruption(), metrics=[max])).fingerprint == sources[0].fingerprint
    )  # type: ignore[list-item]


# --------------------------------------------------------------------------------------- what is in a batch


def test_layout_of_every_batch(source: BatchSource) -> None:
    batch = source.batch_at(2)
    sides = ["encoder", "decoder"] if source.architecture == "encoder_decoder" else ["decoder"]
    names = {"decoder_target_tokens", "decoder_loss_weights"}
    names |= {f"{side}_{name}" for side in sides for name in ("input_tokens", "segment_ids", "positions")}
    assert set(batch) == names
    for key, values in batch.items():
        assert values.dtype == np.int32
        assert values.shape == (8, source.lengths[key.split("_")[0]])
        padding = batch[f"{key.split('_')[0]}_segment_ids"] == 0
        assert not values[padding].any()
    for side in sides:
        for segment in segments(batch, side):
            assert segment[f"{side}_positions"] == list(range(len(segment[f"{side}_positions"])))
        ids = batch[f"{side}_segment_ids"]
        real = ids > 0
        assert (np.diff(real.astype(int), axis=1) <= 0).all()  # padding only at the end
        assert (np.diff(np.where(real, ids, ids.max() + 1), axis=1) >= 0).all()
    carry_over = isinstance(source.tasks[0].objective, CausalLM) and source.tasks[0].objective.carry_over
    for segment in segments(batch):
        assert segment["decoder_input_tokens"][1:] == segment["decoder_target_tokens"][:-1]
        if not carry_over:
            assert segment["decoder_input_tokens"][0] == source.vocabulary.bos_id
    assert batch["decoder_loss_weights"].max() == 1


def test_an_epoch_of_windows_holds_the_text_once(text_store: str) -> None:
    length = 150
    source = BatchSource(Task("t", text_store, CausalLM()), "train", 1, {"decoder": length}, DECODER_ONLY)
    store = token_store.TokenStore.open(text_store)
    total = store.num_tokens("train", "text")
    rows = total // length
    text = store.read("train", "text", np.array([0]), np.array([total])).astype("<u2").tobytes()
    starts: list[set[int]] = []
    for epoch in range(3):
        found = set()
        for n in range(epoch * rows, (epoch + 1) * rows):
            window = source.batch_at(n)["decoder_target_tokens"][0].astype("<u2").tobytes()
            place = (text + text).find(window)  # a window may go on at the beginning of the text
            assert place >= 0
            assert place % 2 == 0
            found.add(place // 2)
        covered = {(place + k) % total for place in found for k in range(length)}
        assert len(covered) == rows * length  # no token twice
        starts.append(found)
    assert not starts[0] & starts[1] & starts[2]  # every epoch is cut elsewhere


def test_carry_over_predicts_from_the_token_before(text_store: str) -> None:
    source = BatchSource(
        Task("t", text_store, CausalLM(carry_over=True)), "train", 8, {"decoder": 40}, DECODER_ONLY
    )
    store = token_store.TokenStore.open(text_store)
    text = store.read("train", "text", np.array([0]), np.array([store.num_tokens("train", "text")])).tolist()
    joined = ",".join(map(str, text + text))
    batch = source.batch_at(0)
    for row in range(8):
        both = [batch["decoder_input_tokens"][row][0], *batch["decoder_target_tokens"][row]]
        assert ",".join(map(str, both)) in joined
    first = BatchSource(
        source.task, "train", 8, source.lengths, DECODER_ONLY, shuffle=False
    ).evaluation_batch_at(0)
    assert first["decoder_input_tokens"][0, 0] == 0  # nothing stands before the split's beginning
    assert first["decoder_input_tokens"][1, 0] == text[39]


def test_packed_examples_are_the_stores(pair_store: str) -> None:
    vocabulary = ByteVocabulary()
    store = token_store.TokenStore.open(pair_store)
    pairs = {
        (vocabulary.decode(a), vocabulary.decode(b))
        for a, b in zip(
            store.examples("train", "inputs", range(200)),
            store.examples("train", "targets", range(200)),
            strict=True,
        )
    }
    source = BatchSource(Task("t", pair_store, Supervised()), "train", 4, ENCODER_DECODER_LENGTHS)
    assert source.examples_per_epoch == 200
    rows = round(source.batches_per_epoch * 4)
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    single = BatchSource(Task("t", pair_store, Supervised()), "train", 1, ENCODER_DECODER_LENGTHS)
    for n in range(rows):
        batch = single.batch_at(n)
        for encoder, decoder in zip(segments(batch, "encoder"), segments(batch), strict=True):
            inputs, targets = encoder["encoder_input_tokens"], decoder["decoder_target_tokens"]
            assert inputs[-1] == targets[-1] == EOS
            seen[vocabulary.decode(inputs), vocabulary.decode(targets)] += 1
    assert set(seen) == pairs
    assert set(seen.values()) == {1}
    assert rows < 200 / 2  # packing does something
    assert source.statistics["t"]["packing_efficiency_encoder"] > 0.7
    unpacked = BatchSource(
        Task("t", pair_store, Supervised()), "train", 4, ENCODER_DECODER_LENGTHS, pack=False
    )
    assert unpacked.batch_at(0)["decoder_segment_ids"].max() == 1
    assert unpacked.batches_per_epoch == 50


def test_decoder_only_pairs_have_loss_on_targets_only(pair_store: str) -> None:
    vocabulary = ByteVocabulary()
    source = BatchSource(Task("t", pair_store, Supervised()), "train", 8, {"decoder": 96}, DECODER_ONLY)
    for segment in segments(source.batch_at(0)):
        tokens, weights = segment["decoder_target_tokens"], segment["decoder_loss_weights"]
        start = weights.index(1)
        assert weights == [0] * start + [1] * (len(weights) - start)
        assert vocabulary.decode(tokens[:start]).startswith("add ")
        assert vocabulary.decode(tokens[start:]).startswith("sum ")
        assert tokens[-1] == EOS
        assert EOS not in tokens[:-1]


def test_too_long_examples(make_store: MakeStore) -> None:
    store = make_store({"train": {"inputs": ["a" * 30, "b"], "targets": ["y", "z" * 30]}}, name="long")
    lengths = {"encoder": 10, "decoder": 8}

    def source(on_overlong: str, **changes: object) -> BatchSource:
        arguments: dict[str, object] = {"lengths": lengths} | changes
        return BatchSource(Task("t", store, Supervised(on_overlong=on_overlong)), "train", 2, **arguments)  # type: ignore[arg-type]

    cut = source("truncate", pack=False)
    assert cut.statistics["t"]["cut"] == 2
    found = {tuple(s["decoder_target_tokens"]) for s in segments(cut.batch_at(0))}
    z = ByteVocabulary().encode("z")[0]
    y = ByteVocabulary().encode("y")[0]
    assert found == {(y, EOS), (*[z] * 7, EOS)}  # the end of sequence is kept, as T5 does
    a = ByteVocabulary().encode("a")[0]
    assert (*[a] * 9, EOS) in {tuple(s["encoder_input_tokens"]) for s in segments(cut.batch_at(0), "encoder")}
    # A decoder-only row of 16: the long input keeps what the target leaves, the long target at least half.
    joined = source("truncate", pack=False, lengths={"decoder": 16}, architecture=DECODER_ONLY)
    sizes = sorted(
        (len(s["decoder_loss_weights"]), sum(s["decoder_loss_weights"])) for s in segments(joined.batch_at(0))
    )
    assert sizes == [(15, 2), (15, 14)]
    with pytest.raises(UserError, match="all 2 examples of split 'train' are longer"):
        source("drop")
    with pytest.raises(
        UserError, match="example 0 of split 'train' has 31 input and 2 target tokens, more than"
    ):
        source("error")
    dropped = source("drop", lengths={"encoder": 40, "decoder": 8})
    assert dropped.statistics["t"]["dropped"] == 1
    assert dropped.examples_per_epoch == 1


# ------------------------------------------------------------------------------------------------- mixtures


@pytest.mark.parametrize("rates", [[0.5, 0.5], [0.9, 0.1], [1.0, 2.0], None])
def test_tasks_have_their_share(text_store: str, pair_store: str, rates: list[float] | None) -> None:
    mixture = Mixture(
        "m", [Task("a", text_store, SpanCorruption()), Task("b", pair_store, Supervised())], rates
    )
    source = BatchSource(mixture, "train", 8, ENCODER_DECODER_LENGTHS)
    expected = mixture.proportions([60, 200])
    drawn = np.bincount([source._order[row][0] for row in range(1000)]) / 1000
    assert drawn == pytest.approx(expected, abs=0.005)
    # Evenly through the run, too: no stretch of 200 rows is far off.
    stretch = np.bincount([source._order[row][0] for row in range(500, 700)], minlength=2) / 200
    assert stretch == pytest.approx(expected, abs=0.02)
    assert source.statistics["a"]["rate"] == pytest.approx(expected[0])


def test_a_task_in_a_mixture_sees_every_row_once_an_epoch(text_store: str, pair_store: str) -> None:
    mixture = Mixture(
        "m", [Task("a", text_store, SpanCorruption()), Task("b", pair_store, Supervised())], [0.7, 0.3]
    )
    source = BatchSource(mixture, "train", 8, ENCODER_DECODER_LENGTHS)
    rows = int(source.statistics["a"]["rows"])
    of_a = [row for task, row in (source._order[i] for i in range(rows * 4)) if task == 0]
    assert sorted(of_a[:rows]) == list(range(rows))
    assert sorted(of_a[rows : 2 * rows]) == list(range(rows, 2 * rows))


# ----------------------------------------------------------------------------------------------- evaluation


def test_evaluation_sees_everything_once(source: BatchSource) -> None:
    shuffled = BatchSource(source.task, "validation", 8, source.lengths, source.architecture, seed=1)
    source = BatchSource(
        source.task, "validation", 8, source.lengths, source.architecture, seed=1, shuffle=False
    )
    task = source.tasks[0]
    store = token_store.TokenStore.open(task.store)
    with source.evaluation_iter() as batches:
        found = list(batches)
    assert len(found) == source.evaluation_batches
    weights = sum(int(batch["decoder_loss_weights"].sum()) for batch in found)
    if isinstance(task.objective, Supervised):
        assert weights == store.num_tokens("validation", "targets")
        assert sum(len(segments(batch)) for batch in found) == 23
    elif isinstance(task.objective, CausalLM):
        assert weights == store.num_tokens("validation", "text")
        flat = np.concatenate([b["decoder_target_tokens"][b["decoder_segment_ids"] > 0] for b in found])
        assert flat.tolist() == store.read("validation", "text", np.array([0]), np.array([weights])).tolist()
    for batch in found:
        empty = batch["decoder_segment_ids"][:, 0] == 0
        assert all(not values[empty].any() for values in batch.values())
    # Shuffled, the same rows stand in another order, the same each time; a limit then takes a fair sample.
    assert shuffled._evaluation_row(0, 0) == shuffled._evaluation_row(0, 0)
    rows = shuffled._rows[0].finite_rows
    order = [shuffled._evaluation_row(0, place) for place in range(rows)]
    assert sorted(order) == list(range(rows))
    assert order != list(range(rows))
    # The last batch is filled up; hosts share it as they share the others.
    last = source.evaluation_batches - 1
    parts = [source.evaluation_batch_at(last, host, 4) for host in range(4)]
    assert equal(found[-1], {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})
    # The seed of the same source gives the same corruption every time.
    assert equal(found[0], source.evaluation_batch_at(0))
    with source.evaluation_iter(max_batches=1) as batches:
        assert len(list(batches)) == 1


def test_evaluation_of_a_mixture_goes_through_its_tasks(text_store: str, pair_store: str) -> None:
    tasks = [Task("a", text_store, SpanCorruption()), Task("b", pair_store, Supervised())]
    whole = BatchSource(Mixture("m", tasks), "validation", 8, ENCODER_DECODER_LENGTHS)
    single = [BatchSource(task, "validation", 8, ENCODER_DECODER_LENGTHS) for task in tasks]
    with whole.evaluation_iter() as batches:
        mixed = np.concatenate([b["decoder_target_tokens"] for b in batches])
    parts = []
    for source in single:
        with source.evaluation_iter() as batches:
            parts.append(np.concatenate([b["decoder_target_tokens"] for b in batches]))
    expected = np.concatenate([part[part.any(axis=1)] for part in parts])
    assert mixed[mixed.any(axis=1)].tolist() == expected.tolist()


def test_a_split_shorter_than_a_window(make_store: MakeStore) -> None:
    store = make_store({"train": {"text": ["tiny"]}}, name="tiny")
    source = BatchSource(Task("t", store, CausalLM()), "train", 2, {"decoder": 64}, DECODER_ONLY)
    batch = source.batch_at(0)
    assert (batch["decoder_segment_ids"].sum(axis=1) == 5).all()
    assert ByteVocabulary().decode(sorted(batch["decoder_target_tokens"][0])) == "".join(sorted("tiny"))


# ------------------------------------------------------------------------------------------------ bad input


def test_what_cannot_work_is_refused_by_name(text_store: str, pair_store: str, make_store: MakeStore) -> None:
    span = Task("spans", text_store, SpanCorruption())
    with pytest.raises(UserError, match="/nowhere holds no token store"):
        BatchSource(Task("t", "/nowhere", CausalLM()), "train", 8, {"decoder": 8}, DECODER_ONLY)
    with pytest.raises(UserError, match="no split 'test', only 'train', 'validation'"):
        BatchSource(span, "test", 8, ENCODER_DECODER_LENGTHS)
    with pytest.raises(UserError, match="no feature 'inputs', only 'text'"):
        BatchSource(Task("t", text_store, Supervised()), "train", 8, ENCODER_DECODER_LENGTHS)
    with pytest.raises(
        ValueError, match=r"lengths\['encoder'\] is 0; a encoder_decoder model needs at least 1"
    ):
        BatchSource(span, "train", 8, {"decoder": 64})
    with pytest.raises(ValueError, match="architecture is 'decoder'"):
        BatchSource(span, "train", 8, ENCODER_DECODER_LENGTHS, "decoder")
    with pytest.raises(ValueError, match="batch_size is 0"):
        BatchSource(span, "train", 0, ENCODER_DECODER_LENGTHS)
    empty = make_store({"train": {"text": ["a"]}, "validation": {"text": []}}, name="empty")
    with pytest.raises(UserError, match=r"Task 't': split 'validation' of token store .*empty is empty"):
        BatchSource(Task("t", empty, CausalLM()), "validation", 8, {"decoder": 8}, DECODER_ONLY)
    other = make_store(
        {"train": {"text": ["abc"]}}, name="characters", vocabulary=CharacterVocabulary("abc", 50)
    )
    mixed = Mixture("m", [span, Task("b", other, SpanCorruption())])
    with pytest.raises(
        UserError, match=r"Task 'b' has a store of vocabulary .* tokenize both with one vocabulary"
    ):
        BatchSource(mixed, "train", 8, ENCODER_DECODER_LENGTHS)
    source = BatchSource(span, "train", 8, ENCODER_DECODER_LENGTHS)
    with pytest.raises(
        ValueError, match="batch_size 8 cannot be divided among 3 hosts; choose a multiple of 3"
    ):
        source.batch_at(0, 0, 3)
    with pytest.raises(ValueError, match="shard is 2; it must be from 0 to 1"):
        source.batch_at(0, 2, 2)
    with pytest.raises(ValueError, match="Batch -1"):
        source.batch_at(-1)
    with pytest.raises(ValueError, match="Evaluation batch 10000 was asked for; there are"):
        source.evaluation_batch_at(10_000)


# ----------------------------------------------------------------------------------------------- read ahead


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("t5style-batches")}


def test_read_ahead_hands_out_in_order_and_closes() -> None:
    started: list[int] = []

    def make(n: int) -> Batch:
        started.append(n)
        time.sleep(0.02 if n % 2 else 0.0)  # the odd ones are slow: order must not suffer
        return {"n": np.array([n])}

    with ReadAhead(make, 3, 9, prefetch=3, threads=2) as batches:
        assert _threads()
        assert [int(batch["n"][0]) for batch in batches] == [3, 4, 5, 6, 7, 8]
    assert sorted(started) == [3, 4, 5, 6, 7, 8]
    assert not _threads()
    batches.close()  # again does no harm
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_read_ahead_works_ahead_but_not_without_end() -> None:
    made: list[int] = []
    with ReadAhead(
        lambda n: made.append(n) or {"n": np.array([n])}, 0, None, prefetch=3, threads=1
    ) as batches:  # type: ignore[func-returns-value]
        next(batches)
        deadline = time.monotonic() + 5
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]  # the one taken and three more


def test_errors_reach_the_consumer_with_the_batch_number() -> None:
    def make(n: int) -> Batch:
        if n == 2:
            raise KeyError("lost")
        return {"n": np.array([n])}

    with ReadAhead(make, 0, None, prefetch=4, threads=1) as batches:
        next(batches)
        next(batches)
        with pytest.raises(RuntimeError, match="Batch 2 could not be made: 'lost'"):
            next(batches)
    assert not _threads()
    with pytest.raises(ValueError, match="prefetch is 0"):
        ReadAhead(make, 0, None, prefetch=0, threads=1)
