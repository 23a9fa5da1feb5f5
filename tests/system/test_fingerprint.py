"""Fingerprints of models: equal for equal weights, different after a change."""

import pytest
import torch

from neox.quantization import torchao_weights
from neox.system.fingerprint import fingerprint


def test_fingerprint_tells_torchao_weights_apart():
    """As on a GPU with weights=int8."""
    pytest.importorskip("torchao")
    pack = torchao_weights.packing("int8", torch.device("cpu"))

    def identity(weight: torch.Tensor) -> str:
        layer = torch.nn.Linear(64, 64, bias=False)
        layer.weight = torch.nn.Parameter(weight.bfloat16())
        return fingerprint(pack("a layer", layer).state_dict())

    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    changed = weight.clone()
    changed[0] *= 1.1
    assert identity(weight) == identity(weight)
    assert identity(weight) != identity(changed)


def test_fingerprint_looks_at_every_byte():
    """A model with most of its neurons zeroed had the whole model's answers: 4,096 values a tensor were looked at."""
    weight = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    seen = {fingerprint({"weight": weight}), fingerprint({"bias": weight}), fingerprint({"weight": weight}, "other")}
    assert len(seen) == 3
    for number in (0, 1, 2, 29, 4097, 60_001, 119_999):
        changed = weight.clone()
        changed.view(-1)[number] = 0
        seen.add(fingerprint({"weight": changed}))
    zeroed = weight.clone()
    zeroed[torch.arange(300) % 4 != 0] = 0
    seen |= {
        fingerprint({"weight": zeroed}),
        fingerprint({"weight": weight.double()}),
        fingerprint({"weight": weight.T}),
    }
    assert len(seen) == 13
    assert fingerprint({"weight": weight.T.contiguous().T}) == fingerprint({"weight": weight})
    assert fingerprint({"a": torch.tensor(1.0), "b": torch.empty(0)}) != fingerprint({"a": torch.tensor(1.0)})
