"""The command line's flags and help."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os

import pytest

from t5style import main
from tests import helpers
from tests.helpers import run_main


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_quick_and_loads_nothing_heavy(flag):
    shown = run_main(flag)
    assert shown.returncode == 0
    assert "--gin_file=experiments/quickstart.gin" in shown.stdout
    assert shown.stderr == ""
    assert shown.loaded(("jax", "flax", "optax", "orbax", "grain", "numpy", "gin", *helpers.HEAVY)) == []
    assert shown.cpu_seconds <= 2.0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "no --gin_file given"),
        (["--gin_fiel=x"], "Unknown command line flag 'gin_fiel'"),
        (["x.gin"], "unexpected argument 'x.gin'; did you mean --gin_file=x.gin?"),
        (["--gin_file=x.gin", "--dry_run=maybe"], "dry_run"),
    ],
)
def test_wrong_flags_exit_with_2_and_one_sentence(arguments, said):
    wrong = run_main(*arguments)
    assert wrong.returncode == 2
    assert said in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_missing_gin_file_is_one_line():
    wrong = run_main("--gin_file=experiments/quickstrat.gin")
    assert wrong.returncode == 1
    assert wrong.stderr.startswith("error: there is no gin file 'experiments/quickstrat.gin'")
    assert wrong.stderr.count("\n") == 1


def test_starts_itself_again_once_to_get_huge_pages(monkeypatch):
    started = []
    monkeypatch.setattr(main.sys, "platform", "linux")
    monkeypatch.setattr(main.os, "execv", lambda program, arguments: started.append((program, arguments)))
    monkeypatch.setattr(main.sys, "orig_argv", ["python", "-m", "t5style.main", "--gin_file=x.gin"])
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    main._use_huge_pages()
    main._use_huge_pages()
    assert started == [(main.sys.executable, [main.sys.executable, "-m", "t5style.main", "--gin_file=x.gin"])]
    assert main.os.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    ("library", "chips", "plugins", "platforms"),
    [
        (True, "0x8086", [], "cpu"),
        (True, "0x1ae0", [], None),  # a TPU
        (True, "0x10de", ["cuda"], None),
        (False, "0x8086", [], None),
    ],
)
def test_libtpu_is_not_asked_for_a_tpu_that_is_not_there(
    monkeypatch, tmp_path, library, chips, plugins, platforms
):
    vendor = tmp_path / "0000:00:01.0" / "vendor"
    vendor.parent.mkdir()
    vendor.write_text(f"{chips}\n")
    monkeypatch.setattr(main, "PCI_DEVICES", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: library or None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: plugins)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.delenv("JAX_PLATFORMS")
    main._leave_absent_tpus_alone()
    assert os.environ.get("JAX_PLATFORMS") == platforms
