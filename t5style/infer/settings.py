"""What a request may ask for: how its tokens are chosen, what ends its answer, what is told about it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import numpy as np

# The most probable alternatives of a token, for each of which a row of numbers is kept on the device.
MAX_LOGPROBS = 20
# Answers of one request are decoded together, each with a cache of its own.
MAX_ANSWERS = 128

Allowed = Callable[[Sequence[int]], np.ndarray]
"""What a constraint says: called with the tokens of an answer so far (without the prompt; the first time
none), returns bool [vocab], the tokens that may come next, at least one. It is called once for every token,
in order."""
Constraint = Callable[[], Allowed]
"""Called once for each answer that begins: makes its Allowed, which may keep state of its own."""


class Fields(TypedDict, total=False):
    """Fields of Settings as Model's methods take them: numbers may be given for each request."""

    temperature: float | Sequence[float]
    top_k: int | Sequence[int]
    top_p: float | Sequence[float]
    min_p: float | Sequence[float]
    repetition_penalty: float | Sequence[float]
    presence_penalty: float | Sequence[float]
    frequency_penalty: float | Sequence[float]
    seed: int | Sequence[int]
    n: int | Sequence[int]
    logprobs: int | None
    tempered: bool
    stop: str | Sequence[str]
    stop_tokens: Sequence[int] | None
    logit_bias: Mapping[int, float]
    banned: Sequence[str | int | Sequence[int]]
    constraint: Constraint | None


_NUMBERS = (
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "n",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one request is answered.

    The logits of a step pass through: logit_bias, repetition_penalty, presence and frequency penalties,
    banned, constraint; where temperature is 0 the most probable token is taken (the lowest id of several), or
    else they are divided by it and cut by top_k, top_p and min_p in this order (transformers').

    Attributes:
      max_new_tokens: at most so many tokens, at least 1.
      temperature: 0 is greedy.
      top_k: keep the k most probable tokens (the lower id of two that tie); 0 keeps all.
      top_p: keep the smallest set of most probable tokens whose probability reaches p; 1 keeps all
        (Holtzman et al. 2020, section 3.1).
      min_p: keep tokens at least p times as probable as the most probable one; 0 keeps all (Nguyen et al.
        2024).
      repetition_penalty: logits of tokens in prompt or answer are divided by it if positive and multiplied if
        negative; 1 changes nothing (CTRL, Keskar et al. 2019, section 4.1; of an encoder-decoder the
        decoder's tokens count, as in transformers).
      presence_penalty, frequency_penalty: subtracted from the logits of tokens in the answer, the one once
        and the other as often as the token is there; 0 changes nothing (OpenAI's definition).
      seed: the stream of random numbers. A request's answer depends on its prompt, its settings and its seed,
        not on what else is in the batch.
      n: answers, independent of each other, for which the prompt is read once.
      logprobs: None; or 0, to be told the log-probability of each token and of the answer; or k, for those of
        the k most probable tokens of each step too. They are the model's own: before all settings.
      tempered: the log-probabilities are those after dividing by the temperature: of the distribution that is
        drawn from, where nothing else changes it.
      stop: texts that end an answer, which is cut before the first of them, wherever tokens begin and end.
      stop_tokens: tokens that end an answer; None: the model's end of sequence; (): nothing does.
      logit_bias: added to the logits of tokens; -inf bans a token.
      banned: what no answer may hold: a token, a sequence of tokens, or a text, which stands for its tokens
        both at the beginning of a text and after a space (transformers' bad_words_ids: the last token of a
        sequence is banned where the others precede it, in the prompt or the answer; an end of sequence by
        itself cannot be banned so).
      constraint: see Constraint; such a request takes a step at a time.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    n: int = 1
    logprobs: int | None = None
    tempered: bool = False
    stop: Sequence[str] = ()
    stop_tokens: Sequence[int] | None = None
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    banned: Sequence[str | int | Sequence[int]] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(
            self, "banned", (self.banned,) if isinstance(self.banned, str) else tuple(self.banned)
        )
        # JSON knows only texts as keys.
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        for name in ("top_k", "n", "seed", "max_new_tokens"):
            _whole(name, getattr(self, name))
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | np.number):
                raise ValueError(f"{name} is {value!r}: give a number")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}: give a whole number of at least 1")
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}: give a finite number ≥ 0 (0 = greedy)")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: give a whole number ≥ 1, or 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p is {self.top_p}: give a number above 0 and at most 1 (1 = keep all tokens)"
            )
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: give a number from 0 (keep all tokens) to 1")
        if not (self.repetition_penalty > 0 and math.isfinite(self.repetition_penalty)):
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}: give a number above 0 (1 = no penalty)"
            )
        for name in _PENALTIES[1:]:
            if not math.isfinite(getattr(self, name)):
                raise ValueError(
                    f"{name} is {getattr(self, name)}: give a finite number (0 = no penalty, usual: -2 to 2)"
                )
        if not 1 <= self.n <= MAX_ANSWERS:
            raise ValueError(f"n is {self.n}: give 1 to {MAX_ANSWERS} answers for each prompt")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(
                f"n is {self.n} and temperature 0: greedy answers are all the same, give a temperature > 0"
            )
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs)
            if not 0 <= self.logprobs <= MAX_LOGPROBS:
                raise ValueError(
                    f"logprobs is {self.logprobs}: give None, or 0 to {MAX_LOGPROBS} alternatives"
                )
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop holds {text!r}: give texts of at least one character")
        for item in self.banned:
            if not isinstance(item, int | np.integer) and not len(item):
                raise ValueError(f"banned holds {item!r}: give tokens, or texts of at least one character")

    def tokens(self) -> list[int]:
        """All token ids that are named, to be checked against a vocabulary."""
        banned = [[item] if isinstance(item, int | np.integer) else item for item in self.banned]
        return [
            *self.logit_bias,
            *(self.stop_tokens or ()),
            *(token for item in banned if not isinstance(item, str) for token in item),
        ]


