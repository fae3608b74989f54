"""Our span-corruption batches beside the same task through seqio and tf.data, on the CPU, in one run.

    python experiments/benchmarks/input_pipeline.py
    python experiments/benchmarks/input_pipeline.py --rounds=7 --seconds=3

Both start from tokens on disk (ours: a token store; theirs: a TFRecord file of tokenised documents, which is
what seqio's offline cache is), shuffle, cut the text into windows of 568 tokens, corrupt spans (density
0.15, mean length 3), and end in batches of 128 rows, 512 encoder and 114 decoder tokens, with the features
that a training step takes. The peer's preprocessors are those of the `t5` package where it is installed, and
otherwise the same algorithm written here as a tf.data graph; its feature converter and its driver are
seqio's.

The two take turns. Reported: text tokens for each second of CPU time, of all threads of the process
together, which is what a core delivers however busy the machine is; and the median ratio over the rounds
(above 1: ours is faster). Ours is measured with the tokens kept in memory, as stores of up to 256 MiB are,
and read from chunks on disk, as larger ones are.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data import token_store
from t5style.data.objectives import SpanCorruption
from t5style.data.pipeline import BatchSource
from t5style.data.task import Task

LENGTHS = {"inputs": 512, "targets": 114}
WINDOW = 568
DENSITY, MEAN_LENGTH = 0.15, 3.0
EXTRA_IDS = 125


def write_documents(folder: pathlib.Path, tokens: int) -> None:
    """The same random documents as a token store and as a TFRecord file."""
    import tensorflow as tf

    random = np.random.default_rng(0)
    vocabulary = ByteVocabulary(EXTRA_IDS)
    written = 0
    with (
        token_store.TokenStoreWriter(folder / "store", ["text"], vocabulary) as store,
        tf.io.TFRecordWriter(str(folder / "train.tfrecord")) as records,
    ):
        while written < tokens:
            document = random.integers(3, vocabulary.base_size, int(random.lognormal(6.0, 1.0)) + 1)
            store.add("train", {"text": document})
            ids = tf.train.Feature(int64_list=tf.train.Int64List(value=document))
            records.write(
                tf.train.Example(features=tf.train.Features(feature={"targets": ids})).SerializeToString()
            )
            written += len(document)


def ours(folder: pathlib.Path, batch_size: int, resident: bool) -> Iterator[int]:
    """Makes batches; yields each one's text tokens."""
    kept = token_store.RESIDENT_BYTES
    task = Task(
        "spans",
        str(folder / "store"),
        SpanCorruption(noise_density=DENSITY, mean_noise_span_length=MEAN_LENGTH),
    )
    lengths = {"encoder": LENGTHS["inputs"], "decoder": LENGTHS["targets"]}
    source = BatchSource(task, "train", batch_size, lengths)
    number = 0
    while True:
        token_store.RESIDENT_BYTES = kept if resident else 0
        try:
            batch = source.batch_at(number)
        finally:
            token_store.RESIDENT_BYTES = kept
        assert batch["encoder_segment_ids"].all()
        yield batch_size * WINDOW
        number += 1


