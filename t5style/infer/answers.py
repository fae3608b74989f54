"""Requests to answers: put together into batches, followed as text where that is asked for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence

import numpy as np

from t5style.corpus.vocabulary import Vocabulary
from t5style.infer.batch import bucket
from t5style.infer.decoding import Answer, Batch
from t5style.infer.engine import CHUNK, Engine
from t5style.infer.settings import Settings
from t5style.infer.text import TextStream

# A call of some steps should take about so long: the pieces of a stream seem to come one by one, a stop text
# is found soon, and a call costs little of it.
CALL_SECONDS = 0.05
MOST_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      text: without what ended it.
      tokens: its token ids, without end of sequence and padding; where a stop text ended it, up to the token
        in which that was whole.
      finish_reason: "stop" (a stop token or text), or "length" (max_new_tokens).
      request: number of the prompt that it answers.
      sample: its number among the answers to that prompt.
      score: log-probability of the answer in nats, its stop token included; None if logprobs is.
      logprobs: of each token; None: not asked for.
      top_logprobs: for each token the most probable ids at its place and their log-probabilities; None: not
        asked for.
    """

    text: str
    tokens: list[int]
    finish_reason: str = "length"
    request: int = 0
    sample: int = 0
    score: float | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None


def completion(answer: Answer, text: str) -> Completion:
    """A finished answer, as the public API gives it."""
    count = len(answer.tokens)
    return Completion(
        text=text,
        tokens=answer.tokens,
        finish_reason=answer.finish_reason or "length",
        request=answer.request,
        sample=answer.sample,
        score=None if answer.logprobs is None else float(np.sum(answer.logprobs)),
        logprobs=None if answer.logprobs is None else answer.logprobs[:count],
        top_logprobs=None if answer.top is None else answer.top[:count],
    )


class Following:
    """A batch whose answers are followed as text: those with stop texts, or all of them."""

    def __init__(self, batch: Batch, vocabulary: Vocabulary | None, every: bool = False) -> None:
        self.batch = batch
        self.streams: list[TextStream | None] = [
            TextStream(vocabulary, answer.settings.stop)
            if vocabulary is not None and (every or answer.settings.stop)
            else None
            for answer in batch.answers
        ]
        self._read = [0] * len(batch.answers)
        self._steps = 1
        self._follow()

    def advance(self) -> None:
        """As many steps as fit into CALL_SECONDS; all, if nothing is followed."""
        if not any(self.streams):
            self.batch.advance()
            return
        began = time.monotonic()
        self.batch.advance(self._steps)
        seconds = time.monotonic() - began
        if seconds < CALL_SECONDS / 2:
            self._steps = min(2 * self._steps, MOST_STEPS)
        elif seconds > CALL_SECONDS:
            self._steps = max(self._steps // 2, 1)
        self._follow()

    def _follow(self) -> None:
        for i, (answer, stream) in enumerate(zip(self.batch.answers, self.streams, strict=True)):
            if stream is None or stream.stopped is not None:
                continue
            for token in answer.tokens[self._read[i] :]:
                if stream.push(token):
                    break
            self._read[i] = len(answer.tokens)
            if answer.finish_reason is not None:
                stream.finish()
            if stream.stopped is not None:
                answer.stop(stream.stopped)


def answer_all(
    engine: Engine,
    prompts: Sequence[np.ndarray],
    settings: Sequence[Settings],
    vocabulary: Vocabulary | None,
    batch_size: int,
) -> Iterator[list[tuple[Answer, str | None]]]:
    """Answers with their texts where they were followed, a batch at a time; `request` numbers the prompts.

    Prompts of similar length are decoded together, about `batch_size` answers at a time; those that take
    single steps, and those with stop texts, among themselves.
    """

    def kind(i: int) -> tuple[bool, bool, int]:
        # A step costs the same for many rows as for one, so the short ones go together, although padded.
        length = bucket(len(prompts[i]), CHUNK)
        return settings[i].constraint is not None, bool(settings[i].stop), length

    order = sorted(range(len(prompts)), key=lambda i: (kind(i), len(prompts[i])))
    while order:
        rows = np.cumsum([settings[i].n for i in order])
        fits = max(int(np.searchsorted(rows, batch_size, side="right")), 1)
        chosen = [i for i in order[:fits] if kind(i) == kind(order[0])]
        order = order[len(chosen) :]
        batch = Batch(engine, [prompts[i] for i in chosen], [settings[i] for i in chosen])
        following = Following(batch, vocabulary)
        while not batch.finished:
            following.advance()
        for answer in batch.answers:
            answer.request = chosen[answer.request]
        yield [
            (answer, None if stream is None else stream.text)
            for answer, stream in zip(batch.answers, following.streams, strict=True)
        ]


class Stream(Iterator[str]):
    """Pieces of an answer's text as they come: `for piece in stream`. Each is whole characters, and none of
    it is taken back; joined they are the answer.
    """

    def __init__(
        self, engine: Engine, prompt: np.ndarray, settings: Settings, vocabulary: Vocabulary
    ) -> None:
        self._pieces = self._run(engine, prompt, settings, vocabulary)
        self._completion: Completion | None = None

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        """The whole answer, once the pieces have ended; ValueError before."""
        if self._completion is None:
            raise ValueError("the answer is not finished: read the stream to its end")
        return self._completion

    def _run(
        self, engine: Engine, prompt: np.ndarray, settings: Settings, vocabulary: Vocabulary
    ) -> Iterator[str]:
        batch = Batch(engine, [prompt], [settings])
        following = Following(batch, vocabulary, every=True)
        (stream,) = following.streams
        assert stream is not None
        while True:
            if piece := stream.piece():
                yield piece
            if batch.finished:
                break
            following.advance()
        self._completion = completion(batch.answers[0], stream.text)
