"""What is sent inside the loop over layers without a rule that asks for it."""

import pytest

from t5style import console
from t5style.nn.settings import MoE
from t5style.parallel.mesh import MeshConfig
from t5style.parallel.rules import Rules
from t5style.train import hlo_cost, resharding
from t5style.train.program import TrainingProgram
from tests.train.mesh_run import MODELS

CONFIG = MODELS["decoder_only"]
ROWS, LENGTH = 16, 48
WRONG = Rules(activations={"heads": None})


def program(sizes, config=CONFIG, **fields):
    lengths = {"encoder": LENGTH, "decoder": LENGTH}
    # Compiled in half the time.
    mesh = MeshConfig(compiler_options={"xla_backend_optimization_level": 0}, **sizes)
    return TrainingProgram(config, lengths, ROWS, mesh=mesh, **fields)


def found(sizes, config=CONFIG, **fields):
    made = program(sizes, config, **fields)
    mesh = made.mesh.build()
    text = made.compile(mesh).as_text()
    cost = hlo_cost.cost(text, clock_hz=1.0, peak_flops=1.0, mesh_shape=dict(mesh.shape))
    return resharding.resharding(cost.collectives, made, mesh, small=256)


@pytest.mark.parametrize(
    ("architecture", "sizes", "accumulation"),
    [
        ("decoder_only", {"data": 2, "fsdp": 4}, 2),
        ("decoder_only", {"data": 2, "fsdp": 2, "tensor": 2}, 1),
        ("decoder_only", {"data": 2, "fsdp": 2, "sequence": 2}, 1),
        ("encoder_decoder", {"data": 2, "fsdp": 2, "stage": 2}, 1),
    ],
    ids=str,
)
def test_default_rules_send_what_they_should(architecture, sizes, accumulation):
    assert found(sizes, MODELS[architecture], accumulation=accumulation) == []


def test_the_gradient_of_a_position_bias_sums_each_devices_own_rows_first():
    config = MODELS["encoder_decoder"].replace(attention="auto")
    assert found({"data": 2, "fsdp": 4}, config) == []


def test_routers_see_their_own_rows_only():
    """XLA gathers scores from all devices for CPU's own top_k."""
    assert found({"data": 2, "fsdp": 4}, CONFIG.replace(moe=MoE(8, 2, 16))) == []


def test_a_wrong_rule_is_found_with_its_place_and_what_to_do():
    """Queries and keys whole, weights divided: every layer gathers heads."""
    wrong = found({"data": 2, "fsdp": 2, "tensor": 2}, rules=WRONG)
    assert wrong
    gathered = [one for one in wrong if one.kind == "all-gather" and "attention" in one.part]
    assert gathered
    assert gathered[0].axes == ("tensor",)
    assert gathered[0].times == CONFIG.decoder_layers
    assert "heads, hidden units or the vocabulary are divided before it and whole after it" in str(
        gathered[0]
    )


def test_a_program_is_warned_of(monkeypatch):
    said = []
    monkeypatch.setattr(console, "say", said.append)
    made = program({"fsdp": 4, "tensor": 2, "data": 1}, rules=WRONG)
    mesh = made.mesh.build()
    resharding.warn(made.compile(mesh), made, mesh)
    assert said
    assert said[0].startswith("Warning: activations are resharded inside the loop over layers: ")
    assert "over tensor in decoder/attention" in said[0]


def test_places_are_read():
    name = (
        "jit(train_step)/transpose(jvp(Transformer.hidden))/decoder/while/body/closed_call/checkpoint/Layer/"
        "Layer._sublayer/attention/attention.queries/query/dot_general"
    )
    assert resharding.part_of(name) == "decoder/attention/query dot_general, backwards"
    assert resharding.part_of("") == "the loop ?"
