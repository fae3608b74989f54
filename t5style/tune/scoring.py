"""Rewards of rollouts, whatever the reward functions do: raise, give no number, or never return.

They run in a process of their own (`python -c`, pickles over a socket), which imports neither jax nor the
model: a regular expression that backtracks for ever holds Python's lock and cannot be stopped from inside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing.connection
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from t5style import console
from t5style.run_dir import UserError
from t5style.tune.rewards import Record, Reward

# So many completions in a row that a reward never returned from, and none that it did: it is the reward.
MAX_HANGS = 8
_START = 60.0  # seconds that starting may take: imports on a busy machine


@dataclasses.dataclass(frozen=True)
class Scores:
    """Rewards of n completions of each of some prompts.

    Attributes:
      total: float64 `[prompts, n]`, the weighted sum; where a reward failed, the value configured for that.
      parts: float64 `[prompts, n]` by reward, before weights; NaN where it failed.
      failed: bool `[prompts, n]`, where one of them did.
      failures: (prompt, completion, reward, what happened).
    """

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failed: np.ndarray
    failures: list[tuple[int, int, str, str]]


class Scorer:
    """Calls rewards; a context manager, whose process ends with it.

    Args:
      rewards: by name. One with the attribute `in_process` set (a reward model) is called here, with all
        prompts at once: `reward.score(records, prompts, completions)`, float `[prompts, n]`.
      weights: of rewards that do not count 1.
      on_failure: the total of a completion whose reward failed.
      seconds: that a reward may take for one completion.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float] | None = None,
        on_failure: float = 0.0,
        seconds: float = 10.0,
    ) -> None:
        self.rewards, self.weights = dict(rewards), dict(weights or {})
        self.on_failure, self.seconds = on_failure, seconds
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: multiprocessing.connection.Connection | None = None
        self._folder: str | None = None
        self._hangs = 0

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        if self._pipe is not None:
            self._pipe.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._process = self._pipe = self._folder = None

    # --- the process ---

    def _start(self) -> multiprocessing.connection.Connection:
        if self._pipe is not None:
            return self._pipe
        away = {name: reward for name, reward in self.rewards.items() if not _is_here(reward)}
        try:
            payload = pickle.dumps(away)
        except Exception as error:
            raise UserError(
                f"a reward cannot be sent to the process that computes rewards ({error}): use a function "
                "that can be imported, or a frozen dataclass"
            ) from error
        # What the rewards leave behind when they are killed goes with this.
        self._folder = tempfile.mkdtemp(prefix="t5style-rewards-")
        os.chmod(self._folder, 0o711)
        ours, theirs = multiprocessing.connection.Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(theirs.fileno()), repr(sys.path)],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "TMPDIR": self._folder},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno() if hasattr(sys.stderr, "fileno") and _has_fileno(sys.stderr) else None,
            start_new_session=True,
        )
        theirs.close()
        self._pipe = ours
        try:
            ours.send_bytes(payload)
            answer = ours.recv() if ours.poll(_START) else "it did not start"
        except (EOFError, OSError):
            answer = "its process ended"
        if answer is not True:
            self.close()
            raise UserError(f"the rewards cannot be imported in a process of their own: {answer}")
        return ours

    def _ask(self, name: str, record: Record, texts: Sequence[str]) -> list[float] | str:
        """The rewards of a prompt's completions, or what happened."""
        pipe = self._start()
        try:
            pipe.send((name, dict(record), list(texts)))
            if pipe.poll(self.seconds * len(texts)):
                answer: list[float] | str = pipe.recv()
                return answer
            happened = f"it did not return within {self.seconds * len(texts):g} s"
            self._hangs += len(texts) == 1
        except (EOFError, OSError):
            happened = "its process ended"
        self.close()
        return happened

    # --- scores ---

    def score(
        self,
        records: Sequence[Record],
        prompts: Sequence[str],
        completions: Sequence[Sequence[str]],
        *,
        may_fail: bool = False,
    ) -> Scores:
        """The rewards of the completions of each prompt.

        Raises:
          UserError: no completion could be scored, and they may not all fail; names the first failure.
        """
        shape = (len(records), len(completions[0]) if completions else 0)
        failures: list[tuple[int, int, str, str]] = []
        parts: dict[str, np.ndarray] = {}
        for name, reward in self.rewards.items():
            values = np.full(shape, math.nan)
            if _is_here(reward):
                values[:] = reward.score(records, prompts, completions)  # type: ignore[attr-defined]
                failures += [
                    (i, j, name, f"it gave {values[i, j]}") for i, j in np.argwhere(~np.isfinite(values))
                ]
            else:
                for i, (record, texts) in enumerate(zip(records, completions, strict=True)):
                    values[i], bad = self._group(name, record, texts)
                    failures += [(i, j, name, happened) for j, happened in bad]
            parts[name] = np.where(np.isfinite(values), values, math.nan)
        failed = np.zeros(shape, bool)
        for i, j, _, _ in failures:
            failed[i, j] = True
        if failed.size and failed.all() and not may_fail:
            _, _, name, happened = failures[0]
            raise UserError(
                f"the reward {name!r} failed for all {failed.size} completions of a step, so that there is "
                f"nothing to learn from; first: {happened}"
            )
        total = sum(
            (self.weights.get(name, 1.0) * values for name, values in parts.items()), start=np.zeros(shape)
        )
        return Scores(np.where(failed, self.on_failure, total), parts, failed, failures)

    def _group(self, name: str, record: Record, texts: Sequence[str]) -> tuple[Any, list[tuple[int, str]]]:
        """The rewards of a prompt's completions, NaN where they failed, and (completion, what happened)."""
        answer = self._ask(name, record, texts)
        bad: list[tuple[int, str]] = []
        if isinstance(answer, str):  # which of them was it?
            values = []
            for j, text in enumerate(texts):
                one = self._ask(name, record, [text]) if len(texts) > 1 else answer
                if isinstance(one, str):
                    bad.append((j, one))
                    values.append(math.nan)
                    self._mind_hangs(name, one)
                else:
                    self._hangs = 0
                    values += one
        else:
            self._hangs, values = 0, answer
        given = {j for j, _ in bad}
        for j, value in enumerate(values):
            if j not in given and not math.isfinite(value):
                bad.append((j, f"it gave {value}"))
        return values, bad

    def _mind_hangs(self, name: str, happened: str) -> None:
        if self._hangs >= MAX_HANGS:
            raise UserError(
                f"the reward {name!r} did not return for {self._hangs} completions in a row: {happened}. "
                "Mend it, or raise reward_seconds if it is only slow."
            )


