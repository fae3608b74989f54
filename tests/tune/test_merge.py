"""Merging: the papers' formulas entry by entry, and what must hold of any two models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import t5style
from t5style.infer.storage import Stored
from t5style.models.adapters import Lora
from t5style.models.adapters_merge import merge_adapters
from t5style.models.params import abstract_params
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.tune import merging, write_model
from t5style.tune.merge import Merge
from t5style.tune.supervised import Finetune
from tests.evaluate import tiny_task

CONFIG = tiny_task.model(decoder_only=True)


def arrays(count, shape=(5, 7), seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(size=shape).astype(np.float32) for _ in range(count)]


def test_slerp_goes_along_the_arc():
    a, b = arrays(2)
    angle = np.arccos((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    for t in (0.0, 0.3, 1.0):
        expected = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        np.testing.assert_allclose(merging.slerp(a, b, t), expected, rtol=1e-4, atol=1e-6)
    unit = [x / np.linalg.norm(x) for x in (a, b)]
    assert np.linalg.norm(merging.slerp(*unit, 0.4)) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(merging.slerp(a, b, 0.3), merging.slerp(b, a, 0.7), atol=1e-6)
    np.testing.assert_allclose(merging.slerp(a, 2 * a, 0.5), 1.5 * a, rtol=1e-6)


def test_ties_trims_elects_and_averages():
    base = np.zeros(5, np.float32)
    deltas = [np.array(x, np.float32) for x in ([3, -1, 0.5, 2, 0], [1, -2, -4, -2, 0], [5, 3, -2, 0.1, 0])]
    # Of each the three largest: (3, -1, 0, 2, 0), (0, -2, -4, -2, 0), (5, 3, -2, 0, 0).
    limits = [merging.threshold(lambda d=d: [d], 0.6) for d in deltas]
    assert limits == [1, 2, 2]
    merged = merging.ties(base + 1, deltas, [1, 1, 1], limits, 2.0)
    np.testing.assert_allclose(merged, 1 + 2 * np.array([4, 0, -3, 0, 0]), rtol=1e-6)
    merged = merging.ties(base, deltas, [1, 2, 1], limits, 1.0)
    np.testing.assert_allclose(merged, [4, -5 / 3, -10 / 3, -2, 0], rtol=1e-6)


def test_the_threshold_is_exact_and_of_all_parts_together():
    parts = [*arrays(3), np.zeros(9, np.float32), np.full(4, 0.25, np.float32)]
    every = np.sort(np.abs(np.concatenate([part.reshape(-1) for part in parts])))[::-1]
    for density in (0.01, 0.2, 0.5, 0.87, 1.0):
        kept = int(np.ceil(density * len(every)))
        expected = 0 if density == 1 else every[kept - 1]
        assert merging.threshold(lambda: parts, density) == expected


def test_dare_keeps_the_mean_and_does_not_depend_on_the_order():
    delta = np.full((300, 300), 2.0, np.float32)
    found = merging.dare(delta, 0.9, merging.generator(0, "a", "x"))
    assert (found == 0).mean() == pytest.approx(0.9, abs=0.01)
    np.testing.assert_allclose(found[found != 0], 20, rtol=1e-5)
    again = merging.dare(delta, 0.9, merging.generator(0, "a", "x"))
    np.testing.assert_array_equal(found, again)
    assert (found != merging.dare(delta, 0.9, merging.generator(0, "b", "x"))).any()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three runs that have not been trained, and a Hugging Face directory of the first: folders."""
    folder, made = tmp_path_factory.mktemp("models"), []
    for number in range(3):
        random = np.random.default_rng(number)
        params = jax.tree.map(
            lambda leaf, random=random: jnp.asarray(random.normal(size=leaf.shape), jnp.float32),
            abstract_params(CONFIG),
        )
        like = Stored(CONFIG, None, tiny_task.VOCABULARY)
        made.append(write_model.write(RunDir(folder / f"run-{number}"), CONFIG, params, like, "run", {}))
    t5style.load(made[0]).save(folder / "hf")
    return [*made, str(folder / "hf")]


def merged(folder, **fields):
    Merge(**fields)(RunDir(folder).create())
    return jax.tree.map(np.asarray, t5style.load(folder).params)


