"""Tensor and sequence parallelism, the loss over a split vocabulary: what one process computes, with few messages."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

import neox
from neox.config import ConfigError, load_config
from neox.parallel import build, parallel_dims
from neox.parallel.tensor import RowParallel
from neox.parallel.tp_plan import plan
from neox.planning.traffic import TrafficCounter
from neox.system.processes import Processes
from neox.train import Trainer, cross_entropy
from tests.parallel.helpers import compare, config, cut, fit, together
from tests.train.helpers import TINY, complete, rows, tensors

TP2 = "parallel.tp=2"
SP = (TP2, "parallel.sequence_parallel=true")
SERIAL = "use_parallel_residual=false"
TIED = "tie_word_embeddings=true"
GPTJ = ("shared_layer_norm=true", "qkv_bias=false", "dense_bias=false", "head_bias=true")
GPTNEO = (SERIAL, TIED, "position_embedding=learned", "local_layers=[1]", "local_window=8", "qkv_bias=false")


@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, (TP2, TIED)),
        (2, (*SP, "activation_checkpointing=selective")),
        (2, (*SP, *GPTNEO)),
        (4, (TP2, "parallel.zero=3", *GPTJ, "log.norms=true")),
        pytest.param(2, (TP2,), marks=pytest.mark.slow),
        pytest.param(2, (TP2, SERIAL, "mlp_bias=false"), marks=pytest.mark.slow),
        pytest.param(2, (TP2, *GPTJ, "optim.name=muon"), marks=pytest.mark.slow),
        pytest.param(2, (*SP, *GPTJ, "activation_checkpointing=full"), marks=pytest.mark.slow),
        pytest.param(2, (*SP, SERIAL, "activation_checkpointing=full", "data.segments=true"), marks=pytest.mark.slow),
        pytest.param(4, ("num_attention_heads=4", "parallel.tp=4"), marks=pytest.mark.slow),
        pytest.param(4, (*SP, "parallel.zero=1", "micro_batch_size=1", "optim.name=muon"), marks=pytest.mark.slow),
        pytest.param(4, (TP2, "parallel.dp_replicate=2", "global_batch_size=7"), marks=pytest.mark.slow),
    ],
)
def test_tensor_parallel_processes_equal_one(tmp_path, world, options):
    compare(tmp_path, world, *options)


# --- how many messages -----------------------------------------------------------------------------------------------


def messages(*options: str) -> dict[str, int]:
    """Collectives of the model's forward pass, of the loss's, and of the backward pass of both, on four layers."""
    settings = load_config(overrides=(*TINY, "num_hidden_layers=4", "loss_chunk=64", *options))
    processes = Processes(dist.get_rank(), dist.get_world_size())
    place = parallel_dims(settings.parallel, processes, torch.device("cpu"))

    (model,), _ = build(settings, place)
    tokens = torch.arange(64).view(2, 32)
    found: dict[str, int] = {}

    def counted(name, call):
        with TrafficCounter(place) as counter:
            result = call()
        for _, kind, _ in counter.calls:
            key = f"{name} {kind}"
            found[key] = found.get(key, 0) + 1
        return result

    hidden = counted("model", lambda: model(tokens, head=False))
    value = counted("loss", lambda: model.embed_out.loss(hidden, tokens, 1.0))
    counted("backward", value.backward)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Forward: the embedding, one a block. Backward: one a block, the final norm, and as many vectors as norms.
        ((), {"model all-reduce": 5, "loss all-gather": 1, "backward all-reduce": 4 + 1 + 9}),
        ((SERIAL,), {"model all-reduce": 9, "loss all-gather": 1, "backward all-reduce": 8 + 1 + 9}),
        (
            ("parallel.sequence_parallel=true",),
            {
                "model reduce-scatter": 5,
                "model all-gather": 9,
                "loss all-gather": 1,
                "backward reduce-scatter": 9,
                # The conjugate of the forward's, and the norms' outputs, which are made again instead of being kept.
                "backward all-gather": 5 + 8,
                "backward all-reduce": 9 + 4,  # norms, and what a block's biases are added to
            },
        ),
    ],
    ids=["parallel", "serial", "sequence"],
)
def test_a_parallel_block_reduces_once_each_way(tmp_path, options, expected):
    for found in together(2, tmp_path, messages, TP2, *options):
        assert found == expected


# --- the loss over a split vocabulary --------------------------------------------------------------------------------


def check_split_loss() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    size = mesh.size()

    @settings(max_examples=60, derandomize=True, database=None, deadline=None)
    @given(
        labels=st.lists(st.sampled_from([-100, 0, 7, 8, 9, 15, 16 * size // 2 - 1, 8 * size - 1]), max_size=13),
        chunk=st.integers(1, 15),
        biased=st.booleans(),
        scale=st.sampled_from([1.0, 0.25, 4096.0]),
        spread=st.sampled_from([1.0, 30.0]),
        seed=st.integers(0, 99),
    )
    def check(labels, chunk, biased, scale, spread, seed):
        random = torch.Generator().manual_seed(seed)
        hidden = torch.randn(len(labels), 6, generator=random, requires_grad=True)
        weight = (spread * torch.randn(8 * size, 6, generator=random)).requires_grad_()
        bias = torch.randn(8 * size, generator=random).requires_grad_() if biased else None
        index = torch.tensor(labels, dtype=torch.int64)
        expected = F.cross_entropy(
            F.linear(hidden.double(), weight.double(), None if bias is None else bias.double()), index, reduction="sum"
        )
        (expected * scale).backward()
        head = torch.nn.Linear(6, 8 * size, bias=biased)
        for name, value in (("weight", weight), ("bias", bias)):
            if value is not None:
                part = distribute_tensor(value.detach(), mesh, [Shard(0)], src_data_rank=None)
                setattr(head, name, torch.nn.Parameter(part))
        states = hidden.detach().clone().requires_grad_()
        found = cross_entropy(states, head, index, chunk=chunk, scale=scale)
        found.backward()
        # Logits are rounded in proportion to the weights, gradients multiply that by the weights once more.
        near = partial(torch.testing.assert_close, rtol=1e-6, atol=2e-6 * scale * spread**2)
        near(found.detach(), (expected * scale).detach().float())
        dist.all_reduce(states.grad)
        near(states.grad, hidden.grad)
        if labels:
            near(head.weight.grad.full_tensor(), weight.grad)
            if biased:
                near(head.bias.grad.full_tensor(), bias.grad)
        assert torch.equal(found, cross_entropy(states.detach(), head, index, chunk=chunk, scale=scale))

    check()
    head = torch.nn.Linear(6, 8 * size, bias=False)
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)], src_data_rank=None))
    for wrong in (8 * size, -1):
        with pytest.raises(RuntimeError, match="a label is no token"):
            cross_entropy(torch.zeros(1, 6), head, torch.tensor([wrong]))


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_loss_over_a_split_vocabulary(tmp_path, world):
    together(world, tmp_path, check_split_loss)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("order", ["one to two", "two to one"])
def test_a_run_resumes_with_another_number_of_processes(tmp_path, order):
    more = ("steps=6", "schedule.min_lr=1e-3")
    fit(config(tmp_path, "alone", *more))
    split, whole = config(tmp_path, "moved", *more, *SP), config(tmp_path, "moved", *more)
    if order == "two to one":
        together(2, tmp_path / "ranks", fit, cut(split, 3))
        fit(whole, True)
    else:
        fit(cut(whole, 3))
        together(2, tmp_path / "ranks", fit, split, True)
    for a, b in zip(rows(tmp_path / "alone"), rows(tmp_path / "moved"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-6), a["step"]


def logits_and_save(settings) -> torch.Tensor:
    """Train; what the split model says of some tokens."""
    found = []

    def note(trainer, step):
        if step == trainer.config.train.steps:
            with torch.no_grad():
                found.append(trainer.model(torch.arange(32)[None]))

    Trainer(settings, hooks=(note,), quiet=True).fit()
    return found[0]


def test_a_run_trained_tensor_parallel_is_read_whole(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = config(tmp_path, "run", TP2, "steps=2")
    first, second = together(2, tmp_path / "ranks", logits_and_save, settings)
    assert torch.equal(first, second)
    model, _ = neox.load(tmp_path / "run")
    neox.save(model, tmp_path / "hf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    # Sums of two halves round apart from whole sums in proportion to the logits' scale (2.2 here), not to one logit's.
    scale = first.abs().max().item()
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(32)[None]), first, rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(theirs(torch.arange(32)[None]).logits, first, rtol=0, atol=1e-5)


# --- the plan --------------------------------------------------------------------------------------------------------


def edited(config, change):
    """neox's table, changed."""
    table = plan(config)
    if change == "leaves out":
        return {name: style for name, style in table.items() if "norm" not in name}
    return table | {"layers.*.branch": table["embed_in"]} if change == "misspelt" else table


