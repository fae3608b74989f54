"""seqio tasks into token stores, and our tasks into seqio's registry.

The only file of the package that imports seqio and TensorFlow, and only inside its functions: whoever does
not use the bridge never loads them.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from t5style import console
from t5style.corpus import vocabulary as vocabulary_lib
from t5style.data.objectives import DECODER_ONLY, ENCODER_DECODER, CausalLM, Supervised
from t5style.data.pipeline import BatchSource
from t5style.data.task import Mixture, Task
from t5style.data.token_store import MANIFEST, TokenStore, TokenStoreWriter
from t5style.run_dir import RunDir, UserError, atomic_write

_MIXTURE = "mixture.json"


# -------------------------------------------------------------------------------------------- seqio → store


@dataclasses.dataclass(frozen=True)
class Materialize:
    """A registered seqio task → a token store in the run's folder; a seqio mixture → one store for each of
    its tasks (in folders of their names) and `mixture.json` with the rates, which `load_mixture` reads.

    What seqio's preprocessors draw at random is drawn once and stays: for span corruption, materialise a
    task that only tokenises, and use `SpanCorruption` on the store.

    Attributes:
      name: as registered.
      module: imported first, because importing it registers the task ("t5.data.tasks"); None if already
        imported.
      splits: None for all the task has.
      sequence_length: handed to seqio's preprocessors, and features are cut to it; None to cut nothing.
      vocabulary: a vocabulary's folder, where seqio's is of a kind that cannot be taken over; the ids must
        mean the same in both.
    """

    name: str
    module: str | None = None
    splits: Sequence[str] | None = None
    sequence_length: Mapping[str, int] | None = None
    vocabulary: str | None = None

    distributed: ClassVar[bool] = False

    def inputs(self) -> Sequence[str]:
        return [] if self.vocabulary is None else [self.vocabulary]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except ImportError as error:
                raise UserError(
                    f"Module {self.module!r} of seqio task {self.name!r}: {error}; install it."
                ) from error
        vocabulary = None if self.vocabulary is None else vocabulary_lib.load(self.vocabulary)
        return materialize(self.name, os.fspath(run.path), self.splits, self.sequence_length, vocabulary)


def materialize(
    name: str,
    folder: str,
    splits: Sequence[str] | None = None,
    sequence_length: Mapping[str, int] | None = None,
    vocabulary: vocabulary_lib.Vocabulary | None = None,
) -> dict[str, Any]:
    """See `Materialize`; replaces stores in `folder`. Returns examples and tokens by task, split, feature."""
    import seqio

    try:
        provider = seqio.get_mixture_or_task(name)
    except ValueError as error:
        raise UserError(f"seqio knows no task or mixture {name!r}: {error}") from error
    if isinstance(provider, seqio.Task):
        return {name: _materialize_task(provider, folder, splits, sequence_length, vocabulary)}
    tasks = {task.name: task for task in provider.tasks}
    figures = {
        task_name: _materialize_task(
            task, os.path.join(folder, task_name), splits, sequence_length, vocabulary
        )
        for task_name, task in tasks.items()
    }
    rates = {task_name: float(provider.get_rate(task)) for task_name, task in tasks.items()}
    atomic_write(epath.Path(folder) / _MIXTURE, json.dumps({"name": name, "rates": rates}, indent=1))
    return figures


def load_mixture(folder: str) -> Mixture:
    """The mixture that `Materialize` wrote, with seqio's rates. Its tasks are supervised, or causal LM where
    seqio's have no inputs.
    """
    path = epath.Path(folder) / _MIXTURE
    if not path.exists():
        raise UserError(f"{folder} holds no materialised seqio mixture: {_MIXTURE} is missing.")
    content = json.loads(path.read_text())
    tasks = []
    for name in content["rates"]:
        store = TokenStore.open(os.path.join(folder, name))
        objective = Supervised() if "inputs" in store.features else CausalLM(feature="targets")
        tasks.append(Task(name, store.folder, objective))
    return Mixture(content["name"], tasks, rates=list(content["rates"].values()))


def _materialize_task(
    task: Any,
    folder: str,
    splits: Sequence[str] | None,
    sequence_length: Mapping[str, int] | None,
    vocabulary: vocabulary_lib.Vocabulary | None,
) -> dict[str, Any]:
    features = {name: feature for name, feature in task.output_features.items() if feature.dtype.is_integer}
    if not features:
        raise UserError(f"seqio task {task.name!r} has no feature of token ids.")
    if vocabulary is None:
        found = {
            name: from_seqio_vocabulary(feature.vocabulary, task.name) for name, feature in features.items()
        }
        vocabulary, *others = found.values()
        if any(other.fingerprint != vocabulary.fingerprint for other in others):
            raise UserError(
                f"seqio task {task.name!r} has a different vocabulary for each of {', '.join(found)}; a "
                f"token store has one."
            )
    for split in splits or ():
        if split not in task.splits:
            raise UserError(
                f"seqio task {task.name!r} has no split {split!r}, only {', '.join(task.splits)}."
            )
    (epath.Path(folder) / MANIFEST).unlink(missing_ok=True)
    with TokenStoreWriter(folder, tuple(features), vocabulary, {"seqio_task": task.name}) as writer:
        for split in splits or task.splits:
            writer.add_split(split)
            dataset = task.get_dataset(
                sequence_length=sequence_length,
                split=split,
                shuffle=False,
                seed=0,
                num_epochs=1,
                trim_output_features=sequence_length is not None,
            )
            with console.progress(f"{task.name} {split}", None, unit="examples") as bar:
                for example in dataset.as_numpy_iterator():
                    writer.add(split, {name: np.asarray(example[name]) for name in features})
                    bar.advance()
    return {
        split: {"examples": counts["examples"]} | {f: c["tokens"] for f, c in counts["features"].items()}
        for split, counts in writer.manifest["splits"].items()
    }


def from_seqio_vocabulary(vocabulary: Any, task: str = "") -> vocabulary_lib.Vocabulary:
    """Our vocabulary with the same ids. Raises UserError for kinds that have none."""
    import seqio

    where = f"seqio task {task!r}: " if task else ""
    ours = getattr(vocabulary, "t5style_vocabulary", None)
    if isinstance(ours, vocabulary_lib.Vocabulary):
        return ours
    if isinstance(vocabulary, seqio.SentencePieceVocabulary):
        if vocabulary._normalizer_spec_overrides is not None or not vocabulary._reverse_extra_ids:
            raise UserError(
                f"{where}its SentencePiece vocabulary changes the model's normalizer or the order of "
                f"extra ids, which "
                "ours cannot; give `vocabulary`."
            )
        model = epath.Path(vocabulary.sentencepiece_model_file).read_bytes()
        return vocabulary_lib.SentencePieceVocabulary(model, vocabulary.extra_ids)
    if isinstance(vocabulary, seqio.ByteVocabulary):
        return vocabulary_lib.ByteVocabulary(vocabulary.extra_ids)
    raise UserError(
        f"{where}a {type(vocabulary).__name__} has no counterpart here; give `vocabulary`, one with the "
        f"same ids."
    )


# --------------------------------------------------------------------------------------------- ours → seqio


def export(task_or_mixture: Task | Mixture) -> str:
    """Registers a task or mixture with seqio, under its own name, which is returned.

    `seqio.get_mixture_or_task(name).get_dataset(...)` then gives `inputs` and `targets` (only `targets` for
    CausalLM) with their texts as `*_pretokenized`, ready for seqio's feature converters and
    `seqio.Evaluator`. Examples come one for each row, in the store's order, cut as our batches are cut;
    windowed objectives need `sequence_length`, and give the same corruption in every epoch.

    Raises: ValueError where seqio already has that name.
    """
    import seqio

    if isinstance(task_or_mixture, Task):
        _export_task(task_or_mixture)
        return task_or_mixture.name
    for task in task_or_mixture.tasks:
        _export_task(task)
    first_split = "train"
    examples = [_num_examples(task, first_split) for task in task_or_mixture.tasks]
    rates = task_or_mixture.proportions(examples)
    pairs = [(task.name, rate) for task, rate in zip(task_or_mixture.tasks, rates, strict=True)]
    seqio.MixtureRegistry.add(task_or_mixture.name, pairs)
    return task_or_mixture.name


def _num_examples(task: Task, split: str) -> int:
    return TokenStore.open(task.store).num_examples(task.store_split(split))


def _export_task(task: Task) -> None:
    import seqio
    import tensorflow as tf

    store = TokenStore.open(task.store)
    splits = tuple(task.splits) if task.splits is not None else store.splits
    vocabulary = to_seqio_vocabulary(store.vocabulary)
    names = ("targets",) if isinstance(task.objective, CausalLM) else ("inputs", "targets")
    signature = {name: tf.TensorSpec([None], tf.int32) for name in names}
    signature |= {f"{name}_pretokenized": tf.TensorSpec([], tf.string) for name in names}

    def dataset_fn(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        # One element that only names the split: how the tokens are cut depends on the sequence length,
        # which seqio tells to preprocessors and not to sources.
        return tf.data.Dataset.from_tensors({"split": split})

    def examples(dataset: Any, sequence_length: Mapping[str, int] | None) -> Any:
        def make(split: bytes) -> Iterator[dict[str, Any]]:
            return _examples(task, store, split.decode(), sequence_length)

        def of_split(element: Any) -> Any:
            return tf.data.Dataset.from_generator(make, output_signature=signature, args=(element["split"],))

        return dataset.flat_map(of_split)

    def whole_examples(dataset: Any, sequence_length: Mapping[str, int] | None = None) -> Any:
        return examples(dataset, sequence_length)

    seqio.TaskRegistry.add(
        task.name,
        source=seqio.FunctionDataSource(
            dataset_fn, splits, num_input_examples={split: _num_examples(task, split) for split in splits}
        ),
        # seqio asks for a sequence length where the argument has no default.
        preprocessors=[whole_examples if isinstance(task.objective, Supervised) else examples],
        output_features={
            name: seqio.Feature(vocabulary, add_eos=False, required=True, dtype=tf.int32) for name in names
        },
        postprocess_fn=None
        if task.postprocess is None
        else functools.partial(_postprocess, task.postprocess),
        metric_fns=[_metric(metric) for metric in task.metrics],
    )


def _postprocess(postprocess: Callable[[str], Any], text: str, **_: Any) -> Any:
    """seqio also hands over the example and whether it is a target."""
    return postprocess(text)


def _metric(metric: Callable[..., Mapping[str, float]]) -> Callable[..., Mapping[str, float]]:
    """seqio tells kinds of metrics apart by the names of their arguments."""

    def predicted(targets: Sequence[Any], predictions: Sequence[Any]) -> Mapping[str, float]:
        return metric(targets, predictions)

    predicted.__name__ = getattr(metric, "__name__", type(metric).__name__)
    return predicted


def _examples(
    task: Task, store: TokenStore, split: str, sequence_length: Mapping[str, int] | None
) -> Iterator[dict[str, Any]]:
    """Inputs and targets of the split's rows, and their texts."""
    architecture = DECODER_ONLY if isinstance(task.objective, CausalLM) else ENCODER_DECODER
    lengths = {
        "encoder": (sequence_length or {}).get("inputs"),
        "decoder": (sequence_length or {}).get("targets"),
    }
    if isinstance(task.objective, Supervised):
        for side, feature in (("encoder", task.objective.inputs), ("decoder", task.objective.targets)):
            if lengths[side] is None:
                lengths[side] = max(1, int(store.lengths(task.store_split(split), feature).max(initial=0)))
    given = {side: int(length) for side, length in lengths.items() if length is not None}
    source = BatchSource(task, split, 32, given, architecture, pack=False, shuffle=False)
    for number in range(source.evaluation_batches):
        batch = source.evaluation_batch_at(number)
        for row in range(source.batch_size):
            targets = batch["decoder_target_tokens"][row][batch["decoder_segment_ids"][row] > 0]
            if not len(targets):  # the last batch is filled up with empty rows
                continue
            example = {"targets": targets}
            if architecture == ENCODER_DECODER:
                example["inputs"] = batch["encoder_input_tokens"][row][batch["encoder_segment_ids"][row] > 0]
            yield example | {
                f"{name}_pretokenized": source.vocabulary.decode(ids) for name, ids in example.items()
            }


