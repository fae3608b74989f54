"""The command line: `python -m t5style.main --gin_file=experiments/quickstart.gin`, or `t5style
--gin_file=...`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags

HELP = """\
usage: python -m t5style.main --gin_file=FILE ... [--gin.NAME=VALUE ...] [--dry_run] [--explain]

Runs the job that gin files bind to launch.run.job, in the folder that they bind to launch.run.run_dir.
Running the same command again skips what is done and goes on with what is not.

  --gin_file=FILE            a gin file; may be given several times, read in order. Looked for here, in the
                             --gin_search_paths, in the repository, then in the installed package.
  --gin.NAME=VALUE           sets a macro: --gin.STEPS=100, --gin.RUN_DIR=runs/mine
  --gin.Class.field=VALUE    sets a field: --gin.Pretrain.seed=3
  --gin.scope/Class.field=VALUE
                             sets it in one scope only, as a gin file does
  --gin_search_paths=A,B     more folders to look for gin files in
  --dry_run                  checks everything, shows the job and what each stage would do; runs nothing
  --explain                  shows every setting: its value, the file and line it comes from, what
                             it overrides, what is required and not set, and the defaults
  --explain_sharding         shows how the parameters of the model lie on the mesh
  -h, --help                 this text

examples:
  python -m t5style.main --gin_file=experiments/quickstart.gin
  python -m t5style.main --gin_file=experiments/quickstart.gin --gin.RUN_DIR=runs/again --dry_run
  python -m t5style.main --gin_file=runs/quickstart/config.gin          # a saved configuration, run again

exit status: 0 done; 1 an error, said in one line; 2 a wrong flag; 130 interrupted (run it again to go on).
"""

PCI_DEVICES = pathlib.Path("/sys/bus/pci/devices")

_GIN_FILE = flags.DEFINE_multi_string("gin_file", [], "A gin file; may be repeated.")
_SEARCH_PATHS = flags.DEFINE_list("gin_search_paths", [], "More folders to look for gin files in.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Check everything and show what would be done.")
_EXPLAIN = flags.DEFINE_bool("explain", False, "Show every setting and where it comes from.")
_EXPLAIN_SHARDING = flags.DEFINE_bool("explain_sharding", False, "Show how parameters lie on the mesh.")


def main(argv: Sequence[str] | None = None) -> int:
    """Parses flags and hands over to launch; returns the exit status."""
    arguments = list(sys.argv if argv is None else argv)
    if any(argument in ("-h", "--help", "-help") for argument in arguments[1:]):
        print(HELP, end="")
        return 0
    bindings = [a.removeprefix("--gin.") for a in arguments if a.startswith("--gin.")]
    try:
        rest = flags.FLAGS([a for a in arguments if not a.startswith("--gin.")])[1:]
    except flags.Error as error:
        return _usage(str(error))
    if rest:
        hint = f"; did you mean --gin_file={rest[0]}?" if rest[0].endswith(".gin") else ""
        return _usage(f"unexpected argument {rest[0]!r}{hint}")
    if not _GIN_FILE.value:
        return _usage("no --gin_file given, for example --gin_file=experiments/quickstart.gin")
    if "" not in sys.path:
        sys.path.insert(0, "")  # gin files may import modules from here under the `t5style` command too
    if argv is None:
        _use_huge_pages()
    _leave_absent_tpus_alone()
    from t5style import launch, runner  # here: --help needs nothing of them

    status = launch.main(
        _GIN_FILE.value,
        bindings,
        _SEARCH_PATHS.value,
        dry_run=_DRY_RUN.value,
        explain=_EXPLAIN.value,
        explain_sharding=_EXPLAIN_SHARDING.value,
    )
    return runner.leave(status)


def _use_huge_pages() -> None:
    """Starts this program again with glibc's malloc asking for huge pages: it reads that setting at start.

    XLA's CPU backend takes a step's temporary memory from malloc and gives it back, gigabytes at every step.
    In pages of 4 kB the kernel spent 0.6 s of CPU time on each gigabyte here, in huge pages 0.15 s. Whoever
    has set GLIBC_TUNABLES knows better; other C libraries do not look at it.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _leave_absent_tpus_alone() -> None:
    """On a machine without a TPU, libtpu is there for planning. jax would try to run on it, and libtpu would
    print what it does not find.
    """
    google = any(file.read_text().strip() == "0x1ae0" for file in PCI_DEVICES.glob("*/vendor"))
    others = importlib.metadata.entry_points(group="jax_plugins")  # those of GPUs
    if importlib.util.find_spec("libtpu") and not google and not others:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def _usage(message: str) -> int:
    print(f"error: {message}\n(python -m t5style.main --help shows all flags)", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
