"""Finetune: it starts from the parameters it is told to, and refuses to start from none."""

import json

import jax
import numpy as np
import pytest

import t5style
from t5style.corpus.vocabulary import CharacterVocabulary
from t5style.data.task import Task
from t5style.data.token_store import TokenStoreWriter
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.train import initialize
from t5style.train.pretrain import Pretrain
from t5style.tune.supervised import Finetune
from tests.evaluate import tiny_task

ONE = MeshConfig(devices=1)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A store and a run of a few steps."""
    folder = tmp_path_factory.mktemp("parent")
    store = tiny_task.make_store(str(folder / "store"))
    job = Pretrain(model=tiny_task.model(), task=tiny_task.task(store), mesh=ONE, **tiny_task.settings(5))
    job(RunDir(folder / "run").create())
    return store, str(folder / "run")


def finetune(store: str, init_from: str | None, steps: int = 2, peak: float = 1e-2, **fields) -> Finetune:
    settings = tiny_task.settings(steps, peak) | {"init_from": init_from} | fields
    return Finetune(
        model=settings.pop("model", tiny_task.model()), task=tiny_task.task(store), mesh=ONE, **settings
    )


def test_starts_from_the_parent_and_changes_it(parent, tmp_path):
    store, run = parent
    finetune(store, run, peak=1e-30)(RunDir(tmp_path / "still").create())
    before, still = t5style.load(run), t5style.load(tmp_path / "still")
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(still.params), strict=True):
        np.testing.assert_array_equal(a, b)
    lineage = json.loads((tmp_path / "still" / "lineage.json").read_text())
    assert lineage["parent"].startswith(run)
    assert lineage["parent_step"] == 5
    finetune(store, run, steps=20)(RunDir(tmp_path / "tuned").create())
    pairs = tiny_task.examples("validation", 21)
    inputs, targets = [source for source, _ in pairs], [target for _, target in pairs]
    assert t5style.load(tmp_path / "tuned").score(inputs, targets).sum() > before.score(inputs, targets).sum()


def test_checkpoint_folders_and_huggingface_directories_are_parents_too(parent, tmp_path):
    store, run = parent
    before = t5style.load(run)
    before.save(tmp_path / "hf")
    for place in (tmp_path / "hf", f"{run}/checkpoints/5"):
        name = f"from-{'hf' if 'hf' in str(place) else 'checkpoint'}"
        model = tiny_task.model().replace(context_length=64)  # what it is meant for, not what it computes
        finetune(store, str(place), steps=1, peak=1e-30, model=model)(RunDir(tmp_path / name).create())
        after = t5style.load(tmp_path / name)
        assert after.generate(["hot"], 4) == before.generate(["hot"], 4)
        np.testing.assert_array_equal(after.params["embedding"], before.params["embedding"])
    assert t5style.load(f"{run}/checkpoints/5").generate(["hot"], 4) == before.generate(["hot"], 4)


def test_the_vocabulary_of_a_huggingface_directory_is_the_stores(parent, tmp_path):
    hf = tmp_path / "hf"
    t5style.load(parent[1]).save(hf)

    def start():
        return initialize.load_params(str(hf), tiny_task.model(), None, None, tiny_task.VOCABULARY)

    assert start().source == f"the Hugging Face model {hf}"
    CharacterVocabulary("zyx", extra_ids=4).save(hf)
    with pytest.raises(UserError, match=r"trained with the vocabulary .* Tokenize with .*vocabulary\.json"):
        start()
    (hf / "vocabulary.json").unlink()
    assert "has no tokenizer file" in start().source


def test_the_parent_says_the_model_and_the_store_the_task(parent, tmp_path):
    with TokenStoreWriter(str(tmp_path / "store"), ("inputs", "targets"), tiny_task.VOCABULARY) as writer:
        for source, target in tiny_task.examples("train", 20):
            texts = {"inputs": source, "targets": target}
            writer.add(
                "train", {name: [*tiny_task.VOCABULARY.encode(text), 1] for name, text in texts.items()}
            )
    settings = tiny_task.settings(2) | {"init_from": parent[1], "store": str(tmp_path / "store"), "mesh": ONE}
    job = Finetune(**settings, changes={"dropout": 0.1})
    assert job.resolved().model == tiny_task.model().replace(dropout=0.1)
    assert job.inputs() == [str(tmp_path / "store"), parent[1]]
    job(RunDir(tmp_path / "run").create())
    assert t5style.load(tmp_path / "run").config.dropout == 0.1
    with pytest.raises(ValueError, match="changes has 'droppout', which is no field"):
        Finetune(**settings, changes={"droppout": 0.1})
    with pytest.raises(ValueError, match="a task and a store were given"):
        Finetune(**settings, task=tiny_task.task(parent[0]))
    with pytest.raises(UserError, match="has the features inputs, targets, text, which no objective"):
        Finetune(**settings | {"store": parent[0]}).resolved()
    with pytest.raises(UserError, match="there is no model"):
        Finetune(**settings | {"init_from": str(tmp_path / "absent")}).resolved()


def test_refuses_to_start_from_nothing(parent, tmp_path):
    store, run = parent
    with pytest.raises(ValueError, match="init_from is not set: Finetune needs a model to start from"):
        finetune(store, None)
    with pytest.raises(UserError, match="there is nothing there"):
        finetune(store, str(tmp_path / "absent"))(RunDir(tmp_path / "a").create())
    with pytest.raises(UserError, match="is of another architecture"):
        finetune(store, run, model=tiny_task.model().replace(d_ff=48))(RunDir(tmp_path / "b").create())
    assert isinstance(finetune(store, run).task, Task)
