"""Axes together: every mesh takes the steps of one process, and goes on where any other one stopped."""

from pathlib import Path

import pytest
import torch

import neox
from neox.checkpoint import complete_steps
from neox.config import Config
from tests.parallel.helpers import compare, config, cut, fit, together
from tests.train.helpers import rows

SHAPE = ("num_attention_heads=4", "num_hidden_layers=4", "hidden_size=32", "global_batch_size=8", "micro_batch_size=1")
MESHES = {
    "one": (1, ()),
    "fsdp2": (2, ("zero=3",)),
    "hsdp2x2": (4, ("dp_replicate=2", "zero=2")),
    "tp2": (2, ("tp=2",)),
    "tp2+sp": (2, ("tp=2", "sequence_parallel=true")),
    "cp2": (2, ("cp=2",)),
    "pp2": (2, ("pp=2",)),
    "fsdp2xtp2": (4, ("dp_shard=2", "tp=2", "zero=3")),
    "pp2xtp2": (4, ("pp=2", "tp=2")),
    "pp2xtp2+sp": (4, ("pp=2", "tp=2", "sequence_parallel=true", "schedule=interleaved_1f1b")),
    "pp2xfsdp2": (4, ("pp=2", "dp_shard=2")),
    "pp2xcp2": (4, ("pp=2", "cp=2")),
    "fsdp2xcp2": (4, ("dp_shard=2", "cp=2")),
    "pp2xfsdp2xtp2": (8, ("pp=2", "dp_shard=2", "tp=2")),
}


def options(mesh: str) -> tuple[str, ...]:
    return tuple(f"parallel.{option}" for option in MESHES[mesh][1])


@pytest.mark.parametrize("mesh", ["fsdp2xtp2", "pp2xtp2", "pp2xtp2+sp", "pp2xcp2"])
def test_meshes_of_two_axes(tmp_path, mesh):
    compare(tmp_path, MESHES[mesh][0], *options(mesh), *SHAPE, "log.norms=true")


@pytest.mark.slow
@pytest.mark.parametrize("model", [("use_parallel_residual=false",), ("shared_layer_norm=true", "qkv_bias=false")])
@pytest.mark.parametrize("mesh", ["fsdp2xtp2", "pp2xtp2", "fsdp2xcp2", "pp2xfsdp2xtp2"])
def test_meshes_of_other_models(tmp_path, mesh, model):
    compare(tmp_path, MESHES[mesh][0], *options(mesh), *SHAPE, *model)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
@pytest.mark.parametrize("mesh", ["pp2xtp2", "pp2xfsdp2xtp2"])
def test_schedules_with_tensor_parallelism(tmp_path, mesh, schedule):
    compare(tmp_path, MESHES[mesh][0], *options(mesh), f"parallel.schedule={schedule}", *SHAPE)


def relay(folder: Path, meshes: list[str]) -> None:
    """Two steps on each mesh in turn, each from the checkpoint of the one before: the losses of one process alone."""
    # A rate that the number of steps does not change, and an eps that leaves rounding as small as it is.
    common = (*SHAPE, "checkpoint.every=2", "schedule.min_lr=1e-3", f"steps={2 * len(meshes)}")
    fit(config(folder, "alone", *common))
    for number, mesh in enumerate(meshes):
        settings: Config = cut(config(folder, "moved", *common, *options(mesh)), 2 * number + 2)
        resume = number > 0
        if MESHES[mesh][0] == 1:
            fit(settings, resume)
        else:
            together(MESHES[mesh][0], folder / "ranks", fit, settings, resume)
    alone, moved = rows(folder / "alone"), rows(folder / "moved")
    assert [row["step"] for row in moved] == list(range(1, 2 * len(meshes) + 1))
    for mine, theirs in zip(moved, alone, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=2e-6), (mine["step"], meshes[(mine["step"] - 1) // 2])


@pytest.mark.slow
def test_any_mesh_goes_on_where_another_stopped(tmp_path):
    relay(tmp_path, ["one", "tp2", "pp2", "fsdp2xtp2", "cp2", "pp2xtp2", "fsdp2", "one"])


@pytest.mark.slow
def test_any_mesh_goes_on_where_another_stopped_other_ways(tmp_path):
    relay(tmp_path / "a", ["pp2xfsdp2xtp2", "one", "pp2xtp2+sp", "tp2", "hsdp2x2", "pp2", "one", "fsdp2", "pp2xcp2"])
    relay(tmp_path / "b", ["cp2", "tp2+sp", "fsdp2xcp2", "pp2xfsdp2", "fsdp2xtp2", "pp2xfsdp2xtp2", "tp2", "fsdp2"])


def test_trained_on_four_processes_loaded_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    settings = (*SHAPE, "steps=3", "checkpoint.every=0")
    fit(config(tmp_path, "alone", *settings))
    together(4, tmp_path / "ranks", fit, config(tmp_path, "many", *settings, *options("pp2xtp2")))
    models = {run: neox.load(tmp_path / run)[0] for run in ("alone", "many")}
    assert complete_steps(tmp_path / "many")[-1].name == "step_00000003"
    neox.save(models["many"], tmp_path / "exported")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager").eval()
    tokens = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = models["many"](tokens)
        torch.testing.assert_close(theirs(tokens).logits, logits, rtol=0, atol=1e-5 * logits.abs().max().item())
        torch.testing.assert_close(models["alone"](tokens), logits, rtol=0, atol=1e-5 * logits.abs().max().item())
