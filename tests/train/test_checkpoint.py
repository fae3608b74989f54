"""Checkpoints on a small state: round trips, damage, another mesh, another architecture, what is kept."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from t5style import console, run_dir
from t5style.parallel.mesh import MeshConfig
from t5style.train import checkpoint, seals
from t5style.train.checkpoint import Checkpointer
from t5style.train.state import TrainState

ONE = MeshConfig(devices=1)


def state(step: int, mesh: MeshConfig = ONE, width: int = 64) -> TrainState:
    built = mesh.build()
    split = NamedSharding(built, PartitionSpec("fsdp"))
    whole = NamedSharding(built, PartitionSpec())
    generator = np.random.default_rng(step)
    kernel = jax.device_put(generator.normal(size=(width, 32)).astype(np.float32), split)
    scale = jax.device_put(generator.normal(size=(width,)).astype(np.float32), whole)
    moment = jax.device_put(generator.normal(size=(width, 32)).astype(np.float32), split)
    return TrainState(
        step=jax.device_put(jnp.int32(step), whole),
        params={"layer": {"kernel": kernel, "scale": scale}},
        opt_state=({"mu": moment},),
    )


def abstract(of: TrainState) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), of)


def save(folder: pathlib.Path, *steps: int, **options: Any) -> None:
    checkpointer = Checkpointer(folder, **options)
    for step in steps:
        checkpointer.save(step, state(step), {"step": step, "model": {}}, {"eval/loss": float(step % 7)})
    checkpointer.close()


def assert_same(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the console was told."""
    lines: list[str] = []
    monkeypatch.setattr(console, "say", lines.append)
    return lines


def test_round_trip(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 3, 9)
    restored = Checkpointer(tmp_path).restore_latest(abstract(state(0)))
    assert restored is not None
    assert restored[1]["step"] == 9
    assert_same(restored[0], state(9))
    assert Checkpointer(tmp_path / "nothing").restore_latest(abstract(state(0))) is None


def test_relative_folders(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(pathlib.Path("run/checkpoints"), 2)
    restored = Checkpointer("run/checkpoints").restore_latest(abstract(state(0)))
    assert restored is not None
    assert_same(restored[0], state(2))
    assert_same(checkpoint.restore("run/checkpoints/2", abstract(state(0)))[0], state(2))
    assert_same(checkpoint.restore_params("run"), state(2).params)


def test_saving_copies_before_it_returns(tmp_path: pathlib.Path) -> None:
    """The next step donates the state's buffers while the save is still writing."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 + 1, s), donate_argnums=0)
    big = state(5, width=40_000)
    wanted = jax.tree.map(np.array, big)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(5, big, {"step": 5})
    jax.block_until_ready(step(big))
    checkpointer.close()
    restored = Checkpointer(tmp_path).restore_latest(abstract(state(0, width=40_000)))
    assert restored is not None
    assert_same(restored[0], wanted)


def test_restores_onto_another_mesh(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 4)
    for mesh in (MeshConfig(data=1, fsdp=8), MeshConfig(data=2, fsdp=4)):
        target = abstract(state(0, mesh))
        restored = Checkpointer(tmp_path).restore_latest(target)
        assert restored is not None
        assert_same(restored[0], state(4))
        kernel = restored[0].params["layer"]["kernel"]
        assert kernel.sharding == target.params["layer"]["kernel"].sharding
        assert len({shard.device for shard in kernel.addressable_shards}) == 8


def damage_bit(folder: pathlib.Path) -> None:
    """One bit in the middle of the largest file, an array's data: orbax by itself would not notice."""
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 4
    largest.write_bytes(content)


def damage_cut(folder: pathlib.Path) -> None:
    largest = max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-100])


def damage_missing(folder: pathlib.Path) -> None:
    (folder / "state" / "manifest.ocdbt").unlink()


def damage_state_gone(folder: pathlib.Path) -> None:
    shutil.rmtree(folder / "state")


def damage_metadata(folder: pathlib.Path) -> None:
    (folder / "metadata" / "metadata").write_text('{"step": 9, "mod')


def damage_seal(folder: pathlib.Path) -> None:
    next(folder.glob("seal-*")).write_text('{"state/_MET')


