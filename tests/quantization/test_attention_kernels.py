"""Attention in training takes a fused causal kernel at every head dimension of the family, never the one that writes
the matrix of scores down; and the fused kernel's result is that one's."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from neox.config import ModelConfig, presets
from neox.model.decoder import Attention, Context, GPTNeoX
from neox.model.rotary import rotary_angles
from tests.tiny import relative

HEAD_DIMS = (64, 80, 96, 128, 256)
FAST = {
    "cpu": {"_scaled_dot_product_flash_attention_for_cpu"},
    "cuda": {"_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention"},
}
cuda = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")],
)


class Calls(TorchDispatchMode):
    """The operators that ran, and how attention's was called."""

    def __init__(self):
        super().__init__()
        self.names, self.causal = set(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        self.names.add(name)
        if name.startswith("_scaled_dot_product") and "backward" not in name:
            values = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
            values |= kwargs or {}
            assert values.get("attn_mask") is None
            assert values.get("attn_bias") is None
            self.causal.append(values.get("is_causal", False))
        return func(*args, **(kwargs or {}))


def run(module, x, context, dtype):
    """Output and gradients of input and weights, and what ran."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    with Calls() as calls, torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = module(x, context)
        out.backward(torch.ones_like(out).cumsum(1))  # of another size for each token
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters())], calls


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("device", ["cpu", cuda])
def test_a_fused_kernel_gives_what_the_scores_written_down_give(device, dim):
    """float32 on a CPU, 1e-5; bfloat16 on CUDA, 2e-2 against float32: products of 8 bits over 256 dims and 300 keys."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=2 * dim, num_attention_heads=2)
    module = Attention(config, 0).to(device)
    length = 300  # of no size that kernels like
    x = torch.randn(2, length, 2 * dim, device=device)
    positions = torch.arange(length, device=device).expand(2, -1)
    context = Context(rotary_angles(config, positions), None, None, None)
    found, calls = run(module, x, context, torch.float32 if device == "cpu" else torch.bfloat16)
    assert calls.causal == [True]
    (forward,) = {name for name in calls.names if "scaled_dot_product" in name and "backward" not in name}
    assert forward in FAST[device]
    assert any("scaled_dot_product" in name and "backward" in name for name in calls.names)
    assert not {"_softmax", "_safe_softmax"} & calls.names
    with sdpa_kernel(SDPBackend.MATH):
        expected, plain = run(module, x, context, torch.float32)
    assert {"_softmax", "_safe_softmax"} & plain.names, "the reference is no other kernel"
    for mine, theirs in zip(found, expected, strict=True):
        assert relative(mine.float(), theirs) < (1e-5 if device == "cpu" else 2e-2)


def test_these_are_the_head_dimensions_of_the_family():
    models = (ModelConfig(**presets.preset(name)["model"]) for name in presets.names())
    assert {model.head_dim for model in models if model.hidden_size >= 1024} <= set(HEAD_DIMS)


def test_a_training_batch_needs_no_mask():
    model = GPTNeoX(ModelConfig(vocab_size=16, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)).initialize()
    with Calls() as calls:
        model(torch.zeros((2, 8), dtype=torch.int64), torch.arange(8).expand(2, -1), head=False).sum().backward()
    assert calls.causal == [True] * 3
