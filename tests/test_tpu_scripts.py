"""The scripts for TPU machines: the commands that they would run, their settings, and what happens on a host.

No cloud is touched: commands are printed by --dry-run, or go to a `gcloud` of the test's own.
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests import helpers

SCRIPTS = helpers.ROOT / "tpu_scripts"
EXAMPLE = SCRIPTS / "settings.example.env"
NAMES = ("project", "create", "setup", "launch", "stop", "status", "logs", "profile", "delete", "resume")
XPK = ("cluster", "image", "launch", "status", "logs", "stop", "delete-cluster")
JOB = (
    "python -m t5style.main --gin_file=gin/models/t5_1_1_small.gin --gin_file=gin/data/span_corruption.gin "
    "--gin_file=gin/mesh/fsdp.gin --gin_file=gin/optim/adafactor.gin --gin_file=gin/runs/pretrain.gin "
    "--gin.STORE=gs://my-bucket/tokens --gin.RUN_DIR=gs://my-bucket/runs/first"
)


def run(script, *arguments, env=None, settings=EXAMPLE):
    command = ["bash", str(SCRIPTS / f"{script}.sh"), *arguments]
    if settings is not None:
        command.append(f"--settings={settings}")
    environment = {**os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)


def commands(script, *arguments, settings=EXAMPLE):
    """What the script would run, as words; remarks are left out."""
    done = run(script, *arguments, "--dry-run", settings=settings)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines() if not line.startswith("#")]


def changed(tmp_path, **settings):
    """A settings file that differs from the example in these; None leaves a setting out."""
    lines = []
    for line in EXAMPLE.read_text().splitlines():
        name = line.partition("=")[0]
        if name in settings:
            line = f"{name}={settings.pop(name)}"
        lines.append(line)
    lines += [f"{name}={value}" for name, value in settings.items()]
    file = tmp_path / "settings.env"
    file.write_text("\n".join(lines) + "\n")
    return file


def remote(words):
    """The line of shell that a gcloud ssh command runs on the hosts."""
    (command,) = [word.removeprefix("--command=") for word in words if word.startswith("--command=")]
    return command


# ---------------------------------------------------------------------------------------------- as they are


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sh")), ids=lambda file: file.name)
def test_syntax_and_help(script):
    subprocess.run(["bash", "-n", script], check=True)
    if script.name == "common.sh":
        return
    assert os.access(script, os.X_OK)
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {script.name}")
    assert "--dry-run" in done.stdout


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck():
    done = subprocess.run(
        ["shellcheck", "-x", *(file.name for file in SCRIPTS.glob("*.sh"))],
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_every_script_is_in_its_readme():
    readme = (SCRIPTS / "README.md").read_text()
    for name in (*NAMES, "xpk"):
        assert f"{name}.sh" in readme
    # And what it tells to type exists.
    for word in readme.split():
        if word.startswith("tpu_scripts/") and word.endswith(".sh"):
            assert (helpers.ROOT / word).exists(), word


def test_the_example_job_is_one():
    """The job of the example settings is a configuration that t5style accepts."""
    done = helpers.run_main(*shlex.split(JOB)[3:], "--explain")
    assert done.returncode == 0, done.output
    assert "gs://my-bucket/runs/first" in done.stdout


# --------------------------------------------------------------------------------------------- the commands


def test_create():
    create, wait = commands("create")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "t5style"]
    flags = set(create[6:])
    assert {"--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= flags
    assert {"--node-id=t5style", "--project=my-project", "--zone=us-west4-a"} <= flags
    assert "--service-account=t5style-tpu@my-project.iam.gserviceaccount.com" in flags
    assert wait[4:7] == ["describe", "t5style", "--format=value(state.state)"]
    assert commands("create", "--no-wait") == [create]


def test_create_several_slices_in_a_closed_network(tmp_path):
    settings = changed(
        tmp_path,
        SLICES=4,
        ACCELERATOR_TYPE="v5p-128",
        CAPACITY="reserved",
        VALID_FOR="6h",
        NETWORK="inner",
        SUBNETWORK="west",
        SSH_FLAGS="--tunnel-through-iap",
    )
    flags = set(commands("create", settings=settings)[0])
    wanted = ["--node-count=4", "--node-prefix=t5style", "--runtime-version=v2-alpha-tpuv5", "--reserved"]
    wanted += ["--valid-until-duration=6h", "--network=inner", "--subnetwork=west", "--internal-ips"]
    assert flags >= set(wanted)
    assert not any(flag.startswith(("--node-id", "--spot")) for flag in flags)
    for words in commands("setup", settings=settings)[2:]:
        assert words[-3] == "--tunnel-through-iap"


def test_setup_brings_commit_and_changes_to_all_hosts():
    bundle, diff, _, copy, setup = commands("setup")
    assert bundle[:1] + bundle[3:5] == ["git", "bundle", "create"]
    assert diff[3:5] == ["diff", "--binary"]
    assert copy[4] == "scp"
    assert [pathlib.Path(word).name for word in copy[5:8]] == ["code.bundle", "code.patch", "host.sh"]
    assert copy[8:11] == ["t5style:t5style-upload/", "--node=all", "--worker=all"]
    assert remote(setup) == "bash t5style-upload/host.sh setup"


def test_launch_hands_the_job_over_word_by_word(tmp_path):
    settings = changed(
        tmp_path,
        JOB='"--gin_file=a.gin --gin.LENGTHS=\'{\\"decoder\\": 8}\'"'.replace('\\"', '"'),
        ENVIRONMENT="A=1 'B=two words'",
    )
    (launch,) = commands("launch", "--gin.Pretrain.profile_steps=(3, 5)", settings=settings)
    assert {"--node=all", "--worker=all"} <= set(launch)
    words = shlex.split(remote(launch))
    assert words[:5] == ["bash", "t5style/tpu_scripts/host.sh", "start", "A=1", "B=two words"]
    expected = ["--", "python", "-m", "t5style.main", "--gin_file=a.gin", '--gin.LENGTHS={"decoder": 8}']
    expected += ["--gin.RUN_DIR=gs://my-bucket/runs/first", "--gin.Pretrain.profile_steps=(3, 5)"]
    assert words[5:] == expected


def test_the_other_commands():
    assert shlex.split(remote(commands("launch")[0]))[4:] == shlex.split(JOB)
    assert remote(commands("stop")[0]).endswith("host.sh stop")
    assert commands("delete")[0][4:8] == ["delete", "t5style", "--force", "--quiet"]
    (log,) = commands("logs", "--node=1", "--worker=3", "--lines=5")
    assert {"--node=1", "--worker=3"} <= set(log)
    assert remote(log).endswith("host.sh log 5")
    made, traces, stacks = commands("profile", "here")
    assert made == ["mkdir", "-p", "here"]
    assert traces[3:5] == ["gs://my-bucket/runs/first/profile", "here/"]
    assert stacks[3] == "gs://my-bucket/runs/first/stacks"
    first, *_, last = commands("project")
    assert first[1:4] == ["services", "enable", "tpu.googleapis.com"]
    assert last[-1] == "--role=roles/storage.objectAdmin"
    verbs = [words[4] for words in commands("resume") if words[0] == "gcloud"]
    assert verbs == ["list", "create", "delete", "ssh", "ssh", "scp", "ssh", "ssh", "ssh"]


def test_xpk(tmp_path):
    settings = changed(tmp_path, ENVIRONMENT="A=1", SLICES=2)
    (cluster,) = commands("xpk", "cluster", settings=settings)
    assert cluster[:3] == ["xpk", "cluster", "create"]
    assert {"--cluster=t5style", "--tpu-type=v5litepod-16", "--num-slices=2", "--spot"} <= set(cluster)
    (launch,) = commands("xpk", "launch", settings=settings)
    assert launch[:3] == ["xpk", "workload", "create"]
    assert {"--workload=t5style", "--max-restarts=50", "--env=A=1"} <= set(launch)
    assert remote(launch) == f"exec bash tpu_scripts/host.sh run {JOB}"
    for verb in XPK:
        assert commands("xpk", verb, settings=settings)
    done = run("xpk", "lunch")
    assert done.returncode == 1
    assert "xpk.sh needs one of cluster, image, launch" in done.stderr


# --------------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"PROJECT": "My Project"}, "PROJECT='My Project' in"),
        ({"ZONE": "us-west4"}, "ZONE='us-west4' in"),
        ({"NAME": "T5"}, "NAME='T5' in"),
        ({"SLICES": "two"}, "SLICES='two' in"),
        ({"CAPACITY": "cheap"}, "must be spot, on-demand or reserved"),
        ({"VALID_FOR": "soon"}, "must be a time such as 6h or 2d"),
        ({"RUN_DIR": "runs/first"}, "must be gs://BUCKET/FOLDER: the hosts share no disk"),
        ({"ACCELERATOR_TYPE": "v5e-256"}, "gcloud calls it v5litepod-256"),
        ({"ACCELERATOR_TYPE": "v5litepod-24"}, "it comes with 1, 4, 8, 16, 32, 64, 128 or 256 chips"),
        ({"ACCELERATOR_TYPE": "v5p-12"}, "the number is of cores, a multiple of 8"),
        ({"ACCELERATOR_TYPE": "tpu7x-8"}, "this generation is on GKE only: use xpk.sh"),
        ({"ACCELERATOR_TYPE": "h100"}, "must be one of v2-N"),
        ({"JOB": ""}, "must hold the flags of python -m t5style.main"),
        ({"JOB": "--gin_file=a.gin 'b"}, "a quote is not closed"),
        ({"JOB": "--gin_file=a.gin --gin.RUN_DIR=b"}, "must not set RUN_DIR"),
        ({"ENVIRONMENT": "A"}, "'A' is not of the form NAME=value"),
        ({"ZONNE": "us-west4-a"}, "there is no setting 'ZONNE'; there are: PROJECT ZONE"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_one_sentence(tmp_path, settings, message):
    done = run("create", "--dry-run", settings=changed(tmp_path, **settings))
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_bad_files_and_flags(tmp_path):
    for text, message in (
        ("PROJECT", "not of the form NAME=value"),
        ("ZONE=a\nZONE=b", ":2: ZONE is set a second"),
    ):
        file = tmp_path / "s.env"
        file.write_text(text)
        assert message in run("create", settings=file).stderr
    missing = run("create", settings=tmp_path / "none.env")
    assert "there is no settings file" in missing.stderr
    assert "settings.example.env" in missing.stderr
    for script in NAMES:
        done = run(script, "--dryrun")  # must not be taken for something else
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{script}.sh does not know --dryrun" in done.stderr


def test_settings_are_not_run(tmp_path):
    file = changed(tmp_path, JOB=f"--gin_file=$(touch {tmp_path}/ran)", ENVIRONMENT="A=`touch ran`")
    run("launch", "--dry-run", settings=file)
    assert not (tmp_path / "ran").exists()


# ------------------------------------------------------------------------------------------------ on a host

FINISHES = 'import os, pathlib; pathlib.Path(os.environ["T5STYLE_DONE_FILE"]).touch()'
WAITS = """
import signal, sys, time
def stop(*_):
    time.sleep(0.3)  # saves
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(30)
"""


def host(tmp_path, code):
    return subprocess.Popen(
        ["bash", str(SCRIPTS / "host.sh"), "run", sys.executable, "-c", code],
        env={**os.environ, "HOME": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("code", "status", "state"),
    [
        (FINISHES, 0, "done"),
        ("", 143, "stopped"),  # another host was told to stop, and all have saved: 0, but not done
        ("raise SystemExit(1)", 1, "failed 1"),
        ("import os; os._exit(142)", 142, "failed 142"),
    ],
)
def test_how_a_command_ended_is_kept(tmp_path, code, status, state):
    process = host(tmp_path, code)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert (tmp_path / "t5style-state").read_text() == f"{state}\n"


def test_a_stop_is_handed_on_and_waited_for(tmp_path):
    process = host(tmp_path, WAITS)
    for line in process.stdout:
        if line == "ready\n":
            break
    assert (tmp_path / "t5style-state").read_text() == "running\n"
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=60)
    assert "saved" in rest
    assert process.returncode == 143
    assert (tmp_path / "t5style-state").read_text() == "stopped\n"


def test_the_command_makes_the_file_when_it_is_done(tmp_path):
    """What host.sh goes by: t5style.main makes it, but not if it was stopped."""
    text = "launch.run.job = @fake_jobs.Write()\nfake_jobs.Write.text = 'a'\n"
    text += f"launch.run.run_dir = '{tmp_path}/run'\n"
    env = {"T5STYLE_DONE_FILE": str(tmp_path / "done")}
    done = helpers.run_main(f"--gin_file={helpers.gin_file(tmp_path, text)}", env=env)
    assert done.returncode == 0, done.output
    assert (tmp_path / "done").exists()


# ------------------------------------------------------------------------------------------------- resuming

GCLOUD = """#!/usr/bin/env bash
# A cloud with one queued resource, whose state is in the file `state`, and a job, whose state is in `job`.
cd "$CLOUD"
echo "$*" >>calls
case "$*" in
  *" list "*) cat state 2>/dev/null || true ;;
  *" create "*) echo ACTIVE >state; echo empty >job ;;
  *" delete "*) rm state ;;
  *"host.sh state"*) echo "state of w0: $(cat job)"; echo "state of w1: $(cat job)" ;;
  *"host.sh setup"*) echo ready >job ;;
  *"host.sh start"*)
    # Taken away in the first run, done in the second.
    if [ -e preempted ]; then echo done >job; else echo running >job; fi ;;
