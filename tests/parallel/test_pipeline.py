"""A pipeline takes the steps that one process takes: same losses, gradients and weights under every schedule."""

import itertools
from pathlib import Path

import pytest
import torch

from neox.checkpoint import complete_steps
from neox.config import Config, load_config
from neox.model.flops import forward_flops, parameters
from neox.parallel import ParallelDims
from neox.parallel.pipeline import check_pipeline, layers_of_stages, rank_of_stage, stages_of_rank
from neox.system.processes import OtherProcessFailed, Processes
from neox.train import Trainer
from tests.parallel.helpers import compare, config, cut, fit, together
from tests.train.helpers import TINY, rows, tensors, token_pair

FOUR = ("num_hidden_layers=4", "hidden_size=16", "micro_batch_size=1")
EIGHT = ("num_hidden_layers=8", *FOUR[1:])
PIPELINE = ("parallel.pp=2",)
INTERLEAVED = "parallel.schedule=interleaved_1f1b"


def held_out(folder: Path) -> tuple[str, ...]:
    return (f"data.valid={token_pair(folder / 'valid', 700, seed=9)}", "eval.every=2", "eval.batches=3")


# --- equal to one process --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, ("parallel.pp=2", "log.norms=true", "activation_checkpointing=full")),
        (2, ("parallel.pp=2", "global_batch_size=7", "use_parallel_residual=false", "position_embedding=learned")),
        (4, ("parallel.pp=4", "global_batch_size=5", *EIGHT)),
        (4, ("parallel.pp=2", "global_batch_size=7", "log.norms=true", "optim.name=muon")),
    ],
)
def test_stages(tmp_path, world, options):
    compare(tmp_path, world, *options, *held_out(tmp_path))


def test_interleaved_stages(tmp_path):
    compare(tmp_path, 2, "parallel.pp=2", INTERLEAVED, *FOUR, *held_out(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("parallel.pp=4", "global_batch_size=8", *EIGHT),
        ("parallel.pp=2", "global_batch_size=7", *FOUR),
        ("parallel.pp=2", "global_batch_size=8", "activation_checkpointing=selective", *FOUR),
    ],
)
def test_interleaved_stages_on_four(tmp_path, options):
    compare(tmp_path, 4, INTERLEAVED, *options, *held_out(tmp_path))


TP = ("parallel.pp=2", "parallel.tp=2", "model.vocab_size=64")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved_1f1b"])
def test_stages_of_split_matrices(tmp_path, schedule):
    compare(tmp_path, 4, *TP, f"parallel.schedule={schedule}", *FOUR, "log.norms=true", *held_out(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (4, (*TP, "parallel.sequence_parallel=true", *FOUR)),
        (4, ("parallel.pp=2", "parallel.cp=2", *FOUR)),
        (8, (*TP, "global_batch_size=7", *FOUR)),
        (8, (*TP, "global_batch_size=8", INTERLEAVED, *FOUR)),
    ],
)
def test_stages_on_meshes_of_more_axes(tmp_path, world, options):
    compare(tmp_path, world, *options, *held_out(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_fewer_microbatches_than_stages(tmp_path, batch):
    compare(tmp_path, 2, *PIPELINE, INTERLEAVED, f"global_batch_size={batch}", *FOUR)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (8, ("parallel.pp=2", "parallel.dp_replicate=2", "global_batch_size=8", "micro_batch_size=1")),
        (2, ("parallel.pp=2", "data.segments=true", "activation_checkpointing=selective")),
        (2, ("parallel.pp=2", "parallel.schedule=interleaved_1f1b", "parallel.stages_per_rank=4", *EIGHT)),
        (2, ("parallel.pp=2", "parallel.stage_layers=[1,3]", "local_layers=[1,3]", "local_window=8", *FOUR)),
        (2, ("parallel.pp=2", "train.compile=true")),
    ],
)
def test_more_stages(tmp_path, world, options):
    compare(tmp_path, world, *options)


