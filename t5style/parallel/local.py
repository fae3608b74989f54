"""Runs a command as several processes on this machine, each with its own CPU devices.

    python -m t5style.parallel.local --processes=2 --devices=4 -- \
        python -m t5style.main --gin_file=experiments/quickstart.gin

What runs on several hosts can so be tried on one: the processes find each other through the same environment
variables (COORDINATOR_ADDRESS, NUM_PROCESSES, PROCESS_ID) as on a cluster. Each line of output is preceded by
the number of its process. SIGINT and SIGTERM are passed on; when a process fails, the others are stopped. The
exit status is 0 if all ended with 0, else that of the first that failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

# How long the others may take to stop by themselves when one has failed, in seconds.
GRACE = 10.0


def environment(
    base: Mapping[str, str], port: int, processes: int, process: int, devices: int
) -> dict[str, str]:
    """Environment of one of the processes: `devices` CPU devices, and where the others are."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", base.get("XLA_FLAGS", ""))
    return {
        **base,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        "COORDINATOR_ADDRESS": f"localhost:{port}",
        "NUM_PROCESSES": str(processes),
        "PROCESS_ID": str(process),
    }


def run(command: Sequence[str], processes: int, devices: int, out: IO[bytes] | None = None) -> int:
    """Runs the command in `processes` processes and waits for them.

    Args:
      out: where the processes' output goes (both streams, line by line); None is this process's standard
        output.

    Returns:
      0 if all ended with 0, else the status of the first that failed (128 + signal for one that was killed).
    """
    out = sys.stdout.buffer if out is None else out
    port = free_port()
    children: list[subprocess.Popen[bytes]] = []
    copiers: list[threading.Thread] = []
    writing = threading.Lock()

    def copy(process: int, pipe: IO[bytes]) -> None:
        for line in pipe:
            with writing:
                out.write(b"[%d] %s" % (process, line if line.endswith(b"\n") else line + b"\n"))
                out.flush()

    def forward(number: int, frame: object) -> None:
        del frame
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for process in range(processes):
            child = subprocess.Popen(
                command,
                env=environment(os.environ, port, processes, process, devices),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches the children once, through `forward`
            )
            children.append(child)
            assert child.stdout is not None
            copiers.append(threading.Thread(target=copy, args=(process, child.stdout), daemon=True))
            copiers[-1].start()
        failed = _first_failure(children)
        deadline = time.monotonic() + GRACE
        for child in children if failed else ():
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        for child in children:
            try:
                child.wait(max(0.0, deadline - time.monotonic()) if failed else None)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for copier in copiers:
            copier.join()
        return failed
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
        for number, handler in before.items():
            signal.signal(number, handler)


def _first_failure(children: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all have ended with 0 (returns 0) or one has not (returns its status)."""
    while True:
        statuses = [child.poll() for child in children]
        for status in statuses:
            if status:
                return status if status > 0 else 128 - status
        if None not in statuses:
            return 0
        time.sleep(0.05)


def free_port() -> int:
    """A TCP port that nobody listens on just now."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m t5style.parallel.local",
        description="Runs a command as several processes on this machine.",
    )
    parser.add_argument("--processes", type=int, default=2, help="how many processes")
    parser.add_argument("--devices", type=int, default=4, help="CPU devices of each process")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command, after --")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command or options.processes < 1 or options.devices < 1:
        parser.error("give at least one process, one device, and a command after --")
    try:
        return run(command, options.processes, options.devices)
    except FileNotFoundError:
        parser.error(f"there is no program {command[0]!r}")


if __name__ == "__main__":
    sys.exit(main())
