"""Traces on request: the files that xprof reads, and nothing else happens to the run."""

import io
import sys

import jax
import pytest

from t5style import run_dir
from t5style.parallel import local
from t5style.parallel.mesh import MeshConfig
from t5style.train.loop import LoopOptions
from tests.train import tiny_run


def train(store, folder, **fields):
    settings = {"steps": 8, "checkpoint_every": None, "eval_split": None, "mesh": MeshConfig(devices=1)}
    return tiny_run.job(store, **(settings | fields))(run_dir.RunDir(folder).create())


def sessions(folder):
    """Session → names of its files."""
    root = folder / "profile" / "plugins" / "profile"
    return {session.name: sorted(file.name for file in session.iterdir()) for session in root.glob("*")}


def test_the_steps_asked_for_are_traced(tmp_path, store):
    train(store, tmp_path, profile_steps=(4, 5))
    ((session, files),) = sessions(tmp_path).items()
    assert session == "steps_4-5"
    (trace,) = [file for file in files if file.endswith(".xplane.pb")]
    assert trace.startswith("0-")
    read = jax.profiler.ProfileData.from_file(str(tmp_path / "profile/plugins/profile" / session / trace))
    names = [event.name for plane in read.planes for line in plane.lines for event in line.events]
    # The steps' own marks, with their numbers.
    assert sum(name.startswith("train") for name in names) == 2
    assert [file for file in tmp_path.glob(".*") if "tmp" in file.name] == []


def test_every_process_traces_into_one_session(tmp_path):
    code = f"""if True:
        import jax, jax.numpy as jnp
        from t5style import run_dir
        from t5style.parallel import distributed
        from t5style.train import profiling
        assert distributed.initialize()
        run_dir.set_process(jax.process_index(), distributed.barrier)
        step = jax.jit(lambda x: x + 1)
        state = jnp.zeros(3)
        with profiling.Tracer(run_dir.RunDir({str(tmp_path)!r}), (2, 3)) as tracer:
            for number in range(1, 5):
                with tracer.step(number, state):
                    state = step(state)
                tracer.finished(number, state)
        distributed.leave(0)
    """
    said = io.BytesIO()
    assert local.run([sys.executable, "-c", code], 2, 1, said) == 0, said.getvalue().decode()
    ((session, files),) = sessions(tmp_path).items()
    assert session == "steps_2-3"
    assert {file[0] for file in files if file.endswith(".xplane.pb")} == {"0", "1"}
    assert said.getvalue().decode().count("profiled steps 2 to 3") == 1


def test_a_stop_in_between_keeps_what_there_is(tmp_path, store):
    train(store, tmp_path, steps=3, profile_steps=[2, 3])
    train(store, tmp_path, steps=5, profile_steps=(1, 4))  # goes on at 3: step 4 alone is left of it
    assert set(sessions(tmp_path)) == {"steps_2-3", "steps_4-4"}


def test_a_profiler_that_fails_does_not_end_the_run(tmp_path, store, monkeypatch, capfd):
    def refuse(folder):
        raise RuntimeError("Only one profile may be run at a time.")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    assert train(store, tmp_path, profile_steps=(4, 5))["steps"] == 8
    said = capfd.readouterr().err
    assert said.count("no profile of the steps asked for (Only one profile may be run at a time.)") == 1


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((5,), r"profile_steps is \(5,\); it must be \(first, last\)"),
        ((5, 4), r"profile_steps is \(5, 4\); first and last must lie between 1 and the last step, 100"),
        ((99, 101), "between 1 and the last step, 100"),
        ((1, 50), r"profile_steps is \(1, 50\), 50 steps; a trace holds at most 20: try \(1, 3\)"),
    ],
)
def test_bad_settings(steps, message):
    with pytest.raises(ValueError, match=message):
        LoopOptions(steps=100, profile_steps=steps)
