import jax
import pytest

from t5style.models import params as model_params
from t5style.models.presets import llama2_7b
from t5style.parallel.explain import explain, format_bytes, placements, summary
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import Rules


def rows_of(mesh, rules=None):
    config = llama2_7b()
    return placements(model_params.logical_axes(config), model_params.abstract_params(config), mesh, rules)


def test_a_7b_model_is_explained_without_allocating(capsys):
    before = sum(array.nbytes for array in jax.live_arrays())
    config = llama2_7b()
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    rows = explain(model_params.logical_axes(config), model_params.abstract_params(config), mesh)
    assert sum(array.nbytes for array in jax.live_arrays()) == before
    by_path = {row.path: row for row in rows}
    query = by_path["decoder/layers/attention/query/kernel"]
    assert query.shape == (32, 4096, 32, 128)
    assert query.logical_axes == ("layers", "embed", "heads", "head_dim")
    assert query.mesh_axes == ("-", "fsdp", "tensor", "-")
    assert query.bytes == 32 * 4096 * 4096 * 4
    assert query.bytes_per_device == query.bytes // 4
    assert sum(row.bytes for row in rows) == 6_738_415_616 * 4
    out = capsys.readouterr().err
    assert "decoder/layers/attention/query/kernel" in out
    assert "6,738,415,616 parameters, 25.10 GiB; each of 8 devices holds 6.28 GiB (25.0%)" in out


def test_large_parameters_that_stay_whole_are_flagged():
    mesh = MeshConfig(data=2, tensor=4).build()
    assert not [row for row in rows_of(mesh) if row.flagged]
    whole = rows_of(mesh, Rules(parameters={"vocab": None}))
    # 32,000 × 4,096 floats each.
    assert {row.path for row in whole if row.flagged} == {"embedding", "head/kernel"}
    assert "2 large parameters are whole on every device (1000.00 MiB): embedding, head/kernel" in summary(
        whole, mesh
    )


def test_data_parallelism_alone_says_so_once():
    mesh = MeshConfig(data=8).build()
    rows = rows_of(mesh)
    assert not [row for row in rows if row.flagged]
    assert "Every device holds the whole model (data parallelism only)" in summary(rows, mesh)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (3 << 40, "3.00 TiB")]
)
def test_format_bytes(count, text):
    assert format_bytes(count) == text
