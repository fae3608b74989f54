"""Plans: the same step that training runs, compiled for this machine and for described TPUs."""

import json
import time

import jax
import pytest

from t5style import runner
from t5style.data.pipeline import empty_batch
from t5style.models.presets import PRESETS
from t5style.nn.settings import MoE
from t5style.parallel import rules, topologies
from t5style.parallel.mesh import MeshConfig
from t5style.run_dir import RunDir, UserError
from t5style.train import plan_search, state
from t5style.train.estimate import estimate
from t5style.train.plan import HLO_FILE, PLAN_FILE, Plan
from t5style.train.plan_search import BEST_FILE, FRONT_FILE, Search
from t5style.train.program import TrainingProgram, load_executable
from tests.train.mesh_run import LENGTH, batch_at

TINY = {"vocab_size": 256, "d_model": 128, "d_ff": 256, "num_heads": 2, "num_kv_heads": 2}


def small(**changes):
    return PRESETS["llama_tiny"](**TINY | {"decoder_layers": 4, "scan_layers": True} | changes)


def program(config, mesh=None, rows=8, length=64, **more):
    mesh = mesh or MeshConfig(fsdp=-1, data=1)
    lengths = {"decoder": length} | ({"encoder": length} if config.encoder_layers else {})
    return TrainingProgram(config, lengths, rows, mesh=mesh, **more)


@pytest.fixture
def tpu():
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install 'jax[tpu]'")


def test_the_program_is_the_one_that_training_lowers():
    """Abstract arguments and arrays give the same program."""
    config = PRESETS["t5_tiny"](vocab_size=64, d_model=16, d_ff=32, num_heads=2, head_dim=8, dtype="float32")
    made = program(config, MeshConfig(data=2, fsdp=2, tensor=2), length=LENGTH)
    mesh = made.mesh.build()
    arrays = {name: rows[:8] % 64 for name, rows in batch_at(0, 0, 1, config.architecture).items()}
    with rules.use_mesh(mesh, made.rules):
        start = state.init_state(config, made.transform, mesh, made.rules)
        key = jax.device_put(jax.random.key(0), made.arguments(mesh)[2].sharding)
        trained = made.step(mesh).lower(start, rules.put_batch(arrays, mesh), key)
    assert {name: x.shape for name, x in arrays.items()} == {
        name: x.shape for name, x in made.arguments(mesh)[1].items()
    }
    assert trained.as_text() == made.lower(mesh).as_text()


def test_a_plan_for_this_machine(tmp_path):
    config = small(remat="full")
    job = Plan(program(config), tokens=1e6)
    figures = job(RunDir(tmp_path).create())
    plan = json.loads((tmp_path / PLAN_FILE).read_text())
    memory = plan["memory"]
    assert (
        sum(memory[part] for part in memory if part not in ("peak", "limit", "offloaded")) == memory["peak"]
    )
    assert plan["step_seconds"] is None
    assert figures["fits"]
    assert plan["reshardings"] == []
    assert plan["tokens"] == 8 * 64
    # The compiler's products are the model's and the recomputed forward pass; on one of eight devices.
    forward, training = plan["model_flops"] / 3, plan["model_flops"]
    assert 0.9 * training < 8 * plan["cost"]["flops"] < 1.3 * (training + forward)
    assert {each["kind"] for each in plan["cost"]["collectives"]} >= {"all-gather", "all-reduce"}
    assert "HloModule" in (tmp_path / HLO_FILE).read_text()
    text = (tmp_path / "plan.txt").read_text()
    assert f"{plan['parameters']:,} parameters" in text
    assert "estimates no times" in text


@pytest.mark.tpu_aot
def test_a_program_does_not_grow_with_layers_and_a_70b_is_lowered_in_seconds(tpu):
    devices = topologies.devices(topologies.parse_slice("v5p-16"))

    def lowered(**changes):
        config = PRESETS["llama3_1_70b"](dtype="bfloat16", remat="full", scan_layers=True, **changes)
        made = program(config, MeshConfig(data=1, fsdp=8), length=8192)
        began = time.process_time()
        text = made.lower(made.mesh.build(devices)).as_text()
        return len(text), time.process_time() - began

    small_size, _ = lowered(decoder_layers=2)
    size, seconds = lowered()
    assert size == pytest.approx(small_size, rel=0.01)
    assert seconds < 5, f"{seconds:.1f} s of CPU time"


