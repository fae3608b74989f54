"""Several processes as one program: start-up from the environment, barriers, agreement.

Which processes there are is read from the environment, in this order:

1. `COORDINATOR_ADDRESS` (host:port of process 0), `NUM_PROCESSES` and `PROCESS_ID`: all three or none.
2. Cloud TPU on GKE (or any set-up that names the workers): `TPU_WORKER_HOSTNAMES` (or
   `TPU_PROCESS_ADDRESSES`) and `TPU_WORKER_ID`; several slices add `MEGASCALE_COORDINATOR_ADDRESS`,
   `MEGASCALE_NUM_SLICES`, `MEGASCALE_SLICE_ID`.
3. Cloud TPU VMs: the same facts from the machine's metadata server.
4. Otherwise there is one process and nothing to start.

`T5STYLE_STARTUP_TIMEOUT` (seconds, default 300) is how long processes wait for each other.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping

import jax
from jax._src import distributed as coordination  # no public name for the service's barrier

from t5style.parallel.rendezvous import StartupError, has_tpu, roll_call

# The port that JAX itself takes on Cloud TPU, where nobody names one.
TPU_COORDINATOR_PORT = 8482
_FOREVER = 30 * 24 * 3600 * 1000  # ms
_GRACE = 10_000  # ms
_visits: collections.Counter[str] = collections.Counter()


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Who takes part: `host:port` of process 0, how many processes, which one this is, host names where
    known."""

    coordinator: str
    num_processes: int
    process_id: int
    hosts: Mapping[int, str] = dataclasses.field(default_factory=dict)


def initialize() -> bool:
    """Joins the processes that the environment names; call it before anything touches a device.

    Returns:
      Whether there are several processes. A second call does nothing.

    Raises:
      StartupError: the environment is incomplete, or processes are absent after the timeout (they are named).
    """
    if jax.distributed.is_initialized():
        return True
    give_cpu_devices_threads()
    timeout = _startup_timeout()
    cluster = find_cluster()
    if cluster is None or cluster.num_processes == 1:
        return False
    roll_call(cluster.coordinator, cluster.num_processes, cluster.process_id, timeout, cluster.hosts)
    jax.distributed.initialize(
        coordinator_address=cluster.coordinator,
        num_processes=cluster.num_processes,
        process_id=cluster.process_id,
        initialization_timeout=max(1, round(timeout)),
        cluster_detection_method="deactivate",
    )
    return True


def give_cpu_devices_threads() -> None:
    """Lets several CPU devices of one process wait for each other without running out of threads.

    XLA's CPU client runs all its devices on one pool of max(cores, devices) threads. A device occupies a
    thread for each collective that it waits in, and may wait in several at once: with 8 devices on 2 cores
    all threads came to wait, and the process aborted after 40 s (three of some ten trials of a few dozen
    steps); with 64 threads none of 52 did. To be called before the backend starts.
    """
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    if flags and int(flags[-1]) > 1:
        os.environ.setdefault("PJRT_NPROC", str(8 * int(flags[-1])))


def leave(status: int) -> int:
    """Ends this process with `status` if it is one of several; alone, it only returns `status`.

    The processes leave together, because process 0 holds the service that the others need; but one that
    failed (or was stopped) waits no longer than `_GRACE` for the others, which may be waiting for it.
    At a normal exit jax would wait for them 300 s. The interpreter's own end is left out, because taking
    down the devices' collectives can hang (seen once: killed 110 s after the other process had ended well).
    """
    if not jax.distributed.is_initialized():
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    client = coordination.global_state.client
    assert client is not None  # made by `initialize`
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the others do not come, or the service is gone
        client.wait_at_barrier("t5style/leave", _GRACE if status else _FOREVER)
        jax.distributed.shutdown()
    os._exit(status)


def index() -> int:
    """The number of this process. `jax.process_index()` would start the devices."""
    return coordination.global_state.process_id