def damage_unsealed_cut(folder: pathlib.Path) -> None:
    """Killed between commit and seal, and damaged since: only restoring can tell."""
    next(folder.glob("seal-*")).unlink()
    (folder / "state" / "manifest.ocdbt").write_bytes(b"")


@pytest.mark.parametrize(
    "damage",
    [
        damage_bit,
        damage_cut,
        damage_missing,
        damage_state_gone,
        damage_metadata,
        damage_seal,
        damage_unsealed_cut,
    ],
)
def test_damaged_newest_falls_back_and_says_so(tmp_path: pathlib.Path, said: list[str], damage: Any) -> None:
    save(tmp_path, 3, 9)
    damage(tmp_path / "9")
    restored = Checkpointer(tmp_path).restore_latest(abstract(state(0)))
    assert restored is not None
    assert restored[1]["step"] == 3
    assert_same(restored[0], state(3))
    assert (tmp_path / "9.corrupt").is_dir(), "the damaged checkpoint is kept, under another name"
    assert checkpoint.all_steps(tmp_path) == [3]
    warning = next(line for line in said if "WARNING" in line)
    assert "9 is damaged" in warning
    assert "going back to step 3" in warning
    save(tmp_path, 9)  # and the run can save that step again
    assert sorted(checkpoint.all_steps(tmp_path)) == [3, 9]


def test_a_flipped_bit_would_restore_silently_without_seals(tmp_path: pathlib.Path) -> None:
    """The reason for the seals; should this fail one day, orbax checks contents itself."""
    save(tmp_path, 9)
    damage_bit(tmp_path / "9")
    next((tmp_path / "9").glob("seal-*")).unlink()
    restored = Checkpointer(tmp_path).restore_latest(abstract(state(0)))
    assert restored is not None
    with pytest.raises(AssertionError):
        assert_same(restored[0], state(9))