def same(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_models_merge_by_their_formulas(models, tmp_path):
    a, b, c = (jax.tree.map(np.asarray, t5style.load(path).params) for path in models[:3])
    soup = merged(tmp_path / "soup", models=models[:2], weights=[3, 1])
    same(soup, jax.tree.map(lambda x, y: 0.75 * x + 0.25 * y, a, b), rtol=1e-5, atol=1e-6)
    added = merged(
        tmp_path / "added",
        models=models[1:3],
        base=models[3],
        method="task_arithmetic",
        weights=[1, -1],
        scale=0.5,
    )
    same(added, jax.tree.map(lambda x, y, z: x + 0.5 * (y - z), a, b, c), rtol=1e-4, atol=1e-5)
    arc = merged(tmp_path / "arc", models=models[:2], method="slerp", weights=[0.5, 0.5])
    same(arc["embedding"], merging.slerp(a["embedding"], b["embedding"], 0.5), atol=1e-6)
    ours, first, second = (tree["decoder"]["layers"]["mlp"]["output"]["kernel"][0] for tree in (arc, a, b))
    same(ours, merging.slerp(first, second, 0.5), atol=1e-6)
    lineage = json.loads((tmp_path / "added" / "lineage.json").read_text())
    assert lineage["parents"] == models[1:3]
    assert lineage["merge"]["scale"] == 0.5


def test_ties_of_whole_models_with_dare_is_the_same_in_any_order(models, tmp_path):
    fields = {"base": models[0], "method": "ties", "density": 0.4, "drop": 0.5}
    one = merged(tmp_path / "one", models=models[1:3], **fields)
    same(one, merged(tmp_path / "other", models=models[2:0:-1], **fields), atol=1e-6)
    # A model merged with itself is that model.
    alone = Merge([models[1], models[1]], "slerp", format="huggingface")
    alone(RunDir(tmp_path / "alone").create())
    found = t5style.load(tmp_path / "alone" / "model")
    same(found.params, t5style.load(models[1]).params, atol=1e-5)
    assert found.vocabulary == tiny_task.VOCABULARY


def test_adapter_runs_are_merged_by_what_they_add(models, tmp_path):
    store = tiny_task.make_store(str(tmp_path / "store"))
    job = Finetune(
        task=tiny_task.task(store),
        init_from=models[0],
        adapter=Lora(rank=2, dora=True),
        mesh=MeshConfig(devices=1),
        **tiny_task.settings(2, 1e-1),
    )
    job(RunDir(tmp_path / "tuned").create())
    base, tuned = t5style.load(models[0]), t5style.load(tmp_path / "tuned")
    twice = {
        "models": [str(tmp_path / "tuned")],
        "base": models[0],
        "method": "task_arithmetic",
        "weights": [2.0],
    }
    found = merged(tmp_path / "twice", **twice)
    whole = merge_adapters(base.config, tuned.params)
    same(found, jax.tree.map(lambda a, b: a + 2 * (b - a), base.params, whole), atol=1e-5)
    kernels = [tree["decoder"]["layers"]["mlp"]["output"]["kernel"] for tree in (found, base.params)]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3


def test_what_cannot_be_merged_is_refused(models, tmp_path):
    with pytest.raises(ValueError, match="method 'ties' merges differences to a base: give one"):
        Merge(models[:2], "ties")
    with pytest.raises(ValueError, match="slerp goes from one model to another: there are 3"):
        Merge(models[:3], "slerp")
    with pytest.raises(ValueError, match="there are 1 weights for 2 models"):
        Merge(models[:2], weights=[1.0])
    other = dataclasses.replace(CONFIG, d_ff=48)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_params(other))
    like = Stored(other, None, tiny_task.VOCABULARY)
    write_model.write(RunDir(tmp_path / "other"), other, params, like, "run", {})
    with pytest.raises(UserError, match=r"the model .* is of another architecture: its d_ff is 48"):
        Merge([models[0], str(tmp_path / "other")])(RunDir(tmp_path / "x").create())
    averaged = Merge([f"{models[0]}/checkpoints/*"])
    assert averaged.inputs() == [f"{models[0]}/checkpoints"]
    steps = averaged(RunDir(tmp_path / "steps").create())
    assert steps["models"] == 1
