"""The public API: `m = t5style.load(path)`, then logits, score, generate, embed and save.

Notebooks, evaluation, serving and other programs use only what is public here. Token arrays are int `[batch,
length]` and masks the same shape, 1 = real token; padding may stand on the left or on the right.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Unpack

import jax
import numpy as np
from jax.sharding import Mesh

from t5style.corpus.vocabulary import Vocabulary
from t5style.infer import adapters, beams, requests, scoring, speculative, storage, virtual
from t5style.infer.adapters import Adapted, AdaptedEngine
from t5style.infer.answers import Completion, Stream, answer_all, completion
from t5style.infer.batch import (
    batch_bucket,
    bucket,
    check_batch_size,
    check_texts,
    check_tokens,
    on_mesh,
    put,
)
from t5style.infer.decoding import Answer
from t5style.infer.embedding import Embedding
from t5style.infer.engine import Engine
from t5style.infer.ids import TokenIds, token_ids
from t5style.infer.settings import Fields, Settings
from t5style.models.adapters_merge import merge_adapters
from t5style.models.adapters_virtual import counts
from t5style.models.config import TransformerConfig
from t5style.models.quantize import quantize as quantized
from t5style.parallel.rules import Rules
from t5style.run_dir import PathLike, UserError

BATCH_SIZE = 16


class Model(Adapted):
    """A model ready for use; made by `load`.

    Attributes:
      config: what it is (`config.architecture`: "encoder_decoder", "decoder_only" or "encoder_only").
      params: nested dicts of arrays.
      vocabulary: None when the directory has no tokenizer; text methods then raise ValueError.
      ids: token ids with a meaning to decoding.
      mesh: the devices it is spread over; None for one device.
      path: where it was loaded from.
      cache_dtype: of the keys and values that decoding keeps; None: as the model computes.
      family: the model_type of the Hugging Face directory it comes from, in which it is saved; None: the
        first that fits.
      embedding: how `embed` pools; by default the mean.
      base: the parameters without an adapter.
      adapters: those that `add_adapter` has added to the base, by name, and as "default" the one that the
        model was loaded with, which then is in `params`.
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
        cache_dtype: str | None = None,
        family: str | None = None,
        embedding: Embedding | None = None,
        base: Any = None,
        held: dict[str, storage.Held] | None = None,
    ) -> None:
        if vocabulary is not None and vocabulary.vocab_size > config.vocab_size:
            raise UserError(
                f"the vocabulary has {vocabulary.vocab_size} ids but the model {path or config.architecture} "
                f"only {config.vocab_size} embeddings: use the vocabulary it was trained with"
            )
        if ids is None:
            ids = TokenIds() if vocabulary is None else token_ids(vocabulary)
        self.config, self.params, self.vocabulary, self.ids = config, params, vocabulary, ids
        self.mesh, self.rules, self.path, self.cache_dtype = mesh, rules, path, cache_dtype
        self.family, self.embedding = family, embedding or Embedding()
        self.base, self.adapters = params if base is None else base, held if held is not None else {}
        self._views: dict[str, Model] = {}
        self._engine: Engine | None = None

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
        return scoring.logits(self, tokens, mask, encoder_tokens, encoder_mask)

    def token_scores(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """How well the model foretells a batch's targets.

        Args:
          batch: int32 arrays under data.pipeline's names: decoder_input_tokens, decoder_target_tokens, and
            what there is of *_segment_ids, *_positions, encoder_input_tokens. Packed rows are fine.

        Returns:
          log-likelihood of each target token, in nats, float32 `[batch, length]`; and whether it is the most
          probable one, bool of the same shape. What stands at padding is unspecified.
        """
        return scoring.token_scores(self, batch)

    def generate_tokens(
        self,
        tokens: Any,
        mask: Any = None,
        max_new_tokens: int | Sequence[int] | None = None,
        settings: Settings | Sequence[Settings] | None = None,
        adapter: str | Sequence[str] | None = None,
        **fields: Unpack[Fields],
    ) -> np.ndarray:
        """New tokens, int32 `[answers, max_new_tokens]`: each row up to and with the token that ended it,
        then padding.

        Args:
          tokens: int `[batch, length]`: the encoder's inputs of an encoder-decoder, else prompts as they
            enter it.
          mask: 1 = real token, padding on either side; None: all real.
          max_new_tokens: at least 1; None: the settings' (128).
          settings: how to answer, one for all rows or one for each; None: greedily (see Settings).
          adapter: the name of the adapter that answers, or one for each row, "base" for none; None: the
            model as it is. Rows of one adapter are decoded together.
          **fields: fields of Settings that shall be different: `temperature=0.7`; numbers may be lists, one
            for each row. A single seed s gives row i the seed s + i.

        Raises:
          ValueError: a value outside its limits; a row without a real token; more positions than the model
            was made for.
        """
        array, real = self.check("tokens", tokens, mask)
        prompts = [row[keep != 0] for row, keep in zip(array, real, strict=True)]
        rows = requests.settings(self, prompts, max_new_tokens, settings, fields)
        answers = self._answers(prompts, rows, sum(row.n for row in rows), adapter)
        out = np.full((len(answers), max(row.max_new_tokens for row in rows)), self.ids.pad, np.int32)
        for row, (answer, _) in zip(out, answers, strict=True):
            new = answer.tokens + ([] if answer.end is None else [answer.end])
            row[: len(new)] = new
        return out

    # -------------------------------------------------------------------------------------------------- texts

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | Sequence[int] | None = None,
        settings: Settings | Sequence[Settings] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        adapter: str | Sequence[str] | None = None,
        **fields: Unpack[Fields],
    ) -> list[str]:
        """Answers to prompts, as text, n for each; see `generate_tokens` for the settings, and `complete`
        for more than the text.
        """
        answers = self.complete(
            prompts, max_new_tokens, settings, batch_size=batch_size, adapter=adapter, **fields
        )
        return [answer.text for answer in answers]

    def complete(
        self,
        prompts: Sequence[str],
        max_new_tokens: int | Sequence[int] | None = None,
        settings: Settings | Sequence[Settings] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        adapter: str | Sequence[str] | None = None,
        **fields: Unpack[Fields],
    ) -> list[Completion]:
        """As generate, with token ids, why the answer ended, and log-probabilities where they are asked for.

        The n answers to a prompt follow each other. `<extra_id_k>` in an encoder's prompt is sentinel k.
        """
        vocabulary = self.text_vocabulary()
        rows = [self.prompt_ids(text, i) for i, text in enumerate(check_texts("prompts", prompts))]
        asked = requests.settings(self, rows, max_new_tokens, settings, fields)
        answers = self._answers(rows, asked, batch_size, adapter)
        return [
            completion(answer, vocabulary.decode(answer.tokens) if text is None else text)
            for answer, text in answers
        ]

    def complete_tokens(
        self,
        prompts: Sequence[np.ndarray],
        max_new_tokens: int | Sequence[int] | None = None,
        settings: Settings | Sequence[Settings] | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        adapter: str | Sequence[str] | None = None,
        **fields: Unpack[Fields],
    ) -> list[list[int]]:
        """New tokens, without end-of-sequence and padding, for prompts of any lengths: int arrays [length].

        Prompts of similar length are decoded together, `batch_size` at a time; settings as for
        generate_tokens.
        """
        rows = requests.settings(self, prompts, max_new_tokens, settings, fields)
        return [answer.tokens for answer, _ in self._answers(prompts, rows, batch_size, adapter)]

    def stream(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        max_new_tokens: int | None = None,
        settings: Settings | None = None,
        **fields: Unpack[Fields],
    ) -> Stream:
        """The answer to one prompt, a piece of text at a time: `for piece in m.stream("Once"): ...`.

        Args:
          prompt: a text, or token ids as they enter the model.
          max_new_tokens, settings, **fields: as for generate_tokens; n must be 1.

        Returns:
          an iterator of texts, whose `completion` is the whole answer when they have ended.
        """
        vocabulary = self.text_vocabulary()
        ids = self._ids(prompt, 0)
        (row,) = requests.settings(self, [ids], max_new_tokens, settings, fields)
        if row.n != 1:
            raise ValueError(f"n is {row.n}: a stream is one answer, call complete for several")
        return Stream(self.engine, ids, row, vocabulary)

    def beam_search(
        self,
        prompts: Sequence[str | Sequence[int] | np.ndarray],
        num_beams: int = 4,
        length_penalty: float = 1.0,
        n: int = 1,
        max_new_tokens: int = 128,
        early_stopping: bool | str = False,
        stop_tokens: Sequence[int] | None = None,
    ) -> list[Completion]:
        """The n best answers that beam search finds for each prompt, a text or token ids; see beams.Beams."""
        how = beams.Beams(num_beams, length_penalty, n, max_new_tokens, early_stopping, stop_tokens)
        rows = [self._ids(prompt, i) for i, prompt in enumerate(prompts)]
        requests.settings(self, rows, max_new_tokens, None, {"stop_tokens": stop_tokens})
        return beams.completions(beams.search(self.engine, rows, how), self.vocabulary)

    def generate_speculative(
        self,
        prompt: str | Sequence[int] | np.ndarray,
        draft: Model | None = None,
        max_new_tokens: int | None = None,
        settings: Settings | None = None,
        *,
        guesses: int | None = None,
        ngram: int = 3,
        **fields: Unpack[Fields],
    ) -> speculative.Speculated:
        """The answer of `complete` to a text or ids, made of guesses; see speculative.speculate."""
        ids = self._ids(prompt, 0)
        (row,) = requests.settings(self, [ids], max_new_tokens, settings, fields)
        if draft is not None:
            requests.check_length(draft, 0, len(ids), row.max_new_tokens)
        other = None if draft is None else draft.engine
        return speculative.speculate(self.engine, ids, row, self.vocabulary, other, guesses, ngram)

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
        return scoring.score(self, inputs, targets, batch_size, eos)

    def embed(self, inputs: Any, mask: Any = None, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Embeddings, float32 `[batch, d_model]`, of the encoder's outputs for the real tokens.

        Pooled as `embedding` says: by default their mean, as Sentence-T5's (Ni et al. 2022); a directory of
        sentence-transformers says it itself. A decoder-only model does not embed: its last states foretell
        the next token, and their mean is no good measure of a text.

        Args:
          inputs: texts, or int `[batch, length]` of the encoder's inputs.
          mask: of a token array, 1 = real token.
          batch_size: rows at a time.

        Raises:
          ValueError: the model is decoder-only, or an input is longer than it reads.
        """
        return scoring.embed(self, inputs, mask, batch_size)

    def classify(self, inputs: Any, mask: Any = None, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """A classifier's logits, float32 `[batch, classes]`; arguments as embed's.

        Raises:
          ValueError: the model is no classifier of texts, or an input is longer than it reads.
        """
        return scoring.classify(self, inputs, mask, batch_size)

    # --------------------------------------------------------------------------------------------------- disk

    def save(self, path: PathLike, format: str = "huggingface") -> None:
        """Writes the model, its tokenizer included, as a directory that transformers and `load` read.

        Raises:
          ValueError: another format, or the model is quantised.
          UserError: the family has no Hugging Face form, or the folder cannot be written.
        """
        if format != "huggingface":
            raise ValueError(f"format is {format!r}: only 'huggingface' is known")
        if any(leaf.dtype == np.int8 for leaf in jax.tree.leaves(self.params)):
            raise ValueError("this model was quantised when it was loaded: save one that was not")
        how = None if self.embedding == Embedding() else self.embedding
        stored = storage.Stored(
            self.config, self.params, self.vocabulary, self.ids, family=self.family, embedding=how
        )
        storage.save_huggingface(stored, path)

    # ------------------------------------------------------------------------------------------------ helpers

    def text_vocabulary(self) -> Vocabulary:
        if self.vocabulary is None:
            raise ValueError(
                f"the model {self.path} has no tokenizer, so it cannot read or write text: put one into its "
                "directory, or use logits and generate_tokens"
            )
        return self.vocabulary

    def prompt_ids(self, text: str, number: int, what: str = "prompt", empty: bool = False) -> np.ndarray:
        """Ids of an input text as the encoder or the decoder-only model reads it, int32 [length]."""
        ids = self.text_vocabulary().encode(text, sentinels=self.encoder_decoder)
        if not self.encoder_decoder and self.ids.prefix is not None:
            ids = [self.ids.prefix, *ids]
        if self.config.encoder_layers:
            ids = ids + list(self.ids.eos[:1])  # T5's inputs are closed, and BERT's
        if not (text or empty) or not ids:
            raise ValueError(f"{what} {number} is empty: give a text of at least one token")
        return np.asarray(ids, np.int32)

    def _ids(self, prompt: str | Sequence[int] | np.ndarray, number: int) -> np.ndarray:
        """A prompt as it enters the model: a text's ids, or those that are given, checked."""
        if isinstance(prompt, str):
            return self.prompt_ids(prompt, number)
        return self.check("prompt", np.asarray(prompt)[None], None)[0][0]

    def check(self, name: str, tokens: Any, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        return check_tokens(name, tokens, mask, self.config.vocab_size, self.ids.pad)

    def run(self, program: Any, batch: dict[str, np.ndarray]) -> Any:
        """Runs a program on a batch, padded to buckets: lengths always, rows where a mesh asks for it. An
        adapter's virtual tokens are put in, and what the program gives for them is left out.
        """
        batch, places = virtual.insert(self.config, batch, counts(self.config, self.params))
        rows = next(iter(batch.values())).shape[0]
        ways = 1 if self.mesh is None else batch_bucket(rows, self.mesh)
        padded = {}
        for name, array in batch.items():
            extra = (max(rows, ways) - rows, bucket(array.shape[1]) - array.shape[1])
            padded[name] = np.pad(array, ((0, extra[0]), (0, extra[1])))
        with on_mesh(self.mesh, self.rules):
            result = program(self.config, self.params, put(padded, self.mesh))
        if places is None:
            return result
        row = np.arange(rows)[:, None]
        return jax.tree.map(lambda leaf: leaf[row, places], result)  # [rows, length, ...]

    @property
    def engine(self) -> Engine:
        """What decodes; made when it is first asked for."""
        if self._engine is None or self._engine.params is not self.params:
            given = (self.config, self.params, self.ids, self.mesh, self.rules, self.cache_dtype)
            if self.adapters and self.params is not self.base:
                self._engine = AdaptedEngine(*given, base=self.with_adapter(adapters.BASE).engine)
            else:
                self._engine = Engine(*given)
        return self._engine

    def _answers(
        self,
        prompts: Sequence[np.ndarray],
        settings: Sequence[Settings],
        batch_size: int,
        adapter: str | Sequence[str] | None = None,
    ) -> list[tuple[Answer, str | None]]:
        """Answers in the order of the prompts, and their texts where they have stop texts."""
        check_batch_size(batch_size)
        found = []
        for name, rows in adapters.rows_by_adapter(adapter, len(prompts), self.adapters).items():
            engine = self.engine if name is None else self.with_adapter(name).engine
            asked = [prompts[i] for i in rows], [settings[i] for i in rows]
            for batch in answer_all(engine, *asked, self.vocabulary, batch_size):
                for answer, text in batch:
                    answer.request = rows[answer.request]
                    found.append((answer, text))
        return sorted(found, key=lambda pair: (pair[0].request, pair[0].sample))


def load(
    path: PathLike,
    dtype: Any = None,
    mesh: Any = None,
    cache_dtype: str | None = None,
    quantize: str | None = None,
    adapter: PathLike | None = None,
    merge: bool = False,
) -> Model:
    """Loads a model for use.

    Args:
      path: a run folder (its newest whole checkpoint), a checkpoint folder inside one, a Hugging Face
        directory (config.json and safetensors of a family in models/families), a .gguf file, or a T5X
        checkpoint of T5. Where an adapter was trained, its base is loaded with it.
      dtype: "float32" or "bfloat16", of parameters and computation; None: as trained, and float32 for a
        Hugging Face directory.
      mesh: what to spread the model over: a MeshConfig takes this process's devices, a jax Mesh its own;
        None: one device.
      cache_dtype: of the keys and values that decoding keeps, "int8" for example; None: as the model
        computes.
      quantize: "int8" rounds weights, and activations before products with them, to eight bits: a smaller
        and faster model that answers a little differently. None: not.
      adapter: one for the model at the path, see `Model.add_adapter`; its name is "default".
      merge: put the adapter into the weights, see `Model.merge`.

    Raises:
      ValueError: a value that is not among these.
      UserError: there is no model at the path, it is damaged, or its vocabulary or the adapter does not fit
        it.
    """
    if quantize not in (None, "int8"):
        raise ValueError(f"quantize is {quantize!r}: only 'int8' is known, or None")
    stored = storage.load(path, dtype, mesh)
    base, held = stored.params, {}
    if stored.held is not None and adapter is not None:
        raise UserError(
            f"{path} has an adapter of its own, {stored.held.path}: give the base and the adapter, or add it "
            "with add_adapter"
        )
    if stored.held is not None:
        base, held = stored.base, {adapters.LOADED: stored.held}
    if adapter is not None:
        held[adapters.LOADED] = storage.load_adapter(adapter, stored, base, stored.path)
    if merge and held:
        one = held.pop(adapters.LOADED)
        base = merge_adapters(stored.config, one.adapter.apply(stored.config, base, one.own))
    if quantize:
        base = jax.jit(functools.partial(quantized, stored.config), donate_argnums=0)(base)
    params = base
    if held:
        one = held[adapters.LOADED]
        params = one.adapter.apply(stored.config, base, one.own)
    return Model(
        *(stored.config, params, stored.vocabulary, stored.ids, stored.mesh),
        path=stored.path,
        cache_dtype=cache_dtype,
        family=stored.family,
        embedding=stored.embedding,
        base=base,
        held=held,
    )