def test_a_whole_checkpoint_that_cannot_be_read_stays(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory, no permission: the files are whole, so nothing is renamed and no step is lost."""
    save(tmp_path, 3, 9)

    def fails(*arguments: Any) -> Any:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    for module, name in ((checkpoint, "restore"), (seals, "_sum")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            with pytest.raises(
                run_dir.UserError, match=r"9 could not be read.*RESOURCE_EXHAUSTED.*Nothing was"
            ):
                Checkpointer(tmp_path).restore_latest(abstract(state(0)))
        assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "9"]


def test_what_one_process_finds_all_are_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen from process 0, whose own share and restoring are fine."""
    save(tmp_path, 3, 9)
    others = iter([0, 1, 0, 2])  # of process 1: share right, restoring damaged; then 3: it cannot read it
    monkeypatch.setattr(
        checkpoint.multihost_utils, "process_allgather", lambda mine: np.array([mine, next(others)])
    )
    with pytest.raises(run_dir.UserError, match=r"3 could not be read.*see process 1"):
        Checkpointer(tmp_path).restore_latest(abstract(state(0)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "9.corrupt"]


def test_half_copied_is_set_aside(tmp_path: pathlib.Path, said: list[str]) -> None:
    """A folder that is no checkpoint would forbid to save that step, at every start."""
    save(tmp_path, 3, 9)
    (tmp_path / "9" / "_CHECKPOINT_METADATA").unlink()
    restored = Checkpointer(tmp_path).restore_latest(abstract(state(0)))
    assert restored is not None
    assert restored[1]["step"] == 3
    assert any("9 is unfinished" in line and "9.corrupt" in line for line in said)
    save(tmp_path, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["3", "9", "9.corrupt"]


def test_a_failure_to_seal_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "seal", fails)
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(3, state(3), {"step": 3})
    while checkpointer._sealing is None:  # by the thread, then
        checkpointer.poll()
    with pytest.raises(run_dir.UserError, match=r"step 3 could not be written .* No space left"):
        checkpointer.wait()
    checkpointer.close()


def test_half_written_is_ignored(tmp_path: pathlib.Path, said: list[str]) -> None:
    save(tmp_path, 3, 9)
    (tmp_path / "9").rename(tmp_path / "9.orbax-checkpoint-tmp")
    restored = Checkpointer(tmp_path).restore_latest(abstract(state(0)))
    assert restored is not None
    assert restored[1]["step"] == 3
    assert any("never finished" in line for line in said)


def test_all_damaged(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 3, 9)
    for step in ("3", "9"):
        damage_bit(tmp_path / step)
    with pytest.raises(run_dir.UserError, match=r"all 2 checkpoints in .* are damaged"):
        Checkpointer(tmp_path).restore_latest(abstract(state(0)))
    assert {p.name for p in tmp_path.iterdir()} == {"3.corrupt", "9.corrupt"}


def test_another_architecture_is_named_and_nothing_renamed(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 9)
    with pytest.raises(
        run_dir.UserError,
        match=r"at params/layer/kernel it has shape \(64, 32\), this model shape \(48, 32\)",
    ):
        Checkpointer(tmp_path).restore_latest(abstract(state(0, width=48)))
    more = state(0).replace(params=state(0).params | {"extra": jnp.zeros(3)})
    with pytest.raises(
        run_dir.UserError, match=r"at params/extra it has no such parameter, this model shape \(3,\)"
    ):
        Checkpointer(tmp_path).restore_latest(abstract(more))
    other = state(0).replace(opt_state=({"mu": state(0).opt_state[0]["mu"], "nu": jnp.zeros(3)},))
    with pytest.raises(run_dir.UserError, match="another optimiser: at opt_state/0/nu"):
        Checkpointer(tmp_path).restore_latest(abstract(other))
    assert checkpoint.all_steps(tmp_path) == [9]


def test_what_is_kept(tmp_path: pathlib.Path) -> None:
    # Metrics are step % 7: the best of all is step 14.
    save(tmp_path, 2, 4, 10, 14, 15, 16, 17, keep=2, keep_every=5, best_metric="eval/loss")
    assert sorted(checkpoint.all_steps(tmp_path)) == [10, 14, 15, 16, 17]
    save(tmp_path / "two", 2, 4, 10, keep=2)
    assert sorted(checkpoint.all_steps(tmp_path / "two")) == [4, 10]


def test_every_checkpoint_is_sealed(tmp_path: pathlib.Path) -> None:
    save(tmp_path, 3, 9)
    for step in (3, 9):
        seal = json.loads((tmp_path / str(step) / "seal-0-of-1.json").read_text())
        assert "state/manifest.ocdbt" in seal
        assert checkpoint.check(tmp_path / str(step)) is None


def test_restore_params_reads_run_folder_checkpoints_folder_or_step(tmp_path: pathlib.Path) -> None:
    save(tmp_path / "checkpoints", 3, 9)
    for path, step in (
        (tmp_path, 9),
        (tmp_path / "checkpoints", 9),
        (tmp_path / "checkpoints" / "3", 3),
    ):
        assert_same(checkpoint.restore_params(path), state(step).params)
    half = checkpoint.restore_params(tmp_path, dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    mesh = MeshConfig(data=1, fsdp=8).build()
    target = NamedSharding(mesh, PartitionSpec("fsdp"))
    split = checkpoint.restore_params(tmp_path, jax.tree.map(lambda _: target, state(0).params))
    assert_same(split, state(9).params)
    assert {x.sharding for x in jax.tree.leaves(split)} == {target}


def test_restore_params_names_what_is_wrong(tmp_path: pathlib.Path, said: list[str]) -> None:
    with pytest.raises(run_dir.UserError, match="there is no checkpoint in"):
        checkpoint.restore_params(tmp_path)
    save(tmp_path, 3, 9)
    damage_bit(tmp_path / "9")
    assert_same(checkpoint.restore_params(tmp_path), state(3).params)
    assert any("9 is damaged" in line for line in said)
    assert (tmp_path / "9").exists(), "a reader renames nothing"
    with pytest.raises(run_dir.UserError, match="is damaged: the contents of"):
        checkpoint.restore_params(tmp_path / "9")


def test_every_process_finds_the_same(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers agree with nobody, so each looks at all the files, whatever its number."""
    save(tmp_path, 3, 9)
    damage_bit(tmp_path / "9")
    monkeypatch.setattr(jax, "process_count", lambda: 64)
    for process in range(0, 64, 9):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert checkpoint.find(tmp_path).name == "3"
