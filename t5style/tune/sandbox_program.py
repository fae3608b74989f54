"""The program in which generated code runs: `python -I sandbox_program.py`, a JSON request in, a verdict out.

Three processes, so that whatever the code does, somebody outside of its reach ends it:

    the supervisor   reads the request, watches time, memory, processes, disk and output, and kills
    the init         the first process of a new PID namespace: when it dies, the kernel kills all in there,
                     also what has forked, ignored signals, or begun a session of its own
    the worker       no rights, limits of its own, an own tmpfs for a folder, everything else read-only or
                     hidden, no network; it runs the code

Where the machine allows no namespaces, root becomes a user that nobody else is, whose processes are killed as
one, and anybody else is refused unless the request says `weak`. It keeps accidents and cheap tricks from the
machine; it is no wall against those who know a hole in the kernel. This file imports nothing of the package
and nothing but the standard library, and starts in 20 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any

TICK = 0.02  # seconds between two looks at what the code uses
KEPT = 4000  # characters of output that are told
# What systemd gives to services that need a user for a while.
FIRST_USER, USERS = 61184, 4336
HIDDEN = ("/run", "/home", "/root", "/dev/shm", "/dev/mqueue", "/mnt", "/media", "/srv", "/proc")

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_PDEATHSIG, _SUBREAPER, _NO_NEW_PRIVS, _DUMPABLE = 1, 36, 38, 4
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_RDONLY, _ATTR_NOSUID = 442, 0x8000, 1, 2
_AT_FDCWD = -100
_CAPSET = {"x86_64": 126, "aarch64": 91}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    """A function of the C library; OSError where it fails."""
    if getattr(_libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


# ------------------------------------------------------------------------------------------------- the worker


def _limit(limits: dict[str, Any], user: int | None, namespace: bool) -> None:
    import resource

    seconds = int(limits["seconds"]) + 1
    # Counted by user: in a user namespace supervisor and init are among them, and
    # without one all that he has, so that only the supervisor's count is left.
    processes = (
        limits["processes"] + 2 * (user is None) if user is not None or namespace else resource.RLIM_INFINITY
    )
    for what, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits["memory"]),
        (resource.RLIMIT_FSIZE, limits["disk"]),
        (resource.RLIMIT_NOFILE, limits["files"]),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(what)
        if hard != resource.RLIM_INFINITY:
            value = hard if value == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(what, (value, value))


def _no_rights(user: int | None) -> None:
    """Another user where there is one to become; and no capabilities."""
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    _call("prctl", _NO_NEW_PRIVS, 1, 0, 0, 0)
    number = _CAPSET.get(os.uname().machine)
    if number is not None:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        _call("syscall", number, header, (ctypes.c_uint32 * 6)())


def _kind(error: BaseException) -> str:
    """The verdict of an exception."""
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError):
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return "disk"
        if error.errno == errno.EAGAIN:
            return "processes"
        if error.errno == errno.ENOMEM:
            return "memory"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return "processes"
    if isinstance(error, AssertionError):
        return "failed"
    return "exit" if isinstance(error, SystemExit) else "error"


def _work(request: dict[str, Any], user: int | None, output: int, report: int, namespace: bool) -> None:
    """Runs the parts of the code in one namespace, each as a file of its own; never returns."""
    limits, folder = request["limits"], request["folder"]
    verdict, text, worker = "error", "", os.getpid()
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.dup2(report, 3)
        os.closerange(4, 65536)
        with contextlib.suppress(OSError):
            os.nice(5)
        os.chdir(folder)  # while the way to it is open
        _no_rights(user)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _limit(limits, user, namespace)
        names: dict[str, Any] = {"__name__": "__main__", "__builtins__": __builtins__}
        for name, source in request["parts"]:
            exec(compile(source, f"<{name}>", "exec"), names)
        verdict = "passed"
    except BaseException as error:  # whatever the code does is the code's error
        verdict = _kind(error)
        with contextlib.suppress(BaseException):
            text = "".join(traceback.format_exception(error, limit=-3))
    try:
        if os.getpid() != worker:  # a process that the code has forked, at its end
            os._exit(0)
        # Only who got here knows the word: code that leaves early has not passed.
        message = {"word": request["word"], "verdict": verdict, "text": text[-KEPT:]}
        with contextlib.suppress(Exception):  # the code may have closed or replaced it
            sys.stdout.flush()
        os.write(3, json.dumps(message).encode())
    finally:
        os._exit(0)


# --------------------------------------------------------------------------------------------------- the init


def _seal(request: dict[str, Any]) -> None:
    """Makes the file system read-only, hides what is nobody's business, and gives the code a folder of its
    own, whose size is limited.
    """

    def mount(source: bytes, target: str, kind: bytes | None, flags: int, data: bytes | None) -> None:
        _call("mount", source, target.encode(), kind, ctypes.c_ulong(flags), data)

    folder = request["folder"]
    mount(b"none", "/", None, _MS_REC | _MS_PRIVATE, None)
    attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY | _ATTR_NOSUID, 0, 0, 0)
    _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE, attributes, ctypes.c_size_t(32))
    size = f"size={request['limits']['disk']},nr_inodes=4096,mode=1777".encode()
    mount(b"tmpfs", folder, b"tmpfs", _MS_NOSUID | _MS_NODEV, size)
    # What Python needs of a hidden place is bound into it again, so that it may lie in somebody's home.
    needed = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, folder, *sys.path) if path}
    tops = [path for path in needed if os.path.isdir(path) and not any(_is_in(path, n) for n in needed)]
    opened = {path: os.open(path, os.O_PATH) for path in tops}
    for place in HIDDEN:  # /proc last: the descriptors are reached through it
        if not os.path.isdir(place):
            continue
        inside = [path for path in tops if _is_in(path, place)]
        mount(b"tmpfs", place, b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=64k,mode=755")
        for path in inside:
            os.makedirs(path, mode=0o755)
            mount(f"/proc/self/fd/{opened[path]}".encode(), path, None, _MS_BIND | _MS_REC, None)
        attributes = (ctypes.c_uint64 * 4)(_ATTR_RDONLY, 0, 0, 0)
        _call("syscall", _MOUNT_SETATTR, _AT_FDCWD, place.encode(), 0, attributes, ctypes.c_size_t(32))


def _is_in(path: str, place: str) -> bool:
    return path.startswith(place.rstrip("/") + "/")


def _init(request: dict[str, Any], user: int | None, output: int, report: int) -> None:
    """The first process of the PID namespace: seals, starts the worker, and ends with it."""
    try:
        _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _call("unshare", _NEWNS | _NEWNET | _NEWIPC)
        _seal(request)
        worker = os.fork()
        if not worker:
            _work(request, user, output, report, True)
        os.close(output)
        os.close(report)
        while True:
            found, status = os.wait()
            if found == worker:
                os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    except OSError as error:
        os.write(report, json.dumps({"no_namespaces": str(error)}).encode())
    finally:
        os._exit(0)


# --------------------------------------------------------------------------------------------- the supervisor


def _pid_namespace(user: int | None) -> bool:
    """Whether the next child is the first process of a new PID namespace."""
    try:
        if user is not None:  # root needs no user namespace, and the worker is somebody else
            _call("unshare", _NEWPID)
            return True
        me, group = os.getuid(), os.getgid()
        _call("unshare", _NEWUSER | _NEWPID)
        for file, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{me} {me} 1"),
            ("gid_map", f"{group} {group} 1"),
        ):
            with open(f"/proc/self/{file}", "w") as stream:
                stream.write(text)
        return True
    except OSError:
        return False


def _family(root: int) -> dict[int, int]:
    """Bytes in memory of a process and of all that descend from it, by process."""
    parents, sizes, page = {}, {}, os.sysconf("SC_PAGESIZE")
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as stream:
                fields = stream.read().rsplit(b")", 1)[1].split()
        except (OSError, IndexError):
            continue
        if fields[0] != b"Z":
            parents[int(name)], sizes[int(name)] = int(fields[1]), int(fields[21]) * page
    children: dict[int, list[int]] = {}
    for child, parent in parents.items():
        children.setdefault(parent, []).append(child)
    found, waiting = {}, [root]
    while waiting:
        process = waiting.pop()
        if process in sizes and process not in found:
            found[process] = sizes[process]
        waiting += children.get(process, [])
    return found


def _shared_once(family: dict[int, int]) -> int:
    """Bytes in memory of processes, what they share counted once."""
    total = 0
    for process, size in family.items():
        try:
            with open(f"/proc/{process}/smaps_rollup", "rb") as stream:
                text = stream.read()
            total += int(text.split(b"\nPss:")[1].split()[0]) << 10
        except (OSError, IndexError):
            total += size
    return total


def _folder_bytes(folder: str) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total


def _kill_all(first: int, user: int | None, namespace: bool) -> None:
    """Ends the code, all that it has started, and waits until they are gone."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if namespace:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
        elif user is not None:
            if not (helper := os.fork()):
                with contextlib.suppress(OSError):
                    os.setresuid(user, user, user)
                    os.kill(-1, signal.SIGKILL)
                os._exit(0)
            os.waitpid(helper, 0)
        else:
            mine = _family(os.getpid())
            for how in (signal.SIGSTOP, signal.SIGKILL):  # what is stopped forks no more
                for process in mine.keys() - {os.getpid()}:
                    with contextlib.suppress(OSError):
                        os.kill(process, how)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _watch(request: dict[str, Any], first: int, output: int, report: int, namespace: bool) -> dict[str, Any]:
    """Waits until the code has ended or passed a limit; the verdict."""
    limits, began = request["limits"], time.monotonic()
    full, supervised = f"all of {limits['processes']} processes", int(namespace)
    told, said, total, most = b"", b"", 0, 0
    pipes = {output, report}
    looked = 0.0
    while True:
        now = time.monotonic()
        if now - began > limits["seconds"]:
            late = f"not done after {limits['seconds']} s"
            if most >= limits["processes"]:
                return {"verdict": "processes", "text": f"{full}; {late}", "said": said}
            return {"verdict": "time", "text": late, "said": said}
        if now - looked >= TICK:
            looked = now
            family = _family(first if namespace else os.getpid())
            family.pop(os.getpid(), None)
            most = max(most, len(family) - supervised)
            if most > limits["processes"]:
                return {"verdict": "processes", "text": full, "said": said}
            if sum(family.values()) > limits["memory"] and _shared_once(family) > limits["memory"]:
                text = f"more than {limits['memory'] >> 20} MiB in all its processes"
                return {"verdict": "memory", "text": text, "said": said}
            if not namespace and _folder_bytes(request["folder"]) > limits["disk"]:
                text = f"more than {limits['disk'] >> 20} MiB of files"
                return {"verdict": "disk", "text": text, "said": said}
        ready, _, _ = select.select(list(pipes), [], [], TICK)
        for pipe in ready:
            data = os.read(pipe, 65536)
            if not data:
                pipes.discard(pipe)
            elif pipe == report:
                told += data
            else:
                total += len(data)
                said = (said + data)[-KEPT:]
        if total > limits["output"]:
            text = f"more than {limits['output']:,} bytes of output"
            return {"verdict": "output", "text": text, "said": said}
        # The worker writes its report last; who holds the pipe without it has died.
        if told or report not in pipes:
            break
        if os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None and not ready:
            break
    try:
        message = json.loads(told)
    except ValueError:
        message = {}
    if "no_namespaces" in message:
        return {"verdict": "refused", "text": message["no_namespaces"], "said": b""}
    if message.get("word") != request["word"]:
        if most >= limits["processes"]:
            return {"verdict": "processes", "text": full, "said": said}
        return {"verdict": "killed", "text": "it ended before its last line", "said": said}
    return {"verdict": message["verdict"], "text": message["text"], "said": said}


