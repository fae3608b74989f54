"""Text to token ids and back.

Every vocabulary follows T5 (Raffel et al. 2020, §2.1 and §3.1.4): pad 0, end of sequence 1, unknown 2, the
decoder starts with pad, and the sentinels that mark corrupted spans sit at the top, counted downwards:
``<extra_id_0>`` is ``vocab_size - 1``. Imported tokenizers keep the ids they have.

Encoding never fails and never reads special tokens out of text: ``"</s>"`` or ``"<extra_id_0>"`` in a
document are plain characters. ``encode(text, sentinels=True)`` is for prompts that are meant to hold
sentinels.
"""

from __future__ import annotations

import abc
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from t5style.corpus.document import valid
from t5style.run_dir import UserError, atomic_write

_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_SPACE_MARK = "\u2581"  # SentencePiece writes a space as this character
_UNKNOWN = "\ufffd"
_FILE = "vocabulary.json"


class Vocabulary(abc.ABC):
    """Maps text to ids in [0, vocab_size) and back.

    Attributes:
      base_size: number of ids without the sentinels that were put on top.
      extra_ids: number of sentinels.
      pad_id, eos_id, unk_id: 0, 1 and 2 unless imported from elsewhere. Where there is no padding or unknown
        token, the end of sequence stands in: never an id that means text.
      bos_id: what a decoder's input starts with; T5 uses pad.
    """

    kind: str
    pad_id = 0
    eos_id = 1
    unk_id = 2
    bos_id = 0

    def __init__(self, extra_ids: int):
        if extra_ids < 0:
            raise UserError(f"extra_ids must be 0 or more, not {extra_ids}")
        self.extra_ids = extra_ids

    @property
    @abc.abstractmethod
    def base_size(self) -> int: ...

    @property
    def vocab_size(self) -> int:
        """Number of ids, sentinels included: the least number of rows an embedding needs."""
        return self.base_size + self.extra_ids

    @property
    @abc.abstractmethod
    def content(self) -> bytes:
        """Everything that decides the ids, as bytes."""

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits; equal exactly when every text gets the same ids and every id has the same
        meaning.
        """
        ids = [self.extra_ids, self.pad_id, self.eos_id, self.unk_id, self.bos_id]
        head = json.dumps([self.kind, *ids]).encode()
        return hashlib.sha256(head + b"\0" + self.content).hexdigest()[:16]

    @property
    def byte_ids(self) -> frozenset[int]:
        """Ids that stand for single bytes of characters which have no id."""
        return frozenset()

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]:
        """Ids of text that holds no lone surrogates."""

    @abc.abstractmethod
    def _decode(self, ids: list[int], first: bool) -> str:
        """Text of ids in [0, base_size) without pad and eos; ``first``: nothing comes before."""

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self._encode(text) for text in texts]

    def encode(self, text: str, *, sentinels: bool = False) -> list[int]:
        """Ids of a text, without an end-of-sequence id.

        Args:
          text: anything; lone surrogates, which are no valid Unicode, become U+FFFD.
          sentinels: read ``<extra_id_k>`` as the sentinel k rather than as characters.
        """
        text = valid(text)
        if not sentinels:
            return self._encode(text)
        ids: list[int] = []
        end = 0
        for match in _SENTINEL.finditer(text):
            if int(match[1]) < self.extra_ids:
                ids += self._encode(text[end : match.start()]) if match.start() > end else []
                ids.append(self.sentinel_id(int(match[1])))
                end = match.end()
        return ids + (self._encode(text[end:]) if end < len(text) or not ids else [])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of many texts: a list of int32 arrays ``[length]``; faster than one at a time."""
        return [np.asarray(ids, np.int32) for ids in self._encode_batch([valid(text) for text in texts])]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Pad, start and end of sequence vanish, nothing is cut there; sentinels read
        ``<extra_id_k>``.

        Ids of vocab_size and above, which a model with a padded embedding can emit, read as U+FFFD.

        Raises:
          ValueError: an id is negative.
        """
        parts: list[str] = []
        run: list[int] = []
        unseen = {self.pad_id, self.eos_id, self.bos_id}

        def flush() -> None:
            if run:
                parts.append(self._decode(run, first=not parts))
                run.clear()

        for token in ids:
            token = int(token)
            if token in unseen:
                continue
            if 0 <= token < self.base_size:
                run.append(token)
                continue
            if token < 0:
                raise ValueError(f"token ids must be 0 or more, not {token}")
            flush()
            parts.append(self._sentinel_index(token) or _UNKNOWN)
        flush()
        return "".join(parts)

    def _sentinel_index(self, token: int) -> str:
        """``<extra_id_k>`` for the id of sentinel k, an empty string for any other id."""
        index = self.vocab_size - 1 - token
        return f"<extra_id_{index}>" if 0 <= index < self.extra_ids else ""

    def sentinel_id(self, index: int) -> int:
        """Id of ``<extra_id_index>``: counted down from the top.

        Raises:
          ValueError: there are not that many sentinels.
        """
        if not 0 <= index < self.extra_ids:
            raise ValueError(
                f"there is no sentinel {index}: this vocabulary has {self.extra_ids}, set a larger extra_ids"
            )
        return self.vocab_size - 1 - index

    def describe(self) -> dict[str, Any]:
        """What vocabulary.json holds."""
        return {
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "extra_ids": self.extra_ids,
            "pad_id": self.pad_id,
            "eos_id": self.eos_id,
            "unk_id": self.unk_id,
            "bos_id": self.bos_id,
            "fingerprint": self.fingerprint,
        }

    def _files(self) -> dict[str, bytes]:
        return {}

    def save(self, folder: epath.PathLike) -> None:
        """Writes vocabulary.json and, where there is one, spm.model or tokenizer.json, for ``load``."""
        folder = epath.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files().items():
            atomic_write(folder / name, data)
        # Last: a folder with vocabulary.json is complete.
        atomic_write(folder / _FILE, json.dumps(self.describe(), ensure_ascii=False, indent=2) + "\n")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, fingerprint={self.fingerprint!r})"


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model with sentinels on top.

    Models that train_tokenizer makes (identity normalisation, no dummy prefix, byte fallback) are lossless:
    ``decode(encode(text)) == text`` for every valid text, and the ids of two texts joined decode to the two
    joined.
    """

    kind = "sentencepiece"

    def __init__(self, model: bytes, extra_ids: int = 100):
        """Takes the bytes of a SentencePiece model file."""
        super().__init__(extra_ids)
        import sentencepiece

        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise UserError(f"these {len(model)} bytes are not a SentencePiece model: {error}") from error
        sp = self._processor
        self._size = int(sp.vocab_size())
        self.unk_id = sp.unk_id()
        self.eos_id = sp.eos_id()
        if self.eos_id < 0:
            raise UserError("this SentencePiece model has no end of sequence: train it with an eos_id")
        self.pad_id = sp.pad_id() if sp.pad_id() >= 0 else self.eos_id
        self.bos_id = sp.bos_id() if sp.bos_id() >= 0 else self.pad_id
        self._dummy_prefix = sp.encode("a", out_type=str)[:1] != ["a"] and sp.decode(sp.encode(" a")) != " a"
        mark = [sp.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE_MARK.encode()]
        self._mark_ids = mark if all(sp.is_byte(token) for token in mark) else None

    def __reduce__(self) -> tuple[Any, ...]:
        return SentencePieceVocabulary, (self._model, self.extra_ids)

    @property
    def base_size(self) -> int:
        return self._size

    @property
    def content(self) -> bytes:
        return self._model

    def _files(self) -> dict[str, bytes]:
        return {"spm.model": self._model}

    def piece(self, token: int) -> str:
        """The piece of an id below base_size, with U+2581 for a space."""
        return str(self._processor.id_to_piece(int(token)))

    @functools.cached_property
    def byte_ids(self) -> frozenset[int]:
        return frozenset(filter(self._processor.is_byte, range(self._size)))

    def _encode(self, text: str) -> list[int]:
        if self._mark_ids is not None and _SPACE_MARK in text:
            # To SentencePiece this character is a space: spell it in bytes to keep it.
            parts = text.split(_SPACE_MARK)
            ids = list(self._processor.encode(parts[0]))
            for part in parts[1:]:
                ids += self._mark_ids + list(self._processor.encode(part))
            return ids
        return list(self._processor.encode(text))

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        if self._mark_ids is not None and any(_SPACE_MARK in text for text in texts):
            return [self._encode(text) for text in texts]
        return list(self._processor.encode(texts, num_threads=1))

    def _decode(self, ids: list[int], first: bool) -> str:
        text = str(self._processor.decode(ids))
        if not first and self._dummy_prefix and self.piece(ids[0]).startswith(_SPACE_MARK):
            return " " + text  # the decoder strips the dummy prefix, but here it was a real space
        return text


