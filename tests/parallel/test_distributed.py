import http.server
import importlib.metadata
import io
import os
import subprocess
import sys
import threading
import time

import pytest

from t5style.parallel import distributed, identity, local
from t5style.parallel.distributed import Cluster, StartupError, find_cluster
from t5style.parallel.local import free_port

VARIABLES = (
    "COORDINATOR_ADDRESS",
    "NUM_PROCESSES",
    "PROCESS_ID",
    "TPU_WORKER_HOSTNAMES",
    "TPU_PROCESS_ADDRESSES",
    "TPU_WORKER_ID",
    "MEGASCALE_COORDINATOR_ADDRESS",
    "MEGASCALE_NUM_SLICES",
    "MEGASCALE_SLICE_ID",
)


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_one_process_by_itself():
    assert find_cluster() is None
    assert distributed.initialize() is False
    distributed.barrier("alone")
    distributed.check_same({"configuration": "abc"})
    assert distributed.is_main()


def test_variables(monkeypatch):
    monkeypatch.setenv("COORDINATOR_ADDRESS", "10.0.0.2:8476")
    monkeypatch.setenv("NUM_PROCESSES", "4")
    with pytest.raises(StartupError, match=r"NUM_PROCESSES are set but PROCESS_ID is not: set all of"):
        find_cluster()
    monkeypatch.setenv("PROCESS_ID", "3")
    assert find_cluster() == Cluster("10.0.0.2:8476", 4, 3)
    monkeypatch.setenv("PROCESS_ID", "4")
    with pytest.raises(StartupError, match="PROCESS_ID=4 must be from 0 to NUM_PROCESSES - 1 = 3"):
        find_cluster()
    monkeypatch.setenv("PROCESS_ID", "two")
    with pytest.raises(StartupError, match="PROCESS_ID='two' must be a whole number"):
        find_cluster()


def test_tpu_variables(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "w0,w1,w2,w3")
    with pytest.raises(StartupError, match="TPU_WORKER_ID is not"):
        find_cluster()
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    assert find_cluster() == Cluster("w0:8482", 4, 2, {0: "w0", 1: "w1", 2: "w2", 3: "w3"})
    # The second of two slices.
    monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", "s0-w0:8080")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    cluster = find_cluster()
    assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == ("s0-w0:8482", 8, 6)
    assert (cluster.hosts[1], cluster.hosts[6]) == ("slice 0, worker 1", "w2")


def test_one_tpu_host_needs_no_start_up(monkeypatch):
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    monkeypatch.setenv("TPU_WORKER_ID", "0")
    assert find_cluster().num_processes == 1
    assert distributed.initialize() is False


def test_tpu_vm_metadata(monkeypatch):
    answers = {
        "worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6",
        "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '0'\n",
    }

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            answer = answers.get(self.path.rsplit("/", 1)[1])
            self.send_response(200 if answer and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write((answer or "").encode())

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("localhost", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("GCE_METADATA_IP", f"localhost:{server.server_address[1]}")
        monkeypatch.setattr(distributed, "has_tpu", lambda: True)
        cluster = find_cluster()
        assert (cluster.coordinator, cluster.num_processes, cluster.process_id) == ("10.0.0.5:8482", 4, 1)
        assert cluster.hosts == {0: "10.0.0.5", 1: "10.0.0.6", 2: "slice 1, worker 0", 3: "slice 1, worker 1"}
        # One host by itself has no endpoints beside its own.
        answers.update({"worker-network-endpoints": "vm-0", "agent-worker-number": "0", "tpu-env": ""})
        assert find_cluster().num_processes == 1
        del answers["agent-worker-number"]
        assert find_cluster() is None
        server.shutdown()


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        ("--xla_force_host_platform_device_count=4", None, "32"),
        ("--xla_force_host_platform_device_count=4", "7", "7"),
        ("--xla_force_host_platform_device_count=1", None, None),
        ("", None, None),
    ],
)
def test_cpu_devices_get_threads_enough(monkeypatch, flags, before, after):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PJRT_NPROC", before or "")
    if before is None:
        monkeypatch.delenv("PJRT_NPROC")
    distributed.give_cpu_devices_threads()
    assert os.environ.get("PJRT_NPROC") == after


def test_timeout_must_be_a_number(monkeypatch):
    monkeypatch.setenv("T5STYLE_STARTUP_TIMEOUT", "soon")
    with pytest.raises(StartupError, match="T5STYLE_STARTUP_TIMEOUT='soon' must be a number of seconds"):
        distributed.initialize()


