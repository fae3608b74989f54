"""The vocabulary, special ids and chat template that a GGUF file holds (its keys `tokenizer.*`).

Two kinds of vocabulary are read: 'gpt2', byte-level BPE with merges, whose way of cutting text has a name
(llama-vocab.cpp of llama.cpp lists the regular expressions); and 'llama', SentencePiece BPE with a score for
each piece. Both become a tokenizer of the tokenizers library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from t5style.corpus.vocabulary import TokenizerVocabulary
from t5style.infer.ids import TokenIds
from t5style.run_dir import UserError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_REST_SLASH = _REST.replace(r"[\r\n]*", r"[\r\n/]*", 1)
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_TEKKEN = _WORDS.replace("%s", "") + r"|\p{N}" + _REST_SLASH
_GPT4O = _WORDS.replace("%s", f"{_CONTRACTION}?") + r"|\p{N}{1,3}" + _REST_SLASH

# tokenizer.ggml.pre -> regular expressions, each of which cuts what those before it left whole.
_PRE = {
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt"), (_GPT2,)),
    **dict.fromkeys(("smollm", "starcoder", "command-r", "refact", "codeshell"), (r"\p{N}", _GPT2)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "dbrx"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), (_QWEN2,)),
    "tekken": (_TEKKEN,),
    "gpt-4o": (_GPT4O,),
    "falcon": (r"[\p{P}$+<=>^~|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "default": (r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
# What llama.cpp sets for a name: a word that is a token as a whole is not built from merges; a text begins
# with bos, unless the file says otherwise.
_WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "tekken"}
_BEGINS = {"llama-bpe", "llama3", "llama-v3", "tekken"}

# Tokens that end a turn of a conversation, under the names that models give them.
_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|return|>")


def vocabulary(metadata: Mapping[str, Any], where: str) -> TokenizerVocabulary | None:
    """The vocabulary of a GGUF file, None if it holds none.

    Args:
      metadata: all keys and values of the file.
      where: the file's name, for errors.

    Raises:
      UserError: the kind or the pre-tokenizer's name is not one we know, or entries contradict each other.
    """
    keys = _Keys(metadata, where)
    kind = keys.get("model", str)
    if kind is None or kind == "none":
        return None
    if kind not in _KINDS:
        raise keys.error(f"tokenizer.ggml.model = {kind!r} is not supported; {', '.join(_KINDS)} are")
    tokens = keys.strings("tokens")
    if len(set(tokens)) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if tokens.index(token) != i)
        raise keys.error(f"the token {twice!r} is there twice in tokenizer.ggml.tokens")
    text = _KINDS[kind](keys, tokens)
    ids: dict[str, Any] = {
        f"{name}_id": keys.token(key, len(tokens))
        for name, key in (("pad", "padding"), ("eos", "eos"), ("unk", "unknown"), ("bos", "bos"))
    }
    if kind == "llama":  # llama.cpp's defaults for this kind
        defaults = {"unk_id": 0, "bos_id": 1, "eos_id": 2}
        ids |= {name: id for name, id in defaults.items() if ids[name] is None and id < len(tokens)}
    try:
        return TokenizerVocabulary(text.encode(), **ids)
    except UserError as error:
        raise keys.error(f"its vocabulary is not usable: {error}") from error


def token_ids(metadata: Mapping[str, Any], tokens: TokenizerVocabulary) -> TokenIds:
    """Special ids: all that end an answer, and what a prompt begins with.

    Args:
      metadata: all keys and values of the file.
      tokens: its vocabulary.
    """
    keys = _Keys(metadata, "the GGUF file")
    all_tokens, types = keys.strings("tokens"), metadata.get("tokenizer.ggml.token_type")
    named = [keys.token(name, len(all_tokens)) for name in ("eos", "eot", "eom")]
    marks = {token: i for i, token in enumerate(all_tokens) if token in _ENDS}
    found = [marks[token] for token in _ENDS if token in marks]
    if types is not None:
        found = [token for token in found if types[token] == _CONTROL]
    ends = dict.fromkeys([tokens.eos_id, *(token for token in named if token is not None), *found])
    begins = metadata.get("tokenizer.ggml.model") == "llama" or metadata.get("tokenizer.ggml.pre") in _BEGINS
    adds = keys.get("add_bos_token", bool)
    begins = begins if adds is None else adds
    return TokenIds(
        pad=tokens.pad_id,
        eos=tuple(ends),
        start=tokens.bos_id,
        prefix=tokens.bos_id if begins else None,
    )


class _Keys:
    """The keys `tokenizer.ggml.*`, each checked to be what it must be."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._values, self._where = metadata, where

    def get(self, key: str, kind: type) -> Any:
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is not None and type(value) is not kind:
            raise self.error(f"tokenizer.ggml.{key} is no {kind.__name__}")
        return value

    def strings(self, key: str) -> list[str]:
        values = self.get(key, list)
        if not values or not all(isinstance(value, str) for value in values):
            raise self.error(f"tokenizer.ggml.{key} is missing or not a list of strings")
        return list(values)

    def numbers(self, key: str, count: int) -> list[Any] | None:
        """One number for each token."""
        values = self.get(key, list)
        if values is not None and len(values) != count:
            raise self.error(f"tokenizer.ggml.{key} has {len(values)} entries for {count} tokens")
        if values is not None and not all(isinstance(value, int | float) for value in values):
            raise self.error(f"tokenizer.ggml.{key} is not a list of numbers")
        return values

    def token(self, name: str, count: int) -> int | None:
        """A special token's id."""
        value = self.get(f"{name}_token_id", int)
        if value == 2**32 - 1:  # llama.cpp's null, as some files write it
            return None
        if value is not None and not 0 <= value < count:
            raise self.error(f"tokenizer.ggml.{name}_token_id = {value}, but there are {count} tokens")
        return value

    def error(self, text: str) -> UserError:
        return UserError(f"{self._where}: {text}")


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            "the vocabulary of a GGUF file needs the tokenizers library: pip install 't5style[hf]'"
        ) from error
    return tokenizers