def theirs(folder: pathlib.Path, batch_size: int) -> tuple[Iterator[int], str]:
    """Makes batches through seqio; yields each one's text tokens. Also says whose preprocessors these are."""
    import seqio
    import tensorflow as tf

    vocabulary = seqio.ByteVocabulary(EXTRA_IDS)
    try:
        from t5.data import preprocessors

        cut_and_corrupt = [preprocessors.span_corruption]
        whose = "t5"
    except ImportError:
        cut_and_corrupt = [_cut_into_windows, _corrupt]
        whose = "the same algorithm as a tf.data graph (the t5 package is not installed)"
    seqio.TaskRegistry.add(
        "spans",
        source=seqio.TFExampleDataSource(
            {"train": str(folder / "train.tfrecord")},
            {"targets": tf.io.RaggedFeature(tf.int64)},
        ),
        preprocessors=[
            lambda dataset: dataset.map(lambda x: {"targets": tf.cast(x["targets"], tf.int32)}),
            *cut_and_corrupt,
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features={name: seqio.Feature(vocabulary, add_eos=True) for name in LENGTHS},
        metric_fns=[],
    )
    dataset = seqio.get_dataset(
        "spans",
        LENGTHS,
        dataset_split="train",
        shuffle=True,
        num_epochs=None,
        seed=0,
        feature_converter=seqio.EncDecFeatureConverter(pack=False),
        batch_size=batch_size,
    )

    def batches() -> Iterator[int]:
        for batch in dataset.as_numpy_iterator():
            assert batch["encoder_input_tokens"].shape == (batch_size, LENGTHS["inputs"])
            yield batch_size * WINDOW

    return batches(), whose


def _cut_into_windows(dataset: Any) -> Any:
    """Documents joined a hundred and more at a time, and cut: what t5's select_random_chunk,
    reduce_concat_tokens (batches of 128) and split_tokens do to documents of this size.
    """
    import tensorflow as tf

    def cut(ragged: Any) -> Any:
        flat = ragged.flat_values
        windows = tf.shape(flat)[0] // WINDOW
        return tf.data.Dataset.from_tensor_slices(
            {"targets": tf.reshape(flat[: windows * WINDOW], [windows, WINDOW])}
        )

    joined = dataset.map(lambda x: x["targets"]).apply(tf.data.experimental.dense_to_ragged_batch(128))
    return joined.flat_map(cut)


def _corrupt(dataset: Any) -> Any:
    import seqio
    import tensorflow as tf

    noise = round(WINDOW * DENSITY)
    spans = round(noise / MEAN_LENGTH)
    sentinel = ByteVocabulary(EXTRA_IDS).vocab_size

    def segments(items: int, seed: Any) -> Any:
        starts = seqio.stateless_shuffle(tf.cast(tf.range(items - 1) < spans - 1, tf.int32), seed)
        segment = tf.cumsum(tf.pad(starts, [[1, 0]]))
        return tf.math.segment_sum(tf.ones_like(segment), segment)

    def replaced(tokens: Any, mask: Any) -> Any:
        before = tf.pad(mask[:-1], [[1, 0]])
        first = tf.logical_and(mask, tf.logical_not(before))
        later = tf.logical_and(mask, before)
        ids = tf.where(first, sentinel - tf.cumsum(tf.cast(first, tf.int32)), tokens)
        return tf.boolean_mask(ids, tf.logical_not(later))

    @seqio.map_over_dataset(num_seeds=2)
    def corrupt(example: Any, seeds: Any) -> Any:
        tokens = example["targets"]
        lengths = tf.stack([segments(WINDOW - noise, seeds[1]), segments(noise, seeds[0])], axis=1)
        borders = tf.cumsum(tf.reshape(lengths, [2 * spans]))[:-1]
        mask = tf.cumsum(tf.math.unsorted_segment_sum(tf.ones_like(borders), borders, WINDOW)) % 2 == 1
        return {"inputs": replaced(tokens, mask), "targets": replaced(tokens, tf.logical_not(mask))}

    return corrupt(dataset)


def rate(batches: Iterator[int], seconds: float) -> tuple[float, float]:
    """Text tokens for each second of CPU time and of wall time, over at least so many seconds of CPU time."""
    tokens, cpu, wall = 0, time.process_time(), time.perf_counter()
    while time.process_time() - cpu < seconds:
        tokens += next(batches)
    return tokens / (time.process_time() - cpu), tokens / (time.perf_counter() - wall)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="CPU seconds of each contestant in a round"
    )
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=50_000_000, help="size of the text")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_documents(folder, options.tokens)
        peer, whose = theirs(folder, options.batch_size)
        contestants: dict[str, Iterator[int]] = {
            "ours, in memory": ours(folder, options.batch_size, True),
            "ours, from chunks": ours(folder, options.batch_size, False),
            "seqio": peer,
        }
        measured = compare(contestants, options.rounds, options.seconds, rate)
    print(
        f"\nText tokens for each CPU second, median of {options.rounds} rounds; preprocessors of seqio's "
        f"task: {whose}"
    )
    for contestant, rates in measured.items():
        ratio = statistics.median(mine / peer for mine, peer in zip(rates, measured["seqio"], strict=True))
        print(f"{contestant:18} {statistics.median(rates):12,.0f}   {ratio:6.2f} x seqio")
    print(json.dumps({contestant: [round(r) for r in rates] for contestant, rates in measured.items()}))


def compare(
    contestants: dict[str, Iterator[int]],
    rounds: int,
    seconds: float,
    measure: Callable[[Iterator[int], float], tuple[float, float]],
) -> dict[str, list[float]]:
    """Lets the contestants take turns; the first turn of each is a warm-up. Returns their rates, round by
    round.
    """
    measured: dict[str, list[float]] = {contestant: [] for contestant in contestants}
    for number in range(rounds + 1):
        for contestant, batches in contestants.items():
            per_cpu, per_wall = measure(batches, seconds if number else min(seconds, 1.0))
            time.sleep(1.0)  # tf.data fills its buffers: that must not count against the next in turn
            if number:
                measured[contestant].append(per_cpu)
                print(
                    f"round {number}: {contestant:18} {per_cpu:12,.0f} per CPU second {per_wall:12,.0f} "
                    f"per second"
                )
    return measured


if __name__ == "__main__":
    main()
