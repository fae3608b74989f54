"""Conversations to tokens, and which of them are the assistant's.

The text that a chat template makes is tokenized as a whole, special tokens included: that is what models saw,
for tokens cross the borders between a template's text and a message's. So a message that spells out
`<|im_end|>` gives that very token, as it does in transformers. `tokenize(..., escape=True)` keeps texts
texts: only special tokens that the template itself wrote become such. What a message spells out is then
tokenized in two parts, its first character and the rest.

Which tokens are the assistant's: those that `{% generation %}` blocks hold, where the template has any. Else
by prefixes: the assistant's turn is what the text of the conversation up to it has more than the text of the
conversation before it with the prompt to answer; behind its last special token, spaces and line ends are not
counted, since nobody generates them. A template whose texts do not nest so (because it rewrites earlier
turns) is refused. A token belongs to the assistant if any of its characters does.
"""

from __future__ import annotations

import bisect
import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from t5style.corpus.document import valid
from t5style.corpus.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)
from t5style.infer.chat_template import ChatTemplate, Message, Span, as_template, collect, render, rendered
from t5style.run_dir import UserError

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_PRIVATE = range(0xF0000, 0xF0100)  # characters that no standard gives a meaning: free ones become marks


class Tokenized(NamedTuple):
    """A conversation as a model reads it: ids int32 [length], and bool [length], the assistant's tokens."""

    ids: np.ndarray
    assistant_mask: np.ndarray


def tokenize(
    vocabulary: Vocabulary,
    template: ChatTemplate | str,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    escape: bool = False,
    assistant_mask: bool = True,
    last_turn: bool = False,
    now: datetime.datetime | None = None,
    **variables: Any,
) -> Tokenized:
    """The tokens of a conversation; arguments as for `render`.

    Args:
      escape: no text that was given becomes a special token (see the module's text). Added tokens that are
        not special (`<think>`) count too if the template writes them, except in the assistant's own messages.
      assistant_mask: False: all False, and templates whose turns cannot be found are not refused.
      last_turn: only the last message's tokens are the assistant's; the others' turns are not looked for.

    Raises:
      UserError: as render; or the assistant's turns cannot be found.
    """
    template = as_template(template)
    given = collect(messages, tools, documents, add_generation_prompt, variables)
    now = now or datetime.datetime.now()  # the same for all that is rendered here
    marks = _free(template.source + json.dumps(given, ensure_ascii=False, default=str))
    if escape:
        given = _escaped(vocabulary, template, given, marks[2])
    wanted = assistant_mask and any(message["role"] == "assistant" for message in messages)
    tagged = _GENERATION.search(template.source) is not None
    text, spans = rendered(template, given, now=now, spans=wanted and tagged, marks=marks[:2])
    if wanted and not tagged:
        names = special_tokens(vocabulary)
        spans = _turns(template, given, text, now, names, len(messages) - 1 if last_turn else 0)
    spans = spans[-1:] if last_turn else spans
    ids, places = encode(vocabulary, text)
    keep = np.ones(len(ids), bool)
    if escape:
        keep = _outside(text, places, marks[2])
    mask = np.zeros(len(ids), bool)
    starts = [start for start, _ in spans]
    for token, (start, end) in enumerate(places):
        after = bisect.bisect_left(starts, end)  # spans that begin before the token ends
        mask[token] = after > 0 and end > start and spans[after - 1][1] > start
    return Tokenized(np.asarray(ids, np.int32)[keep], mask[keep])