def _add_special(tokenizer: Any, tokens: list[str], types: list[int], normalized: bool) -> None:
    """Makes control tokens special, and user-defined ones whole words wherever they stand."""
    from tokenizers import AddedToken

    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [
            AddedToken(token, special=False, normalized=normalized)
            for token, kind in zip(tokens, types, strict=True)
            if kind == _USER_DEFINED
        ]
    )


def _byte_level(keys: _Keys, tokens: list[str]) -> str:
    """tokenizer.json of byte-level BPE."""
    tokenizers = _tokenizers()
    name = keys.get("pre", str) or "default"
    if name not in _PRE:
        raise keys.error(f"tokenizer.ggml.pre = {name!r} is not supported; {', '.join(_PRE)} are")
    ids = {token: i for i, token in enumerate(tokens)}
    merges = []
    for line in keys.strings("merges"):
        # The second part may begin with a space only in vocabularies that are not byte-level.
        left, _, right = line.partition(" ")
        if left not in ids or right not in ids or left + right not in ids:
            raise keys.error(f"the merge {line!r} in tokenizer.ggml.merges is not of tokens")
        merges.append((left, right))
    model = tokenizers.models.BPE(vocab=ids, merges=merges, ignore_merges=name in _WHOLE_WORDS)
    tokenizer = tokenizers.Tokenizer(model)
    if name in ("qwen2", "deepseek-r1-qwen"):
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    pre = tokenizers.pre_tokenizers
    cuts = [pre.Split(tokenizers.Regex(pattern), "isolated") for pattern in _PRE[name]]
    bytes_ = pre.ByteLevel(add_prefix_space=bool(keys.get("add_space_prefix", bool)), use_regex=False)
    tokenizer.pre_tokenizer = pre.Sequence([*cuts, bytes_])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    types = keys.numbers("token_type", len(tokens)) or [_NORMAL] * len(tokens)
    _add_special(tokenizer, tokens, types, normalized=False)
    return str(tokenizer.to_str())


def _sentencepiece(keys: _Keys, tokens: list[str]) -> str:
    """tokenizer.json of SentencePiece BPE, whose merges are in the scores: the best piece is made first."""
    tokenizers = _tokenizers()
    scores, types = keys.numbers("scores", len(tokens)), keys.numbers("token_type", len(tokens))
    if scores is None or types is None:
        raise keys.error("tokenizer.ggml.scores or tokenizer.ggml.token_type is missing")
    if keys.get("remove_extra_whitespaces", bool) or keys.get("precompiled_charsmap", list):
        raise keys.error("a SentencePiece vocabulary that normalises text is not supported")
    ids = {token: i for i, token in enumerate(tokens)}
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind in (_NORMAL, _USER_DEFINED)}
    ranked = []
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in normal and right in normal:
                ranked.append((-scores[ids[token]], ids[left], ids[right], left, right))
    ranked.sort()
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = tokenizers.models.BPE(
        vocab=ids,
        merges=[(left, right) for *_, left, right in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    tokenizer = tokenizers.Tokenizer(model)
    prefix = keys.get("add_space_prefix", bool) in (None, True)
    normalizers, decoders = tokenizers.normalizers, tokenizers.decoders
    spaces = normalizers.Replace(" ", "\u2581")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces]) if prefix else spaces
    undo = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*undo, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    # A prefix would be put before user-defined pieces too, and so none would be found.
    _add_special(tokenizer, tokens, types, normalized=not prefix)
    return str(tokenizer.to_str())


_KINDS: dict[str, Callable[[_Keys, list[str]], str]] = {"gpt2": _byte_level, "llama": _sentencepiece}
