"""Students are their teachers with what they lack at zero, and what they lack counts least."""

import functools

import jax
import numpy as np
import pytest

from t5style.models import importance, prune
from t5style.models.params import abstract_params
from t5style.models.prune import Student
from t5style.nn.settings import MoE
from t5style.run_dir import UserError
from tests.models import tiny

T5 = tiny.T5.replace(num_heads=4, encoder_layers=3, decoder_layers=3)
LLAMA = tiny.LLAMA.replace(num_heads=8, num_kv_heads=4, decoder_layers=4)


@functools.cache
def params_of(config):
    """Random ones, without compiling what would make them."""
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: random.normal(size=leaf.shape).astype(np.float32) * 0.2, abstract_params(config)
    )


def logits(config, params, batch):
    names = {name: value for name, value in batch.items() if not name.endswith("input_tokens")}
    tokens = [
        batch[f"{side}_input_tokens"] for side in ("decoder", "encoder") if f"{side}_positions" in batch
    ]
    return np.asarray(tiny.runner(config)(params, *tokens, **names))


def batch_of(config, seed=0):
    """Two rows, the second with padding."""
    batch = {}
    for side in ("encoder", "decoder") if config.encoder_layers else ("decoder",):
        batch[f"{side}_input_tokens"] = tiny.tokens_of(config, 2, 7, seed)
        batch[f"{side}_segment_ids"] = np.array([[1] * 7, [1] * 5 + [0] * 2], np.int32)
        batch[f"{side}_positions"] = np.tile(np.arange(7, dtype=np.int32), (2, 1))
    return batch


def zeroed(config, params, kept):
    """The teacher, of which heads, hidden units and layers that go add nothing."""
    params = jax.tree.map(np.array, params)
    for side, stays in kept.layers.items():
        layers = params[side]["layers"]
        for number in range(len(config.layers_of(side))):
            blocks = [block for block in ("attention", "cross_attention", "mlp") if block in layers]
            for block in blocks:
                chosen = kept.hidden[side] if block == "mlp" else kept.heads[side, block]
                kernel = layers[block]["output"]["kernel"][number]
                gone = (
                    range(len(kernel)) if number not in stays else set(range(len(kernel))) - {*chosen[number]}
                )
                kernel[list(gone)] = 0
    return params


@pytest.mark.parametrize(
    ("config", "student"),
    [
        (T5, Student(encoder_layers=[0, 2], decoder_layers=2, num_heads=2, d_ff=0.5)),
        (T5.replace(relative_bias_per_layer=True), Student(num_heads=3, d_ff=7)),
        (LLAMA, Student(decoder_layers=3, num_kv_heads=2, d_ff=10)),
        (
            LLAMA,
            Student(
                decoder_layers=2,
                layers="influence",
                num_heads=3,
                num_kv_heads=3,
                d_ff=20,
                importance="activations",
            ),
        ),
    ],
)
def test_a_student_is_its_teacher_with_what_it_lacks_at_zero(config, student):
    params, batch = params_of(config), batch_of(config)
    made, cut = prune.prune(config, params, student, [batch])
    statistics = (
        importance.of_activations(config, params, [batch])
        if student.needs_batches
        else importance.of_weights(config, params)
    )
    kept = prune.choose(config, student, statistics)
    real = batch["decoder_segment_ids"] > 0
    ours, theirs = logits(made, cut, batch)[real], logits(config, zeroed(config, params, kept), batch)[real]
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    assert np.abs(ours - logits(config, params, batch)[real]).max() > 1e-3


def test_pruning_nothing_changes_nothing_and_layers_with_experts_stay_what_they_are():
    for config in (T5, LLAMA):
        made, params = prune.prune(config, params_of(config), Student())
        assert made == config
        jax.tree.map(np.testing.assert_array_equal, params, params_of(config))
    mixed = LLAMA.replace(
        moe=MoE(4, 2, 8, shared_d_ff=6), moe_layers=(1, 3), layer_pattern=("window", "full"), window=3
    )
    made, params = prune.prune(mixed, params_of(mixed), Student(decoder_layers=[0, 3], d_ff=5, d_model=12))
    assert (made.moe_layers, made.layer_pattern, made.window) == ((1,), ("window", "full"), 3)
    shapes = jax.tree.map(np.shape, params)
    assert shapes == jax.tree.map(np.shape, jax.tree.map(np.array, params_of(made)))


