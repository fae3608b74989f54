"""The loop that all training shares: step, log, evaluate, checkpoint, and survive.

Two things make it exact. The batch of a step is a pure function of its number, so a resumed run asks for
batch n and gets it. And the sums of a logging window that a checkpoint cuts in two travel in the checkpoint's
metadata, so that a resumed run writes the same figures.

Two things keep the device busy. Steps are dispatched ahead and their metrics read `IN_FLIGHT` steps later;
and nothing in the hot loop moves an array but by an explicit call (`jax.transfer_guard` says so where the
platform can tell).
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from t5style import console, run_dir
from t5style.train import profiling, watchdog
from t5style.train.checkpoint import Checkpointer, all_steps
from t5style.train.goodput import Goodput, mfu
from t5style.train.stop import StopSignal

IN_FLIGHT = 2  # steps dispatched and not yet read: enough to hide the host's work, little to lose
MAX_BAD = 10  # steps in a row skipped, or rollbacks to one checkpoint, before it is no accident any more
NAN_POLICIES = ("stop", "skip", "rollback")


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """When the loop does what.

    Attributes:
      steps: train until this step.
      log_every, eval_every, checkpoint_every: steps between; eval_every and checkpoint_every None for only at
        the end.
      on_nan: what to do where loss or gradient is not finite: 'stop' with an error; 'skip' the update (the
        step must have been made with skip_nonfinite); 'rollback' to the newest checkpoint and go on after the
        bad batch.
      patience: the run ends after so many evaluations in a row without a better value of the checkpointer's
        best_metric; None: never.
      profile_steps: (first, last) of the steps to trace for xprof into <run>/profile; None for none.
      hang_seconds, on_hang: how long no step may be finished, and what happens then, see `watchdog.Watchdog`.
    """

    steps: int
    log_every: int = 10
    eval_every: int | None = None
    checkpoint_every: int | None = None
    on_nan: str = "stop"
    patience: int | None = None
    profile_steps: Sequence[int] | None = None
    hang_seconds: float | None = None
    on_hang: str = "warn"

    def __post_init__(self) -> None:
        if self.on_nan not in NAN_POLICIES:
            raise ValueError(f"on_nan is {self.on_nan!r}; it must be one of {', '.join(NAN_POLICIES)}.")
        for name in ("steps", "log_every", "eval_every", "checkpoint_every", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be 1 or more.")
        profiling.check_steps(self.profile_steps, self.steps)
        watchdog.check(self.hang_seconds, self.on_hang)


@dataclasses.dataclass
class Progress:
    """What a checkpoint's metadata keeps of the loop beside the state: plain numbers.

    Attributes:
      offset: batch number minus step; above 0 once a rollback has jumped over bad batches.
      tokens: non-padding tokens read so far.
      seconds: seconds spent stepping and waiting for data so far, over all processes that worked on the run.
      skipped: updates skipped so far.
      window: sums and weights of the metrics since the last log line.
      last: the newest line of training figures, by name.
      evaluation: the newest evaluation, empty before the first: 'step', 'settings' (Loop.eval_settings) and
        'figures' by name.
      best: the best value of the metric by which checkpoints are kept, empty before the first: 'value',
        'step', and 'since', the evaluations since then.
    """

    offset: int = 0
    tokens: float = 0.0
    seconds: float = 0.0
    skipped: int = 0
    window: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    last: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation: dict[str, Any] = dataclasses.field(default_factory=dict)
    best: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For the metadata; JSON keeps every bit of a float."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Progress:
        """What `to_json` gave."""
        return cls(**dict(value))


@dataclasses.dataclass
class Loop:
    """Everything a training job hands over; `run_to_end` does the rest.

    Attributes:
      run: the run folder.
      options: see LoopOptions.
      step: the jitted or compiled training step, (state, batch, key) -> (state, metrics).
      key: base key of dropout; the step folds its number in.
      batches: batch number -> iterator of device-ready batches from there on.
      put: host batch -> device batch.
      checkpointer: saves and restores.
      metadata: what every checkpoint records beside step and progress.
      restore: () -> (state, metadata) of the newest whole checkpoint, for rollbacks.
      evaluate: (params, stopping) -> figures by name ('eval/<task>/loss'), or None once stopping() is true;
        None where there is nothing to evaluate on.
      eval_settings: fingerprint of what `evaluate` reads: a finished run is evaluated again when it changes.
      flops_per_token: for MFU.
      goodput: the clock.
      first, done: the first and the newest step of this process, kept by the loop.
      params: the newest trained parameters, kept by the loop for `batches`; gone with the next step.
    """

    run: run_dir.RunDir
    options: LoopOptions
    step: Callable[[Any, Any, jax.Array], tuple[Any, Any]]
    key: jax.Array
    batches: Callable[[int], Iterator[Any]]
    put: Callable[[Any], Any]
    checkpointer: Checkpointer
    metadata: Mapping[str, Any]
    restore: Callable[[], tuple[Any, dict[str, Any]] | None]
    evaluate: Callable[[Any, Callable[[], bool]], dict[str, float] | None] | None
    eval_settings: str
    flops_per_token: float
    goodput: Goodput
    first: int = 0
    done: int = 0
    params: Any = None

    def run_to_end(self, state: Any, progress: Progress) -> tuple[Any, Progress]:
        """Trains from the state's step to the last, through rollbacks; saves at the end.

        Raises:
          SystemExit: SIGTERM came and the state is saved (status 0).
          KeyboardInterrupt: Ctrl-C came and the state is saved.
          UserError: a loss that is not finite, as the policy says; a checkpoint that cannot be written; a
            `keep_best` that is not measured. Whatever an evaluation raises; the state is saved then.
        """
        rollbacks: collections.Counter[int] = collections.Counter()
        self.first = self.done = int(state.step)
        if self.options.on_nan == "rollback" and not all_steps(self.checkpointer.folder):
            self._save(self.done, state, progress, {})  # something to go back to
        with StopSignal() as stop:
            while True:
                try:
                    state, progress = self._session(state, progress, stop)
                    break
                except _Rollback as error:
                    # The traceback would keep the bad state alive during the restore.
                    bad = error.with_traceback(None)
                except Exception:
                    with contextlib.suppress(run_dir.UserError):  # a save under way still gets finished
                        self.checkpointer.close()
                    raise
                finally:
                    with contextlib.suppress(OSError):  # a full disk has been told of by then
                        self.goodput.write(self.run, self.first, self.done)
                state = self.params = None
                state, progress = self._roll_back(bad, rollbacks)
        # A stop in the last step, or later, is one too: else a workflow would go on with its next job.
        stopping = stop.requested(self.done + 1)
        if stopping is None:
            return state, progress
        console.say(f"stopped at step {self.done}; run the same command to go on")
        if stopping == 0:
            raise SystemExit(0)
        raise KeyboardInterrupt

    def _roll_back(self, bad: _Rollback, rollbacks: collections.Counter[int]) -> tuple[Any, Progress]:
        with self.goodput.timed("checkpoint"):
            self.checkpointer.wait()
            restored = self.restore()
        if restored is None:
            raise run_dir.UserError(f"{bad}: there is no checkpoint to go back to.")
        state, metadata = restored
        back = self.done = int(state.step)
        rollbacks[back] += 1
        if rollbacks[back] > MAX_BAD:
            raise run_dir.UserError(
                f"{bad}: {MAX_BAD} rollbacks to step {back} did not help. Lower the learning rate or look "
                "at the data."
            )
        progress = Progress.from_json(metadata["progress"])
        progress.offset = bad.batch + 1 - back
        console.say(
            f"WARNING: {bad}; rolled back to step {back}, going on with batch {bad.batch + 1} "
            f"(rollback {rollbacks[back]})"
        )
        return state, progress

    # --- one stretch without rollback ---

    def _session(self, state: Any, progress: Progress, stop: StopSignal) -> tuple[Any, Progress]:
        options = self.options
        done = int(state.step)
        self.params = state.params
        pending: collections.deque[tuple[int, Any]] = collections.deque()
        with contextlib.ExitStack() as stack:
            writer = _Metrics(self.run, done)
            stack.callback(writer.close)
            bar = stack.enter_context(
                console.progress("training", total=options.steps, unit="steps", start=done)
            )
            guard = stack.enter_context(
                watchdog.Watchdog(self.run, options.hang_seconds, options.on_hang, done)
            )
            tracer = stack.enter_context(profiling.Tracer(self.run, options.profile_steps))
            reader = _Reader(self, progress, writer, bar, guard)
            if self.evaluate is None:
                progress.evaluation = {}
            if self._is_owed(done, progress):
                self._evaluate(done, state, progress, writer, stop, guard)
            stack.enter_context(self.goodput.timed("step"))
            source = self.batches(done + progress.offset)
            closer = getattr(source, "close", None)
            if closer is not None:
                stack.callback(closer)
            stopping = None
            while done < options.steps and stopping is None and not self._stalled(progress):
                with self.goodput.timed("data_wait"):
                    host_batch = next(source)
                batch = self.put(host_batch)
                with tracer.step(done + 1, state), jax.transfer_guard("disallow"):
                    state, metrics = self.step(state, batch, self.key)
                self.params = state.params
                done = self.done = done + 1
                tracer.finished(done, metrics)
                pending.append((done, metrics))
                while len(pending) > IN_FLIGHT:
                    reader.read(*pending.popleft())
                self.checkpointer.poll()
                stopping = stop.requested(done)
                # Who stops has no time to evaluate (a preempted TPU has 30 s): the resumed run does it.
                evaluating = self._is_due(done) and stopping is None
                saving = done == options.steps or (
                    options.checkpoint_every is not None and done % options.checkpoint_every == 0
                )
                if not (evaluating or saving or stopping is not None):
                    continue
                while pending:  # nothing is evaluated or saved before its steps are known to be finite
                    reader.read(*pending.popleft())
                reader.settle()
                if evaluating:
                    try:
                        self._evaluate(done, state, progress, writer, stop, guard)
                    except Exception:  # not a step is lost by it
                        self._save(done, state, progress, {})
                        raise
                    stopping = stop.requested(done)
                if saving or stopping is not None or self._stalled(progress):
                    writer.flush()  # or a kill could lose lines that the resumed run does not write again
                    self._save(done, state, progress, reader.figures_of(done))
            reader.settle()
            with self.goodput.timed("checkpoint"):
                self.checkpointer.close()
        if done < options.steps and stopping is None:
            console.say(
                f"stopped early at step {done}: {self.checkpointer.best_metric} has not been better for "
                f"{options.patience} evaluations; the best is {progress.best['value']:.6g} at step "
                f"{progress.best['step']}"
            )
        return state, progress

    def _stalled(self, progress: Progress) -> bool:
        patience = self.options.patience
        return patience is not None and progress.best.get("since", 0) >= patience

    def _is_due(self, step: int) -> bool:
        every, steps = self.options.eval_every, self.options.steps
        due = step == steps or (every is not None and step > 0 and step % every == 0)
        return self.evaluate is not None and due

    def _is_owed(self, step: int, progress: Progress) -> bool:
        """Whether the evaluation of a restored step is still to be made: a stop or an error came before it,
        or the run had been finished with other evaluation settings.
        """
        made = progress.evaluation
        same = step < self.options.steps or made.get("settings") == self.eval_settings
        return self._is_due(step) and not (made.get("step") == step and same)

    def _evaluate(
        self,
        step: int,
        state: Any,
        progress: Progress,
        writer: _Metrics,
        stop: StopSignal,
        guard: watchdog.Watchdog,
    ) -> None:
        """Evaluates and writes the figures; a stop ends it early, without figures."""
        assert self.evaluate is not None

        def stopping() -> bool:  # asked after every batch
            guard.beat()
            return stop.is_caught()

        with self.goodput.timed("evaluate"):
            figures = self.evaluate(state.params, stopping)
        guard.beat()
        if figures is None:
            return
        progress.evaluation = {"step": step, "settings": self.eval_settings, "figures": figures}
        writer.write(step, figures)
        best = self.checkpointer.best_metric
        measured = [*figures, *progress.last, *(f"train/{name}" for name in progress.window)]
        if best is not None and best not in measured:
            near = difflib.get_close_matches(best, measured, 1, cutoff=0)
            raise run_dir.UserError(
                f"keep_best is {best!r}, which is not measured: did you mean {near[0]!r}? There are "
                f"{', '.join(sorted(figures))}. The checkpoint of step {step} is saved; run with another "
                "keep_best to go on."
            )
        if best in figures:
            value, sign = figures[best], self.checkpointer.best_sign
            before = progress.best or {"value": math.inf * sign, "step": 0, "since": 0}
            since = 0 if sign * value < sign * before["value"] else before["since"] + 1
            as_good = sign * value <= sign * before["value"]  # of equals the checkpointer keeps the newer
            best_now = {"value": value, "step": step} if as_good else before
            progress.best = {**best_now, "since": since}

    def _save(self, step: int, state: Any, progress: Progress, metrics: Mapping[str, float]) -> None:
        """Saves with `metrics`, which keep_best compares: those of this very step and no other."""
        with self.goodput.timed("checkpoint"):
            self.checkpointer.save(
                step,
                state,
                {**self.metadata, "step": step, "progress": progress.to_json()},
                metrics=metrics,
            )


class _Metrics:
    """The run's metrics writer, with a full disk told in words."""

    def __init__(self, run: run_dir.RunDir, step: int) -> None:
        self._run, self._step = run, step
        with self._told():
            self._writer = run.metrics(resume_step=step)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise run_dir.UserError(
                f"metrics of step {self._step} could not be written to {self._run.path}: "
                f"{error.strerror or error}. "
                "The checkpoints are as they were; make room and run the same command to go on."
            ) from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """See MetricsWriter.write. Raises UserError where the disk is full."""
        self._step = step
        with self._told():
            self._writer.write(step, values)

    def flush(self) -> None:
        """See MetricsWriter.flush. Raises UserError where the disk is full."""
        with self._told():
            self._writer.flush()

    def close(self) -> None:
        """See MetricsWriter.close."""
        with self._told():
            self._writer.close()