class CharacterVocabulary(Vocabulary):
    """One id per character, after pad, eos and unknown; characters in sorted order."""

    kind = "character"

    def __init__(self, characters: str, extra_ids: int = 0):
        """Takes the characters, each once; sorts them."""
        super().__init__(extra_ids)
        self.characters = "".join(sorted(set(valid(characters))))
        self._ids = {character: 3 + index for index, character in enumerate(self.characters)}

    @property
    def base_size(self) -> int:
        return 3 + len(self.characters)

    @property
    def content(self) -> bytes:
        return self.characters.encode()

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "characters": self.characters}

    def _encode(self, text: str) -> list[int]:
        get = self._ids.get
        return [get(character, 2) for character in text]

    def _decode(self, ids: list[int], first: bool) -> str:
        return "".join(self.characters[token - 3] if token > 2 else _UNKNOWN for token in ids)


class ByteVocabulary(Vocabulary):
    """One id per UTF-8 byte, after pad, eos and unknown: byte b is id b + 3, as in ByT5 (Xue et al. 2022,
    §3.1).
    """

    kind = "byte"

    def __init__(self, extra_ids: int = 125):
        super().__init__(extra_ids)

    @property
    def base_size(self) -> int:
        return 259

    @property
    def content(self) -> bytes:
        return b""

    def _encode(self, text: str) -> list[int]:
        return [byte + 3 for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(valid(text).encode(), np.uint8).astype(np.int32) + 3 for text in texts]

    def _decode(self, ids: list[int], first: bool) -> str:
        unknown = _UNKNOWN.encode()
        return b"".join(bytes((token - 3,)) if token > 2 else unknown for token in ids).decode(
            errors="replace"
        )