def _is_here(reward: Reward) -> bool:
    return bool(getattr(reward, "in_process", False))


def _has_fileno(stream: Any) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError):
        return False
    return True


_CHILD = "import sys; sys.path[:] = eval(sys.argv[2]); from t5style.tune.scoring import serve; serve()"


def serve() -> None:
    """The process: answers (reward, record, texts) with numbers, or with what happened."""
    with contextlib.suppress(Exception):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # ends with the run
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    pipe = multiprocessing.connection.Connection(int(sys.argv[1]))
    try:
        rewards = pickle.loads(pipe.recv_bytes())
        pipe.send(True)
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
        return
    while True:
        try:
            name, record, texts = pipe.recv()
        except EOFError:
            return
        pipe.send(_answer(rewards[name], record, texts))


def _answer(reward: Reward, record: Record, texts: list[str]) -> list[float] | str:
    try:
        values = [float(value) for value in reward(record, texts)]
        if len(values) != len(texts):
            raise ValueError(f"it gave {len(values)} numbers for {len(texts)} completions")
        return values
    except BaseException as error:  # SystemExit too: a reward does not end the run
        at = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error} ({os.path.basename(at.filename)}, line {at.lineno})"


def tell(scores: Scores, limit: int = 1) -> None:
    """Says the first of the failures."""
    for i, j, name, happened in scores.failures[:limit]:
        more = f" ({len(scores.failures)} in this step)" if len(scores.failures) > 1 else ""
        console.say(f"WARNING: the reward {name!r} failed for completion {j} of prompt {i}: {happened}{more}")