def test_an_executable_is_kept_and_run_and_only_for_its_own_program(tmp_path):
    made = program(small(dtype="float32"), MeshConfig(data=2, fsdp=4))
    mesh = made.mesh.build()
    estimate(made, None, tmp_path / "step.executable")
    with rules.use_mesh(mesh, made.rules):
        lowered = made.lower(mesh)
        start = state.init_state(made.model, made.transform, mesh, made.rules)
        batch = rules.put_batch(empty_batch(8, {"decoder": 64}), mesh)
        key = jax.device_put(jax.random.key(0), made.arguments(mesh)[2].sharding)
        loaded = load_executable(tmp_path / "step.executable", lowered, mesh)
        after, metrics = loaded(start, batch, key)
    assert int(after.step) == 1
    assert float(metrics["tokens"][0]) == 0
    other = program(small(dtype="float32", remat="full"), made.mesh)
    with pytest.raises(UserError, match="made for another program"):
        load_executable(tmp_path / "step.executable", other.lower(mesh), mesh)
    (tmp_path / "broken").write_bytes((tmp_path / "step.executable").read_bytes()[10:50])
    for path, sentence in (("broken", "no executable that a plan"), ("none", "keep_executable=True")):
        with pytest.raises(UserError, match=sentence):
            load_executable(tmp_path / path, lowered, mesh)


def test_remat_and_batch_show_in_memory():
    def kept(remat, rows=64):
        return estimate(program(small(remat=remat), rows=rows, length=256), None).memory

    full, none = kept("full"), kept("none")
    assert none.activations > 3 * full.activations > 0
    assert none.peak > full.peak
    assert kept("full", 128).activations == pytest.approx(2 * full.activations, rel=0.01)
    assert full.parameters * 2 <= full.optimizer <= full.parameters * 2 + 64


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"slice": "v5e-255"}, "v5e-256"),
        ({"slice": "v7x-4"}, "tpu7x"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulation": 3}, "batch_size is 8 and accumulation 3"),
        ({"lengths": {"encoder": 64}}, "also needs 'decoder'"),
        ({"lengths": 64}, r"lengths is 64; it must be as \{'encoder'"),
        ({"lengths": {"decoder": 0}}, r"lengths\['decoder'\] is 0; it must be a whole number from 1"),
        ({"lengths": {"decoder": "64"}}, r"lengths\['decoder'\] is '64'"),
        ({"tokens": -1.0}, "tokens is -1.0"),
        ({"chip_hour_price": 0.0}, "chip_hour_price is 0.0"),
    ],
)
def test_bad_values(changes, sentence):
    step = {
        name: changes.pop(name)
        for name in list(changes)
        if name not in ("slice", "tokens", "chip_hour_price")
    }
    given = {"model": small(), "lengths": {"decoder": 64}, "batch_size": 8} | step
    with pytest.raises((ValueError, UserError), match=sentence):
        Plan(TrainingProgram(**given), **changes)


def test_a_mesh_that_does_not_divide_is_said_before_anything_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingProgram, "compile", None)
    job = Plan(program(small(), rows=9))
    with pytest.raises(ValueError, match="batch of 9 rows"):
        job(RunDir(tmp_path).create())
    with pytest.raises(UserError, match="a search needs a slice"):
        Plan(program(small()), search=Search())(RunDir(tmp_path))


@pytest.mark.parametrize(
    ("changes", "mesh", "sentence"),
    [
        ({}, MeshConfig(tensor=3), "tensor 3 does not divide the 8 devices"),
        (
            {},
            MeshConfig(tensor=8),
            "'kv_heads' of size 2 does not divide by tensor=8. Choose tensor among 1, 2",
        ),
        ({"moe": MoE(4, 2, 32)}, MeshConfig(expert=8), "'expert' of size 4 does not divide by expert=8"),
        ({}, MeshConfig(stage=8), "4 decoder layers do not divide into 8 equal groups"),
        (
            {},
            MeshConfig(sequence=8, data=1),
            "divides 60 positions by sequence=8: make the length a multiple",
        ),
    ],
)
def test_an_impossible_mesh_is_one_sentence(changes, mesh, sentence, capsys):
    made = program(small(**changes), mesh, length=60)
    with pytest.raises(ValueError, match=sentence) as error:
        made.lower(made.mesh.build())
    assert "\n" not in str(error.value)
    runner.report(error.value)
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "JAX_TRACEBACK" not in said