def built(change: str, *options: str) -> str:
    """What building says on this rank, by neox's table where there is no `change`."""
    settings = load_config(overrides=(*TINY, *options))
    place = parallel_dims(settings.parallel, Processes(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))
    try:
        build(settings, place, edited(settings, change) if change else None)
    except ValueError as error:
        return str(error)
    return "built"


def built_all(cases: list[tuple[str, ...]]) -> list[str]:
    return [built(*case) for case in cases]


def test_plans_and_refusals(tmp_path):
    cases = {
        ("", TP2): "built",
        ("as it is", TP2): "built",
        ("leaves out", TP2): "layers.0.input_layernorm.weight has no style: give one to 'layers.0.input_layernorm'",
        ("misspelt", TP2): "'layers.*.branch' matches no module of the model",
        ("", TP2, "hidden_dropout=0.1"): "parallel.tp: processes would drop other values than one does",
        ("", "parallel.cp=2", "attention_dropout=0.1"): "parallel.cp: processes would drop other values than one does",
        ("", TP2, "train.compile=true"): "parallel.tp: cannot be compiled yet: set train.compile=false",
    }
    for found in together(2, tmp_path, built_all, list(cases)):
        for said, expected in zip(found, cases.values(), strict=True):
            assert expected in said


ROWS = []