esac
"""


def test_resume_until_done(tmp_path):
    """Machines are asked for, set up and launched; taken away; asked for again; and the job gets done."""
    (tmp_path / "bin").mkdir()
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.write_text(GCLOUD)
    gcloud.chmod(0o755)
    sleep = tmp_path / "bin" / "sleep"  # POLL_SECONDS are whole ones
    sleep.write_text("#!/bin/sh\nexec /bin/sleep 0.1\n")
    sleep.chmod(0o755)
    env = {**os.environ, "PATH": f"{gcloud.parent}:{os.environ['PATH']}", "CLOUD": str(tmp_path)}
    settings = changed(tmp_path, POLL_SECONDS=1)
    command = ["bash", str(SCRIPTS / "resume.sh"), f"--settings={settings}"]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    try:
        while not (tmp_path / "job").exists() or (tmp_path / "job").read_text() != "running\n":
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.1)
        (tmp_path / "preempted").touch()
        (tmp_path / "state").write_text("SUSPENDED\n")
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, said
    calls = (tmp_path / "calls").read_text()
    verbs = [
        verb
        for line in calls.splitlines()
        for verb in ("create", "delete", "host.sh setup", "host.sh start")
        if f" {verb}" in line or f"/{verb}" in line
    ]
    once = ["create", "host.sh setup", "host.sh start"]
    assert verbs == [*once, "delete", *once]
    starts = [line for line in calls.splitlines() if "host.sh start" in line]
    assert len(set(starts)) == 1  # the same job in the same RUN_DIR
    assert "the machines are gone (SUSPENDED); asking for new ones" in said
    assert "the job is done" in said
