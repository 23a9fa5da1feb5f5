"""How many processes `neox train` starts on a host."""

import pytest
import torch

from neox.cli.launch import processes_here
from neox.config import load_config


@pytest.mark.parametrize(
    ("devices", "options", "expected"),
    [
        (0, [], 1),
        (0, ["parallel.tp=2"], 2),
        (0, ["parallel.tp=2", "parallel.dp_shard=3"], 6),
        (1, [], 1),
        (8, [], 8),
        (8, ["parallel.tp=2"], 8),
        (8, ["parallel.pp=3"], 6),
        (8, ["parallel.dp_shard=2"], 2),
        (8, ["parallel.dp_shard=1"], 1),
        (8, ["parallel.tp=2", "parallel.dp_replicate=2", "parallel.dp_shard=2"], 8),
        (8, ["train.device=cpu"], 1),
        (8, ["train.device=cpu", "parallel.cp=2"], 2),
    ],
)
def test_processes_here(monkeypatch, devices, options, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: devices > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    assert processes_here(load_config(overrides=options)) == expected


def test_more_than_the_host_has_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    with pytest.raises(ValueError, match="16 processes, this host has 8 CUDA devices: start torchrun on several hosts"):
        processes_here(load_config(overrides=["parallel.tp=4", "parallel.pp=4"]))
