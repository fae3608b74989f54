"""The job that makes a vocabulary from a corpus."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import io
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from etils import epath

from t5style import console
from t5style.corpus.document import Document, document_files, read_documents
from t5style.corpus.measure_vocabulary import held_out, measure, write_report
from t5style.corpus.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
)
from t5style.run_dir import RunDir, UserError

_KINDS = ("unigram", "bpe", "character", "byte")
_ALWAYS = 3 + 256 + 2  # special tokens, bytes, line feed and tab
# SentencePiece's spaces, and the names that it and T5 give to other ids.
_NO_SYMBOL = re.compile(r"[\s\u2581\0]|^(<pad>|</?s>|<unk>|<extra_id_\d+>|<0x[0-9A-F]{2}>)$")
# SentencePiece's own limit is 4,192 bytes, above which it silently skips a sentence: lines are cut below it.
_PASSAGE_CHARACTERS = 1000


@dataclasses.dataclass(frozen=True)
class TrainTokenizer:
    """Trains a vocabulary on a seeded sample of the training split and writes it into the run folder.

    SentencePiece models ("unigram": Kudo 2018, "bpe": Sennrich et al. 2016) are made lossless: identity
    normalisation, no dummy prefix, white space kept, bytes for characters they lack, every digit a piece of
    its own.

    Attributes:
      corpus: run folder of ``Prepare``, with one folder of documents per split.
      kind: "unigram", "bpe", "character" or "byte".
      vocab_size: number of ids in all, special tokens and sentinels included, of "unigram" and "bpe"; the
        other kinds have the size they have.
      extra_ids: number of sentinels, the top ids.
      character_coverage: share of the sample's characters that become pieces ("unigram" and "bpe"); the
        others are spelt in bytes. The default fits alphabets; for texts with thousands of signs take 0.9995.
      sample_characters: characters to learn from. Passages are drawn from all of the training split, each
        with the same chance, when it holds more. The sample is all that is in memory: 50 million
        characters in lines of usual length take 0.3 GB, and training on them 1.4 GB ("unigram").
      user_defined_symbols: strings that are always one token ("unigram" and "bpe"), such as the marks of a
        chat template. Wherever they stand in a text, they are it: choose what no other text says.
      seed: of the draw.
      split: split to learn from.
      held_out_split: split to measure on; the training split where it is not there.
      threads: used by SentencePiece. It decides the order in which sums are added, so a vocabulary is exactly
        reproduced only with the same number.
    """

    corpus: str = "run:corpus"
    kind: str = "unigram"
    vocab_size: int = 8192
    extra_ids: int = 100
    character_coverage: float = 0.9999
    sample_characters: int = 50_000_000
    user_defined_symbols: Sequence[str] = ()
    seed: int = 0
    split: str = "train"
    held_out_split: str = "validation"
    threads: int = 4

    distributed: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise UserError(f"kind must be one of {', '.join(_KINDS)}, not {self.kind!r}")
        if self.extra_ids < 0:
            raise UserError(f"extra_ids must be 0 or more, not {self.extra_ids}")
        self._check_symbols()
        least = _ALWAYS + len(self.user_defined_symbols) + self.extra_ids + 1
        if self.kind in ("unigram", "bpe") and self.vocab_size < least:
            raise UserError(
                f"vocab_size must be at least {least} (3 special tokens, 256 bytes, 2 white space, "
                f"extra_ids={self.extra_ids} sentinels, {len(self.user_defined_symbols)} "
                f"user_defined_symbols and something to learn), not {self.vocab_size}"
            )
        if not 0 < self.character_coverage <= 1:
            raise UserError(f"character_coverage must lie in (0, 1], not {self.character_coverage}")
        if self.sample_characters < 1 or self.threads < 1:
            raise UserError("sample_characters and threads must be 1 or more")

    def _check_symbols(self) -> None:
        symbols = self.user_defined_symbols
        if isinstance(symbols, str):
            raise UserError(f"user_defined_symbols must be a list of strings, not the string {symbols!r}")
        if symbols and self.kind not in ("unigram", "bpe"):
            raise UserError(f"kind={self.kind!r} has no user_defined_symbols, only 'unigram' and 'bpe' do")
        if len(set(symbols)) < len(symbols):
            raise UserError(f"user_defined_symbols names one twice: {list(symbols)}")
        for symbol in symbols:
            if not symbol or _NO_SYMBOL.search(symbol):
                raise UserError(
                    f"user_defined_symbols has {symbol!r}: it must not be empty, hold white space, U+2581 "
                    "or U+0000, or be a special token (<pad>, </s>, <unk>, <extra_id_0>, <0x00>)"
                )

    def inputs(self) -> Sequence[str]:
        return [self.corpus]

    def __call__(self, run: RunDir) -> dict[str, Any]:
        """Writes vocabulary.json (and spm.model) and vocabulary_report.json into ``run.path``.

        Returns:
          Figures: vocab_size, fingerprint, and those of ``measure_vocabulary.measure`` on held-out text.

        Raises:
          UserError: there is no corpus, or the sample does not hold enough different text for vocab_size.
          RuntimeError: a SentencePiece vocabulary does not give a text back as it was.
        """
        corpus = epath.Path(self.corpus)
        folder = corpus / self.split
        document_files(folder)  # fails here, with a clear message, where there is no corpus
        vocabulary = self._train(folder)
        vocabulary.save(run.path)
        place = held_out(corpus, self.held_out_split, self.split)
        report = measure(vocabulary, read_documents(place))
        if isinstance(vocabulary, SentencePieceVocabulary) and report["changed"]:
            raise RuntimeError(
                f"the vocabulary does not give document {report['first_changed']!r} back as it was; please "
                "report this"
            )
        figures = {
            "kind": self.kind,
            "vocab_size": vocabulary.vocab_size,
            "extra_ids": vocabulary.extra_ids,
            "fingerprint": vocabulary.fingerprint,
            **write_report(run, report, place.name),
        }
        console.say(
            f"vocabulary of {vocabulary.vocab_size:,} ids in {run.path}: "
            f"{figures['bytes_per_token']:.2f} bytes per token, "
            f"{figures['fertility']:.2f} tokens per word on {place.name}"
        )
        return figures

    def _train(self, folder: epath.Path) -> Vocabulary:
        if self.kind == "byte":
            return ByteVocabulary(self.extra_ids)
        if self.kind == "character":
            characters: set[str] = set()
            for document in console_documents("collecting characters", folder):
                characters.update(document.text)
            return CharacterVocabulary("".join(sorted(characters)), self.extra_ids)
        passages = sample_passages(
            console_documents("sampling text", folder), self.sample_characters, self.seed
        )
        if not passages:
            raise UserError(f"there is no text in {folder} to learn a vocabulary from")
        console.say(f"training a {self.kind} vocabulary on {sum(map(len, passages)):,} characters")
        return SentencePieceVocabulary(self._train_sentencepiece(passages), self.extra_ids)

    def _train_sentencepiece(self, passages: list[str]) -> bytes:
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(passages),
                model_writer=model,
                model_type=self.kind,
                vocab_size=self.vocab_size - self.extra_ids,
                pad_id=0,
                eos_id=1,
                unk_id=2,
                bos_id=-1,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=False,
                allow_whitespace_only_pieces=True,
                byte_fallback=True,
                split_digits=True,
                # Passages are lines, so these two would otherwise be spelt in bytes.
                user_defined_symbols=["\n", "\t", *self.user_defined_symbols],
                character_coverage=self.character_coverage,
                max_sentence_length=16 * _PASSAGE_CHARACTERS,
                num_threads=self.threads,
                minloglevel=2,  # errors only; what goes wrong is also in the exception
            )
        except (RuntimeError, OSError) as error:
            raise self._explained(str(error)) from error
        return model.getvalue()

    def _explained(self, message: str) -> Exception:
        """SentencePiece's complaint in terms of this job's fields."""
        if match := re.search(r"Vocabulary size too high \((\d+)\).*?<= (\d+)", message, re.S):
            most = int(match[2]) + self.extra_ids
            return UserError(
                f"vocab_size={self.vocab_size} is more than this corpus can fill: at most {most}; "
                "set vocab_size to that or less, or give more text"
            )
        if match := re.search(r"smaller than required_chars\D*(\d+) vs (\d+)", message):
            least = int(match[2]) + self.extra_ids
            return UserError(
                f"vocab_size={self.vocab_size} is too small to hold all characters of this corpus: at least "
                f"{least}; set vocab_size to more than that or character_coverage to less than "
                f"{self.character_coverage}"
            )
        return RuntimeError(f"SentencePiece could not train on this corpus: {message}")


def console_documents(description: str, path: epath.Path) -> Iterator[Document]:
    """Documents of a folder with a progress bar over its files."""
    files = document_files(path)
    with console.progress(description, len(files), unit="files") as progress:
        count = 0
        for file in files:
            for document in read_documents(file):
                count += 1
                yield document
            progress.advance(docs=count)


def passages(text: str) -> Iterator[str]:
    """The non-empty lines of a text, those of more than 1,000 characters cut, after a space if there is
    one.
    """
    for line in text.split("\n"):
        while len(line) > _PASSAGE_CHARACTERS:
            cut = line.rfind(" ", _PASSAGE_CHARACTERS // 2, _PASSAGE_CHARACTERS)
            cut = cut if cut > 0 else _PASSAGE_CHARACTERS
            yield line[:cut]
            line = line[cut:]
        if line:
            yield line


def sample_passages(documents: Iterator[Document], characters: int, seed: int) -> list[str]:
    """Up to so many characters of passages, drawn with equal chance from all documents; in the documents'
    order.

    Every passage gets a random number and those with the smallest are kept (bottom-k sampling, Cohen and
    Kaplan 2007), so one pass and memory for ``characters`` are enough. Text with a zero byte is left out:
    SentencePiece reserves it.
    """
    generator = random.Random(hashlib.sha256(f"passages/{seed}".encode()).digest())
    heap: list[tuple[float, int, str]] = []  # the largest number on top, negated
    held = 0
    index = 0
    for document in documents:
        for passage in passages(document.text):
            index += 1
            draw = generator.random()
            if "\0" in passage or (held >= characters and -draw <= heap[0][0]):
                continue
            heapq.heappush(heap, (-draw, index, passage))
            held += len(passage)
            while held - len(heap[0][2]) >= characters:
                held -= len(heapq.heappop(heap)[2])
    return [passage for _, _, passage in sorted(heap, key=lambda entry: entry[1])]
