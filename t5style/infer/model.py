"""The public API: `m = t5style.load(path)`, then logits, score, generate, embed and save.

Notebooks, evaluation, serving and other programs use only what is public here. Token arrays are int `[batch,
length]` and masks the same shape, 1 = real token; padding may stand on the left or on the right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from t5style.corpus.vocabulary import Vocabulary
from t5style.infer import decoding, programs, storage
from t5style.infer.batch import (
    batch_bucket,
    bucket,
    check_batch_size,
    check_texts,
    check_tokens,
    on_mesh,
    pad_rows,
    put,
)
from t5style.infer.ids import TokenIds, token_ids
from t5style.infer.sampling import Sampling
from t5style.models.config import TransformerConfig
from t5style.parallel.rules import Rules
from t5style.run_dir import PathLike, UserError

BATCH_SIZE = 16


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer: its text and its token ids, without end-of-sequence and padding."""

    text: str
    tokens: list[int]


class Model:
    """A model ready for use; made by `load`.

    Attributes:
      config: what it is (`config.architecture`: "encoder_decoder" or "decoder_only").
      params: nested dicts of arrays.
      vocabulary: None when the directory has no tokenizer; text methods then raise ValueError.
      ids: token ids with a meaning to decoding.
      mesh: the devices it is spread over; None for one device.
      path: where it was loaded from.
    """

    def __init__(
        self,
        config: TransformerConfig,
        params: Any,
        vocabulary: Vocabulary | None = None,
        ids: TokenIds | None = None,
        mesh: Mesh | None = None,
        rules: Rules | None = None,
        path: str = "",
    ) -> None:
        if vocabulary is not None and vocabulary.vocab_size > config.vocab_size:
            raise UserError(
                f"the vocabulary has {vocabulary.vocab_size} ids but the model {path or config.architecture} "
                f"only {config.vocab_size} embeddings: use the vocabulary it was trained with"
            )
        if ids is None:
            ids = TokenIds() if vocabulary is None else token_ids(vocabulary)
        self.config, self.params, self.vocabulary, self.ids = config, params, vocabulary, ids
        self.mesh, self.rules, self.path = mesh, rules, path

    def __repr__(self) -> str:
        return f"Model({self.path!r}, {self.config.architecture}, vocabulary={self.vocabulary!r})"

    @property
    def encoder_decoder(self) -> bool:
        """Whether there is an encoder."""
        return self.config.architecture == "encoder_decoder"

    # ------------------------------------------------------------------------------------------- token arrays

    def logits(
        self,
        tokens: Any,
        mask: Any = None,
        encoder_tokens: Any = None,
        encoder_mask: Any = None,
    ) -> jax.Array:
        """Next-token logits, float32 `[batch, length, vocab]`.

        Args:
          tokens: the decoder's inputs as they enter it, int `[batch, length]` (an encoder-decoder's begin
            with its start token).
          mask: 1 = real token; None: all real. What stands at padding in the result is unspecified.
          encoder_tokens, encoder_mask: the same for the encoder of an encoder-decoder.

        Raises:
          ValueError: wrong shapes or dtypes, ids outside the vocabulary, encoder inputs missing or unwanted.
        """
        decoder, decoder_mask = self._check("tokens", tokens, mask)
        batch = {"decoder_input_tokens": decoder, "decoder_segment_ids": decoder_mask}
        if encoder_tokens is not None:
            encoder, encoder_mask = self._check("encoder_tokens", encoder_tokens, encoder_mask)
            if len(encoder) != len(decoder):
                raise ValueError(f"encoder_tokens has {len(encoder)} rows but tokens {len(decoder)}")
            batch |= {"encoder_input_tokens": encoder, "encoder_segment_ids": encoder_mask}
        if self.encoder_decoder != (encoder_tokens is not None):
            raise ValueError(
                "this model is an encoder-decoder: give encoder_tokens"
                if self.encoder_decoder
                else "this model is decoder-only: it takes no encoder_tokens"
            )
        return self._run(programs.logits, batch)[: len(decoder), : decoder.shape[1]]

    def token_scores(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """How well the model foretells a batch's targets.

        Args:
          batch: int32 arrays under data.pipeline's names: decoder_input_tokens, decoder_target_tokens, and
            what there is of *_segment_ids, *_positions, encoder_input_tokens. Packed rows are fine.

        Returns:
          log-likelihood of each target token, in nats, float32 `[batch, length]`; and whether it is the most
          probable one, bool of the same shape. What stands at padding is unspecified.
        """
        names = [
            f"{side}_{what}"
            for side in ("encoder", "decoder")
            for what in ("input_tokens", "segment_ids", "positions")
        ]
        arrays = {
            name: np.asarray(batch[name]) for name in [*names, "decoder_target_tokens"] if name in batch
        }
        rows, length = arrays["decoder_target_tokens"].shape
        for name in [name for name in arrays if name.endswith("input_tokens")]:
            arrays.setdefault(name.replace("input_tokens", "segment_ids"), np.ones_like(arrays[name]))
        scores, correct = jax.device_get(self._run(programs.token_scores, arrays))
        return scores[:rows, :length], correct[:rows, :length]

    def generate_tokens(
        self,
        tokens: Any,
        mask: Any = None,
        max_new_tokens: int = 128,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        eos_id: int | Sequence[int] | None = None,
    ) -> np.ndarray:
        """New tokens, int32 `[batch, max_new_tokens]`; after a row's end-of-sequence token everything is
        padding.

        Args:
          tokens: int `[batch, length]`: the encoder's inputs of an encoder-decoder, else prompts as they
            enter it.
          mask: 1 = real token, padding on either side; None: all real.
          max_new_tokens: at least 1.
          temperature: 0 is greedy.
          top_k: keep the k most probable tokens; 0 keeps all.
          top_p: keep the smallest set of most probable tokens whose probability reaches p; 1 keeps all.
          seed: one number s (row i then has the seed s + i) or one for each row. A row's answer depends on
            its own prompt, settings and seed only.
          eos_id: token or tokens that end an answer; None: the model's own; -1: nothing does.

        Raises:
          ValueError: a value outside its limits; a row without a real token; more positions than the model
            was made for.
        """
        array, real = self._check("tokens", tokens, mask)
        prompts = [row[keep != 0] for row, keep in zip(array, real, strict=True)]
        return self._decode(prompts, max_new_tokens, temperature, top_k, top_p, seed, eos_id)

    # -------------------------------------------------------------------------------------------------- texts

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = BATCH_SIZE,
    ) -> list[str]:
        """Answers to prompts, as text; see generate_tokens for the settings, and `complete` for token ids
        too.
        """
        answers = self.complete(prompts, max_new_tokens, temperature, top_k, top_p, seed, batch_size)
        return [answer.text for answer in answers]

    def complete(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 128,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = BATCH_SIZE,
    ) -> list[Completion]:
        """As generate, with the token ids. `<extra_id_k>` in an encoder's prompt is sentinel k."""
        vocabulary = self._vocabulary()
        rows = [self._prompt(text, i) for i, text in enumerate(check_texts("prompts", prompts))]
        answers = self.complete_tokens(rows, max_new_tokens, temperature, top_k, top_p, seed, batch_size)
        return [Completion(vocabulary.decode(answer), answer) for answer in answers]

    def complete_tokens(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int = 128,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        seed: int | Sequence[int] = 0,
        batch_size: int = BATCH_SIZE,
    ) -> list[list[int]]:
        """New tokens, without end-of-sequence and padding, for prompts of any lengths: int arrays [length].

        Prompts of similar length are decoded together, `batch_size` at a time; settings as for
        generate_tokens.
        """
        check_batch_size(batch_size)
        settings = Sampling.of(len(prompts), temperature, top_k, top_p, seed)
        sizes = [bucket(len(prompt)) for prompt in prompts]
        order = sorted(range(len(prompts)), key=sizes.__getitem__)
        answers: list[list[int]] = [[] for _ in prompts]
        while order:
            chosen = [i for i in order[:batch_size] if sizes[i] == sizes[order[0]]]
            order = order[len(chosen) :]
            out = self._decode(
                [prompts[i] for i in chosen],
                max_new_tokens,
                settings.temperature[chosen],
                settings.top_k[chosen],
                settings.top_p[chosen],
                settings.seed[chosen],
                None,
            )
            for i, new in zip(chosen, out, strict=True):
                ends = np.flatnonzero(np.isin(new, self.ids.eos))
                answers[i] = new[: ends[0]].tolist() if len(ends) else new.tolist()
        return answers

    def score(
        self,
        inputs: Sequence[str],
        targets: Sequence[str],
        batch_size: int = BATCH_SIZE,
        eos: bool | None = None,
    ) -> np.ndarray:
        """Log-likelihood of each target given its input, in nats: float64 `[pairs]`, summed over the target's
        tokens.

        Both texts are tokenized by themselves, as in training: a space between them belongs to one of them.

        Args:
          inputs, targets: as many of one as of the other. A decoder-only model may have empty inputs if its
            prompts start with a token of their own.
          batch_size: pairs at a time.
          eos: whether the end-of-sequence token counts as a target; None: for an encoder-decoder it does, as
            in T5's targets; for a decoder-only model it does not, since a continuation need not end there.
        """
        check_batch_size(batch_size)
        vocabulary = self._vocabulary()
        sources, wanted = (
            check_texts("inputs", inputs, empty=True),
            check_texts("targets", targets, empty=True),
        )
        if len(sources) != len(wanted):
            raise ValueError(f"{len(sources)} inputs but {len(wanted)} targets: give as many of each")
        if eos is None:
            eos = self.encoder_decoder
        if eos and not self.ids.eos:
            raise ValueError("this model has no end-of-sequence token: call score with eos=False")
        ending = list(self.ids.eos[:1]) if eos else []
        pairs = []
        for i, (source, target) in enumerate(zip(sources, wanted, strict=True)):
            answer = vocabulary.encode(target, sentinels=self.encoder_decoder) + ending
            if not answer:
                raise ValueError(f"target {i} is empty: there is no token to score")
            pairs.append((self._prompt(source, i, "input", empty=True), np.asarray(answer, np.int32)))
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
        result = np.zeros(len(pairs))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            result[chosen] = self._score([pairs[i] for i in chosen])
        return result

    def embed(self, inputs: Any, mask: Any = None, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Embeddings, float32 `[batch, d_model]`: the mean of the encoder's outputs over the real tokens.

        The pooling of Sentence-T5's "encoder mean" (Ni et al. 2022). A decoder-only model has no encoder and
        does not
        embed: its last states foretell the next token, and their mean is no good measure of a text.

        Args:
          inputs: texts, or int `[batch, length]` of the encoder's inputs.
          mask: of a token array, 1 = real token.
          batch_size: rows at a time.

        Raises:
          ValueError: the model is decoder-only.
        """
        if not self.encoder_decoder:
            raise ValueError("this model is decoder-only and has no encoder: embed needs an encoder-decoder")
        check_batch_size(batch_size)
        if len(inputs) and isinstance(inputs[0], str):
            if mask is not None:
                raise ValueError("embed takes a mask with token arrays only, not with texts")
            rows = [self._prompt(text, i, "input") for i, text in enumerate(check_texts("inputs", inputs))]
        else:
            array, real = self._check("inputs", inputs, mask)
            rows = [row[keep != 0] for row, keep in zip(array, real, strict=True)]
        result = np.zeros((len(rows), self.config.d_model), np.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = bucket(max(len(rows[i]) for i in chosen))
            tokens, real = pad_rows([rows[i] for i in chosen], len(chosen), longest, self.ids.pad)
            batch = {"encoder_input_tokens": tokens, "encoder_segment_ids": real}
            result[chosen] = jax.device_get(self._run(programs.embed, batch))[: len(chosen)]
        return result

    # --------------------------------------------------------------------------------------------------- disk

    def save(self, path: PathLike, format: str = "huggingface") -> None:
        """Writes the model, its tokenizer included, as a directory that transformers and `load` read.

        Raises:
          ValueError: another format.
          UserError: the family has no Hugging Face form, or the folder cannot be written.
        """
        if format != "huggingface":
            raise ValueError(f"format is {format!r}: only 'huggingface' is known")
        storage.save_huggingface(storage.Stored(self.config, self.params, self.vocabulary, self.ids), path)

    # ------------------------------------------------------------------------------------------------ helpers

    def _vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            raise ValueError(
                f"the model {self.path} has no tokenizer, so it cannot read or write text: put one into its "
                "directory, or use logits and generate_tokens"
            )
        return self.vocabulary

    def _prompt(self, text: str, number: int, what: str = "prompt", empty: bool = False) -> np.ndarray:
        """Ids of an input text as the encoder or the decoder-only model reads it, int32 [length]."""
        ids = self._vocabulary().encode(text, sentinels=self.encoder_decoder)
        if self.encoder_decoder:
            ids = ids + list(self.ids.eos[:1])  # T5's inputs are closed
        elif self.ids.prefix is not None:
            ids = [self.ids.prefix, *ids]
        if not (text or empty) or not ids:
            raise ValueError(f"{what} {number} is empty: give a text of at least one token")
        return np.asarray(ids, np.int32)

    def _check(self, name: str, tokens: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        return check_tokens(name, tokens, mask, self.config.vocab_size, self.ids.pad)

    def _run(self, program: Any, batch: dict[str, np.ndarray]) -> Any:
        """Runs a program on a batch, padded to buckets: lengths always, rows where a mesh asks for it."""
        rows = next(iter(batch.values())).shape[0]
        ways = 1 if self.mesh is None else batch_bucket(rows, self.mesh)
        padded = {}
        for name, array in batch.items():
            extra = (max(rows, ways) - rows, bucket(array.shape[1]) - array.shape[1])
            padded[name] = np.pad(array, ((0, extra[0]), (0, extra[1])))
        with on_mesh(self.mesh, self.rules):
            return program(self.config, self.params, put(padded, self.mesh))

    def _decode(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int,
        temperature: Any,
        top_k: Any,
        top_p: Any,
        seed: Any,
        eos_id: int | Sequence[int] | None,
    ) -> np.ndarray:
        if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}: give a whole number of at least 1")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(
                    f"row {i} has no real token: give at least one, and a mask that is not all 0"
                )
            used = len(prompt) + (0 if self.encoder_decoder else int(max_new_tokens))
            if (limit := self.config.context_length) is not None and used > limit:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens"
                    + (
                        ""
                        if self.encoder_decoder
                        else f", with max_new_tokens {max_new_tokens} that is {used}"
                    )
                    + f", but the model was made for {limit} positions: shorten the prompt"
                    + ("" if self.encoder_decoder else " or lower max_new_tokens")
                )
        eos = (
            self.ids.eos
            if eos_id is None
            else (eos_id,)
            if isinstance(eos_id, int | np.integer)
            else tuple(eos_id)
        )
        request = decoding.Request(
            prompts=prompts,
            max_new_tokens=int(max_new_tokens),
            sampling=Sampling.of(len(prompts), temperature, top_k, top_p, seed),
            eos_ids=[int(token) for token in eos],
            pad_id=self.ids.pad,
            start_id=self.ids.start,
        )
        return decoding.decode(self.config, self.params, request, self.mesh, self.rules)

    def _score(self, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
        """Summed log-likelihoods float64 [pairs] of (prompt ids, target ids)."""
        n, pad = len(pairs), self.ids.pad
        if self.encoder_decoder:
            sources = [source for source, _ in pairs]
            starts = [np.r_[np.int32(self.ids.start), target[:-1]] for _, target in pairs]
            goals = [target for _, target in pairs]
        else:
            sources = []
            starts = [np.r_[source, target[:-1]] for source, target in pairs]
            goals = [np.r_[source[1:], target] for source, target in pairs]
        length = bucket(max(map(len, goals)))
        inputs, mask = pad_rows(starts, n, length, pad)
        batch = {
            "decoder_input_tokens": inputs,
            "decoder_target_tokens": pad_rows(goals, n, length, pad)[0],
            "decoder_segment_ids": mask,
        }
        if sources:
            width = bucket(max(map(len, sources)))
            tokens, mask = pad_rows(sources, n, width, pad)
            batch |= {"encoder_input_tokens": tokens, "encoder_segment_ids": mask}
        scores, _ = self.token_scores(batch)
        return np.asarray(
            [
                row[len(goal) - len(target) : len(goal)].astype(np.float64).sum()
                for row, goal, (_, target) in zip(scores, goals, pairs, strict=True)
            ]
        )


def load(path: PathLike, dtype: Any = None, mesh: Any = None) -> Model:
    """Loads a model for use.

    Args:
      path: a run folder (its newest whole checkpoint), a checkpoint folder inside one, or a Hugging Face
        directory (config.json and safetensors of T5 1.0/1.1 or LLaMA).
      dtype: "float32" or "bfloat16", of parameters and computation; None: as trained, and float32 for a
        Hugging Face directory.
      mesh: what to spread the model over: a MeshConfig takes this process's devices, a jax Mesh its own;
        None: one device.

    Raises:
      UserError: there is no model at the path, it is damaged, or its vocabulary does not fit it.
    """
    stored = storage.load(path, dtype, mesh)
    return Model(
        stored.config, stored.params, stored.vocabulary, stored.ids, mesh=stored.mesh, path=stored.path
    )