SCRIPT = """
import sys
from t5style.parallel import distributed
try:
    assert distributed.initialize()
    distributed.barrier("ready")
    distributed.barrier("ready")
    distributed.check_same({"code": "c0de", "configuration": sys.argv[1], "jaxlib": "0.10.2"})
except distributed.StartupError as error:
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
    print(error, file=sys.stderr)
    sys.exit(distributed.leave(1))
sys.exit(distributed.leave(0))
"""


def start(port, processes, process, value="same", timeout="60"):
    environment = {
        **os.environ,
        "COORDINATOR_ADDRESS": f"localhost:{port}",
        "NUM_PROCESSES": str(processes),
        "PROCESS_ID": str(process),
        "T5STYLE_STARTUP_TIMEOUT": timeout,
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, value], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_a_missing_process_is_an_error_and_no_hang():
    began = time.monotonic()
    process = start(free_port(), 2, 0, timeout="2")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "After 2 s only 1 of 2 processes have started; absent: 1. Start the same command" in errors
    assert time.monotonic() - began < 100  # of which nearly all is Python's own start on a busy machine


def test_hosts_with_different_configurations_are_named():
    port = free_port()
    processes = [start(port, 2, process, value) for process, value in enumerate(("aaaa", "bbbb"))]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "do not run the same configuration: process 1 on" in errors
        assert "has configuration bbbb, where process 0 on" in errors
        assert "has aaaa. Give every host the same code" in errors


def facts(code="c0de", jaxlib="0.10.2"):
    return {"code": code, "jaxlib": jaxlib}


def test_who_differs_from_most_is_the_odd_one():
    same = {process: (f"w{process}", facts()) for process in range(4)}
    assert distributed._disagreement(same) is None
    # Process 0 may be the one that was forgotten.
    assert distributed._disagreement(same | {0: ("w0", facts(code="01d"))}) == (
        "The hosts do not run the same code: process 0 on w0 has code 01d, where process 1 on w1 and 2 more "
        "has c0de. Give every host the same code, packages, gin files and flags."
    )
    several = {1: ("w1", facts(code="01d")), 3: ("w3", facts("01d", "0.9.0"))}
    said = distributed._disagreement(same | several)
    assert said.startswith(
        "The hosts do not run the same code and jaxlib: process 1 on w1 has code 01d, where"
    )
    assert "; process 3 on w3 has code 01d, where process 0 on w0 and 1 more has c0de, and has jaxlib" in said
    # A host whose code is so old that it does not tell.
    assert "process 2 on w2 has jaxlib nothing" in distributed._disagreement(
        same | {2: ("w2", {"code": "c0de"})}
    )
    many = {process: (f"w{process}", facts(code=str(process))) for process in range(4, 24)}
    assert "; and 12 processes more. Give" in distributed._disagreement(same | many)


def test_identity_of_the_program(tmp_path):
    for name, text in (("a.py", "one"), ("b/c.py", "two"), ("notes.txt", "three")):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
    before = identity.sources(tmp_path)
    identity.sources.cache_clear()
    (tmp_path / "notes.txt").write_text("other")
    assert identity.sources(tmp_path) == before
    identity.sources.cache_clear()
    (tmp_path / "b" / "c.py").write_text("other")
    assert identity.sources(tmp_path) != before
    found = identity.program()
    assert found["jax"] == importlib.metadata.version("jax")
    assert found["code"].startswith(importlib.metadata.version("t5style") + "+")
    assert set(found) >= {"code", "jax", "jaxlib", "libtpu"}


def test_hosts_with_different_code_are_named_before_the_run_begins(tmp_path):
    """The whole command: the second process has a changed source file. Nothing is made, nothing is run."""
    job = tmp_path / "job.gin"
    job.write_text(
        "from __gin__ import dynamic_registration\nfrom t5style import launch\nfrom tests import fake_jobs\n"
        f"launch.run.job = @fake_jobs.Write()\nfake_jobs.Write.text = 'hi'\n"
        f"launch.run.run_dir = '{tmp_path}/run'\n"
    )
    code = f"""if True:
        import os, sys
        from t5style.parallel import identity
        if os.environ["PROCESS_ID"] == "1":
            identity.sources = lambda: "0123456789ab"
        from t5style.main import main
        sys.exit(main(["t5style", "--gin_file={job}"]))
    """
    said = io.BytesIO()
    assert local.run([sys.executable, "-c", code], 2, 1, said) == 1
    text = said.getvalue().decode()
    assert "error: The hosts do not run the same code: process 1 on" in text
    assert "+0123456789ab, where process 0 on" in text
    assert not (tmp_path / "run").exists()
