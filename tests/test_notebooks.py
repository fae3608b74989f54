"""The notebooks run from their first cell to their last on a run made here."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

from t5style import launch
from t5style.corpus import prepare, sources, split, stages, train_tokenizer
from t5style.data import objectives, task, tokenize
from t5style.models.config import TransformerConfig
from t5style.parallel.mesh import MeshConfig
from t5style.train import pretrain
from t5style.tune import supervised
from t5style.workflow import Workflow

FOLDER = pathlib.Path(__file__).parents[1] / "notebooks"


def workflow(text, encoder_layers):
    model = TransformerConfig(
        vocab_size=512,
        d_model=16,
        d_ff=32,
        num_heads=2,
        encoder_layers=encoder_layers,
        decoder_layers=1,
        positions="relative_bias" if encoder_layers else "rope",
        dtype="float32",
    )
    objective = objectives.SpanCorruption() if encoder_layers else objectives.CausalLM()
    common = {
        "model": model,
        "mesh": MeshConfig(devices=1),
        "lengths": {"encoder": 64, "decoder": 32} if encoder_layers else {"decoder": 48},
        "steps": 4,
        "batch_size": 8,
        "log_every": 1,
        "eval_batches": 1,
    }
    return Workflow(
        stages={
            "corpus": prepare.Prepare(
                sources=[sources.JsonLines([str(text)])],
                stages=(stages.MinLength(1),),
                split=split.HashSplit(validation=0.2, test=0.0),
                workers=1,
            ),
            "vocabulary": train_tokenizer.TrainTokenizer(kind="byte"),
            "text": tokenize.Tokenize(workers=1),
            "pairs": tokenize.Tokenize(features={"inputs": "number {id}:", "targets": "{text}"}, workers=1),
            "pretrained": pretrain.Pretrain(task=task.Task("text", "run:text", objective), **common),
            "tuned": supervised.Finetune(
                task=task.Task("pairs", "run:pairs", objectives.Supervised()),
                init_from="run:pretrained",
                **common,
            ),
        }
    )


@pytest.mark.parametrize("encoder_layers", [1, 0], ids=["encoder_decoder", "decoder_only"])
def test_first_look(encoder_layers, tmp_path, monkeypatch):
    text = tmp_path / "text.jsonl"
    lines = [
        f'{{"id": "{i}", "text": "The {i}th line tells of {i * i} small things in a row."}}\n'
        for i in range(60)
    ]
    text.write_text("".join(lines))
    launch.run(workflow(text, encoder_layers), str(tmp_path / "run"))
    notebook = nbformat.read(FOLDER / "first_look.ipynb", as_version=4)
    monkeypatch.setenv("T5STYLE_RUN_DIR", str(tmp_path / "run"))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER)}}).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert "training runs here: pretrained, tuned" in printed
    assert "small things" in printed  # decoded batches
    assert ("<extra_id_0>" in printed) == bool(encoder_layers)
    assert "⟦number" in printed or encoder_layers  # a decoder-only prompt is read but not learnt
    pictures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert pictures == (4 if encoder_layers else 3)  # no relative bias with rotary positions


def test_notebooks_are_stored_without_outputs():
    notebooks = sorted(FOLDER.glob("*.ipynb"))
    assert notebooks
    for file in notebooks:
        for cell in nbformat.read(file, as_version=4).cells:
            assert not cell.get("outputs"), f"{file.name} holds outputs: clear them before committing"