class TokenizerVocabulary(Vocabulary):
    """A Hugging Face ``tokenizer.json``, read by the ``tokenizers`` library (extra: ``t5style[hf]``).

    Sentinels are the tokenizer's own ``<extra_id_k>`` where it has them at its top (T5's do); otherwise
    ``extra_ids`` are put on top.
    """

    kind = "tokenizer"

    def __init__(
        self,
        tokenizer_json: bytes,
        extra_ids: int = 0,
        pad_id: int | str | None = None,
        eos_id: int | str | None = None,
        unk_id: int | str | None = None,
        bos_id: int | str | None = None,
    ):
        """Takes the bytes of tokenizer.json, and special ids or tokens; others are found by usual names."""
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(
                "a tokenizer.json vocabulary needs the tokenizers library: pip install 't5style[hf]'"
            ) from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises a bare Exception
            raise UserError(f"not a readable tokenizer.json: {error}") from error
        self._json = tokenizer_json
        tokenizer = self._tokenizer
        tokenizer.encode_special_tokens = True  # special tokens in text are characters
        tokenizer.no_truncation()
        tokenizer.no_padding()
        ids = [*tokenizer.get_vocab(with_added_tokens=True).values(), *tokenizer.get_added_tokens_decoder()]
        top = max(ids, default=-1) + 1
        own = 0
        while tokenizer.token_to_id(f"<extra_id_{own}>") == top - 1 - own:
            own += 1
        super().__init__(own or extra_ids)
        self._size = top - own

        def special(given: int | str | None, *names: str) -> int | None:
            if isinstance(given, int):
                return given
            found = (tokenizer.token_to_id(name) for name in (given, *names) if name)
            return next((token for token in found if token is not None), None)

        eos = special(eos_id, "</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
        if eos is None:
            raise UserError(
                "this tokenizer.json has no end of sequence under a usual name: name its token as eos_token "
                "in a tokenizer_config.json beside it"
            )
        pad = special(pad_id, "<pad>", "[PAD]", "<|endoftext|>")
        unk = special(unk_id, "<unk>", "[UNK]", "<|endoftext|>", "<|end_of_text|>")
        bos = special(bos_id, "<s>", "<bos>", "<|begin_of_text|>", "[CLS]")
        self.eos_id = eos
        self.pad_id = eos if pad is None else pad
        self.unk_id = eos if unk is None else unk
        self.bos_id = self.pad_id if bos is None else bos

    def __reduce__(self) -> tuple[Any, ...]:
        ids = (self.pad_id, self.eos_id, self.unk_id, self.bos_id)
        return TokenizerVocabulary, (self._json, self.extra_ids, *ids)

    @property
    def base_size(self) -> int:
        return self._size

    @property
    def content(self) -> bytes:
        return self._json

    def _files(self) -> dict[str, bytes]:
        return {"tokenizer.json": self._json}

    @functools.cached_property
    def byte_ids(self) -> frozenset[int]:
        ids = map(self._tokenizer.token_to_id, (f"<0x{byte:02X}>" for byte in range(256)))
        return frozenset(token for token in ids if token is not None)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [list(item.ids) for item in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int], first: bool) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False))


