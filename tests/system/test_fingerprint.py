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
