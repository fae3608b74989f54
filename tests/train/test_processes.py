"""Two processes of four devices each train as one device does."""

import io
import json
import pathlib
import sys
import time

import numpy as np
import pytest

from t5style.parallel import local
from tests.train.mesh_run import alone

SCRIPT = pathlib.Path(__file__).with_name("mesh_run.py")


# Two of the data × fsdp positions are each process's own; with tensor 8 both processes read the same rows.
@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [("decoder_only", {"data": 2, "fsdp": 2, "tensor": 2}), ("encoder_decoder", {"data": 1, "tensor": 8})],
)
def test_two_processes_equal_one(tmp_path, architecture, sizes):
    out, said = tmp_path / "losses.json", io.BytesIO()
    given = ",".join(f"{axis}={size}" for axis, size in sizes.items())
    command = [sys.executable, str(SCRIPT), architecture, given, "3", str(out)]
    assert local.run(command, processes=2, devices=4, out=said) == 0, said.getvalue().decode()
    result = json.loads(out.read_text())
    assert result["processes"] == 2
    np.testing.assert_allclose(result["losses"], alone(architecture, 3), rtol=1e-5)


def test_a_process_that_fails_does_not_wait_for_the_others():
    """jax's own exit would wait 300 s for process 0, which waits for process 1."""
    code = """if True:
        import sys, jax
        from t5style import run_dir, runner
        from t5style.parallel import distributed
        distributed.initialize()
        run_dir.set_process(jax.process_index(), distributed.barrier)
        if jax.process_index() == 1:
            sys.exit(runner.leave(3))
        run_dir.barrier("together")
    """
    began = time.monotonic()
    assert local.run([sys.executable, "-c", code], processes=2, devices=1, out=io.BytesIO()) == 3
    assert time.monotonic() - began < 120
