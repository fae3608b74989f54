"""Roll call of processes before JAX's own start-up.

`jax.distributed.initialize` aborts the process (a C++ fatal error without a name in it) when a process does
not come. So every process first reports to process 0 over a plain TCP connection, on the very port that JAX
will use next. When all are there, process 0 lets them go on; when the time is over, everybody who came learns
who did not.

Protocol: a client sends one line of JSON, {"process", "processes", "host"}, and gets one line back, {"error"}
with null or a sentence. The client closes first, so that no half-closed connection holds the port when JAX
opens it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
import select
import socket
import time
from collections.abc import Mapping
from typing import Any

from t5style.run_dir import UserError

_LINE_LIMIT = 1 << 16


def has_tpu() -> bool:
    """Whether this machine has TPU chips that the program may use, found without starting JAX's backend."""
    chips = any(pathlib.Path("/dev").glob("accel[0-9]*")) or any(pathlib.Path("/dev/vfio").glob("[0-9]*"))
    return (
        chips and importlib.util.find_spec("libtpu") is not None and os.environ.get("JAX_PLATFORMS") != "cpu"
    )


class StartupError(UserError):
    """The processes of a run did not find each other."""


def roll_call(
    address: str,
    num_processes: int,
    process_id: int,
    timeout: float,
    hosts: Mapping[int, str] | None = None,
) -> None:
    """Returns when all `num_processes` processes have reported at `address` (`host:port` of process 0).

    Args:
      hosts: host names by process, where the environment tells them; only for the error.

    Raises:
      StartupError: in every process that came, after at most `timeout` seconds (and a few more for the
        message), with the absent processes; or at once, when two processes claim the same number or disagree
        on how many they are.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise StartupError(
            f"The coordinator address {address!r} must be HOST:PORT, for example 10.0.0.2:8476."
        )
    if process_id == 0:
        _lead(int(port), num_processes, timeout, hosts or {})
    else:
        _report(host.strip("[]"), int(port), num_processes, process_id, timeout)


def _lead(port: int, num_processes: int, timeout: float, hosts: Mapping[int, str]) -> None:
    """Process 0: counts the others and answers them all."""
    deadline = time.monotonic() + timeout
    present: dict[int, tuple[str, socket.socket]] = {}
    answered: list[socket.socket] = []
    error: str | None = None
    try:
        server = _listen(port)
    except OSError as problem:
        raise StartupError(
            f"Process 0 cannot listen on port {port} ({problem.strerror or problem}): another program has "
            "it, so give COORDINATOR_ADDRESS another port."
        ) from problem
    with server:
        while error is None:
            # Who has gone again (it was stopped, and is started anew) does not count as present.
            present = {process: it for process, it in present.items() if not _closed(it[1])}
            if len(present) == num_processes - 1:
                break
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                error = _absence(num_processes, present, hosts, timeout)
                break
            # A client writes at once; whoever does not (a port scanner) must not use up the others' time.
            connection.settimeout(5.0)
            try:
                message = _read(connection)
                process, processes, host = (
                    int(message["process"]),
                    int(message["processes"]),
                    str(message["host"]),
                )
            except (OSError, ValueError, KeyError, TypeError):
                connection.close()
                continue
            answered.append(connection)
            if processes != num_processes:
                error = (
                    f"Process {process} on {host} was told there are {processes} processes, process 0 on "
                    f"{socket.gethostname()} that there are {num_processes}: give both the same "
                    "NUM_PROCESSES."
                )
            elif not 0 < process < num_processes:
                error = (
                    f"{host} says it is process {process}, which is not a free number from 1 to "
                    f"{num_processes - 1}: give each process a PROCESS_ID of its own."
                )
            elif process in present and not _closed(present[process][1]):
                error = (
                    f"Two programs say they are process {process}, on {present[process][0]} and on {host}: "
                    f"give each a PROCESS_ID of its own from 0 to {num_processes - 1}."
                )
            else:
                present[process] = (host, connection)
    for connection in answered:
        with (
            connection,
            contextlib.suppress(OSError),
        ):  # who has gone meanwhile is noticed by JAX's own start-up
            connection.sendall(json.dumps({"error": error}).encode() + b"\n")
            connection.recv(1)  # the client's close
    if error is not None:
        raise StartupError(error)


def _closed(connection: socket.socket) -> bool:
    """Whether the peer has closed; it never sends a second line, so anything readable is its end."""
    return bool(select.select([connection], [], [], 0)[0])


def _absence(num_processes: int, present: Mapping[int, Any], hosts: Mapping[int, str], timeout: float) -> str:
    absent = [process for process in range(1, num_processes) if process not in present]
    named = [f"{process} ({hosts[process]})" if process in hosts else str(process) for process in absent[:16]]
    more = f" and {len(absent) - 16} more" if len(absent) > 16 else ""
    return (
        f"After {timeout:g} s only {num_processes - len(absent)} of {num_processes} processes have started; "
        f"absent: {', '.join(named)}{more}. Start the same command on every host, or look there for why it "
        "ended (longer waiting: T5STYLE_STARTUP_TIMEOUT)."
    )


def _report(host: str, port: int, num_processes: int, process_id: int, timeout: float) -> None:
    deadline = time.monotonic() + timeout
    message = {"process": process_id, "processes": num_processes, "host": socket.gethostname()}
    problem: Exception | None = None
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=min(10.0, timeout)) as connection:
                connection.sendall(json.dumps(message).encode() + b"\n")
                # Process 0 may have started later than we did: leave it its whole time to count the others.
                connection.settimeout(timeout + 10.0)
                reply = _read(connection)
            if reply["error"] is not None:
                raise StartupError(str(reply["error"]))
            return
        except (OSError, ValueError, KeyError) as again:
            problem = again
            time.sleep(min(0.2, timeout / 10))
    raise StartupError(
        f"Process {process_id} on {socket.gethostname()} did not reach process 0 at {host}:{port} within "
        f"{timeout:g} s ({problem}): start process 0, or correct COORDINATOR_ADDRESS or the firewall."
    )


def _listen(port: int) -> socket.socket:
    """Listening socket on all interfaces, IPv6 and IPv4 where the machine has both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return socket.create_server(("", port), backlog=1024)


def _read(connection: socket.socket) -> dict[str, Any]:
    """One line of JSON.

    Raises:
      ValueError: the peer closed early or sent something else.
      TimeoutError: nothing came within the connection's timeout.
    """
    line = b""
    while not line.endswith(b"\n"):
        part = connection.recv(4096)
        if not part or len(line) > _LINE_LIMIT:
            raise ValueError("the connection was closed before a whole line came")
        line += part
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("the line is not a JSON object")
    return message
