"""Loading and saving by two processes of two devices each, none of which holds all parameters."""

import os
import subprocess
import sys

import jax
import numpy as np

from t5style.models.convert import load_huggingface, save_huggingface
from t5style.parallel.local import free_port
from tests.helpers import ROOT, clean_env
from tests.models.tiny import LLAMA, params_of

SCRIPT = """
import sys
from t5style import run_dir
from t5style.parallel import distributed
assert distributed.initialize()
import jax
from t5style.models.convert import load_huggingface, save_huggingface
from t5style.parallel.mesh import MeshConfig
run_dir.set_process(jax.process_index(), distributed.barrier)
mesh = MeshConfig(data=1, fsdp=2, tensor=2).build(jax.devices())
config, params = load_huggingface(sys.argv[1], mesh=mesh)
assert not params["embedding"].is_fully_addressable
save_huggingface(sys.argv[2], config, params)
# All of it is there when any process goes on.
load_huggingface(sys.argv[2])
sys.exit(distributed.leave(0))
"""


def test_what_two_processes_load_and_save_is_what_one_saves(tmp_path):
    config = LLAMA.replace(vocab_size=62)
    save_huggingface(tmp_path / "one", config, params_of(config))
    environment = clean_env(devices=2) | {
        "COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "NUM_PROCESSES": "2",
        "T5STYLE_STARTUP_TIMEOUT": "100",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path / "one"), str(tmp_path / "two")],
            env=environment | {"PROCESS_ID": str(number)},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    jax.tree.map(np.testing.assert_array_equal, load_huggingface(tmp_path / "two")[1], params_of(config))
