"""Generated code that misbehaves in every way: a named verdict, and nothing of it is left."""

import contextlib
import os
import pathlib
import subprocess
import sys
import time

import pytest

from t5style.run_dir import UserError
from t5style.tune import sandbox, sandbox_program
from t5style.tune.sandbox import Sandbox

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is for Linux")

BOX = Sandbox(seconds=1.5, memory=256 << 20, disk=2 << 20, output=1 << 18)

PROGRAMS = {
    "passed": "x = sum(range(10))\nassert x == 45",
    "failed": "assert 1 == 2, 'no'",
    "error": "1 / 0",
    "exit": "import sys; sys.exit(0)",
    "killed": "import os; os._exit(0)",
    "time": "import signal, time\nfor s in range(1, 64):\n  try: signal.signal(s, signal.SIG_IGN)\n"
    "  except (OSError, ValueError): pass\nwhile True: time.sleep(1)",
    "memory": "a = []\nwhile True: a.append(bytearray(10**7))",
    "processes": "import os\nwhile True: os.fork()",
    "disk": "i = 0\nwhile True:\n  i += 1\n  open(f'f{i}', 'wb').write(b'0' * 10**6)",
    "output": "while True: print('x' * 10000)",
}


def programs() -> list[str]:
    """Command lines of this process's sandboxes."""
    found = []
    for process in sandbox_program._family(os.getpid()):
        with contextlib.suppress(OSError):
            found.append(pathlib.Path(f"/proc/{process}/cmdline").read_text())
    return [text for text in found if "sandbox_program.py" in text]


@pytest.fixture(scope="module", autouse=True)
def _possible():
    try:
        BOX.run([("answer", "")])
    except UserError as error:
        pytest.skip(f"this machine allows no sandbox: {error}")


@pytest.mark.parametrize("expected", PROGRAMS)
def test_every_end_has_its_verdict(expected):
    verdict = BOX.run([("answer", PROGRAMS[expected])])
    assert verdict.verdict == expected, verdict
    assert verdict.passed == (expected == "passed")
    assert verdict.seconds < 6


def test_parts_share_a_module_and_tracebacks_name_them():
    assert BOX.run([("answer", "def f(x): return x + 1"), ("tests", "assert f(1) == 2")]).passed
    verdict = BOX.run([("answer", "def f(x): return x - 1"), ("tests", "print('so far')\nassert f(1) == 2")])
    assert verdict.verdict == "failed"
    assert "<tests>" in verdict.text
    assert verdict.output == "so far\n"


def test_what_forks_and_hides_is_gone_and_so_is_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.tempfile, "tempdir", str(tmp_path))
    code = "import os, sys, time\nif os.fork() == 0:\n  os.setsid()\n  if os.fork() == 0:\n"
    code += "    open('kept', 'w').write('x')\n    time.sleep(60)\n"
    before = time.monotonic()
    assert BOX.run([("answer", code)]).passed
    assert time.monotonic() - before < 5
    assert not list(tmp_path.iterdir())
    assert not programs()


def test_a_program_reaches_neither_its_parents_nor_the_network_nor_other_files(tmp_path):
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    target = tmp_path / "written"
    tmp_path.chmod(0o777)
    code = f"""
import os, signal, socket
for process in [os.getppid(), -1, {victim.pid}, {os.getpid()}]:
    try: os.kill(process, signal.SIGKILL)
    except OSError: pass
for action in [lambda: open({str(target)!r}, 'w'), lambda: os.unlink({__file__!r}),
               lambda: socket.create_connection(('127.0.0.1', 22), timeout=1)]:
    try: action()
    except OSError: pass
    else: print('reached')
print(sorted(os.environ))
"""
    try:
        verdict = BOX.run([("answer", code)])
        assert verdict.verdict == "passed", verdict
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()
    assert "PATH" not in verdict.output
    assert "HOME" not in verdict.output
    assert pathlib.Path(__file__).exists()
    if verdict.isolation == "namespaces":
        assert "reached" not in verdict.output
        assert not target.exists()


@pytest.mark.parametrize("expected", ["passed", "processes", "disk", "memory"])
def test_without_namespaces_the_limits_hold_too(expected):
    box = Sandbox(seconds=1.5, memory=256 << 20, disk=2 << 20, weak=True)
    verdict = box.run([("answer", PROGRAMS[expected])], namespaces=False)
    assert verdict.isolation in ("user", "none")
    assert verdict.verdict == expected, verdict


def test_bad_limits():
    with pytest.raises(ValueError, match="memory is 0; it must be above 0"):
        Sandbox(memory=0)