_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} is {value!r}: give a whole number")


def _bias(given: Any) -> dict[int, float]:
    try:
        bias = {int(token): float(value) for token, value in dict(given).items()}
    except (TypeError, ValueError):
        raise ValueError(f"logit_bias is {given!r}: give numbers by token id") from None
    for token, value in bias.items():
        if math.isnan(value) or value == math.inf:
            raise ValueError(
                f"logit_bias of token {token} is {value}: give a number, or -inf to ban the token"
            )
    return bias


def settings_of(
    count: int, settings: Settings | Sequence[Settings] | None = None, fields: Mapping[str, Any] | None = None
) -> list[Settings]:
    """The settings of each of `count` requests.

    Args:
      count: requests.
      settings: one for all of them, or one for each; None: the defaults.
      fields: what differs from these: a value for all, or a list of numbers, one for each. A single seed s
        gives request i the seed s + i; so does one Settings for all.

    Raises:
      ValueError: an unknown field, a list of another length, or a value outside its limits.
    """
    changes = dict(fields or {})
    known = [field.name for field in dataclasses.fields(Settings)]
    for name in changes:
        if name not in known:
            raise TypeError(f"there is no setting {name!r}: the settings are {', '.join(known)}")
    changes = {name: value for name, value in changes.items() if value is not None or name in _MAY_BE_NONE}
    if settings is None or isinstance(settings, Settings):
        base = settings or Settings()
        changes.setdefault("seed", base.seed)
        rows = [base] * count
    else:
        rows = list(settings)
        if len(rows) != count:
            raise ValueError(f"{len(rows)} settings for {count} requests: give one, or one for each")
    by_row: dict[str, list[Any]] = {}
    for name in _NUMBERS:
        if name not in changes:
            continue
        array = np.asarray(changes.pop(name))
        if array.ndim > 1 or (array.ndim == 1 and len(array) != count):
            raise ValueError(
                f"{name} has shape {array.shape}: give one number or one for each of the {count} requests"
            )
        if array.ndim:
            by_row[name] = array.tolist()
        else:
            by_row[name] = [array.item() + i if name == "seed" else array.item() for i in range(count)]
    if not changes and not by_row:
        return rows
    return [
        dataclasses.replace(row, **changes, **{name: values[i] for name, values in by_row.items()})
        for i, row in enumerate(rows)
    ]


_MAY_BE_NONE = ("logprobs", "stop_tokens", "constraint")