def run(request: dict[str, Any]) -> dict[str, Any]:
    """{"verdict", "text", "said", "isolation", "seconds"} of a request, see sandbox.Sandbox."""
    began = time.monotonic()
    user = FIRST_USER + os.getpid() % USERS if os.getuid() == 0 else None
    output, into_output = os.pipe()
    report, into_report = os.pipe()
    namespace = request["namespaces"] and _pid_namespace(user)
    if not namespace and not request["other_user"]:  # who could not read the interpreter
        user = None
    if not namespace and user is None and not request["weak"]:
        return {"verdict": "refused", "text": "neither namespaces nor another user", "isolation": "none"}
    if not namespace:
        _call("prctl", _SUBREAPER, 1, 0, 0, 0)
        if user is not None:
            os.chown(request["folder"], user, user)
    first = os.fork()
    if not first:
        os.close(output)
        os.close(report)
        if namespace:
            _init(request, user, into_output, into_report)
        _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _work(request, user, into_output, into_report, False)
    os.close(into_output)
    os.close(into_report)
    try:
        result = _watch(request, first, output, report, namespace)
    finally:
        _kill_all(first, user, namespace)
    result["said"] = result["said"].decode("utf-8", "replace")
    isolation = "namespaces" if namespace else "none" if user is None else "user"
    return result | {"isolation": isolation, "seconds": time.monotonic() - began}


def main() -> None:
    """Answers the request on standard input."""
    _call("prctl", _PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    request = json.loads(sys.stdin.read())
    sys.stdout.write(json.dumps(run(request)))


if __name__ == "__main__":
    main()
