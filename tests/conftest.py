"""Settings every test shares: eight CPU devices and one compile cache, both set before jax is imported."""

import os
import pathlib
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

# A shell's background job ignores Ctrl-C, and so would the programs that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# Eight devices waiting for each other on two cores need more threads than XLA makes: see
# `parallel.distributed.give_cpu_devices_threads`.
os.environ.setdefault("PJRT_NPROC", "64")
# Many tests compile the same tiny programs, several of them in processes of their own: compile once.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "t5style-jax-cache")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Compiled programs live as long as the process: of 160 files' tests they took 6 GB, and once XLA crashed
    loading one more. The compile cache has those that another file needs again.
    """
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