def load(path: epath.PathLike, extra_ids: int | None = None) -> Vocabulary:
    """Reads a vocabulary from a folder or from one file.

    A folder is read in this order: vocabulary.json (written by ``save``), then as a Hugging Face directory:
    tokenizer.json, then spiece.model or tokenizer.model. A file is one of these.

    Args:
      path: the folder or file.
      extra_ids: sentinels to put on a bare model file that does not say how many; default: what a
        tokenizer_config.json beside it says, else none.

    Raises:
      UserError: nothing is there, or what is there is no vocabulary or was changed after it was saved.
    """
    path = epath.Path(path)
    if path.is_dir():
        for name in (_FILE, "tokenizer.json", "spiece.model", "tokenizer.model", "spm.model"):
            if (path / name).exists():
                return load(path / name, extra_ids)
        raise UserError(
            f"no vocabulary in {path}: expected vocabulary.json, tokenizer.json or a SentencePiece model"
        )
    if not path.exists():
        raise UserError(f"no vocabulary at {path}: no such file or folder")
    if path.name == _FILE:
        return _load_saved(path)
    if path.suffix not in (".json", ".model"):
        raise UserError(f"{path} is no vocabulary: expected vocabulary.json, tokenizer.json or a .model file")
    config_path = path.parent / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) if config_path.exists() else {}
    if extra_ids is None:
        extra_ids = int(config.get("extra_ids") or 0)
    if path.suffix == ".model":
        return SentencePieceVocabulary(path.read_bytes(), extra_ids)
    # What the directory says goes before usual names.
    tokens = {name: config.get(f"{name}_token") for name in ("pad", "eos", "unk", "bos")}
    special = {f"{name}_id": t.get("content") if isinstance(t, dict) else t for name, t in tokens.items()}
    return TokenizerVocabulary(path.read_bytes(), extra_ids, **special)


def _load_saved(path: epath.Path) -> Vocabulary:
    try:
        record = json.loads(path.read_text())
        kind, extra_ids = record["kind"], int(record["extra_ids"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a vocabulary written by t5style: {error!r}") from error
    vocabulary: Vocabulary
    try:
        if kind == "sentencepiece":
            vocabulary = SentencePieceVocabulary((path.parent / "spm.model").read_bytes(), extra_ids)
        elif kind == "character":
            vocabulary = CharacterVocabulary(record["characters"], extra_ids)
        elif kind == "byte":
            vocabulary = ByteVocabulary(extra_ids)
        elif kind == "tokenizer":
            ids = {name: record[name] for name in ("pad_id", "eos_id", "unk_id", "bos_id")}
            vocabulary = TokenizerVocabulary((path.parent / "tokenizer.json").read_bytes(), extra_ids, **ids)
        else:
            kinds = "sentencepiece, character, byte, tokenizer"
            raise UserError(f"{path} has the unknown kind {kind!r}: it must be one of {kinds}")
    except FileNotFoundError as error:
        raise UserError(f"the vocabulary {path.parent} is incomplete: {error.filename} is missing") from error
    if vocabulary.fingerprint != record["fingerprint"]:
        raise UserError(
            f"the vocabulary in {path.parent} was changed after it was saved: its fingerprint is "
            f"{vocabulary.fingerprint}, vocabulary.json says {record['fingerprint']}; train or copy it again"
        )
    return vocabulary
