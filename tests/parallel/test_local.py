import io
import os
import signal
import subprocess
import sys
import time

import pytest

from t5style.parallel import local


def python(text):
    return [sys.executable, "-c", text]


def test_each_process_knows_its_place():
    out = io.BytesIO()
    show = "import os; print(os.environ['PROCESS_ID'], os.environ['NUM_PROCESSES'], os.environ['XLA_FLAGS'])"
    assert local.run(python(show), 3, 2, out) == 0
    lines = sorted(out.getvalue().decode().splitlines())
    assert [line.split()[:3] for line in lines] == [[f"[{p}]", str(p), "3"] for p in range(3)]
    assert all(line.count("device_count=") == 1 and line.endswith("device_count=2") for line in lines)


def test_one_failure_stops_the_others_and_gives_the_status():
    fail = "import os, sys, time; sys.exit(7) if os.environ['PROCESS_ID'] == '1' else time.sleep(300)"
    began = time.monotonic()
    assert local.run(python(fail), 2, 1, io.BytesIO()) == 7
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number):
    child = (
        "import signal, sys, time\n"
        f"signal.signal({int(number)}, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(300)"
    )
    command = [
        sys.executable,
        "-m",
        "t5style.parallel.local",
        "--processes=2",
        "--devices=1",
        "--",
        *python(child),
    ]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert sorted([launcher.stdout.readline(), launcher.stdout.readline()]) == ["[0] ready\n", "[1] ready\n"]
    launcher.send_signal(number)
    rest, _ = launcher.communicate(timeout=60)
    assert sorted(rest.splitlines()) == ["[0] saved", "[1] saved"]
    assert launcher.returncode == 0


def test_bad_command_lines(capsys):
    for arguments, words in (
        (["--processes=2", "--"], "a command after --"),
        (["--processes=0", "--", "true"], "at least one process"),
        (["--", "no-such-program-here"], "there is no program 'no-such-program-here'"),
    ):
        with pytest.raises(SystemExit) as end:
            local.main(arguments)
        assert end.value.code == 2
        assert words in capsys.readouterr().err