def predictions(numbered: Iterable[tuple[int, Sequence[int]]]) -> list[tuple[int, np.ndarray]]:
    """What a `predict_fn` of `seqio.Evaluator` should return: (example's number, ids), all ids of one length.

    seqio (0.0.20) stacks the answers into one array, which NumPy refuses since 1.24 where lengths differ;
    padding is cut off when it decodes, at the first end of sequence.
    """
    pairs = [(int(number), np.asarray(ids, np.int32)) for number, ids in numbered]
    longest = max((len(ids) for _, ids in pairs), default=0)
    return [(number, np.pad(ids, (0, longest - len(ids)))) for number, ids in pairs]


def to_seqio_vocabulary(vocabulary: vocabulary_lib.Vocabulary) -> Any:
    """A `seqio.Vocabulary` that encodes and decodes exactly as ours does."""
    import seqio
    import tensorflow as tf

    class _Adapter(seqio.Vocabulary):
        def __init__(self, ours: vocabulary_lib.Vocabulary) -> None:
            super().__init__(extra_ids=ours.extra_ids)
            self.t5style_vocabulary = ours

        @property
        def bos_id(self) -> int:
            return self.t5style_vocabulary.bos_id

        @property
        def eos_id(self) -> int:
            return self.t5style_vocabulary.eos_id

        @property
        def unk_id(self) -> int:
            return self.t5style_vocabulary.unk_id

        @property
        def _base_vocab_size(self) -> int:
            return self.t5style_vocabulary.base_size

        def _encode(self, text: str) -> list[int]:
            return self.t5style_vocabulary.encode(text)

        def _decode(self, ids: Sequence[int]) -> str:
            return self.t5style_vocabulary.decode(ids)

        def _encode_tf(self, text: Any) -> Any:
            def encode(value: Any) -> np.ndarray:
                # Eagerly a 0-d array of an object, in a graph the bytes themselves.
                content = value.item() if isinstance(value, np.ndarray) else value
                return np.array(self._encode(content.decode("utf-8", "replace")), np.int32)

            ids = tf.numpy_function(encode, [text], tf.int32)
            ids.set_shape([None])
            return ids

        def _decode_tf(self, ids: Any) -> Any:
            def decode(values: np.ndarray) -> Any:
                rows = values.reshape(-1, values.shape[-1])
                texts = np.array([self._decode(row.tolist()).encode() for row in rows], object)
                return texts.reshape(values.shape[:-1])

            text = tf.numpy_function(decode, [ids], tf.string)
            text.set_shape(ids.shape[:-1])
            return text

        def __eq__(self, other: object) -> bool:
            return getattr(other, "t5style_vocabulary", None) == self.t5style_vocabulary

        def __hash__(self) -> int:
            return hash(self.t5style_vocabulary)

    return _Adapter(vocabulary)
