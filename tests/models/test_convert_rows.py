import types

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from t5style.models import convert_stream
from t5style.models.convert_rows import (
    SAME,
    Fields,
    Row,
    Transform,
    computation,
    fused,
    linear,
    matrix,
    norm,
    rotary,
    vector,
)
from t5style.models.families.registry import FAMILIES
from t5style.run_dir import UserError
from tests.models.tiny import LLAMA, T5

EMBED, HEADS, GROUPS, WIDTH = 6, 4, 2, 8
QUERY, KEY = (EMBED, HEADS, WIDTH), (EMBED, GROUPS, WIDTH)

# Name: transform, shapes of ours, shapes of theirs.
TRANSFORMS = {
    "same": (SAME, [(5, 3)], [(5, 3)]),
    "linear": (matrix(), [QUERY], [(HEADS * WIDTH, EMBED)]),
    "output": (matrix(2), [(HEADS, WIDTH, EMBED)], [(EMBED, HEADS * WIDTH)]),
    "Conv1D": (matrix(transposed=False), [QUERY], [(EMBED, HEADS * WIDTH)]),
    "stacked experts": (matrix(leading=1), [(3, EMBED, 5)], [(3, 5, EMBED)]),
    "stacked experts, [in, out]": (matrix(transposed=False, leading=1), [(3, EMBED, 5)], [(3, EMBED, 5)]),
    "bias": (vector(), [(HEADS, WIDTH)], [(HEADS * WIDTH,)]),
    "bias of experts": (vector(leading=1), [(3, HEADS, WIDTH)], [(3, HEADS * WIDTH)]),
    "Phi-3": (fused(matrix()), [QUERY, KEY, KEY], [((HEADS + 2 * GROUPS) * WIDTH, EMBED)]),
    "GPT-2": (fused(matrix(transposed=False), axis=1), [QUERY] * 3, [(EMBED, 3 * HEADS * WIDTH)]),
    "GPT-2's bias": (fused(vector()), [(HEADS, WIDTH)] * 3, [(3 * HEADS * WIDTH,)]),
    "GPT-NeoX": (fused(matrix(), width=WIDTH), [QUERY] * 3, [(HEADS * 3 * WIDTH, EMBED)]),
    "GPT-NeoX's bias": (fused(vector(), width=WIDTH), [(HEADS, WIDTH)] * 3, [(3 * HEADS * WIDTH,)]),
    "GPT-OSS": (
        fused(matrix(transposed=False, leading=1), axis=-1, width=1),
        [(3, EMBED, 5)] * 2,
        [(3, EMBED, 10)],
    ),
    "GPT-J's order": (rotary(matrix(), WIDTH), [QUERY], [(HEADS * WIDTH, EMBED)]),
    "DeepSeek": (rotary(matrix(), 4, start=WIDTH - 4), [QUERY], [(HEADS * WIDTH, EMBED)]),
}