def test_the_analytic_model_orders_memory_as_the_compiler_does():
    where = topologies.parse_slice("v5e-8")
    mesh = MeshConfig(fsdp=8, data=1)
    guesses = [
        plan_search.guess(program(small(remat=remat), mesh, rows=64, length=512), where)
        for remat in ("full", "qkv", "none")
    ]
    assert sorted(guesses, key=lambda each: each.memory) == guesses
    assert sorted(guesses, key=lambda each: -each.seconds) == guesses


def test_candidates_divide():
    where = topologies.parse_slice("v5e-16")
    knobs = Search(remats=("full", "none"), batch_sizes=(16, 24), accumulations=(1, 2))
    found = list(knobs.candidates(program(small(), rows=16), where))
    assert found
    for each in found:
        sizes = each.mesh.sizes(16)
        assert each.batch_size % (sizes["data"] * sizes["fsdp"] * each.accumulation) == 0
        assert 2 % sizes["tensor"] == 0
    assert {each.model.remat for each in found} == {"full", "none"}
    assert {each.batch_size for each in found} == {16, 24}


@pytest.mark.tpu_aot
def test_a_plan_for_a_slice_and_a_search(tpu, tmp_path, monkeypatch):
    run = RunDir(tmp_path).create()
    knobs = Search(meshes=[MeshConfig(data=1, fsdp=4)], remats=("full", "none"), compiled=2)
    job = Plan(
        program(small(dtype="bfloat16"), rows=16, length=256),
        "v5e-4",
        tokens=1e9,
        chip_hour_price=1.2,
        search=knobs,
    )
    figures = job(run)
    compiled = []
    again = lambda program, *more: compiled.append(program) or estimate(program, *more)  # noqa: E731
    monkeypatch.setattr(plan_search, "estimate", again)
    plan_search.search(knobs, job.program, topologies.parse_slice("v5e-4"), run)
    assert not compiled  # as after an interruption: what is in front.json is not compiled again
    plan = json.loads((tmp_path / PLAN_FILE).read_text())
    assert 0 < figures["mfu"] < 1
    assert figures["peak_bytes"] < 16 << 30
    assert plan["step_seconds"] >= plan["compute_seconds"] > 0
    assert plan["bill"]["price"] == pytest.approx(
        1.2 * 4 * 1e9 / plan["tokens"] * plan["step_seconds"] / 3600
    )
    front = json.loads((tmp_path / FRONT_FILE).read_text())
    assert {row["remat"] for row in front} == {"full", "none"}
    by_remat = {row["remat"]: row for row in front}
    assert by_remat["none"]["peak_bytes"] > by_remat["full"]["peak_bytes"]
    assert by_remat["none"]["compute_seconds"] < by_remat["full"]["compute_seconds"]
    assert all(row["front"] and row["fits"] for row in front)
    assert "front" in (tmp_path / "plan.txt").read_text()
    best = (tmp_path / BEST_FILE).read_text()
    assert "config.TransformerConfig.remat = 'none'" in best
    assert "mesh.MeshConfig.fsdp = 4" in best


@pytest.mark.tpu_aot
def test_what_a_policy_keeps_is_on_the_device_or_on_the_host(tpu):
    where = topologies.parse_slice("v5e-1")

    def memory(remat):
        config = small(dtype="bfloat16", d_model=256, decoder_layers=8, attention="reference", remat=remat)
        return estimate(program(config, MeshConfig(), rows=64, length=128), where).memory

    full, kept, offloaded = (memory(remat) for remat in ("full", "qkv", "qkv_offloaded"))
    qkv = 8 * 64 * 128 * (256 + 2 * 256) * 2
    assert (full.offloaded, kept.offloaded, offloaded.offloaded) == (0, 0, qkv)
    assert kept.activations == full.activations + qkv
    assert offloaded.activations == full.activations
    assert offloaded.peak < kept.peak


@pytest.mark.tpu_aot
def test_what_does_not_fit_says_what_takes_the_memory_and_what_would_help(tpu, tmp_path):
    config = small(dtype="bfloat16", vocab_size=65536, decoder_layers=2)
    job = Plan(program(config, MeshConfig(data=1), rows=16, length=8192), "v5e-1")
    with pytest.raises(UserError, match=r"does not fit v5e-1: it needs .* has 15.75 GiB"):
        job(RunDir(tmp_path).create())
    text = (tmp_path / "plan.txt").read_text()
    for words in ("does NOT fit", "accumulation=2", "remat="):
        assert words in text
    assert not json.loads((tmp_path / PLAN_FILE).read_text())["fits"]
