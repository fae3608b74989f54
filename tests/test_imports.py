"""Who may import whom: read from the source, and checked once more by importing everything."""

from __future__ import annotations

import ast
import dataclasses
import graphlib
import pathlib
import subprocess
import sys

import pytest

from tests import helpers

PACKAGE = helpers.ROOT / "t5style"

# Each room may import the rooms before it, and itself.
LADDER = ("parallel", "nn", "models", "train", "infer", "evaluate", "tune", "serve", "monitor")
COMMON = {"run_dir", "console"}
ALLOWED: dict[str, set[str]] = {
    room: COMMON | set(LADDER[: i + 1]) | ({"corpus", "data"} if i >= LADDER.index("train") else set())
    for i, room in enumerate(LADDER)
} | {
    # A prepared corpus leaves its report, which is made from its files alone.
    "corpus": COMMON | {"corpus", "samples", "report"},
    "data": COMMON | {"data", "corpus", "report"},
    "samples": COMMON | {"samples", "corpus"},
    "report": COMMON | {"report"},
    "files": set(),
    "run_dir": {"files"},
    "console": {"run_dir"},
    "settings": {"run_dir"},
    "lineage": {"run_dir"},
    "workflow": COMMON | {"lineage"},
    "runner": COMMON | {"workflow", "parallel"},
    "launch": COMMON | {"settings", "lineage", "workflow", "runner"},
    "main": {"launch", "runner"},
    "__init__": {"infer"},
}
# Packages that only these modules may import, at all.
ONLY_IN = {
    "gin": {"launch"},
    "seqio": {"data/seqio_bridge"},
    "tensorflow": {"data/seqio_bridge"},
    "tensorflow_datasets": {"data/seqio_bridge", "corpus/hub_sources"},  # the latter as a source
    "tensorflow_text": {"data/seqio_bridge"},
    "t5": set(),
    "clu": set(),
}
# Packages that may be imported inside functions only.
LAZY = {
    *("tensorflow", "tensorflow_datasets", "tensorflow_text", "seqio", "torch", "transformers", "tokenizers"),
    *("plotly", "rouge_score", "sacrebleu", "nltk"),
    *("trafilatura", "ftfy", "py3langid", "fastwarc", "pypdf", "datasets", "apache_beam", "mlcroissant"),
}
# Packages that whole rooms do without.
WITHOUT = {
    "corpus": {"jax", "flax", "optax", "orbax", "grain", "tensorstore"},
    "data": {"jax", "flax", "optax", "orbax"},
    "report": {"jax", "flax", "optax", "orbax", "grain", "tensorstore"},
}


@dataclasses.dataclass(frozen=True)
class Import:
    module: str  # what is imported, in full
    line: int
    lazy: bool
    typing_only: bool


def imports_of(tree: ast.Module, module: str, is_package: bool) -> list[Import]:
    found: list[Import] = []

    def walk(node: ast.AST, lazy: bool, typing_only: bool) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            lazy = True
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                walk(child, lazy, True)
            for child in node.orelse:
                walk(child, lazy, typing_only)
            return
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy, typing_only) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join(
                    [*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])]
                )
            found.extend(
                Import(f"{base}.{alias.name}", node.lineno, lazy, typing_only) for alias in node.names
            )
        for child in ast.iter_child_nodes(node):
            walk(child, lazy, typing_only)

    walk(tree, False, False)
    return found


def read(package: pathlib.Path) -> dict[str, list[Import]]:
    """Module path inside the package, such as `train/step`, -> its imports."""
    result = {}
    for file in sorted(package.rglob("*.py")):
        path = file.relative_to(package).with_suffix("").as_posix()
        dotted = f"{package.name}." + path.replace("/", ".")
        is_package = file.name == "__init__.py"
        result[path] = imports_of(ast.parse(file.read_text()), dotted.removesuffix(".__init__"), is_package)
    return result


