"""Gin files: strictness, provenance, saved configurations; and what running them says."""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest

from t5style import launch, run_dir, runner
from t5style.parallel import distributed
from t5style.settings import ConfigError
from tests import fake_jobs, helpers
from tests.helpers import gin_file, run_main

JOB = "launch.run.job = @fake_jobs.Write()\nlaunch.run.run_dir = 'unused'\nfake_jobs.Write.text = 'hi'\n"


def problem(tmp_path: pathlib.Path, text: str, *bindings: str) -> str:
    with pytest.raises(ConfigError) as caught:
        launch.load([gin_file(tmp_path, text)], bindings)
    return str(caught.value)


# Every mistake that a gin file can hold: what is added to a good file -> what the error must say.
MISTAKES = {
    "unused macro": ("STEPS = 3\n", r"test.gin:8: macro STEPS = 3 is used nowhere"),
    "macro not set": (
        "fake_jobs.Write.size = %SIZ\n",
        r"test.gin:8: fake_jobs.Write.size needs macro SIZ, which is set nowhere; .*--gin.SIZ=",
    ),
    "macro misspelt": (
        "fake_jobs.Write.size = %SIZ\nSIZE = 3\n",
        r"needs macro SIZ, which is set nowhere \(did you mean 'SIZE'\?\)",
    ),
    "macro asked for": (
        "fake_jobs.Write.size = %SIZE\nSIZE = %gin.REQUIRED\n",
        r"test.gin:8: .* needs macro SIZE, which is set nowhere \(.*test.gin:9 asks for it\); .*--gin.SIZE=",
    ),
    "macro of itself": ("fake_jobs.Write.size = %A\nA = %B\nB = %A\n", r"macro A contains itself"),
    "field misspelt": (
        "fake_jobs.Write.sise = 3\n",
        r"test.gin:8: fake_jobs.Write has no field 'sise' \(did you mean 'size'\?\)",
    ),
    "class misspelt": (
        "fake_jobs.Wirte.size = 3\n",
        r"test.gin:8: tests.fake_jobs has no 'Wirte' \(did you mean 'Write'\?\)",
    ),
    "reference misspelt": (
        "fake_jobs.Write.part = @fake_jobs.Prat()\n",
        r"test.gin:8: tests.fake_jobs has no 'Prat' \(did you mean 'Part'\?\)",
    ),
    "module misspelt": (
        "fake_job.Write.size = 3\n",
        r"test.gin:8: 'fake_job.Write' .*no import gives 'fake_job' \(did you mean 'fake_jobs'\?\)",
    ),
    "class without module": (
        "Write.size = 3\n",
        r"test.gin:8: 'Write' .*\(did you mean 'fake_jobs.Write'\?\)",
    ),
    "import misspelt": (
        "from t5style import workflwo\n",
        r"test.gin:8: .*no module 'workflwo' in t5style \(did you mean 'workflow'\?\)",
    ),
    "import of a class": (
        "from t5style.workflow import Workflow\n",
        r"test.gin:8: .*only modules are imported: import t5style.workflow, and write workflow.Workflow",
    ),
    "import of nothing": ("import no_such_package\n", r"test.gin:8: .*no module 'no_such_package'"),
    "set twice": (
        "fake_jobs.Write.text = 'ho'\n",
        r"test.gin:8: .*second time in this file \(first at .*:7\)",
    ),
    "set but not used": (
        "fake_jobs.Part.size = 3\n",
        r"test.gin:8: fake_jobs.Part.size is set, but this job uses no fake_jobs.Part",
    ),
    "scope never entered": (
        "other/fake_jobs.Write.size = 3\n",
        r"test.gin:8: other/fake_jobs.Write.size has no effect: nothing uses Write in the scope 'other'",
    ),
    "settings of an uncalled class": (
        "fake_jobs.Write.options = {'make': @fake_jobs.Part}\nfake_jobs.Part.size = 3\n",
        r"test.gin:8: @fake_jobs.Part passes fake_jobs.Part itself.*write @fake_jobs.Part\(\)",
    ),
    "bad syntax": ("fake_jobs.Write.size 3\n", r"test.gin:8: .* in the line 'fake_jobs.Write.size 3'"),
    "open bracket": ("fake_jobs.Write.parts = [1, 2\n", r"test.gin:\d+: .*a bracket or string is not closed"),
    "not a class": (
        "fake_jobs.ClassVar.x = 3\n",
        r"test.gin:8: 'fake_jobs.ClassVar' is a .*not a class or function",
    ),
    "wrong type": (
        "fake_jobs.Write.size = %SIZE\nSIZE = 2.0\n",
        r"test.gin:8: fake_jobs.Write.size must be int, not float 2.0 \(%SIZE is set at .*test.gin:9\)",
    ),
    "a name where a record belongs": (
        "fake_jobs.Write.part = 'hub'\n",
        r"test.gin:8: fake_jobs.Write.part must be Part \(written @Part\(\)\), not str 'hub'",
    ),
    "refused value": (
        "fake_jobs.Write.size = 0\n",
        r"Write: size must be at least 1, not 0; .*\(size is set at .*test.gin:8\)$",
    ),
    "run: outside of a workflow": (
        "fake_jobs.Write.options = {'in': 'run:x'}\n",
        r"refers to run:x, but only stages",
    ),
    "include of nothing": ("include 'tset.gin'\n", r"test.gin:8: there is no gin file 'tset.gin'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_name_the_place_and_the_nearest_name(name, tmp_path):
    text, said = MISTAKES[name]
    assert re.search(said, problem(tmp_path, JOB + text), re.S)


def test_a_required_field_is_missed_with_its_user(tmp_path):
    text = JOB.replace("fake_jobs.Write.text = 'hi'\n", "")
    said = problem(tmp_path, text)
    assert "fake_jobs.Write.text is required and not set (needed by launch.run)" in said
    assert "--gin.Write.text=" in said


def test_all_mistakes_are_told_at_once(tmp_path):
    said = problem(tmp_path, JOB + "A = 1\nB = 2\nfake_jobs.Write.size = %C\n")
    assert said.startswith("3 things are wrong")
    assert [name for name in "ABC" if f"macro {name}" in said] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("binding", "said"),
    [
        ("SIZE=3", r"--gin.SIZE=3: macro SIZE = 3 is used nowhere \(did you mean 'SIZES'\?\)"),
        ("Wirte.size=3", r"no class or function 'Wirte' .*\(did you mean '(fake_jobs\.)?Write'\?\)"),
        ("Write.sice=3", r"fake_jobs.Write has no field 'sice' \(did you mean 'size'\?\)"),
        ("Write.size=3x", r"'3x' is not a value"),
        ("Write.size=three", r"--gin.Write.size=three: fake_jobs.Write.size must be int, not str 'three'"),
        ("Write.size", r"write --gin.NAME=value"),
        ("=3", r"write --gin.NAME=value"),
        ("a b.c=3", r"neither a macro's name nor Class.field"),
        ("Part.size=3", r"Part.size is set, but this job uses no fake_jobs.Part"),
        ("x/Write.size=3", r"x/fake_jobs.Write.size has no effect"),
        ("Write.part=@Prat()", r"no class or function 'Prat' .*\(did you mean '(fake_jobs\.)?Part'\?\)"),
    ],
)
def test_mistakes_on_the_command_line(binding, said, tmp_path):
    text = JOB + "SIZES = 3\nfake_jobs.Write.size = %SIZES\n"
    assert re.search(said, problem(tmp_path, text, binding))


def test_the_command_line_overrides_everything(tmp_path):
    file = gin_file(tmp_path, JOB + "SIZE = 3\nfake_jobs.Write.size = %SIZE\n")
    assert launch.load([file]).job.size == 3
    assert launch.load([file], ["SIZE=4"]).job.size == 4
    loaded = launch.load(
        [file],
        [
            "Write.size=5",
            "Write.text=some/path.txt",
            "Write.part=@Part()",
            "Part.size=2",
            "run.run_dir=runs/x",
        ],
    )
    assert loaded.job == fake_jobs.Write("some/path.txt", size=5, part=fake_jobs.Part(2))
    assert loaded.run_dir == "runs/x"
    with pytest.raises(ConfigError, match=r"--gin.SIZE=4: macro SIZE = 4 is used nowhere$"):
        launch.load([file], ["SIZE=4", "Write.size=5"])
    assert "SIZE = 3" not in loaded.text.given  # it has no effect, and the saved file must stand by itself
    assert launch.load([file], ["Write.size=5", "Write.size=6"]).job.size == 6


def test_a_line_break_in_a_value_stays_in_the_value(tmp_path):
    file = gin_file(tmp_path, JOB)
    for given in ("two\nlines", "'two\\nlines'"):
        loaded = launch.load([file], [f"Write.text={given}"])
        assert loaded.job.text == "two\nlines"
        saved = tmp_path / "saved.gin"
        saved.write_text(loaded.text.given)
        assert launch.load([str(saved)]).job == loaded.job
    assert launch.load([file], ["Write.parts=[\n1,\n2]"]).job.parts == [1, 2]
    assert "'3\\n4' is not a value" in problem(tmp_path, JOB, "Write.size=3\n4")


def test_a_setting_hidden_by_scopes_is_told_which_one_wins(tmp_path):
    text = JOB.replace("@fake_jobs.Write()", "@a/fake_jobs.Write()") + "a/fake_jobs.Write.size = 3\n"
    said = problem(tmp_path, text, "Write.size=4")
    assert re.search(r"Write.size has no effect: a/fake_jobs.Write.size \(.*test.gin:8\) wins over it", said)
    assert "you may mean --gin.a/Write.size=..." in said
    assert launch.load([gin_file(tmp_path, text)], ["a/Write.size=4"]).job.size == 4
    # In a file it may stay: what is set for all is often set otherwise for each.
    assert launch.load([gin_file(tmp_path, text + "fake_jobs.Write.size = 5\n")]).job.size == 3


def test_scopes_and_lists_and_functions_arrive_plain(tmp_path):
    text = """
fake_jobs.Write.parts = [@fake_jobs.Part(), @a/fake_jobs.Part()]
fake_jobs.Part.size = 2
a/fake_jobs.Part.name = 'second'
fake_jobs.Write.function = @fake_jobs.double
"""
    job = launch.load([gin_file(tmp_path, JOB + text)]).job
    assert job.parts == [fake_jobs.Part(2), fake_jobs.Part(2, "second")]
    assert type(job) is fake_jobs.Write
    assert job.function is fake_jobs.double  # not gin's wrapper, which cannot be sent to a worker process
    job = launch.load([gin_file(tmp_path, JOB + text)], ["a/Part.size=7"]).job
    assert job.parts == [fake_jobs.Part(2), fake_jobs.Part(7, "second")]


# ---------------------------------------------------------------------------------------------- several files


def two_files(folder: pathlib.Path, left: str, right: str, both: str = "") -> str:
    gin_file(folder, left, "left.gin")
    gin_file(folder, right, "right.gin")
    return gin_file(folder, f"include '{folder}/left.gin'\ninclude '{folder}/right.gin'\n" + both + JOB)


def test_a_file_may_override_what_it_includes(tmp_path):
    file = two_files(tmp_path, "SIZE = 3\n", "fake_jobs.Write.size = %SIZE\n", "SIZE = 4\n")
    loaded = launch.load([file])
    assert loaded.job.size == 4
    assert re.search(r"SIZE = 4  # .*test.gin:7 \(instead of 3, .*left.gin:5\)", loaded.text.given)


def test_siblings_may_not_silently_override_one_another(tmp_path):
    right = "SIZE = 4\nfake_jobs.Write.size = %SIZE\n"
    file = two_files(tmp_path, "SIZE = 3\n", right)
    with pytest.raises(
        ConfigError, match=r"right.gin:5: SIZE = 4 silently overrides 3 set at .*left.gin:5; .*--gin.SIZE"
    ):
        launch.load([file])
    assert launch.load([file], ["SIZE=5"]).job.size == 5
    assert launch.load([two_files(tmp_path, "SIZE = 3\n", right, "SIZE = 6\n")]).job.size == 6
    assert launch.load([two_files(tmp_path, "SIZE = 4\n", right)]).job.size == 4  # they agree
    both = [gin_file(tmp_path, JOB + right, "one.gin"), gin_file(tmp_path, "SIZE = 3\n", "two.gin")]
    with pytest.raises(ConfigError, match=r"two.gin:5: SIZE = 3 silently overrides 4 set at .*one.gin:8"):
        launch.load(both)


def test_a_file_may_not_silently_override_what_came_before_those_that_it_includes(tmp_path):
    gin_file(tmp_path, "SIZE = 1\n", "below.gin")
    first = gin_file(tmp_path, "SIZE = 1\n", "first.gin")
    rest = f"include '{tmp_path}/below.gin'\nSIZE = 2\nfake_jobs.Write.size = %SIZE\n" + JOB
    file = gin_file(tmp_path, rest)
    with pytest.raises(
        ConfigError, match=r"test.gin:6: SIZE = 2 silently overrides 1 set at .*first.gin:5; .*--gin.SIZE"
    ):
        launch.load([first, file])
    assert launch.load([first, file], ["SIZE=3"]).job.size == 3
    gin_file(tmp_path, "SIZE = 2\n", "first.gin")
    assert launch.load([first, file]).job.size == 2  # in the end they agree


def test_an_include_below_may_not_override_what_stands_above(tmp_path):
    gin_file(tmp_path, "SIZE = 3\n", "left.gin")
    file = gin_file(
        tmp_path, JOB + f"fake_jobs.Write.size = %SIZE\nSIZE = 4\ninclude '{tmp_path}/left.gin'\n"
    )
    with pytest.raises(
        ConfigError, match=r"left.gin:5: .*override SIZE, set at .*test.gin:9; move the include"
    ):
        launch.load([file])


def test_a_file_included_twice_counts_once_and_no_file_includes_itself(tmp_path):
    gin_file(tmp_path, "SIZE = 3\n", "base.gin")
    include = f"include '{tmp_path}/base.gin'\n"
    file = two_files(tmp_path, include + "SIZE = 4\n", include + "fake_jobs.Write.size = %SIZE\n")
    assert launch.load([file]).job.size == 4
    gin_file(tmp_path, f"include '{tmp_path}/test.gin'\n", "base.gin")
    with pytest.raises(
        ConfigError, match=r"includes itself \(.*test.gin -> .*left.gin -> .*base.gin -> .*test.gin\)"
    ):
        launch.load([file])


def test_one_name_for_two_modules_is_refused(tmp_path):
    file = two_files(tmp_path, "import os.path as thing\n", "import json as thing\n")
    with pytest.raises(ConfigError, match=r"give two modules the name 'thing'; add `as another_name`"):
        launch.load([file])


def test_gin_files_are_searched_here_then_in_search_paths_then_in_the_repository(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, size in ((here, 1), (there, 2)):
        (folder / "gin").mkdir(parents=True)
        gin_file(folder / "gin", JOB + f"fake_jobs.Write.size = {size}\n", "x.gin")
    monkeypatch.chdir(here)
    assert launch.load(["gin/x.gin"], [], [str(there)]).job.size == 1
    (here / "gin" / "x.gin").unlink()
    assert launch.load(["gin/x.gin"], [], [str(there)]).job.size == 2
    with pytest.raises(
        ConfigError, match=r"no gin file 'gin/xx.gin' \(did you mean 'gin/x.gin'\?\) \(searched in .*here"
    ):
        launch.load(["gin/xx.gin"], [], [str(there)])
    assert str(helpers.ROOT) in launch.search_folders()


# ---------------------------------------------------------------------------------------------------- running


@pytest.fixture
def workflow_file(tmp_path):
    return gin_file(
        tmp_path,
        f"""
RUN_DIR = '{tmp_path}/run'
launch.run.run_dir = %RUN_DIR
launch.run.job = @workflow.Workflow()
workflow.Workflow.stages = {{'write': @fake_jobs.Write(), 'count': @fake_jobs.Count()}}
TEXT = 'hello'
fake_jobs.Write.text = %TEXT
fake_jobs.Count.file = 'run:write/out.txt'
""",
    )


def test_a_run_leaves_its_description_and_its_saved_configuration_runs_again(workflow_file, tmp_path):
    first = run_main(f"--gin_file={workflow_file}", "--gin.Write.size=3")
    assert first.returncode == 0, first.output
    assert first.loaded(("jax", *helpers.HEAVY)) == []
    run = tmp_path / "run"
    config = (run / "config.gin").read_text()
    assert "fake_jobs.Write.size = 3  # --gin.Write.size=3" in config
    assert (
        f"TEXT = 'hello'  # {os.path.relpath(workflow_file)}:10" in config or f"{workflow_file}:10" in config
    )
    assert "fake_jobs.Write.rate = 0.5" in (run / "operative_config.gin").read_text()
    lineage = json.loads((run / "count" / "lineage.json").read_text())
    assert lineage["inputs"].keys() == {"run:write"}
    (session,) = lineage["sessions"]
    assert session["packages"]["gin-config"]
    assert session["python"] == sys.version.split()[0]
    assert session["code"]["version"]
    assert "--gin.Write.size=3" in session["command"]

    again = run_main(f"--gin_file={run}/config.gin")
    assert again.output.count("done already") == 2
    assert (run / "config.gin").read_text() == config  # the places of its first writing stay
    assert json.loads((run / "count" / "lineage.json").read_text()) == lineage  # skipped: nothing was made
    assert not (run / "lineage.json").exists()  # the workflow itself makes nothing
    moved = run_main(f"--gin_file={run}/config.gin", f"--gin.RUN_DIR={tmp_path}/again")
    assert moved.returncode == 0, moved.output
    assert (tmp_path / "again" / "count" / "manifest.json").exists()
    figures = [
        json.loads((p / "count" / "manifest.json").read_text())["figures"] for p in (run, tmp_path / "again")
    ]
    assert figures[0] == figures[1]
    assert figures[0]["characters"] == 15


def test_dry_run_says_what_each_stage_would_do_and_makes_nothing(workflow_file, tmp_path):
    dry = run_main(f"--gin_file={workflow_file}", "--dry_run")
    assert dry.returncode == 0, dry.output
    assert dry.loaded(("jax", *helpers.HEAVY)) == []
    assert "[1/2] write: will run. Writes its text into a file." in dry.output
    assert "[2/2] count: will run after write." in dry.output
    assert not (tmp_path / "run").exists()
    run_main(f"--gin_file={workflow_file}")
    dry = run_main(f"--gin_file={workflow_file}", "--gin.Count.steps=5", "--dry_run")
    assert "write: done, will be skipped" in dry.output
    assert "count: will go on with changed settings (steps: 3 -> 5)" in dry.output


def test_explain_shows_values_places_overrides_defaults_and_what_is_missing(workflow_file, tmp_path):
    here = {"cwd": tmp_path, "env": {"PYTHONPATH": str(helpers.ROOT)}}
    shown = run_main("--gin_file=test.gin", "--gin.TEXT=bye", "--explain", **here)
    assert shown.returncode == 0, shown.output
    rows = {line.split("│")[1].strip(): line for line in shown.stdout.splitlines() if line.startswith("│")}
    assert re.search(r"'bye' .*--gin.TEXT=bye .*instead of 'hello' from .*test.gin:10", rows["TEXT"])
    assert re.search(r"%TEXT .*test.gin:11", rows["fake_jobs.Write.text"])
    assert re.search(r"0.5 .*default", rows["fake_jobs.Write.rate"])
    text = pathlib.Path(workflow_file).read_text().replace("fake_jobs.Write.text = %TEXT\n", "")
    pathlib.Path(workflow_file).write_text(text)
    shown = run_main("--gin_file=test.gin", "--explain", **here)
    assert shown.returncode == 1
    assert re.search(r"fake_jobs.Write.text *│ REQUIRED, not set", shown.stdout)
    assert "macro TEXT = 'hello' is used nowhere" in shown.stderr


@pytest.mark.parametrize(
    ("how", "said", "status"),
    [
        ("error", "error: step 1 cannot be done; use another\n", 1),
        ("user", "error: the tape is full; put in another\n", 1),
        ("bug", "ZeroDivisionError: a mistake in the program\n", 1),
        ("interrupt", "run the same command again:\n    python -m t5style.main --gin_file=", 130),
    ],
)
def test_failures_say_what_happened_and_the_next_start_goes_on(how, said, status, workflow_file, tmp_path):
    failed = run_main(f"--gin_file={workflow_file}", "--gin.Count.stop_at=1", f"--gin.Count.how={how}")
    assert failed.returncode == status
    assert said in failed.stderr
    assert ("Traceback" in failed.stderr) == (how == "bug")
    error = tmp_path / "run" / "error.txt"
    assert error.exists() == (how != "interrupt")
    if how != "interrupt":
        assert "Traceback" in error.read_text()
        assert str(error) in failed.stderr
    again = run_main(f"--gin_file={workflow_file}")
    assert again.returncode == 0, again.output
    assert "begun_at 1" in again.output
    assert not error.exists()


def test_a_run_folder_in_use_by_another_process_is_refused_and_left_alone(workflow_file, tmp_path):
    command = [sys.executable, "-m", "t5style.main", f"--gin_file={workflow_file}"]
    holder = subprocess.Popen(
        [*command, "--gin.Count.stop_at=1", "--gin.Count.how=wait"],
        cwd=helpers.ROOT,
        env=helpers.clean_env(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stderr is not None
        for line in holder.stderr:
            if line.strip() == "waiting":
                break
        config = (tmp_path / "run" / "config.gin").read_text()
        second = run_main(f"--gin_file={workflow_file}", "--gin.TEXT=other")
        assert second.returncode == 1
        assert f"in use by process {holder.pid} on " in second.stderr
        assert second.stderr.count("\n") == 1
        assert (tmp_path / "run" / "config.gin").read_text() == config
        holder.send_signal(signal.SIGINT)  # as Ctrl-C does
        assert "run the same command again" in holder.stderr.read()
        assert holder.wait(timeout=30) == 130
    finally:
        holder.kill()
        holder.wait()


def test_a_single_job_refuses_a_folder_with_other_settings(tmp_path):
    file = gin_file(tmp_path, JOB.replace("'unused'", f"'{tmp_path}/run'"))
    assert run_main(f"--gin_file={file}").returncode == 0

    def contents():
        return {
            p.name: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != ".lock" and p.is_file()
        }

    before = contents()
    refused = run_main(f"--gin_file={file}", "--gin.Write.text=bye")
    assert refused.returncode == 1
    assert "holds a run with other settings (text: 'hi' -> 'bye'); choose another RUN_DIR" in refused.stderr
    assert contents() == before
    assert "done already" in run_main(f"--gin_file={file}").output


def test_python_code_may_run_a_job(tmp_path):
    figures = launch.run(fake_jobs.Write("abc"), str(tmp_path / "run"))
    assert figures["characters"] == 3
    assert (tmp_path / "run" / "manifest.json").exists()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="with parentheses"):
        launch.run(fake_jobs.Write, str(tmp_path / "run"))


def test_processes_must_agree_on_everything_given_and_on_the_folder(tmp_path, monkeypatch):
    said = []
    monkeypatch.setenv("NUM_PROCESSES", "1")
    monkeypatch.setattr(distributed, "initialize", lambda: True)
    monkeypatch.setattr(distributed, "check_same", lambda facts: said.append(facts["configuration"]))
    file = gin_file(
        tmp_path, JOB.replace("Write", "Count").replace("text = 'hi'", f"file = '{tmp_path}/test.gin'")
    )

    def agree(folder: str, *bindings: str) -> str:
        loaded = launch.load([file], [*bindings, f"run.run_dir={tmp_path}/{folder}"])
        try:
            runner.execute(loaded.job, loaded.run_dir, loaded.text)
        except (OSError, ValueError):
            pass
        finally:
            run_dir.set_process(0)
        return said[-1]

    first = agree("a")
    assert agree("a") == first
    assert len({first, agree("b"), agree("a", "Count.steps=5"), agree("a", "Count.stop_at=1")}) == 4


def test_two_processes_share_the_work_of_one_command(workflow_file, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "t5style.parallel.local", "--processes=2", "--devices=1", "--"),
            *(sys.executable, "-m", "t5style.main", f"--gin_file={workflow_file}"),
        ],
        cwd=helpers.ROOT,
        env=helpers.clean_env(),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("[2/2] count") == 1  # process 0 alone speaks
    assert (tmp_path / "run" / "write" / "calls.txt").read_text() == "x"  # and works
    assert (tmp_path / "run" / "count" / "manifest.json").exists()