class _Rollback(Exception):
    def __init__(self, step: int, batch: int) -> None:
        super().__init__(f"loss or gradient not finite at step {step}, batch {batch}")
        self.step, self.batch = step, batch


class _Reader:
    """Reads metrics late, sums them over a window, writes a line at multiples of log_every, and minds NaN."""

    def __init__(
        self, loop: Loop, progress: Progress, writer: _Metrics, bar: Any, guard: watchdog.Watchdog
    ) -> None:
        self.loop, self.progress, self.writer, self.bar, self.guard = loop, progress, writer, bar, guard
        self.bad_in_a_row = 0
        self._logged = -1  # step of progress.last
        self._clock = self._busy()
        self._rate_clock, self._rate_tokens = self._clock, 0.0

    def _busy(self) -> float:
        seconds = self.loop.goodput.snapshot()
        return seconds.get("step", 0.0) + seconds.get("data_wait", 0.0)

    def settle(self) -> None:
        """Books the seconds since the last call on the progress."""
        now = self._busy()
        self.progress.seconds += now - self._clock
        self._clock = now

    def figures_of(self, step: int) -> dict[str, float]:
        """What was measured at this very step: the line of training figures, the evaluation, or neither."""
        evaluation = self.progress.evaluation
        trained = self.progress.last if self._logged == step else {}
        return trained | (evaluation["figures"] if evaluation.get("step") == step else {})

    def read(self, step: int, metrics: Any) -> None:
        """Waits for the step's metrics and books them."""
        values = jax.device_get(metrics)
        self.guard.beat(step)
        progress = self.progress
        if float(values["nonfinite"][0]) > 0:
            self._bad(step, step - 1 + progress.offset)
        else:
            self.bad_in_a_row = 0
        for name, (total, weight) in values.items():
            if name == "tokens":
                progress.tokens += float(total)
                self._rate_tokens += float(total)
                continue
            sums = progress.window.setdefault(name, [0.0, 0.0])
            sums[0] += float(total)
            sums[1] += float(weight)
        if step % self.loop.options.log_every == 0 or step == self.loop.options.steps:
            self._log(step)
        else:
            self.bar.advance(1)

    def _log(self, step: int) -> None:
        progress, loop = self.progress, self.loop
        figures = {
            f"train/{name}": total / weight if weight else math.nan
            for name, (total, weight) in progress.window.items()
            if name != "nonfinite"
        }
        progress.window = {}
        now = self._busy()
        rate = self._rate_tokens / max(now - self._rate_clock, 1e-9)
        self._rate_clock, self._rate_tokens = now, 0.0
        figures["train/tokens_per_second"] = rate
        figures["train/tokens"] = progress.tokens
        share = mfu(rate * loop.flops_per_token, jax.devices())
        if share is not None:
            figures["train/mfu"] = share
        self.writer.write(step, figures)
        progress.last, self._logged = figures, step
        shown = {"loss": round(figures.get("train/loss", math.nan), 4), "tokens/s": round(rate)}
        if share is not None:
            shown["MFU"] = round(share, 3)
        self.bar.advance(1, **shown)

    def _bad(self, step: int, batch: int) -> None:
        policy = self.loop.options.on_nan
        if policy == "rollback":
            raise _Rollback(step, batch)
        self.loop.checkpointer.wait()
        good = sorted(all_steps(self.loop.checkpointer.folder))
        kept = f"the last good checkpoint is step {good[-1]}" if good else "there is no checkpoint yet"
        if policy == "stop":
            raise run_dir.UserError(
                f"loss or gradient not finite at step {step}, batch {batch} of {self.loop.run.path}; {kept}. "
                "Look at the batch (t5style.data.replay), lower the learning rate, or set on_nan to 'skip' "
                "or "
                "'rollback' and run the same command."
            )
        self.progress.skipped += 1
        self.bad_in_a_row += 1
        console.say(
            f"WARNING: loss or gradient not finite at step {step}, batch {batch}; the update is skipped"
        )
        if self.bad_in_a_row >= MAX_BAD:
            raise run_dir.UserError(
                f"{MAX_BAD} updates in a row were not finite, the last at step {step}, batch {batch}; "
                f"{kept}. "
                "Lower the learning rate or look at the data."
            )
