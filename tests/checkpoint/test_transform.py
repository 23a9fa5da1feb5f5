"""Linear layers that are replaced while the rest of the weights is still on the disk."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import neox
from neox.checkpoint import load, save_step
from neox.config import Config, DataConfig, load_config
from tests.tiny import GPT_J, GPT_NEO, ours, tokens


class Halved(nn.Module):
    """Stands for any other way to hold a layer: its weights in 16 bits."""

    def __init__(self, layer: nn.Linear | nn.Embedding) -> None:
        super().__init__()
        bias = getattr(layer, "bias", None)
        self.looked_up = isinstance(layer, nn.Embedding)
        self.register_buffer("weight", layer.weight.detach().half())
        self.register_buffer("bias", None if bias is None else bias.detach().half())

    def forward(self, x):
        if self.looked_up:
            return nn.functional.embedding(x, self.weight).float()
        return nn.functional.linear(x, self.weight.float(), None if self.bias is None else self.bias.float())


def folder_of(kind: str, model, path):
    if kind == "huggingface":
        neox.save(model, path)
        return path
    config = Config(model=model.config, data=DataConfig(seq_length=16))
    save_step(path, [model], [], config, {"step": 1, "samples": 16})
    return path


@pytest.mark.parametrize("kind", ["huggingface", "run"])
@pytest.mark.parametrize("flags", [{}, {"tie_word_embeddings": True}, GPT_J, GPT_NEO])
def test_transform_gets_every_layer_once_with_its_weights(tmp_path, kind, flags):
    model, ids = ours(**flags).eval(), tokens()
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    folder = folder_of(kind, model, tmp_path / "model")
    seen = []

    def transform(name, linear):
        assert torch.equal(linear.weight, model.get_submodule(name).weight)
        seen.append(name)
        return Halved(linear)

    loaded, _ = load(folder, transform=transform)
    tied = ("embed_in", "embed_out") if model.config.tie_word_embeddings else ()
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    assert sorted(seen) == sorted(layers - set(tied))
    # The largest layers come first: read last, a copy beside all other weights would be the peak of memory.
    assert tied or sorted(seen[: sum(name.startswith("embed_") for name in seen)]) == sorted(
        name for name in layers if name.startswith("embed_")
    )
    left = {name for name, module in loaded.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    assert left == set(tied)
    if tied:
        assert loaded.embed_in.weight is loaded.embed_out.weight
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-6, atol=1e-6)


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["huggingface", "run"])
def test_peak_memory_of_a_transformed_load_is_what_it_makes_and_little_more(tmp_path, kind):
    """1.2 GB of fp32 weights in 44 layers, each thrown away: anonymous memory stays below an eighth of that."""
    options = ["hidden_size=1024", "num_hidden_layers=24", "num_attention_heads=8", "model.vocab_size=512"]
    model = neox.GPTNeoX(load_config(overrides=options).model).initialize()
    size = sum(parameter.nbytes for parameter in model.parameters())
    assert size > 1.2e9
    folder = folder_of(kind, model, tmp_path / "model")
    del model
    code = """
import sys, torch
from torch import nn
from neox.checkpoint import load
def anonymous():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("RssAnon"))
class Empty(nn.Module):
    pass
peak = before = anonymous()
def transform(name, linear):
    global peak
    peak = max(peak, anonymous())
    return Empty()
load(sys.argv[1], transform=transform)
print(max(peak, anonymous()) - before)
"""
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < size / 8