def _turns(
    template: ChatTemplate,
    given: Mapping[str, Any],
    text: str,
    now: datetime.datetime,
    names: Iterable[str],
    first: int,
) -> list[Span]:
    """Where the assistant's turns, from message `first` on, stand in the text, by prefixes."""
    ends = tuple(names)
    spans = []
    messages = given["messages"]
    for number, message in enumerate(messages):
        if message["role"] != "assistant" or number < first:
            continue
        parts = []
        for count, prompt in ((number, True), (number + 1, False)):
            part = {**given, "messages": messages[:count], "add_generation_prompt": prompt}
            try:
                parts.append(rendered(template, part, now=now)[0])
            except UserError as error:
                raise UserError(
                    f"{template.name} does not tell which tokens are the assistant's: it has no "
                    f"{{% generation %}} block and cannot render the first {count} messages alone ({error})"
                ) from None
        before, whole = parts
        if not (whole.startswith(before) and text.startswith(whole)):
            raise UserError(
                f"{template.name} does not tell which tokens are the assistant's: it has no "
                f"{{% generation %}} block, and its text up to message {number} is not the beginning of its "
                "text of all; put {% generation %} and {% endgeneration %} around what it writes for the "
                "assistant"
            )
        closed = whole.rstrip()
        end = len(closed) if closed.endswith(ends) and len(closed) > len(before) else len(whole)
        spans.append((len(before), end))
    return spans


def stop_tokens(vocabulary: Vocabulary, template: ChatTemplate | str) -> tuple[int, ...]:
    """The special token with which the template closes an assistant's turn, if it does: it ends an answer,
    whatever the model's own end of sequence is.
    """
    said = "Yes."
    messages = [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": said}]
    text = render(template, messages)
    rest = text[text.rindex(said) + len(said) :].lstrip() if said in text else ""
    found = [name for name in special_tokens(vocabulary) if rest.startswith(name)]
    return (special_tokens(vocabulary)[max(found, key=len)],) if found else ()


def special_tokens(vocabulary: Vocabulary) -> dict[str, int]:
    """Special tokens by the text that stands for them in a rendered conversation."""
    if isinstance(vocabulary, TokenizerVocabulary):
        return {token["content"]: token["id"] for token in _added(vocabulary) if token.get("special")}
    names = {"<pad>": vocabulary.pad_id, "</s>": vocabulary.eos_id, "<unk>": vocabulary.unk_id}
    if isinstance(vocabulary, SentencePieceVocabulary):
        for token in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.unk_id, vocabulary.bos_id):
            names[vocabulary.piece(token)] = token
        names = {name: token for name, token in names.items() if vocabulary.piece(token) == name}
    return names


def encode(vocabulary: Vocabulary, text: str) -> tuple[list[int], list[Span]]:
    """Ids of a rendered conversation, special tokens read as such, and the characters of each."""
    text = valid(text)
    if isinstance(vocabulary, TokenizerVocabulary):
        encoded = _tokenizer(vocabulary).encode(text, add_special_tokens=False)
        return list(encoded.ids), list(encoded.offsets)
    names = special_tokens(vocabulary)
    ids: list[int] = []
    places: list[Span] = []
    at = 0
    pattern = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    for piece in re.split(f"({pattern})", text):
        if piece in names:
            ids.append(names[piece])
            places.append((at, at + len(piece)))
        elif piece:
            found, spans = _plain(vocabulary, piece)
            ids += found
            places += [(at + start, at + end) for start, end in spans]
        at += len(piece)
    return ids, places


@functools.lru_cache(maxsize=4)
def _added(vocabulary: TokenizerVocabulary) -> list[dict[str, Any]]:
    return json.loads(vocabulary.content).get("added_tokens") or []


