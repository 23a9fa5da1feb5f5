"""GPT-NeoX-20B on 96 processes, as it was trained, without its data: one process that knows shapes alone."""

import subprocess
import sys
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor

from neox.config import load_config
from neox.model.flops import parameters
from neox.parallel import build, parallel_dims
from neox.parallel.fsdp import shard
from neox.system.processes import Processes
from tests.train.helpers import ROOT

pytestmark = pytest.mark.slow
PP, TP, WORLD, MICRO, T = 4, 2, 96, 4, 2048


@pytest.mark.parametrize("rank", [0, WORLD // PP, WORLD - 1])
def test_a_stage_of_20b(rank):
    """In a process of its own: DTensor keeps what it works out of one world, and it does not hold in another."""
    code = f"from tests.parallel.test_twenty_billion import build_and_run; build_and_run({rank})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def build_and_run(rank: int) -> None:
    """The part of that process is built, sharded, and a microbatch goes forward and backward, as shapes."""
    dist.init_process_group("fake", rank=rank, world_size=WORLD)
    settings = load_config(
        "neox-20b",
        overrides=(
            f"parallel.pp={PP}",
            f"parallel.tp={TP}",
            f"seq_length={T}",
            "global_batch_size=1536",
            f"micro_batch_size={MICRO}",
            "train.dtype=bf16",
            "activation_checkpointing=full",
        ),
    )
    model, stage = settings.model, rank * PP // WORLD

    place = parallel_dims(settings.parallel, Processes(rank, WORLD), torch.device("cpu"))
    assert (place.dp_size, place.rank("pp")) == (WORLD // PP // TP, stage)

    def shard_for_real(*arguments):
        # Meshes look at the ranks they hold, which are numbers.
        with unset_fake_temporarily():
            shard(*arguments)

    with FakeTensorMode(allow_non_fake_inputs=True), patch("neox.parallel.build.shard", shard_for_real):
        (part,), _ = build(settings, place)
        named = dict(part.named_parameters())
        counts = parameters(model)
        block = (counts.attention + counts.mlp + counts.norms - 2 * model.hidden_size) // model.num_hidden_layers
        expected = block * model.num_hidden_layers // PP
        expected += counts.embedding if stage == 0 else 0
        expected += counts.head + 2 * model.hidden_size if stage == PP - 1 else 0
        assert sum(parameter.numel() for parameter in named.values()) == expected
        # Norms and biases, a thousandth, are on both processes of tensor parallelism; ranks' rows come out uneven.
        local = sum(parameter.to_local().numel() for parameter in named.values())
        assert local * place.dp_size * TP == pytest.approx(expected, rel=0.01)
        tokens = torch.zeros(MICRO, T, dtype=torch.int64)
        hidden = torch.zeros(MICRO, T, model.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        positions = torch.arange(T).expand(MICRO, -1)
        with torch.autocast("cpu", torch.bfloat16):
            out = part(tokens if stage == 0 else hidden, positions, head=False)
            assert (out.shape, out.dtype) == (hidden.shape, hidden.dtype)
            loss = part.embed_out.loss(out, tokens, 1.0) if stage == PP - 1 else out
        # A loss whose graph goes looks at a number on a CPU, of which there is none here.
        loss.backward(torch.ones_like(loss), retain_graph=True)
    if stage:
        assert hidden.grad.shape == hidden.shape
    for name, parameter in named.items():
        assert isinstance(parameter, DTensor), name
        assert parameter.grad.to_local().shape == parameter.to_local().shape, name
        assert parameter.grad.dtype == torch.float32, name
