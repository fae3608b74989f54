"""A trained reward model in use: texts or tokens in, rewards out."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5style.corpus import vocabulary as vocabulary_lib
from t5style.corpus.vocabulary import Vocabulary
from t5style.data.objectives import DECODER_ONLY, Examples
from t5style.data.pipeline import Batch, empty_batch, lay_out
from t5style.infer import storage
from t5style.models.config import TransformerConfig
from t5style.parallel import rules
from t5style.run_dir import PathLike, UserError
from t5style.train import checkpoint, state
from t5style.tune.reward_model import HEAD, rewards

_ROUND = 64  # lengths are multiples of it: few programs are compiled


class Scorer:
    """Rewards of answers to prompts.

    Args:
      config: the model.
      params: with 'value_head', on the mesh.
      vocabulary: of the texts.
      mesh: None for one device.
      batch_size: rows that are read at once.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: Any,
        vocabulary: Vocabulary,
        mesh: Mesh | None = None,
        batch_size: int = 8,
    ) -> None:
        self.config, self.params, self.vocabulary = config, params, vocabulary
        self.mesh, self.batch_size = mesh, batch_size

    @classmethod
    def load(cls, path: PathLike, mesh: Mesh | None = None, batch_size: int = 8) -> Scorer:
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
        config = TransformerConfig.from_json(metadata["model"])
        run = folder.parent.parent
        vocabulary = vocabulary_lib.load(run / storage.VOCABULARY_FOLDER)
        whole = state.Trained(config, heads=(HEAD,))
        shardings = None
        if mesh is not None:
            abstract = state.abstract_params(whole)
            shardings = rules.param_shardings(state.logical_axes(whole), abstract, mesh)
        if "adapter" not in metadata:
            params = checkpoint.restore_params(folder, shardings, abstract=state.abstract_params(whole))
        else:  # an adapter's own, which storage puts together with its base
            head = checkpoint.restore_params(folder)[HEAD]
            params = {**storage.load(path, mesh=mesh).params, HEAD: head}
        return cls(config, params, vocabulary, mesh, batch_size)

    def texts(self, prompts: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Rewards f32 [answers]; the texts are encoded as they are, and the answers closed by the
        end-of-sequence token.
        """
        encode, end = self.vocabulary.encode, self.vocabulary.eos_id
        return self.tokens(
            [encode(prompt) for prompt in prompts], [[*encode(answer), end] for answer in answers]
        )

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
        examples = Examples(inputs, input_lengths, targets, target_lengths, np.ones(len(targets), np.int32))
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