@pytest.mark.parametrize(
    ("world", "dtype", "options"),
    [
        (2, "bf16", ()),
        (4, "bf16", (INTERLEAVED, *FOUR, "global_batch_size=8")),
        (2, "fp16", ("optim.loss_scale=1e38", "optim.loss_scale_hysteresis=1", "steps=5")),
    ],
)
def test_16_bits(tmp_path, world, dtype, options):
    """The loss within 16 bits' rounding of one process's; in fp16 the stages skip the same steps, from overflow on."""
    options = (f"train.dtype={dtype}", *options)
    fit(config(tmp_path, "alone", *(option for option in options if not option.startswith("parallel."))))
    together(world, tmp_path / "ranks", fit, config(tmp_path, "many", "parallel.pp=2", *options))
    one, many = rows(tmp_path / "alone"), rows(tmp_path / "many")
    for a, b in zip(one, many, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-2)
        assert [a.get(key) for key in ("loss_scale", "skipped")] == [b.get(key) for key in ("loss_scale", "skipped")]
    assert dtype != "fp16" or one[-1]["skipped"] > 0


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, PIPELINE), (1, ())),
        ((2, PIPELINE), (2, ("parallel.zero=3",))),
        ((1, ()), (4, PIPELINE)),
        ((2, ("parallel.zero=2",)), (2, ("parallel.pp=2", INTERLEAVED))),
    ],
)
def test_a_run_goes_on_in_another_layout(tmp_path, before, after):
    """Three steps each: the losses, and the weights at the end, of six steps on one process."""
    whole = ("steps=6", "checkpoint.every=3", "schedule.min_lr=1e-3", *FOUR)  # a constant rate
    fit(config(tmp_path, "alone", *whole))
    for (world, options), stop in ((before, 3), (after, 6)):
        settings = cut(config(tmp_path, "moved", *whole, *options), stop)
        if world == 1:
            fit(settings, stop > 3)
        else:
            together(world, tmp_path / "ranks", fit, settings, stop > 3)
    for a, b in zip(rows(tmp_path / "alone"), rows(tmp_path / "moved"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6), a["step"]
    first, second = (tensors(complete_steps(tmp_path / run)[-1], tmp_path) for run in ("alone", "moved"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-6, msg=name)


def failure(settings: Config) -> str:
    with pytest.raises((ValueError, OtherProcessFailed)) as error:
        Trainer(settings, resume=True, quiet=True).fit()
    return str(error.value)


def test_all_stages_find_what_a_checkpoint_lacks(tmp_path):
    """A tensor of the last stage alone: no process waits for one that has given up."""
    fit(config(tmp_path, "run", *FOUR))
    messages = together(2, tmp_path / "ranks", failure, config(tmp_path, "run", *PIPELINE, *FOUR, "head_bias=true"))
    assert "tensor model.embed_out.bias is missing" in messages[0]
    assert messages[1] == "rank 0 failed"


# --- what a hook may do ----------------------------------------------------------------------------------------------


def seen_by_a_hook(settings: Config) -> tuple[list[str], str]:
    found = []

    def look(trainer: Trainer, step: int) -> None:
        if not step:
            found.append([name for part in trainer.model_parts for name, _ in part.named_parameters()])
            with pytest.raises(ValueError) as error:
                print(trainer.model)
            found.append(str(error.value))

    Trainer(settings, hooks=(look,), quiet=True).fit()
    return tuple(found)


def test_each_process_holds_its_stages_alone(tmp_path):
    settings = config(tmp_path, "run", *PIPELINE, INTERLEAVED, "steps=1", *FOUR)
    (first, message), (last, _) = together(2, tmp_path / "ranks", seen_by_a_hook, settings)
    ends = [{name for name in names if "layers" not in name} for names in (first, last)]
    assert ends == [{"embed_in.weight"}, {"final_layer_norm.weight", "final_layer_norm.bias", "embed_out.weight"}]
    layers = [{name.split(".")[1] for name in names if name.startswith("layers.")} for names in (first, last)]
    assert layers == [{"0", "2"}, {"1", "3"}]
    assert "no process holds the whole model; use trainer.model_parts" in message


# --- balance ---------------------------------------------------------------------------------------------------------


def settings_of(*options: str, preset: str | None = None) -> Config:
    return load_config(preset, overrides=options)


@pytest.mark.parametrize("vocab", [64, 5000, 50_000])
@pytest.mark.parametrize(("layers", "stages"), [(5, 2), (7, 3), (9, 4)])
def test_no_other_split_has_a_cheaper_dearest_stage(vocab, layers, stages):
    """All splits are tried. The units are those of the docstring, from the counts that have tests of their own."""
    found = settings_of(
        f"model.vocab_size={vocab}", f"num_hidden_layers={layers}", f"parallel.pp={stages}", "hidden_size=64"
    )
    block = forward_flops(found.model, 256, scored=0) / 256 / layers
    end = 2 * parameters(found.model).head / block

    def dearest(counts: tuple[int, ...]) -> float:
        costs = list(map(float, counts))
        costs[0] += end
        costs[-1] += end
        return max(costs)

    splits = [s for s in itertools.product(range(1, layers + 1), repeat=stages) if sum(s) == layers]
    mine = layers_of_stages(found)
    assert [n for stage in mine for n in stage] == list(range(layers))
    assert dearest(tuple(map(len, mine))) == pytest.approx(min(map(dearest, splits)))


def test_the_split_of_20b():
    """Eleven layers each: what GPT-NeoX-20B was trained with."""
    assert list(map(len, layers_of_stages(settings_of("parallel.pp=4", preset="neox-20b")))) == [11] * 4


def test_a_given_split():
    found = layers_of_stages(settings_of("parallel.pp=2", "parallel.stage_layers=[3,1]"))
    assert found == [range(3), range(3, 4)]


@pytest.mark.parametrize(("schedule", "places"), [("1f1b", [0, 1, 2]), ("interleaved_1f1b", [0, 1, 2] * 2)])
def test_where_stages_lie(schedule, places):
    parallel = settings_of("parallel.pp=3", f"parallel.schedule={schedule}", "num_hidden_layers=6").parallel
    assert [rank_of_stage(parallel, stage) for stage in range(parallel.stages)] == places
    assert sorted(s for rank in range(3) for s in stages_of_rank(parallel, rank)) == list(range(len(places)))


# --- what is refused -------------------------------------------------------------------------------------------------


REFUSED = [
    (("tie_word_embeddings=true",), "parallel.pp: .* different stages, and model.tie_word_embeddings"),
    (("parallel.zero=3",), "parallel.zero: 3 would .* with parallel.pp set it to 1"),
    (("parallel.pp=5",), r"parallel.pp: 5 stages of 1f1b are more than model.num_hidden_layers \(4\)"),
    (("parallel.schedule=interleaved_1f1b", "parallel.stages_per_rank=3"), "parallel.pp: 6 stages of interleaved"),
    (
        ("parallel.stage_layers=[2,1]",),
        r"parallel.stage_layers: \[2, 1\] must give each of 2 stages at least one layer, 4",
    ),
    (("parallel.stage_layers=[4,0]",), r"parallel.stage_layers: \[4, 0\]"),
    (("parallel.pp=1", "parallel.stage_layers=[4]"), "parallel.stage_layers: distributes .* set parallel.pp"),
]


def test_configs_that_no_pipeline_can_run():
    for options, message in REFUSED:
        with pytest.raises(ValueError, match=message) as error:
            settings_of("parallel.pp=2", *options)
        assert "\n" not in str(error.value), options


class Mesh(ParallelDims):
    """A layout of which only the sizes are asked."""

    def size(self, axis: str) -> int:
        return {"pp": 2, "dp_shard": 2, "tp": 2}.get(axis, 1)


UNFIT = [
    (
        ("global_batch_size=4",),
        "global_batch_size=4 gives .* 1 microbatches of .*=1f1b with .* at least 2, one a stage",
    ),
    (("parallel.schedule=interleaved_1f1b", "global_batch_size=20"), "5 microbatches .* a multiple of 2"),
]


def test_schedules_that_do_not_fit_the_batch():
    for options, message in UNFIT:
        settings = load_config(overrides=(*TINY, "num_hidden_layers=4", "parallel.pp=2", *options))
        with pytest.raises(ValueError, match=message):
            check_pipeline(settings, Mesh(Processes(0, 8), torch.device("cpu"), None))