@functools.lru_cache(maxsize=4)
def _tokenizer(vocabulary: TokenizerVocabulary) -> Any:
    """The vocabulary's tokenizer without our setting: special tokens in a text are special tokens."""
    import tokenizers  # there, since a TokenizerVocabulary is

    tokenizer = tokenizers.Tokenizer.from_buffer(vocabulary.content)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _plain(vocabulary: Vocabulary, text: str) -> tuple[list[int], list[Span]]:
    """Ids of a text without special tokens, and the characters of each."""
    ids = vocabulary.encode(text)
    if isinstance(vocabulary, CharacterVocabulary):
        return ids, [(i, i + 1) for i in range(len(ids))]
    if isinstance(vocabulary, ByteVocabulary):
        return ids, [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
    if isinstance(vocabulary, SentencePieceVocabulary):
        return ids, _places(vocabulary, text, ids)
    raise UserError(f"a {vocabulary.kind} vocabulary does not tell which characters a token stands for")


def _places(vocabulary: SentencePieceVocabulary, text: str, ids: Sequence[int]) -> list[Span]:
    """The characters of each of the ids of a text."""
    processor = _processor(vocabulary)

    def of(part: str, at: int) -> list[Span]:
        # The character in which each byte of the text lies, and the end.
        character = [i for i, c in enumerate(part, at) for _ in c.encode()] + [at + len(part)]
        found: list[Span] = []
        unplaced = 0  # bytes of a run, whose last one tells the characters that the run stands for
        for piece in processor.encode(part, return_type="proto").pieces:
            start, end = character[piece.begin], character[piece.end]
            if piece.id not in vocabulary.byte_ids:
                found.append((start, end))
                continue
            unplaced += 1
            if piece.surface:
                run = [(i, i + 1) for i in character[piece.begin : piece.end]]
                found += run if len(run) == unplaced else [(start, end)] * unplaced
                unplaced = 0
        return found

    # The vocabulary spells this character in bytes, where it has them, see SentencePieceVocabulary.
    parts = text.split("\u2581")
    places = of(parts[0], 0)
    at = len(parts[0])
    for part in parts[1:]:
        places += [(at, at + 1)] * 3 + of(part, at + 1)
        at += 1 + len(part)
    return places if len(places) == len(ids) else of(text, 0)


@functools.lru_cache(maxsize=4)
def _processor(vocabulary: SentencePieceVocabulary) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=vocabulary.content)


# --------------------------------------------------------------------------------------------------- escaping


def _free(text: str) -> str:
    """Three characters that are not in the text."""
    found = [mark for mark in map(chr, _PRIVATE) if mark not in text][:3]
    if len(found) < 3:
        raise UserError("the messages hold all private characters from U+F0000 on: remove them")
    return "".join(found)


def _escaped(
    vocabulary: Vocabulary, template: ChatTemplate, given: Mapping[str, Any], mark: str
) -> dict[str, Any]:
    """What was given, with the mark behind the first character of every special token that is spelled out."""
    special = set(special_tokens(vocabulary))
    written = set()
    if isinstance(vocabulary, TokenizerVocabulary):
        added = {token["content"] for token in _added(vocabulary)}
        written = {name for name in added if name in template.source and name.strip()} - special
    if short := [name for name in special | written if len(name) < 2]:
        raise UserError(f"the special token {short[0]!r} is one character, which cannot be escaped")

    def breaker(names: Iterable[str]) -> Callable[[Any], Any]:
        longest = sorted(names, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, longest)) or "(?!)")

        def walk(value: Any) -> Any:
            if isinstance(value, str):
                return pattern.sub(lambda match: match[0][0] + mark + match[0][1:], value)
            if isinstance(value, Mapping):
                return {walk(key): walk(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return [walk(item) for item in value]
            return value

        return walk

    everything, own = breaker(special | written), breaker(special)
    result = {name: everything(value) for name, value in given.items() if name != "messages"}
    result["messages"] = [
        (own if message["role"] == "assistant" else everything)(message) for message in given["messages"]
    ]
    return result


def _outside(text: str, places: Sequence[Span], mark: str) -> np.ndarray:
    """bool [tokens]: those that do not stand for marks."""
    keep = np.ones(len(places), bool)
    for token, (start, end) in enumerate(places):
        inside = text[start:end]
        if mark in inside:
            if inside.strip(mark):
                raise UserError(
                    f"the tokenizer joins {inside!r} into one token: it cannot read special tokens as text"
                )
            keep[token] = False
    return keep
