"""Activation checkpointing and compilation change what is kept and how fast it is, never a gradient."""

import subprocess
import sys
from functools import partialmethod

import pytest
import torch
from torch import _dynamo as dynamo
from torch import nn
from torch._dynamo.utils import counters

from neox.config import load_config
from neox.data import Batch
from neox.generate import Engine, Sampling
from neox.model.decoder import Block
from neox.parallel import ParallelDims, build, compiles, parallel_dims
from neox.system.processes import Processes
from neox.train import Trainer
from tests.parallel.helpers import config
from tests.train.helpers import TINY

CPU = torch.device("cpu")


def gradients(*options: str, batch: int = 2, length: int = 32) -> tuple[float, dict[str, torch.Tensor]]:
    settings = load_config(overrides=(*TINY, "loss_chunk=48", *options))
    tokens = torch.randint(settings.model.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(3))

    batches = [
        Batch(rows[:, :-1], rows[:, 1:], torch.arange(length).expand(batch, -1)) for rows in (tokens, tokens.flip(0))
    ]
    torch.manual_seed(0)  # for dropout
    (model,), forward_backward = build(settings, parallel_dims(settings.parallel, Processes(), CPU))
    value = forward_backward(batches, 1 / (batch * length))
    return value.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize(
    "shape",
    [
        (),
        ("use_parallel_residual=false",),
        ("shared_layer_norm=true",),
        ("local_layers=[1]", "local_window=8"),
        ("hidden_dropout=0.1", "attention_dropout=0.2"),
    ],
)
def test_activation_checkpointing_keeps_gradients_bit_for_bit(mode, shape):
    plain, expected = gradients(*shape)
    value, found = gradients(*shape, f"activation_checkpointing={mode}")
    assert value == plain
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_activation_checkpointing_keeps_parameter_names():
    _, plain = gradients()
    _, found = gradients("activation_checkpointing=full")
    assert list(found) == list(plain)


PEAK = """
import sys, torch
torch.set_num_threads(1)
from neox.system.device import peak_memory
from tests.parallel.test_blocks import CPU, gradients
shape = ["hidden_size=256", "num_hidden_layers=8", "num_attention_heads=4", "model.max_position_embeddings=512"]
gradients()
before = peak_memory(CPU)
gradients(*shape, "activation_checkpointing=" + sys.argv[1], batch=8, length=512)
print(peak_memory(CPU) - before)
"""


@pytest.mark.alone
@pytest.mark.slow
def test_activation_checkpointing_lowers_peak_memory():
    """8 blocks of 4096 tokens x 256 x 4 bytes are 34 MB a width; they keep 9, 6 and 1 widths a block. What one block
    needs while it is at work, weights and gradients come on top; the allocator makes the peak vary by a width."""
    peaks = {
        mode: int(subprocess.run([sys.executable, "-c", PEAK, mode], capture_output=True, text=True, check=True).stdout)
        for mode in ("none", "selective", "full")
    }
    width = 8 * 4096 * 256 * 4
    assert peaks["none"] - peaks["selective"] > 2 * width
    assert peaks["none"] - peaks["full"] > 7 * width
    assert peaks["selective"] > peaks["full"]


@pytest.fixture
def graphs(monkeypatch):
    """Blocks are compiled, up to the generation of code; gives how many graphs that took."""
    dynamo.reset()
    counters.clear()
    monkeypatch.setattr(Block, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    yield lambda: counters["stats"]["unique_graphs"]
    dynamo.reset()


MANY = "num_hidden_layers=12"  # more than the graphs that dynamo makes of one function before it refuses


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", [(), ("shared_layer_norm=true", "train.dtype=bf16"), ("train.float8=rowwise",)])
def test_one_whole_graph_serves_all_blocks(graphs, mode, shape):
    """A graph break would raise: fullgraph. 1e-6: products may be grouped otherwise; in bf16 of values below 1."""
    options = (MANY, *shape, f"train.activation_checkpointing={mode}")
    plain, expected = gradients(*options, "train.compile=false")
    value, found = gradients(*options, "train.compile=true")
    tolerance = 1e-2 if "train.dtype=bf16" in shape else 1e-6
    assert graphs() == 1
    assert value == pytest.approx(plain, abs=tolerance)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=tolerance, msg=name)


def test_hooks_may_generate_with_a_compiled_model(tmp_path, graphs):
    """A cache makes each layer another program, and lengths vary: hooks run the blocks as they are written."""
    said = []

    def generate(trainer, step):
        engine = Engine(trainer.whole_model())
        said.append(
            [engine.generate([prompt], Sampling(max_tokens=4, temperature=0))[0].tokens for prompt in ([1, 2], [3] * 5)]
        )
        trainer.model.train()

    for compiled in ("true", "false"):
        settings = config(tmp_path, compiled, MANY, "steps=2", f"train.compile={compiled}")
        assert Trainer(settings, hooks=(generate,), quiet=True).fit().finished
    assert graphs() == 1
    assert said[:3] == said[3:]


@pytest.mark.parametrize(
    ("device", "options", "expected"),
    [
        ("cuda", (), True),
        ("cpu", (), False),
        ("mps", (), False),
        ("cpu", ("train.compile=true",), True),
        ("cuda", ("train.compile=false",), False),
    ],
)
def test_left_open_blocks_are_compiled_on_cuda(device, options, expected):
    assert compiles(load_config(overrides=options), ParallelDims(Processes(), torch.device(device), None)) is expected


@pytest.mark.slow
def test_compiled_blocks():
    """1e-6: a compiler may order sums differently."""
    plain, expected = gradients()
    value, found = gradients("train.compile=true")
    assert value == pytest.approx(plain, abs=1e-6)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-6, msg=name)