class CountedRows(RowParallel):
    """Notes each module that it splits."""

    def _apply(self, module, device_mesh):
        ROWS.append(module)
        return super()._apply(module, device_mesh)


def trained_by_a_plan_of_ones_own(settings) -> int:
    table = plan(settings) | {"layers.*.attention.dense": CountedRows(seam=True)}
    Trainer(settings, quiet=True, tp_plan=table).fit()
    return len(ROWS)


def test_a_trainer_takes_a_plan(tmp_path):
    counts = together(2, tmp_path / "ranks", trained_by_a_plan_of_ones_own, config(tmp_path, "run", TP2, "steps=1"))
    assert counts == [2, 2]


UNEVEN = [
    (("parallel.tp=3",), r"^parallel.tp: 3 does not divide model.num_attention_heads \(4\): choose a tp that"),
    (("parallel.tp=2", "intermediate_size=33"), r"^parallel.tp: 2 does not divide model.intermediate_size \(33\)"),
    (("parallel.tp=4", "model.vocab_size=50257"), r"model.vocab_size \(50257\): raise it to 50260"),
    (("parallel.cp=3",), r"^parallel.cp: 3 cuts a sequence into 6 slices, .* data.seq_length \(256\)"),
    (("parallel.sequence_parallel=true",), r"^parallel.sequence_parallel: .* set tp"),
    ((*SP, "seq_length=33"), r"^parallel.sequence_parallel: tp=2 does not divide the 33 tokens of data.seq_length"),
    ((*SP, "parallel.cp=3", "seq_length=6"), None),
    (("parallel.tp=4", "parallel.cp=2", "parallel.sequence_parallel=true", "seq_length=12"), r"the 6 tokens"),
]


def test_uneven_tensor_parallel_splits_are_refused():
    for options, expected in UNEVEN:
        if expected is None:
            load_config(overrides=options)
            continue
        with pytest.raises(ConfigError, match=expected):
            load_config(overrides=options)


def test_axes_multiply_up_to_the_processes(tmp_path):
    settings = load_config(overrides=(TP2, "parallel.pp=3", "parallel.cp=2"))
    with pytest.raises(ValueError, match=r"^parallel.pp=3 x parallel.cp=2 x parallel.tp=2 is 12 processes, 8 run"):
        parallel_dims(settings.parallel, Processes(0, 8), torch.device("cpu"))


def test_tensors_are_stored_whole(tmp_path):
    together(2, tmp_path / "ranks", fit, config(tmp_path, "run", TP2, "steps=1"))
    stored = tensors(complete(tmp_path / "run")[0], tmp_path)
    assert stored["model.layers.0.attention.query_key_value.weight"].shape == (96, 32)
