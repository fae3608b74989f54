"""A trained reward model in use: texts or tokens in, rewards out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from t5style.corpus.vocabulary import Vocabulary
from t5style.data.objectives import DECODER_ONLY, Examples
from t5style.data.pipeline import Batch, empty_batch, lay_out
from t5style.infer import chat_tokens, storage
from t5style.models.config import TransformerConfig
from t5style.parallel import rules
from t5style.run_dir import PathLike, UserError
from t5style.train import checkpoint
from t5style.tune.reward_model import HEAD, rewards

_ROUND = 64  # lengths are multiples of it: few programs are compiled


class RewardScorer:
    """Rewards of answers to prompts.

    Args:
      config: the model.
      params: with 'value_head', on the mesh.
      vocabulary: of the texts.
      mesh: None for one device.
      batch_size: rows that are read at once.
      prefix: what a decoder-only model's texts begin with; None for the vocabulary's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: Any,
        vocabulary: Vocabulary,
        mesh: Mesh | None = None,
        batch_size: int = 8,
        prefix: int | None = None,
    ) -> None:
        self.prefix = vocabulary.bos_id if prefix is None else prefix
        self.config, self.params, self.vocabulary = config, params, vocabulary
        self.mesh, self.batch_size = mesh, batch_size

    @classmethod
    def load(cls, path: PathLike, mesh: Mesh | None = None, batch_size: int = 8) -> RewardScorer:
        """The reward model of a run folder of tune.reward_model.RewardModel, or of one of its checkpoints.

        Raises:
          UserError: there is none.
        """
        folder = checkpoint.find(path)
        metadata = checkpoint.read_metadata(folder)
        if HEAD not in metadata.get("heads", ()):
            raise UserError(
                f"{path} is no reward model: it has no {HEAD}. Train one with tune.reward_model.RewardModel."
            )
        stored = storage.load(path, mesh=mesh)  # without heads
        assert stored.vocabulary is not None  # every run has one
        head = jax.device_get(checkpoint.restore_params(folder)[HEAD])
        prefix = None if stored.ids is None else stored.ids.prefix
        params = {**stored.params, HEAD: head}
        return cls(stored.config, params, stored.vocabulary, mesh, batch_size, prefix)

    def texts(
        self, prompts: Sequence[str], answers: Sequence[str], special_tokens: bool = False
    ) -> np.ndarray:
        """Rewards f32 [answers]; texts become tokens as tune.examples.Examples makes them.

        Args:
          prompts: of a model with a chat template in that, else as they are.
          answers: what it said.
          special_tokens: prompts spell out all special tokens (`<|im_start|>`), as a chat template writes
            them, and these are to be read as such.
        """
        vocabulary = self.vocabulary
        end = [vocabulary.eos_id]
        before, behind = ([], end) if self.config.architecture != DECODER_ONLY else ([self.prefix], [])
        read = []
        for prompt in prompts:
            plain = vocabulary.encode(prompt)
            ids = chat_tokens.encode(vocabulary, prompt)[0] if special_tokens else plain
            # What a template wrote begins as it shall; nothing else has special tokens in it.
            read.append([*(before if ids == plain else ()), *ids, *behind])
        return self.tokens(read, [[*vocabulary.encode(answer), *end] for answer in answers])

    def tokens(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> np.ndarray:
        """Rewards f32 [answers] of answers given as tokens, laid out as in training.

        Raises:
          ValueError: not as many prompts as answers, or an answer without a token.
        """
        if len(prompts) != len(answers):
            raise ValueError(f"there are {len(prompts)} prompts and {len(answers)} answers: give as many.")
        if empty := [i for i, answer in enumerate(answers) if not len(answer)]:
            raise ValueError(f"answer {empty[0]} has no token: there is nothing to reward.")
        order = np.argsort([-len(prompt) - len(answer) for prompt, answer in zip(prompts, answers)])  # noqa: B905
        found = np.zeros(len(answers), np.float32)
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = self._batch([prompts[i] for i in rows], [answers[i] for i in rows])
            found[rows] = self._rewards(batch)[: len(rows)]
        return found

    def _batch(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Batch:
        """Rows one place longer than they need to be: the last token is read too."""

        def flat(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
            tokens = np.array([token for row in rows for token in row], np.int32)
            return tokens, np.array([len(row) for row in rows], np.int64)

        inputs, input_lengths = flat(prompts)
        targets, target_lengths = flat(answers)
        first = None
        if self.config.architecture == DECODER_ONLY:  # a prompt's first token is read and not foretold
            first = np.array([prompt[0] if len(prompt) else self.vocabulary.bos_id for prompt in prompts])
            inputs, input_lengths = flat([prompt[1:] for prompt in prompts])
        weights = np.ones(len(targets), np.int32)
        examples = Examples(inputs, input_lengths, targets, target_lengths, weights, first)
        if self.config.architecture == DECODER_ONLY:
            examples = examples.joined()
        lengths = {"decoder": _rounded(int(examples.target_lengths.max()) + 1)}
        if self.config.architecture != DECODER_ONLY:
            lengths["encoder"] = _rounded(int(input_lengths.max()))
        batch = empty_batch(self.batch_size, lengths)
        lay_out(batch, examples, np.arange(len(answers)), self.vocabulary.bos_id)
        return batch

    def _rewards(self, batch: Batch) -> np.ndarray:
        if self.mesh is None:
            return np.asarray(self._function(self.params, batch))
        with rules.use_mesh(self.mesh):
            return np.asarray(self._function(self.params, rules.put_batch(batch, self.mesh)))

    @functools.cached_property
    def _function(self) -> Any:
        return jax.jit(lambda params, batch: rewards(self.config, params, batch)[0])


def _rounded(length: int) -> int:
    return -(-max(length, 1) // _ROUND) * _ROUND


@dataclasses.dataclass(frozen=True)
class LearnedReward:
    """What a reward model says, as a reward of reinforcement learning and of best-of-n (see rewards.Reward).

    It is computed in the process that trains, on the same devices, for all completions at once.

    Attributes:
      model: run folder of tune.reward_model.RewardModel; 'run:<stage>' inside a workflow.
      batch_size: rows that are read at once.
      mean, scale: a reward r becomes (r - mean) / scale.
    """

    model: str
    batch_size: int = 8
    mean: float = 0.0
    scale: float = 1.0

    in_process: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be 1 or more.")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale}; it must be above 0.")

    @functools.cached_property
    def scorer(self) -> RewardScorer:
        """The model, loaded when it is first asked."""
        return RewardScorer.load(self.model, batch_size=self.batch_size)

    def __call__(self, record: Mapping[str, Any], completions: Sequence[str]) -> list[float]:
        """See rewards.Reward; the record's prompt is what the completions answer."""
        return self.score([record], [str(record["prompt"])], [completions])[0].tolist()

    def score(
        self,
        records: Sequence[Mapping[str, Any]],
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
    ) -> np.ndarray:
        """Rewards float64 [prompts, n] of n completions of each prompt."""
        repeated = [prompt for prompt, texts in zip(prompts, completions, strict=True) for _ in texts]
        found = self.scorer.texts(
            repeated, [text for texts in completions for text in texts], special_tokens=True
        )
        rewards = (found.astype(np.float64) - self.mean) / self.scale
        return rewards.reshape(len(prompts), -1)  # [prompts · n] -> [prompts, n]
