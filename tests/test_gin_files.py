"""Every gin file of the repository is read, checked and built, without running anything.

- A file whose comments show commands (`python -m t5style.main --gin_file=...`): each command must load.
- Otherwise a file that binds launch.run.job must load by itself.
- Otherwise the file is a piece: it must load in its place among others, as the README composes them.

Macros that a file leaves to its user (unset, or %gin.REQUIRED) get the values in SAMPLES.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shlex
import tomllib
from typing import Any

import pytest

from t5style import launch, run_dir
from t5style.corpus.vocabulary import ByteVocabulary
from t5style.data.objectives import DECODER_ONLY, ENCODER_DECODER, Windowed
from t5style.data.task import Mixture
from t5style.nn.settings import AttentionBlocks
from t5style.parallel import topologies
from t5style.parallel.mesh import MeshConfig
from t5style.settings import REQUIRED, Macro, Settings
from t5style.train import plan_search
from t5style.train.pretrain import Pretrain
from tests import helpers

FILES = sorted(
    str(file.relative_to(helpers.ROOT))
    for part in ("gin", "experiments")
    for file in (helpers.ROOT / part).rglob("*.gin")
)

# Values for what the user must give. Strings as on the command line.
SAMPLES = {
    "RUN_DIR": "runs/test",
    "INIT_FROM": "'runs/small'",
    "MODEL": "'runs/small'",
    "DATA": "['data.jsonl']",
    "STORE": "'tokens'",
    "SUPERVISED_STORE": "'pairs'",
}

# The README's order, with the piece that stands for the others of its folder.
PLACES = {
    "models": "gin/models/t5_tiny.gin",
    "data": "gin/data/span_corruption.gin",
    "mesh": "gin/mesh/single.gin",
    "optim": "gin/optim/adamw.gin",
    "runs": "gin/runs/pretrain.gin",
}


def pretraining(**pieces: str) -> list[str]:
    """A whole composition, with these pieces in their places."""
    places = PLACES | pieces
    if places["data"] in ("gin/data/causal_lm.gin", "gin/data/chat.gin"):  # for a decoder-only model
        places["models"] = "gin/models/llama_tiny.gin"
    return list(places.values())


def compositions() -> list[list[str]]:
    """Every piece in its place of a pretraining, and every task also with the other jobs that take one."""
    found = []
    for file in FILES:
        folder = pathlib.PurePath(file).parts[1]
        if folder in PLACES and folder != "runs":
            found.append(pretraining(**{folder: file}))
        if folder == "data":
            found.append([file, "gin/runs/replay.gin"])
            if file != "gin/data/mixture.gin":
                found.append([file, "gin/runs/evaluate.gin"])
    return [list(files) for files in dict.fromkeys(map(tuple, found))]


def commands(text: str) -> list[list[str]]:
    """The commands in a file's comments, split into words; a backslash at the end goes on in the next comment
    line.
    """
    joined = re.sub(r"\\\n#\s*", " ", text)
    found = re.findall(r"^#.*?(python -m t5style\.main .*)$", joined, re.M)
    return [shlex.split(command.split(" # ")[0])[3:] for command in found]


def flags(words: list[str], name: str) -> list[str]:
    return [word.removeprefix(name) for word in words if word.startswith(name)]


def with_samples(files: list[str], bindings: list[str]) -> list[str]:
    """The bindings, and samples for the macros that the files need and nobody sets."""
    settings = launch.read(files, bindings)
    needed = {name for b in settings.bindings.values() for name in macros_in(b.value)}
    needed |= {b.field for b in settings.bindings.values() if b.target is None and b.value == REQUIRED}
    unset = {n for n in needed if (m := settings.macro(n)) is None or m.value == REQUIRED} - {"gin.REQUIRED"}
    unknown = sorted(unset - SAMPLES.keys())
    assert not unknown, f"{files}: give macros {unknown} a value in SAMPLES of tests/test_gin_files.py"
    return [*bindings, *(f"{name}={SAMPLES[name]}" for name in sorted(unset))]


def macros_in(value: Any) -> set[str]:
    if isinstance(value, Macro):
        return {value.name}
    items = (
        [*value, *value.values()]
        if isinstance(value, dict)
        else value
        if isinstance(value, list | tuple)
        else []
    )
    return {name for item in items for name in macros_in(item)}


def has_job(settings: Settings) -> bool:
    return any(
        b.target is not None and b.target.thing is launch.run and b.field == "job"
        for b in settings.bindings.values()
    )


@pytest.mark.parametrize("file", FILES)
def test_every_gin_file_builds(file, monkeypatch):
    monkeypatch.chdir(helpers.ROOT)
    text = pathlib.Path(file).read_text()
    shown = commands(text)
    for words in shown:
        files, bindings = flags(words, "--gin_file="), flags(words, "--gin.")
        assert file in files, f"{file} shows a command that does not use it: {shlex.join(words)}"
        launch.load(files, bindings, flags(words, "--gin_search_paths="))
    if shown:
        return
    if has_job(launch.read([file])):
        assert run_dir.fingerprint(launch.load([file], with_samples([file], [])).job)
    else:
        assert any(file in files for files in compositions()), f"{file} is in no composition"


@pytest.mark.parametrize("files", compositions(), ids=lambda files: "+".join(files).replace(".gin", ""))
def test_pieces_compose(files, monkeypatch):
    monkeypatch.chdir(helpers.ROOT)
    job = launch.load(files, with_samples(files, [])).job
    assert run_dir.fingerprint(job)
    if not isinstance(job, Pretrain):
        return
    # The lengths that come with a task fit it.
    architecture = ENCODER_DECODER if job.model.encoder_layers else DECODER_ONLY
    for task in job.task.tasks if isinstance(job.task, Mixture) else [job.task]:
        assert "encoder" in job.lengths or architecture == DECODER_ONLY
        if isinstance(task.objective, Windowed):
            assert task.objective.window(job.lengths, architecture, ByteVocabulary()) > 1


@pytest.mark.parametrize("optimizer", ["gin/optim/adamw.gin", "gin/optim/adafactor.gin"])
def test_a_plan_is_of_the_training_of_the_same_files_and_training_takes_what_it_finds(
    optimizer, tmp_path, monkeypatch
):
    monkeypatch.chdir(helpers.ROOT)
    files = pretraining(data="gin/data/causal_lm.gin", optim=optimizer)
    trained = launch.load(files, with_samples(files, [])).job
    files[-1] = "gin/runs/plan.gin"
    files.remove("gin/data/causal_lm.gin")
    planned = launch.load(files, ["SLICE='v5e-8'", "LENGTHS={'decoder': 1024}"]).job
    assert isinstance(trained, Pretrain)
    assert planned.program == trained.program
    found = dataclasses.replace(
        planned.program,
        model=planned.program.model.replace(remat="qkv", attention_blocks=AttentionBlocks(block_q=256)),
        batch_size=64,
        accumulation=2,
        mesh=MeshConfig(data=1, fsdp=4, tensor=2, compiler_options={"xla_tpu_scoped_vmem_limit_kib": 49152}),
    )
    best = tmp_path / "best.gin"
    best.write_text(plan_search.gin_file(found, topologies.parse_slice("v5e-8")))
    files[-1:] = ["gin/data/causal_lm.gin", str(best)]
    files.remove("gin/mesh/single.gin")
    assert launch.load(files, with_samples(files, [])).job.program == found


def test_there_are_gin_files_and_the_quickstart_is_one():
    assert "experiments/quickstart.gin" in FILES
    assert len(FILES) > 10


def test_planning_the_quickstart_loads_neither_tensorflow_nor_torch_nor_transformers(tmp_path):
    planned = helpers.run_main(
        "--gin_file=experiments/quickstart.gin", f"--gin.RUN_DIR={tmp_path}/run", "--dry_run"
    )
    assert planned.returncode == 0, planned.output
    assert planned.loaded() == []
    assert not (tmp_path / "run").exists()


def test_a_plain_install_takes_every_folder_of_gin_files_along():
    settings = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "data-files"
    ]
    assert {f"share/t5style/{pathlib.PurePath(file).parent}" for file in FILES} <= settings.keys()
    assert all(
        patterns == [f"{folder.removeprefix('share/t5style/')}/*.gin"]
        for folder, patterns in settings.items()
    )


def test_a_piece_that_sets_something_wrong_is_found(tmp_path):
    piece = tmp_path / "bad.gin"
    piece.write_text(
        "from __gin__ import dynamic_registration\n"
        "from t5style.parallel import mesh\nmesh.MeshConfig.fsdp = 0\n"
    )
    files = pretraining(mesh=str(piece))
    with pytest.raises(launch.ConfigError, match="fsdp"):
        launch.load(files, with_samples(files, []))


def test_commands_in_comments_are_found():
    text = (
        "# Do:\n#   python -m t5style.main --gin_file=a.gin \\\n#       --gin.X=\"['b']\"  # and so\nX = 1\n"
    )
    assert commands(text) == [["--gin_file=a.gin", "--gin.X=['b']"]]
