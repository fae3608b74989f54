"""The job Examples: files of chats, instructions, preferences or prompts to the tokens that a model reads."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import string
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from t5style import console
from t5style.data import conversations
from t5style.data.conversations import KINDS, Example, Rejected
from t5style.data.pair_rows import margin_tokens
from t5style.data.token_store import MANIFEST, TokenStoreWriter
from t5style.infer import chat_template, chat_tokens, storage
from t5style.infer.chat import located
from t5style.infer.chat_template import ChatTemplate
from t5style.run_dir import RunDir, UserError, atomic_write
from t5style.tune.prompts import RECORDS, write_lines

TEMPLATES = "chat_templates"  # beside the store's splits
TRAIN, VALIDATION = "train", "validation"
LEARNED = ("assistant", "completion")
NO_TOKENS = ("mask", "margin", "desirable")  # features that tell about the others

_REFUSALS = 20  # of the chat template, before anything was taken, after which no more are tried

Tokens = dict[str, np.ndarray]


class _Refused(Exception):
    """The chat template does not take a conversation, such as one whose roles do not alternate."""


@dataclasses.dataclass(frozen=True)
class Examples:
    """Files of examples → a token store for tuning, in the run's folder.

    Records are recognised by their shape (data.conversations): chats and instructions, preferences, single
    answers with a label, prompts. For a decoder-only model a chat is one sequence in the model's chat
    template with a mask of what is learnt (features tokens, mask); for an encoder-decoder each answer is an
    example (inputs, targets). A model without a template gets the texts alone. What cannot be used is
    counted, and kept in quarantine.jsonl with its file and line.

    Attributes:
      data: files, folders or patterns of JSON lines or Parquet.
      model: whose vocabulary and chat template to use: a run folder, a Hugging Face directory, a .gguf file,
        also `package:NAME/PATTERN`.
      kind: 'chat', 'pairs', 'unpaired' or 'prompts'; None for what the first record looks like.
      system: a message put before conversations that have none.
      learn: 'assistant': every turn of the assistant; 'completion': the last one.
      template: a Jinja chat template in place of the model's; '' for none.
      phrasings: texts in which a record's fields are put, {'prompt': 'Translate: {en}', 'completion':
        '{fr}'}; of several one is drawn for each record (FLAN, Wei et al. 2022). None: records as they are.
      validation: share of the records that becomes the split validation, drawn by their ids; at least one.
        All that comes of one record, or of one tree, is in one split.
      seed: of both draws.
      max_examples: stop after so many records; None: all.
    """

    data: Sequence[str] | str
    model: str
    kind: str | None = None
    system: str | None = None
    learn: str = "assistant"
    template: str | None = None
    phrasings: Sequence[Mapping[str, str]] | None = None
    validation: float = 0.05
    seed: int = 0
    max_examples: int | None = None

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("data is empty; give files of examples.")
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; it must be one of {', '.join(KINDS)}, or None.")
        if self.learn not in LEARNED:
            raise ValueError(f"learn is {self.learn!r}; it must be one of {', '.join(LEARNED)}.")
        if not 0 <= self.validation < 1:
            raise ValueError(f"validation is {self.validation}; it must lie in [0, 1).")
        if self.max_examples is not None and self.max_examples < 1:
            raise ValueError(f"max_examples is {self.max_examples}; it must be 1 or more, or None.")

    @property
    def paths(self) -> list[str]:
        """`data` as a list."""
        return [self.data] if isinstance(self.data, str) else list(self.data)

    def inputs(self) -> Sequence[str]:
        """Files whose content decides the store."""
        return [*self.paths, located(self.model)]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes the store; returns counts by split and reason.

        Raises:
          UserError: no file, no record of a known shape, or a template that cannot be used.
        """
        tokenizer = Tokenizer.of(located(self.model), self.template, self.learn)
        (epath.Path(run.path) / MANIFEST).unlink(missing_ok=True)
        kind, rejected = self.kind, list[Rejected]()
        counts: collections.Counter[str] = collections.Counter()
        sizes: collections.Counter[str] = collections.Counter()
        records: dict[str, list[Mapping[str, Any]]] = {TRAIN: [], VALIDATION: []}
        held: tuple[float, list[tuple[Example, list[Tokens]]]] | None = None
        writer: TokenStoreWriter | None = None
        refused = too_long = 0
        context = tokenizer.stored.config.context_length
        has_margin: bool | None = None  # as the first pair, all must say how much better the chosen answer is
        began = time.monotonic()

        def add(split: str, example: Example, made: list[Tokens]) -> None:
            nonlocal too_long
            assert writer is not None
            for tokens in made:
                writer.add(split, tokens)
                counts[split] += 1
                sizes[split] += sum(len(ids) for name, ids in tokens.items() if name not in NO_TOKENS)
                too_long += context is not None and tokenizer.places(tokens) > context
            if kind == "prompts":
                records[split].append(example.record)

        with console.progress("examples", self.max_examples, unit="records") as bar:
            for item in self._examples(kind):
                bar.advance(1)
                if isinstance(item, Rejected):
                    rejected.append(item)
                    continue
                example, kind, place = item
                try:
                    made = tokenizer.tokens(example, kind)
                except _Refused as refusal:
                    made = str(refusal)
                    refused += 1
                    if writer is None and refused == _REFUSALS:
                        raise self._nothing([*rejected, Rejected(*place, made)]) from None
                if has_margin is not None and has_margin != (example.margin is not None):
                    made = "a pair with a margin" if example.margin is not None else "a pair without a margin"
                if isinstance(made, str):
                    rejected.append(Rejected(*place, made))
                    continue
                if writer is None:
                    has_margin = example.margin is not None
                    writer = self._writer(run, tokenizer, kind, has_margin)
                chance = conversations.chance(example.group or example.id, self.seed)
                if chance < self.validation:
                    add(VALIDATION, example, made)
                elif held is not None and chance == held[0]:
                    held[1].append((example, made))
                elif held is None or chance < held[0]:  # the first that validation would also take
                    for one in held[1] if held is not None else ():
                        add(TRAIN, *one)
                    held = (chance, [(example, made)])
                else:
                    add(TRAIN, example, made)
            if writer is None:
                raise self._nothing(rejected)
            validates = counts[VALIDATION] > 0
            for one in held[1] if held is not None else ():
                add(VALIDATION if self.validation and not validates else TRAIN, *one)
            if not counts[TRAIN]:
                raise UserError(
                    f"all {counts[VALIDATION]:,} examples of {', '.join(self.paths)} went into the split "
                    f"validation (a share of {self.validation}, at least one record or tree), so that none "
                    "is left to learn from: give more records, or set validation = 0.0."
                )
        writer.__exit__(None, None, None)
        if kind == "prompts":
            for split, kept in records.items():
                if kept:
                    write_lines(epath.Path(run.path) / split / RECORDS, kept)
        reasons = self._set_aside(run, rejected)
        if tokenizer.template is not None:
            chat_template.save({chat_template.DEFAULT: tokenizer.template}, run.path / TEMPLATES)
        seconds = time.monotonic() - began
        rows = [[split, f"{counts[split]:,}", f"{sizes[split]:,}"] for split in counts]
        console.table(f"Examples ({kind}) {run.path}", ["split", "examples", "tokens"], rows)
        if reasons:
            few = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(5))
            console.say(f"    {len(rejected):,} records set aside in quarantine.jsonl: {few}")
        if too_long:
            console.say(
                f"    {too_long:,} examples are longer than the model's context of {context:,} tokens"
            )
        return {
            "kind": kind,
            "examples": dict(counts),
            "tokens": dict(sizes),
            "set_aside": dict(reasons),
            "longer_than_context": too_long,
            "tokens_per_second": round(sum(sizes.values()) / max(seconds, 1e-9)),
            "fingerprint": writer.manifest["fingerprint"],
        }

    def _writer(self, run: RunDir, tokenizer: Tokenizer, kind: str, has_margin: bool) -> TokenStoreWriter:
        description = {"kind": kind, "whole": tokenizer.is_decoder_only}
        features = (*tokenizer.features(kind), *(("margin",) if has_margin else ()))
        writer = TokenStoreWriter(os.fspath(run.path), features, tokenizer.vocabulary, description)
        writer.__enter__()
        for split in (TRAIN, *((VALIDATION,) if self.validation else ())):
            writer.add_split(split)
        return writer

    def _examples(self, kind: str | None) -> Iterator[Rejected | tuple[Example, str, tuple[str, int]]]:
        """What each record says, as what and where it stands (a tree's answer: its id); or why nothing."""
        rows: list[Mapping[str, Any]] = []
        read = 0
        for file, line, record in conversations.records(self.paths):
            if self.max_examples is not None and read == self.max_examples:
                break
            read += 1
            name = f"{os.path.basename(file)}:{line}"
            found = self._phrased(record, name) if isinstance(record, Mapping) else record
            if isinstance(found, str):
                yield Rejected(file, line, found)
                continue
            kind = kind or conversations.kind_of(found)
            if kind is None:
                reason = f"of no known shape (keys: {', '.join(sorted(found))[:200]})"
                yield Rejected(file, line, reason)
            elif "message_id" in found and kind == "chat":
                if problem := conversations.row_of_tree(found):
                    yield Rejected(file, line, problem)
                else:
                    rows.append(found)  # a tree's messages come in any order
            elif isinstance(made := conversations.example(found, kind, name), str):
                yield Rejected(file, line, made)
            else:
                for example in made:
                    yield self._with_system(example), kind, (file, line)
        for answer in conversations.tree(rows):
            if isinstance(answer, Rejected):
                yield answer
            else:
                yield self._with_system(answer), "chat", (answer.id, 0)

    def _with_system(self, example: Example) -> Example:
        if self.system is None or example.messages[0]["role"] == "system":
            return example
        messages = ({"role": "system", "content": self.system}, *example.messages)
        return dataclasses.replace(example, messages=messages)

    def _phrased(self, record: Mapping[str, Any], name: str) -> Mapping[str, Any] | str:
        """The record in one of the phrasings."""
        if not self.phrasings:
            return record
        id = str(record.get("id") or name)
        drawn = int(conversations.chance(f"phrasing {id}", self.seed) * len(self.phrasings))
        record = {key: value for key, value in record.items() if value is not None}  # null is a missing field
        try:
            texts = {
                field: string.Formatter().vformat(text, (), record)
                for field, text in self.phrasings[drawn].items()
            }
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            return f"no {error.args[0]} for phrasing {drawn}"
        # What the phrasing has put into words is not read a second time.
        said = {*conversations.PROMPTS, "input", "context", "messages", "conversations", "instances"}
        if any(field in texts for field in conversations.COMPLETIONS):
            said |= {*conversations.COMPLETIONS}
        rest = {key: value for key, value in record.items() if key not in said}
        return {**rest, **texts, "id": id}

    def _nothing(self, rejected: Sequence[Rejected]) -> UserError:
        why = collections.Counter(item.reason for item in rejected).most_common(3)
        told = "; ".join(f"{count:,} {reason}" for reason, count in why) or "the files are empty"
        return UserError(
            f"no example to learn from in {', '.join(self.paths)} ({told}). Known are messages, prompt and "
            "completion, instruction and output, chosen and rejected, and what else "
            "t5style/data/conversations.py says; phrasings put other fields into words."
        )

    def _set_aside(self, run: RunDir, rejected: Sequence[Rejected]) -> collections.Counter[str]:
        if rejected:
            lines = [json.dumps(dataclasses.asdict(item), ensure_ascii=False) + "\n" for item in rejected]
            atomic_write(run.path / "quarantine.jsonl", "".join(lines))
        return collections.Counter(item.reason for item in rejected)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Examples as a model reads them.

    Attributes:
      stored: the model, without its parameters.
      template: its chat template; None for none.
      learn: see Examples.
    """

    stored: storage.Stored
    template: ChatTemplate | None
    learn: str = "assistant"

    @classmethod
    def of(cls, place: str, template: str | None, learn: str) -> Tokenizer:
        """Of a model's path. Raises UserError where it has no vocabulary."""
        stored = storage.describe(place)
        if stored.vocabulary is None:
            raise UserError(f"the model {place} has no tokenizer: put one into its directory")
        if template is None:
            return cls(stored, chat_template.choose(chat_template.of(place)), learn)
        return cls(stored, chat_template.as_template(template) if template else None, learn)

    @property
    def vocabulary(self) -> Any:
        """The model's."""
        return self.stored.vocabulary

    @property
    def is_decoder_only(self) -> bool:
        """Whether prompt and answer are one sequence."""
        return not self.stored.encoder_decoder

    def features(self, kind: str) -> tuple[str, ...]:
        """Of the store."""
        if kind == "chat":
            return ("tokens", "mask") if self.is_decoder_only else ("inputs", "targets")
        return {
            "pairs": ("prompt", "chosen", "rejected"),
            "unpaired": ("prompt", "completion", "desirable"),
            "prompts": ("prompt",),
        }[kind]

    def places(self, tokens: Tokens) -> int:
        """The longest sequence that the model sees of an example."""
        lengths = {name: len(ids) for name, ids in tokens.items() if name not in NO_TOKENS}
        prompt = lengths.pop("prompt", 0)
        longest = max(lengths.values(), default=0)
        return prompt + longest if self.is_decoder_only else max(prompt, longest)

    def tokens(self, example: Example, kind: str) -> list[Tokens] | str:
        """What the store gets for an example; or why it gets nothing."""
        if kind == "chat":
            return self._chat(example)
        prompt = self._prompt(example.messages)
        if kind == "prompts":
            return [{"prompt": prompt}]
        answers = [self._answer(example.messages, text, prompt) for text in example.answers]
        if any(isinstance(answer, str) for answer in answers):
            return next(answer for answer in answers if isinstance(answer, str))
        if kind == "unpaired":
            desirable = np.array([int(example.desirable)], np.int32)
            return [{"prompt": prompt, "completion": answers[0], "desirable": desirable}]  # type: ignore[dict-item]
        if np.array_equal(answers[0], answers[1]):
            return "chosen and rejected are the same tokens"
        pair = {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}
        if example.margin is not None:
            pair["margin"] = margin_tokens(example.margin)
        return [pair]  # type: ignore[list-item]

    def _chat(self, example: Example) -> list[Tokens] | str:
        turns = [i for i, message in enumerate(example.messages) if message["role"] == "assistant" and i]
        if not turns:
            return "no answer of the assistant after a prompt"
        turns = turns[-1:] if self.learn == "completion" else turns
        if self.is_decoder_only and self.template is not None:
            last = self.learn == "completion"
            found = self._in_template(example.messages[: turns[-1] + 1], last_turn=last)
            mask = found.assistant_mask.astype(np.int32)
            if not mask.any():
                raise UserError(
                    f"{self.template.name} leaves the assistant's turns out: example {example.id} has "
                    "nothing to learn. Give another template, or '' for none."
                )
            end = int(np.flatnonzero(mask)[-1]) + 1  # what follows the last answer nobody generates
            return [{"tokens": found.ids[:end], "mask": mask[:end]}]
        made: list[Tokens] = []
        for turn in turns:
            prompt = self._prompt(example.messages[:turn])
            answer = self._answer(example.messages[:turn], example.messages[turn]["content"], prompt)
            if isinstance(answer, str):
                return answer
            if not self.is_decoder_only:
                made.append({"inputs": prompt, "targets": answer})
                continue
            mask = np.r_[np.zeros(len(prompt), np.int32), np.ones(len(answer), np.int32)]
            made.append({"tokens": np.concatenate([prompt, answer]), "mask": mask})
        return made

    def _in_template(self, messages: Sequence[Mapping[str, Any]], **given: Any) -> chat_tokens.Tokenized:
        assert self.template is not None
        try:
            return chat_tokens.tokenize(self.vocabulary, self.template, messages, **given)
        except UserError as error:
            raise _Refused(str(error)) from None

    def _prompt(self, messages: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """The conversation so far as it enters the model before an answer, int32 [length]."""
        vocabulary = self.vocabulary
        if self.template is not None and self.is_decoder_only:
            found = self._in_template(messages, add_generation_prompt=True, assistant_mask=False)
            return np.asarray(found.ids, np.int32)
        if self.template is not None:
            try:
                text = chat_template.render(self.template, messages, add_generation_prompt=True)
            except UserError as error:
                raise _Refused(str(error)) from None
        elif len(messages) == 1:
            text = messages[0]["content"]
        else:
            text = "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        ids = vocabulary.encode(text)
        if self.is_decoder_only:
            prefix = self.stored.ids.prefix if self.stored.ids is not None else vocabulary.bos_id
            return np.asarray(ids if prefix is None else [prefix, *ids], np.int32)
        return np.asarray([*ids, vocabulary.eos_id], np.int32)

    def _answer(
        self, messages: Sequence[Mapping[str, Any]], text: str, prompt: np.ndarray
    ) -> np.ndarray | str:
        """An answer's tokens with what ends it, int32 [length]; or why there are none."""
        if self.template is None or not self.is_decoder_only:
            return np.asarray([*self.vocabulary.encode(text), self.vocabulary.eos_id], np.int32)
        whole = [*messages, {"role": "assistant", "content": text}]
        found = self._in_template(whole, last_turn=True)
        learned = np.flatnonzero(found.assistant_mask)
        if not len(learned):
            raise UserError(f"{self.template.name} leaves the assistant's turn out: give another template.")
        if not np.array_equal(found.ids[: learned[0]], prompt):
            return "the template writes the prompt otherwise when an answer follows"
        return np.asarray(found.ids[learned[0] : learned[-1] + 1], np.int32)
