"""Constrained output: answers that are JSON of a schema, match a regular expression or a grammar, or are one
of some texts; by the library llguidance (extra: `t5style[grammar]`).

    m.complete(["Name a city."], constraint=grammar.constraint(m, json_schema={"type": "string"}))

At every step the model may only choose tokens with which its answer can still become what is asked for; the
end of sequence where it is complete. Special tokens are never among them. An answer that max_new_tokens cuts
off (its finish_reason is "length") is a beginning of something valid. JSON is written as Python's json.dumps
writes it, ", " and ": " between its parts and no other spaces: a model could put them in without end.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5style.corpus.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
    Vocabulary,
)
from t5style.infer.model import Model
from t5style.infer.settings import Allowed
from t5style.run_dir import UserError

_JSON = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


@dataclasses.dataclass(frozen=True)
class GrammarConstraint:
    """What `Settings.constraint` takes; made by `constraint`, for one model and one grammar."""

    grammar: str  # as llguidance writes grammars
    vocabulary: Vocabulary
    vocab_size: int
    eos: tuple[int, ...]

    def __call__(self) -> Allowed:
        """A state for one answer that begins."""
        return _State(self).allowed


def constraint(
    model: Model,
    *,
    json_schema: Mapping[str, Any] | str | None = None,
    regex: str | None = None,
    lark: str | None = None,
    choices: Sequence[str] | None = None,
    eos: Sequence[int] | None = None,
) -> GrammarConstraint:
    """The constraint that holds a model's answers to one of four kinds of form.

    Args:
      model: for its vocabulary and its end of sequence.
      json_schema: a JSON schema, as Python values or as JSON text; `{}` is any JSON. A keyword that cannot be
        kept is refused, not ignored.
      regex: a regular expression (of Rust's kind) that the whole answer matches.
      lark: a context-free grammar in Lark's form, with the rule `start`.
      choices: texts, one of which the answer is.
      eos: tokens that end an answer; None: the model's own. Give what `stop_tokens` of the request says.

    Raises:
      UserError: not one of the four, or it is malformed; the model has no vocabulary or no end of sequence;
        llguidance is not installed.
    """
    library = _library()
    given = {"json_schema": json_schema, "regex": regex, "lark": lark, "choices": choices}
    names = [name for name, value in given.items() if value is not None]
    if len(names) != 1:
        raise UserError(f"give one of {', '.join(given)}, not {' and '.join(names) or 'none'}")
    matcher = library.LLMatcher
    if json_schema is not None:
        grammar = matcher.grammar_from_json_schema(_schema(json_schema), overrides=_JSON)
    elif choices is not None:
        if isinstance(choices, str) or not choices or not all(isinstance(c, str) and c for c in choices):
            raise UserError(f"choices are {choices!r}: give a list of texts that are not empty")
        grammar = matcher.grammar_from_regex("|".join(map(_literal, choices)))
    elif regex is not None:
        grammar = matcher.grammar_from_regex(regex)
    else:
        grammar = matcher.grammar_from_lark(lark)
    made = GrammarConstraint(
        grammar,
        model.text_vocabulary(),
        model.config.vocab_size,
        tuple(model.ids.eos if eos is None else eos),
    )
    if not made.eos:
        raise UserError("this model has no end of sequence, so a constrained answer could not end: give eos")
    if problem := matcher.validate_grammar(grammar, _tokenizer(made.vocabulary, made.eos)):
        raise UserError(f"{names[0]} {_short(given[names[0]])}: {_sentence(problem)}")
    return made


class _State:
    """One answer on its way through a grammar."""

    def __init__(self, of: GrammarConstraint) -> None:
        self._of = of
        self._matcher = _library().LLMatcher(_tokenizer(of.vocabulary, of.eos), of.grammar, log_level=0)
        self._seen = 0

    def allowed(self, tokens: Sequence[int]) -> np.ndarray:
        """bool [vocab_size]: what may come after the tokens of the answer so far."""
        fresh = [int(token) for token in tokens[self._seen :]]
        if fresh:
            self._matcher.consume_tokens(fresh)
            self._seen = len(tokens)
        mask = np.zeros(self._of.vocab_size, bool)
        if not self._matcher.is_stopped():
            bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
            found = np.unpackbits(bits, count=min(8 * len(bits), len(mask)), bitorder="little")
            mask[: len(found)] = found
        if self._matcher.is_error():
            raise UserError(f"the grammar cannot go on: {_sentence(self._matcher.get_error())}")
        if self._matcher.is_accepting():  # also where nothing more can come
            mask[list(self._of.eos)] = True
        return mask


def token_bytes(vocabulary: Vocabulary) -> list[bytes | None]:
    """What each id of [0, vocab_size) adds to a text, in bytes; None for ids that are no text."""
    size = vocabulary.vocab_size
    result: list[bytes | None]
    if isinstance(vocabulary, ByteVocabulary):
        result = [None] * 3 + [bytes((byte,)) for byte in range(256)]
    elif isinstance(vocabulary, CharacterVocabulary):
        result = [None] * 3 + [character.encode() for character in vocabulary.characters]
    elif isinstance(vocabulary, SentencePieceVocabulary):
        result = _pieces(vocabulary)
    elif isinstance(vocabulary, TokenizerVocabulary):
        result = _tokens(vocabulary)
    else:
        raise UserError(f"a {vocabulary.kind} vocabulary does not tell the bytes of its tokens")
    result += [None] * (size - len(result))  # sentinels
    for token in (vocabulary.pad_id, vocabulary.eos_id, vocabulary.bos_id):
        result[token] = None
    return result


def _pieces(vocabulary: SentencePieceVocabulary) -> list[bytes | None]:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(model_proto=vocabulary.content)

    def of(token: int) -> bytes | None:
        piece = vocabulary.piece(token)
        if sp.is_byte(token):
            return bytes((int(piece[3:5], 16),))
        if sp.is_control(token) or sp.is_unknown(token) or sp.is_unused(token):
            return None
        return piece.replace(_SPACE_MARK, " ").encode()

    return [of(token) for token in range(vocabulary.base_size)]


def _tokens(vocabulary: TokenizerVocabulary) -> list[bytes | None]:
    """From tokenizer.json: byte-level tokens, or pieces with a mark for spaces and with bytes."""
    import tokenizers  # there, since a TokenizerVocabulary is

    content = json.loads(vocabulary.content)
    kinds = {str(step.get("type")) for step in _steps(content.get("decoder"))}
    result: list[bytes | None] = [None] * vocabulary.base_size
    tokenizer = tokenizers.Tokenizer.from_buffer(vocabulary.content)
    words = tokenizer.get_vocab(with_added_tokens=False)
    if "ByteLevel" in kinds:
        byte_of = {character: bytes((byte,)) for byte, character in enumerate(_byte_characters())}
        for word, token in words.items():
            if token < len(result) and all(character in byte_of for character in word):
                result[token] = b"".join(byte_of[character] for character in word)
    elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
        for word, token in words.items():
            if token < len(result):
                byte = _BYTE.fullmatch(word) if "ByteFallback" in kinds else None
                text = word.replace(_SPACE_MARK, " ").encode()
                result[token] = bytes((int(byte[1], 16),)) if byte else text
    else:
        raise UserError(
            f"this tokenizer.json joins tokens by {', '.join(sorted(kinds)) or 'nothing'}: constrained "
            "output needs the bytes of tokens, which byte-level and SentencePiece tokenizers tell"
        )
    for added in content.get("added_tokens") or []:
        if added["id"] < len(result):
            result[added["id"]] = None if added.get("special") else added["content"].encode()
    unknown = content["model"].get("unk_token")
    for word in [unknown] if unknown is not None else []:
        result[words.get(word, vocabulary.unk_id)] = None
    if (number := content["model"].get("unk_id")) is not None:
        result[number] = None
    return result


def _steps(decoder: Any) -> list[dict[str, Any]]:
    if not decoder:
        return []
    return list(decoder["decoders"]) if decoder.get("type") == "Sequence" else [decoder]


def _byte_characters() -> list[str]:
    """The character by which byte-level tokenizers write each byte (GPT-2's table): itself where it is
    printable Latin-1, else the next one from U+0100 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


@functools.lru_cache(maxsize=4)
def _tokenizer(vocabulary: Vocabulary, eos: tuple[int, ...]) -> Any:
    """What llguidance wants to know of a vocabulary; some tenths of a second for 50,000 tokens."""
    library = _library()
    pieces = token_bytes(vocabulary)
    for token in eos:
        pieces[token] = None

    class Source:
        """The fields that llguidance.TokenizerWrapper reads."""

        eos_token_id = eos[0]
        bos_token_id = None
        tokens: tuple[bytes, ...] = tuple(
            f"<|special_{token}|>".encode() if piece is None else piece for token, piece in enumerate(pieces)
        )
        special_token_ids: tuple[int, ...] = tuple(
            token for token, piece in enumerate(pieces) if piece is None
        )

        def __call__(self, text: str | bytes) -> list[int]:
            return vocabulary.encode(text.decode(errors="replace") if isinstance(text, bytes) else text)

    return library.LLTokenizer(library.TokenizerWrapper(Source()), eos_token=list(eos))


def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise UserError(
            "constrained output needs the library llguidance: pip install 't5style[grammar]'"
        ) from None
    return llguidance


def _schema(schema: Mapping[str, Any] | str) -> str:
    if not isinstance(schema, str):
        try:
            return json.dumps(schema)
        except (TypeError, ValueError) as error:
            raise UserError(f"json_schema is not made of JSON values: {error}") from None
    try:
        json.loads(schema)
    except ValueError as error:
        raise UserError(f"json_schema is not JSON: {error}") from None
    return schema


def _literal(text: str) -> str:
    """A regular expression for this text alone; every character that is no letter or digit by its number."""
    return "".join(c if c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _sentence(problem: str) -> str:
    """The library's message in one line, without the source lines and pointers that follow it."""
    lines = [line.strip() for line in problem.splitlines() if line.strip(" ^")]
    told = next((line for line in lines if line.startswith("error:")), None)
    return told.removeprefix("error:").strip() if told else lines[0] if lines else "it is not valid"