def test_channels_that_are_never_used_go_first():
    """With the norms' means over fewer channels made up for, the student is the teacher."""
    config = LLAMA.replace(scale_embeddings=True, scale_logits=True)
    dead = np.array([1, 5, 6, 11])
    axes = {path: names for path, _, names in importance.leaves_of(config, params_of(config))}

    def kill(keys, leaf):
        names = axes[importance.path_name(keys)]
        leaf = np.array(leaf)
        if "embed" in names and names != ("embed",) and names[-2:] != ("layers", "embed"):
            np.moveaxis(leaf, names.index("embed"), 0)[dead] = 0
        return leaf if "_norm" not in importance.path_name(keys) else leaf * np.float32((12 / 16) ** 0.5)

    params = jax.tree_util.tree_map_with_path(kill, params_of(config))
    batch = batch_of(config)
    made, cut = prune.prune(config, params, Student(d_model=12, importance="activations"), [batch])

    def stretch(keys, leaf):
        return leaf / np.float32((12 / 16) ** 0.5) if "_norm" in importance.path_name(keys) else leaf

    whole = jax.tree_util.tree_map_with_path(stretch, cut)
    real = batch["decoder_segment_ids"] > 0
    np.testing.assert_allclose(
        logits(made, whole, batch)[real], logits(config, params, batch)[real], atol=2e-4
    )


def test_statistics_follow_their_definitions():
    config = LLAMA
    params = jax.tree.map(np.array, params_of(config))
    params["decoder"]["layers"]["mlp"]["output"]["kernel"][:, 3] *= 10
    params["decoder"]["layers"]["mlp"]["inputs_0"]["kernel"][:, :, 4] = 0
    found = importance.of_weights(config, params)
    mlp = params["decoder"]["layers"]["mlp"]
    own = np.sqrt(
        sum((mlp[name]["kernel"][1, :, 3] ** 2).sum() for name in ("inputs_0", "inputs_1"))
        + (mlp["output"]["kernel"][1, 3] ** 2).sum()
    )
    np.testing.assert_allclose(found.hidden["decoder"][1, 3], own, rtol=1e-5)
    one = batch_of(config)
    measured = importance.of_activations(config, params, [one])
    assert (measured.hidden["decoder"][:, 4] == 0).all()
    assert (measured.hidden["decoder"].argmax(axis=1) != 4).all()
    # Padding does not count, and batches add up.
    other = {
        **one,
        "decoder_input_tokens": np.where(one["decoder_segment_ids"] > 0, one["decoder_input_tokens"], 9),
    }
    again = importance.of_activations(config, params, [other, other])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), measured.hidden, again.hidden)
    np.testing.assert_allclose(measured.channels, again.channels, rtol=1e-5)
    np.testing.assert_allclose(measured.influence["decoder"], again.influence["decoder"], rtol=1e-4)


@pytest.mark.parametrize(
    ("student", "said"),
    [
        (Student(d_ff=25), "d_ff is 25, but the teacher has 24"),
        (Student(encoder_layers=1), "the teacher has no encoder"),
        (Student(decoder_layers=[0, 4]), "names layer 4, the teacher's are numbered 0 to 3"),
        (Student(num_heads=6), "each group of heads that share keys must keep equally many"),
        (Student(importance="activations"), "measured on data: give batches"),
    ],
)
def test_what_cannot_be_is_said(student, said):
    with pytest.raises(UserError, match=said):
        prune.prune(LLAMA, params_of(LLAMA), student)
    with pytest.raises(ValueError, match="must be one of magnitude, activations"):
        Student(importance="luck")
