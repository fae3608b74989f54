"""Every command of the README is known here and is executed, shortened only by settings on its line."""

import html
import json
import os
import pathlib
import random
import re
import shlex
import subprocess
import sys
import tomllib

import pytest

from t5style.corpus.document import read_documents

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MAIN = ("python", "-m", "t5style.main")

SMALL_MODEL = [
    "--gin.TransformerConfig.num_heads=2",
    "--gin.TransformerConfig.head_dim=8",
    "--gin.TransformerConfig.d_model=16",
    "--gin.TransformerConfig.d_ff=32",
    "--gin.TransformerConfig.encoder_layers=1",
    "--gin.TransformerConfig.decoder_layers=1",
    "--gin.MeshConfig.devices=1",
]
# What makes each run short: few steps, few examples, a small model.
QUICKSTART = [
    *SMALL_MODEL,
    "--gin.PRETRAIN_STEPS=2",
    "--gin.TUNE_STEPS=2",
    "--gin.WARMUP_STEPS=1",
    "--gin.EVAL_EXAMPLES=2",
    "--gin.Samples.names=['wordnet']",
    "--gin.TrainTokenizer.sample_characters=300000",
    "--gin.TrainTokenizer.vocab_size=1024",
    "--gin.Pretrain.batch_size=2",
    "--gin.Pretrain.eval_batches=1",
    "--gin.Finetune.batch_size=2",
    "--gin.Finetune.eval_batches=1",
    "--gin.language/Evaluate.max_examples=2",
    "--gin.Evaluate.train_examples=50",
    "--gin.instructions/Evaluate.max_new_tokens=4",
]
SHAKESPEARE = [
    "--gin.Schedule.warmup_steps=1",
    "--gin.STEPS=2",
    "--gin.TransformerConfig.d_model=16",
    "--gin.TransformerConfig.d_ff=32",
    "--gin.TransformerConfig.decoder_layers=1",
]
TUNING = [
    "--gin.STEPS=2",
    "--gin.BATCH_SIZE=2",
    "--gin.EVAL_EVERY=2",
    "--gin.WARMUP_STEPS=1",
    "--gin.LENGTHS={'encoder': 32, 'decoder': 32}",
    "--gin.MeshConfig.devices=1",
]
# The start of each command → what is appended to it. A command is matched by the longest start that fits.
RUN = {
    (*MAIN, "--gin_file=experiments/quickstart.gin"): QUICKSTART,
    (*MAIN, "--gin_file=gin/runs/prepare.gin"): [],
    (*MAIN, "--gin_file=gin/runs/erase.gin"): [],
    (*MAIN, "--gin_file=experiments/web_corpus.gin"): [
        "--gin.HashSplit.test=0.0",
        "--gin.HashSplit.validation=0.0",
    ],
    (*MAIN, "--gin_file=gin/runs/train_tokenizer.gin"): ["--gin.VOCAB_SIZE=450"],
    (*MAIN, "--gin_file=gin/runs/tokenize.gin"): [],
    (*MAIN, "--gin_file=gin/models/t5_tiny.gin"): [
        *SMALL_MODEL,
        "--gin.STEPS=2",
        "--gin.BATCH_SIZE=2",
        "--gin.LENGTHS={'encoder': 64, 'decoder': 32}",
        "--gin.WARMUP_STEPS=1",
    ],
    (*MAIN, "--gin_file=experiments/shakespeare_char.gin"): SHAKESPEARE,
    (*MAIN, "--gin_file=gin/models/llama_small.gin"): [
        "--gin.TransformerConfig.vocab_size=512",
        "--gin.TransformerConfig.d_model=128",
        "--gin.TransformerConfig.d_ff=256",
        "--gin.TransformerConfig.num_heads=2",
        "--gin.TransformerConfig.num_kv_heads=2",
    ],
    (*MAIN, "--gin_file=gin/runs/chat.gin"): [],
    (*MAIN, "--gin_file=gin/runs/finetune.gin"): TUNING,
    (*MAIN, "--gin_file=gin/runs/dpo.gin"): TUNING,
    (*MAIN, "--gin_file=experiments/arithmetic_grpo.gin"): [
        "--gin.PRETRAIN_STEPS=2",
        "--gin.base/Schedule.warmup_steps=1",
        "--gin.STEPS=2",
        "--gin.tuned/Schedule.warmup_steps=1",
        "--gin.Reinforce.prompts=4",
        "--gin.Reinforce.group=4",
        "--gin.Reinforce.eval_prompts=8",
        "--gin.Pretrain.eval_batches=1",
    ],
    ("XLA_FLAGS=--xla_force_host_platform_device_count=8", *MAIN): [],
    ("python", "experiments/benchmarks/train_step.py"): [
        "--workload=tiny",
        "--contestant=ours",
        "--rounds=1",
    ],
    ("python", "experiments/benchmarks/generate.py"): [
        "--workload=tiny",
        "--contestant=ours",
        "--rounds=1",
    ],
    ("python", "experiments/benchmarks/input_pipeline.py"): [
        "--rounds=1",
        "--seconds=0.1",
        "--tokens=200000",
    ],
}
# These change the environment that the test itself runs in: what they name is checked instead.
INSTALL = ("pip", "install", "-e")
SUITE = ("python", "-m", "pytest")