def is_main() -> bool:
    """Whether this is process 0, the one that writes and speaks."""
    return index() == 0


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name, however long that takes.

    It goes through the coordination service and not through the devices
    (`multihost_utils.sync_global_devices`): CPU devices give up after 30 s, and process 0 may be alone at
    work for hours. A process that dies is noticed by its missing heartbeat, which ends the others too.
    """
    client = coordination.global_state.client
    if client is not None:  # there are several processes
        _visits[name] += 1  # the service wants a new name each time
        client.wait_at_barrier(f"t5style/{name}/{_visits[name]}", _FOREVER)


def check_same(facts: Mapping[str, str]) -> None:
    """Checks that every process has the same facts, for example {'configuration': its fingerprint}.

    It goes through the coordination service: no device is touched, nothing allocated.

    Raises:
      StartupError: in every process, naming the hosts that differ from most (of two groups of one size, from
        that of the lower process), and in what.
    """
    client = coordination.global_state.client
    if client is None:
        return
    _visits["same"] += 1
    folder = f"t5style/same/{_visits['same']}/"
    client.key_value_set(
        f"{folder}{index()}", json.dumps({"host": socket.gethostname(), "facts": dict(facts)})
    )
    barrier("same")
    everyone = {
        int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in client.key_value_dir_get(folder)
    }
    if problem := _disagreement({k: (v["host"], v["facts"]) for k, v in sorted(everyone.items())}):
        raise StartupError(problem)


def _disagreement(everyone: Mapping[int, tuple[str, Mapping[str, str]]]) -> str | None:
    """Who has other facts than most: process → (host, facts) in order of processes; None if nobody has."""
    names = list(dict.fromkeys(name for _, facts in everyone.values() for name in facts))
    odd: dict[int, list[str]] = {}
    wrong: list[str] = []
    for name in names:
        values = {process: facts.get(name, "nothing") for process, (_, facts) in everyone.items()}
        usual, many = collections.Counter(values.values()).most_common(1)[0]  # the first of equals
        leader = next(process for process, value in values.items() if value == usual)
        others = f" and {many - 1} more" if many > 1 else ""
        for process, value in values.items():
            if value != usual:
                wrong.append(name)
                odd.setdefault(process, []).append(
                    f"has {name} {value}, where process {leader} on {everyone[leader][0]}{others} has {usual}"
                )
    if not odd:
        return None
    told = [
        f"process {process} on {everyone[process][0]} {', and '.join(what)}"
        for process, what in sorted(odd.items())
    ]
    return (
        f"The hosts do not run the same {' and '.join(dict.fromkeys(wrong))}: {'; '.join(told[:8])}"
        f"{f'; and {len(told) - 8} processes more' if len(told) > 8 else ''}. "
        "Give every host the same code, packages, gin files and flags."
    )


def find_cluster() -> Cluster | None:
    """The processes that the environment names, or None when it names none.

    Raises:
      StartupError: it names them incompletely.
    """
    return _from_variables() or _from_tpu_variables() or _from_metadata()


def _startup_timeout() -> float:
    given = os.environ.get("T5STYLE_STARTUP_TIMEOUT", "300")
    try:
        timeout = float(given)
    except ValueError:
        timeout = 0.0
    if timeout <= 0:
        raise StartupError(f"T5STYLE_STARTUP_TIMEOUT={given!r} must be a number of seconds above 0.")
    return timeout


def _from_variables() -> Cluster | None:
    names = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")
    given = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not given:
        return None
    missing = [name for name in names if name not in given]
    if missing:
        raise StartupError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set but {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not: set all of {', '.join(names)} for several "
            "processes, or none."
        )
    count, process = (
        _number("NUM_PROCESSES", given["NUM_PROCESSES"]),
        _number("PROCESS_ID", given["PROCESS_ID"]),
    )
    if count < 1 or process >= count:
        raise StartupError(f"PROCESS_ID={process} must be from 0 to NUM_PROCESSES - 1 = {count - 1}.")
    return Cluster(given["COORDINATOR_ADDRESS"], count, process)


def _from_tpu_variables() -> Cluster | None:
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if not workers:
        return None
    if "TPU_WORKER_ID" not in os.environ:
        raise StartupError(
            "TPU_WORKER_HOSTNAMES is set but TPU_WORKER_ID is not: give each worker its number."
        )
    worker = _number("TPU_WORKER_ID", os.environ["TPU_WORKER_ID"])
    return _tpu_cluster([part.split(":")[0] for part in workers.split(",")], worker, os.environ)


def _from_metadata() -> Cluster | None:
    """Facts of a Cloud TPU VM; its metadata server is asked only on a machine that has TPU chips."""
    if not has_tpu():
        return None
    endpoints, number = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
    if not endpoints or not number:
        return None
    # Each endpoint is a host name, or name:id:address in the older form.
    workers = [part.split(":")[-1] for part in endpoints.split(",")]
    settings = dict(re.findall(r"^\s*(\w+)\s*:\s*'?([^'\n]*)'?\s*$", _metadata("tpu-env") or "", flags=re.M))
    return _tpu_cluster(workers, _number("agent-worker-number", number), {**settings, **os.environ})


def _tpu_cluster(workers: list[str], worker: int, settings: Mapping[str, str]) -> Cluster:
    """Processes numbered slice by slice, as JAX numbers them on Cloud TPU."""
    slices = _number("MEGASCALE_NUM_SLICES", settings.get("MEGASCALE_NUM_SLICES") or "1")
    this_slice = _number("MEGASCALE_SLICE_ID", settings.get("MEGASCALE_SLICE_ID") or "0")
    leader = (settings.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    first = this_slice * len(workers)
    hosts = {
        process: f"slice {process // len(workers)}, worker {process % len(workers)}"
        for process in range(slices * len(workers))
    }
    hosts.update({first + index: host for index, host in enumerate(workers)})
    return Cluster(f"{leader}:{TPU_COORDINATOR_PORT}", slices * len(workers), first + worker, hosts)


def _metadata(key: str) -> str | None:
    """One attribute from the metadata server, None where there is no server or no such attribute."""
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{key}", headers={"Metadata-Flavor": "Google"}
    )
    try:
        # No proxy: the server is on this machine's own link.
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=10) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        raise StartupError(f"The metadata server answered {error.code} to {key!r}: try again.") from error
    except OSError:
        return None


def _number(name: str, text: str) -> int:
    if not text.strip().isdigit():
        raise StartupError(f"{name}={text!r} must be a whole number from 0.")
    return int(text)