def violations(modules: dict[str, list[Import]], package: str = "t5style") -> list[str]:
    wrong = []
    for path, imports in modules.items():
        room = path.split("/")[0]
        if room not in ALLOWED:
            wrong.append(f"{path}: room {room!r} is not in the table of tests/test_imports.py")
            continue
        for item in imports:
            where = f"{path}.py:{item.line}"
            top, *rest = item.module.split(".")
            if top == package:
                target = rest[0] if rest else "__init__"
                if target not in ALLOWED:
                    target = "__init__"  # `from t5style import load`
                if target not in ALLOWED[room] and not (item.typing_only and room == "__init__"):
                    wrong.append(f"{where}: {room} may not import {target}")
                continue
            if path not in ONLY_IN.get(top, {path}):
                wrong.append(f"{where}: {top} may be imported only in {sorted(ONLY_IN[top])}")
            if top in LAZY and not (item.lazy or item.typing_only):
                wrong.append(f"{where}: {top} must be imported inside a function")
            if top in WITHOUT.get(room, ()):
                wrong.append(f"{where}: {room} does without {top}")
    return wrong


def cycle(modules: dict[str, list[Import]], package: str = "t5style") -> list[str]:
    """A cycle of modules that import one another, at load time or later; empty if there is none."""
    graph = {}
    for path, imports in modules.items():
        needs = set()
        for item in imports:
            if item.typing_only or item.module.split(".")[0] != package:
                continue
            parts = item.module.split(".")[1:]
            for candidate in ("/".join(parts), "/".join(parts[:-1]), "/".join([*parts, "__init__"])):
                if candidate in modules and candidate != path:
                    needs.add(candidate)
                    break
        graph[path] = needs
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_import_is_allowed():
    assert violations(read(PACKAGE)) == []


def test_there_are_no_cycles():
    assert cycle(read(PACKAGE)) == []


@pytest.mark.parametrize(
    ("path", "line", "said"),
    [
        ("corpus/x", "import jax", "corpus does without jax"),
        ("corpus/x", "from t5style.train import step", "corpus may not import train"),
        ("nn/x", "def f():\n    from t5style.models import config", "nn may not import models"),
        ("models/x", "from ..data import task", "models may not import data"),
        ("models/x", "from .. import data", "models may not import data"),
        ("train/x", "import gin.config", "gin may be imported only in"),
        ("data/task", "def f():\n    import seqio", "seqio may be imported only in"),
        ("data/seqio_bridge", "import seqio", "seqio must be imported inside a function"),
        ("report/x", "from t5style.infer import model", "report may not import infer"),
        ("train/x", "if True:\n    import torch", "torch must be imported inside a function"),
        ("nowhere/x", "import os", "not in the table"),
    ],
)
def test_the_rules_catch_what_they_forbid(path, line, said):
    found = violations({path: imports_of(ast.parse(line), "t5style." + path.replace("/", "."), False)})
    assert len(found) == 1
    assert said in found[0]


def test_cycles_are_found():
    def module(path, line):
        return {path: imports_of(ast.parse(line), "t5style." + path.replace("/", "."), False)}

    two = module("nn/a", "from t5style.nn import b") | module(
        "nn/b", "def f():\n    from t5style.nn import a"
    )
    assert set(cycle(two)) == {"nn/a", "nn/b"}
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from t5style.nn import a"
    assert cycle(two | module("nn/b", typed)) == []


_IMPORT_ALL = """
import importlib, pkgutil, sys
import t5style
rooms = sys.argv[1:] or [info.name for info in pkgutil.iter_modules(t5style.__path__)]
names = [f"t5style.{room}" for room in rooms]
for name in names:
    module = importlib.import_module(name)
    if hasattr(module, "__path__"):
        names += [f"{name}.{info.name}" for info in pkgutil.iter_modules(module.__path__)]
print(*sys.modules)
"""


def modules_after_importing(*rooms: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", _IMPORT_ALL, *rooms],
        cwd=helpers.ROOT,
        env=helpers.clean_env(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_everything_loads_neither_tensorflow_nor_torch_nor_transformers():
    assert modules_after_importing() & {*LAZY, "clu"} == set()


def test_the_corpus_room_does_not_load_jax_even_through_others():
    assert modules_after_importing("corpus", "report") & {"jax", "flax", "grain"} == set()