def blocks(language: str) -> list[str]:
    """The README's code blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def commands() -> list[tuple[str, ...]]:
    """Every shell command of the README as words, in order."""
    found = []
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    found.append(tuple(words))
                    words = []
    return found


def shortening(command: tuple[str, ...]) -> list[str] | None:
    """What to append to a command of RUN; None for a command it does not know."""
    starts = [start for start in RUN if command[: len(start)] == start]
    return RUN[max(starts, key=len)] if starts else None


def test_every_command_is_known():
    unknown = [
        shlex.join(command)
        for command in commands()
        if command[:3] not in (INSTALL, SUITE) and shortening(command) is None
    ]
    assert not unknown, f"the README has commands that this test does not run: {unknown}"
    unused = [start for start in RUN if not any(command[: len(start)] == start for command in commands())]
    assert not unused, f"this test has commands that the README does not: {unused}"
    # Only these languages: a command in a block of another one would escape the test.
    assert set(re.findall(r"^```(\w+)$", README, re.M)) == {"bash", "python"}


def test_installs_name_extras_that_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = [command for command in commands() if command[:3] == INSTALL]
    assert installs
    for command in installs:
        (target,) = command[3:]
        extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", target)
        assert extras, f"the README installs {target!r}, which is not this checkout"
        assert set((extras[1] or "").split(",")) - {""} <= set(project["optional-dependencies"])


def test_suite_is_collected():
    """The README's pytest command finds the suite (running it from itself would not end)."""
    (command,) = {command for command in commands() if command[:3] == SUITE}
    done = execute([*command, "--collect-only", "-q", "-n0", "tests/report"], ROOT)
    assert "test_report.py::test_number" in done.stdout


def test_files_and_links_exist():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), f"the README links to {target}, which is not there"
    for target in re.findall(r"`((?:gin|experiments|notebooks|tests|tpu_scripts)/[\w./-]*)`", README):
        assert (ROOT / target).exists(), f"the README names {target}, which is not there"


def execute(command: list[str], folder: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """Runs a command, as a user with one device would; fails with its output if it fails."""
    environment = dict(os.environ)
    environment.pop("XLA_FLAGS", None)
    while "=" in command[0]:
        name, _, value = command[0].partition("=")
        environment[name] = value
        command = command[1:]
    if command[0] == "python":
        command = [sys.executable, *command[1:]]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


@pytest.mark.timeout(900)
def test_commands_run(tmp_path):
    """From a folder of its own, in the README's order; then its Python example, which uses what they made."""
    texts = tmp_path / "my_texts"
    texts.mkdir()
    draw = random.Random(0)
    syllables = [first + last for first in "bdfgklmnprst" for last in ("a", "en", "il", "or", "u")]
    for number in range(40):
        words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(400)]
        (texts / f"{number}.txt").write_text(" ".join(words) + ".\n")
    (tmp_path / "tinyshakespeare.txt").write_text("To be, or not to be: that is the question.\n" * 200)
    # Real pages and texts: sections of Python's manual.
    manual = [item.text for item in read_documents(ROOT / "t5style/samples/python-doc.jsonl.zst")]
    manual = [text for text in manual if 2000 < len(text) < 20_000]
    for name in ("pages", "more", "benchmarks"):
        (tmp_path / name).mkdir()
    for number, text in enumerate(manual[:8]):
        body = "".join(f"<p>{html.escape(part)}</p>\n" for part in text.split("\n\n"))
        page = f"<html><head><title>{number}</title></head><body><article>{body}</article></body></html>"
        (tmp_path / f"pages/{number}.html").write_text(page)
    (tmp_path / "more/text.txt").write_text(manual[8])
    (tmp_path / "benchmarks/questions.txt").write_text(manual[9])
    (tmp_path / "erase.jsonl").write_text(json.dumps({"text": manual[8]}) + "\n")
    asked = [{"prompt": f"define noun: {word}", "completion": f"what is {word}"} for word in syllables[:20]]
    (tmp_path / "instruct.jsonl").write_text("".join(json.dumps(record) + "\n" for record in asked))
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": "nothing"} for r in asked]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(record) + "\n" for record in pairs))
    for name in ("experiments", "gin"):
        (tmp_path / name).symlink_to(ROOT / name)  # as in a clone, but what is written lands here
    for command in commands():
        if command[:3] not in (INSTALL, SUITE):
            execute([*command, *(shortening(command) or [])], tmp_path)
    assert (tmp_path / "out" / "data_report.html").exists()
    ids = [
        item.id
        for name in ("train", "validation", "test")
        for item in read_documents(tmp_path / "out2" / name)
    ]
    assert "files/text.txt" not in ids
    quickstart = tmp_path / "runs" / "quickstart"
    assert (quickstart / "report" / "report.html").stat().st_size > 1_000_000
    for line in blocks("python"):
        execute(["python", "-c", line], tmp_path)
    assert (tmp_path / "exported" / "model.safetensors").exists()