def random(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_are_exact_both_ways_and_know_their_shapes(name):
    transform, ours, theirs = TRANSFORMS[name]
    assert transform.their_shapes(ours) == tuple(theirs)
    values = random(theirs)
    made = transform.to_ours(values, ours)
    assert [value.shape for value in made] == ours
    for value, again in zip(values, transform.to_theirs(made), strict=True):
        np.testing.assert_array_equal(again, value)
    # Every number is somewhere: nothing is dropped and nothing is repeated.
    np.testing.assert_array_equal(
        np.sort(np.concatenate([x.ravel() for x in made])),
        np.sort(np.concatenate([x.ravel() for x in values])),
    )


@pytest.mark.parametrize(
    "name", ["linear", "output", "Conv1D", "stacked experts", "bias", "Phi-3", "GPT-2", "GPT-OSS"]
)
def test_transforms_of_files_are_views(name):
    transform, ours, theirs = TRANSFORMS[name]
    values = random(theirs)
    made = transform.to_ours(values, ours)
    if name != "GPT-OSS":
        assert all(np.shares_memory(value, values[0]) for value in made)
    # Shapes of a large tensor are known without memory for it.
    if name in ("linear", "output", "Conv1D"):
        assert transform.their_shapes([(1 << 20, 1 << 20, 1 << 10)])


def test_a_projection_of_theirs_and_ours_computes_the_same():
    (x,) = random([(2, EMBED)], seed=1)
    weight, bias = random([(HEADS * WIDTH, EMBED), (HEADS * WIDTH,)])
    theirs = (x @ weight.T + bias).reshape(2, HEADS, WIDTH)  # torch.nn.Linear, then split into heads
    (kernel,) = matrix().to_ours([weight], [QUERY])
    (ours_bias,) = vector().to_ours([bias], [(HEADS, WIDTH)])
    np.testing.assert_allclose(np.einsum("be,ehd->bhd", x, kernel) + ours_bias, theirs, rtol=1e-4, atol=1e-6)
    weight = random([(EMBED, HEADS * WIDTH)])[0]
    (kernel,) = matrix(2).to_ours([weight], [(HEADS, WIDTH, EMBED)])
    attended = theirs.reshape(2, -1) @ weight.T
    np.testing.assert_allclose(np.einsum("bhd,hde->be", theirs, kernel), attended, rtol=1e-4, atol=1e-5)


def test_fused_projections_hold_what_the_families_put_there():
    (x,) = random([(2, EMBED)], seed=1)
    (weight,) = random([((HEADS + 2 * GROUPS) * WIDTH, EMBED)])
    y = x @ weight.T
    query, key, value = fused(matrix()).to_ours([weight], [QUERY, KEY, KEY])  # Phi3Attention: slices
    end = HEADS * WIDTH
    for kernel, part in ((query, y[:, :end]), (key, y[:, end : end + 16]), (value, y[:, end + 16 :])):
        np.testing.assert_allclose(np.einsum("be,ehd->bhd", x, kernel).reshape(2, -1), part, rtol=1e-4)
    (weight,) = random([(3 * HEADS * WIDTH, EMBED)])
    y = (x @ weight.T).reshape(2, HEADS, 3, WIDTH)  # GPTNeoXAttention: [heads, 3, head_dim]
    for i, kernel in enumerate(fused(matrix(), width=WIDTH).to_ours([weight], [QUERY] * 3)):
        np.testing.assert_allclose(np.einsum("be,ehd->bhd", x, kernel), y[:, :, i], rtol=1e-4, atol=1e-6)
    (weight,) = random([(3, EMBED, 10)])  # GptOssExperts: gate is [..., ::2], up is [..., 1::2]
    gate, up = TRANSFORMS["GPT-OSS"][0].to_ours([weight], [(3, EMBED, 5)] * 2)
    np.testing.assert_array_equal(gate, weight[..., ::2])
    np.testing.assert_array_equal(up, weight[..., 1::2])


def turned(x, positions, interleaved):
    """Rotary embedding of x [tokens, width], of neighbours or of the two halves (RoFormer; GPT-NeoX)."""
    width = x.shape[-1]
    angle = positions[:, None] * 100.0 ** (-np.arange(width // 2) / (width // 2))
    a, b = (x[:, ::2], x[:, 1::2]) if interleaved else (x[:, : width // 2], x[:, width // 2 :])
    c, d = a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)
    return np.stack([c, d], -1).reshape(x.shape) if interleaved else np.concatenate([c, d], -1)


@given(st.integers(1, 4).map(lambda n: 2 * n), st.integers(0, 3), st.integers(0, 2))
def test_permuted_queries_and_keys_have_the_same_scores(width, before, after):
    rng = np.random.default_rng(width + before)
    x = rng.normal(size=(5, EMBED))
    total = before + width + after
    weights = [rng.normal(size=(total, EMBED)) for _ in range(2)]
    transform = rotary(matrix(), width, start=before)
    rotated = slice(before, before + width)

    def scores(vectors, interleaved):
        vectors = [one.copy() for one in vectors]
        for one in vectors:
            one[:, rotated] = turned(one[:, rotated], np.arange(5), interleaved)
        return vectors[0] @ vectors[1].T

    theirs = scores([x @ weight.T for weight in weights], interleaved=True)
    kernels = [transform.to_ours([weight], [(EMBED, total)])[0] for weight in weights]
    np.testing.assert_allclose(scores([x @ kernel for kernel in kernels], interleaved=False), theirs)


# --- rows in a model ---


class Sparse:
    """A config whose decoder has experts in layers 1 and 3, as far as rows ask."""

    def layers_of(self, side):
        assert side == "decoder"
        return tuple(types.SimpleNamespace(experts=number in (1, 3)) for number in range(5))


SHAPES = {
    "embedding": (8, EMBED),
    "decoder": {
        "layers": {"mlp": {"kernel": (3, EMBED, 5)}, "query": {"kernel": (3, EMBED, 2, 4)}},
        "moe_layers": {
            "query": {"kernel": (2, EMBED, 2, 4)},
            "experts": {"kernel": (2, 4, EMBED, 5)},
            "gate": {"kernel": (2, 4, EMBED, 5)},
            "up": {"kernel": (2, 4, EMBED, 5)},
        },
    },
}
ROWS = (
    Row("embedding", "wte"),
    Row("decoder/layers/mlp/kernel", "h.{layer}.mlp", matrix()),
    *(row for tree in ("layers", "moe_layers") for row in linear(f"decoder/{tree}/query", "h.{layer}.q")),
    Row("decoder/moe_layers/experts/kernel", "h.{layer}.experts.{expert}.w", matrix()),
    Row(
        ("decoder/moe_layers/gate/kernel", "decoder/moe_layers/up/kernel"),
        "h.{layer}.gate_up",
        fused(matrix(transposed=False, leading=1), axis=-1, width=1),
    ),
)


@pytest.fixture
def placed(monkeypatch):
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple)
    )
    monkeypatch.setattr(convert_stream, "abstract_params", lambda config: tree)
    return convert_stream.place(Sparse(), ROWS, "Sparse")


def tensors_of(placed):
    named = dict(tensor for one in placed for tensor in one.tensors())
    return dict(zip(named, random(named.values()), strict=True))


def test_layers_have_their_numbers_in_the_stack_and_experts_their_own_tensors(placed):
    tensors = tensors_of(placed)
    assert set(tensors) == {
        "wte",
        *(f"h.{n}.mlp" for n in (0, 2, 4)),
        *(f"h.{n}.q.weight" for n in range(5)),
        *(f"h.{n}.experts.{e}.w" for n in (1, 3) for e in range(4)),
        *(f"h.{n}.gate_up" for n in (1, 3)),
    }
    params = convert_stream.load(placed, tensors.__getitem__, "float32")
    decoder = params["decoder"]
    np.testing.assert_array_equal(decoder["layers"]["mlp"]["kernel"][2], tensors["h.4.mlp"].T)
    query = tensors["h.3.q.weight"].T.reshape(EMBED, 2, 4)
    np.testing.assert_array_equal(decoder["moe_layers"]["query"]["kernel"][1], query)
    np.testing.assert_array_equal(
        decoder["moe_layers"]["experts"]["kernel"][1, 2], tensors["h.3.experts.2.w"].T
    )
    np.testing.assert_array_equal(decoder["moe_layers"]["up"]["kernel"][0], tensors["h.1.gate_up"][..., 1::2])


@pytest.mark.parametrize("spec", ["layers", "experts", "inner", "two", "none"])
def test_any_sharding_holds_the_same_numbers_and_gives_the_same_tensors(placed, spec):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("a", "b", "c"))
    tensors = tensors_of(placed)
    single = convert_stream.load(placed, tensors.__getitem__, "float32")

    def of(leaf):
        if leaf.ndim < 3:
            return NamedSharding(mesh, PartitionSpec(None, "b"))
        names = {
            "layers": ["a"] if leaf.shape[0] == 2 else [],
            "experts": [None, "a", "c"] if leaf.ndim == 4 else [None, None],
            "inner": [None] * (leaf.ndim - 2) + ["b"],
            "two": [None, ("a", "b")] if leaf.shape[1] == 4 else [None, "c"],
            "none": [],
        }
        return NamedSharding(mesh, PartitionSpec(*names[spec]))

    shardings = jax.tree.map(of, single)
    read = []

    def reading(name):
        read.append(name)
        return tensors[name]

    params = convert_stream.load(placed, reading, "float32", shardings)
    jax.tree.map(np.testing.assert_array_equal, params, single)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings
    saved = {tensor.name: tensor.make() for tensor in convert_stream.plan(placed, params)}
    assert set(saved) == set(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(saved[name], value)


def test_only_the_devices_part_is_taken_from_a_tensor(placed, monkeypatch):
    sizes = []
    solid = convert_stream.solid
    monkeypatch.setattr(
        convert_stream, "solid", lambda value, dtype: sizes.append(value.nbytes) or solid(value, dtype)
    )
    mesh = Mesh(np.array(jax.devices()[:2]), ("a",))
    tensors = tensors_of(placed)
    shardings = jax.tree.map(
        lambda shape: NamedSharding(mesh, PartitionSpec(*[None] * (len(shape) - 2), "a")),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    convert_stream.load(placed, tensors.__getitem__, "float32", shardings)
    assert sum(sizes) == sum(value.nbytes for value in tensors.values())
    assert max(sizes) <= max(value.nbytes for value in tensors.values()) / 2


def test_missing_rows_and_tensors_are_errors_naming_them(placed):
    with pytest.raises(UserError, match="the parameter embedding has no place in a Hugging Face Sparse"):
        convert_stream.place(Sparse(), ROWS[1:], "Sparse")
    with pytest.raises(AssertionError, match="two rows"):
        convert_stream.place(Sparse(), (*ROWS, Row("embedding", "other")), "Sparse")
    shapes = dict(tensor for one in placed for tensor in one.tensors())
    del shapes["h.3.experts.2.w"]
    with pytest.raises(UserError, match=r"x lacks 1 tensors that its header calls for: h.3.experts.2.w"):
        convert_stream.check(placed, shapes, "x", "header")


def test_norms_and_linears_have_biases_where_the_model_has():
    assert [row.theirs for row in (*norm("n", "ln"), *linear("l", "fc"))] == [
        *("ln.weight", "ln.bias", "fc.weight", "fc.bias"),
    ]


# --- configs ---


def test_configs_that_compute_the_same_are_told_from_those_that_do_not():
    same = LLAMA.replace(head_dim=4, dropout=0.1, remat="full", relative_buckets=16, dtype="bfloat16")
    assert computation(same) == computation(LLAMA)
    assert computation(LLAMA.replace(scale_attention=False, attention_scale=0.5)) == computation(LLAMA)
    assert computation(T5.replace(rope_theta=5.0)) == computation(T5)
    for changes in ({"rope_theta": 5.0}, {"num_kv_heads": 4}, {"layer_pattern": ("window",), "window": 4}):
        assert computation(LLAMA.replace(**changes)) != computation(LLAMA)


@pytest.mark.parametrize("name", FAMILIES)
def test_fields_are_read_once_and_refused_by_name(name):
    with pytest.raises(UserError, match=r"somewhere: lacks the field"):
        FAMILIES[name].config(Fields({"model_type": name}, "somewhere"))


def test_a_transform_of_ones_own():
    halved = Transform(lambda theirs, shapes: [theirs[0] * 2], lambda ours: [ours[0] / 2])
    assert halved.their_shapes([(3, 4)]) == ((3, 4),)
