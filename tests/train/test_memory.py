"""Memory that runs out ends a run with one line, which names an option that helps, and leaves the run resumable."""

import re

import pytest
import torch

from neox.cli import main
from neox.config import load_config
from neox.model.decoder import GPTNeoX
from neox.parallel import ParallelDims
from neox.system.processes import Processes
from neox.train.memory import advice, out_of_memory_explained, remembered_allocations, state_bytes
from tests.train.helpers import TINY, assert_same_run, one_line, token_pair

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def cpu_allocator():
    torch.empty(2**60, dtype=torch.uint8)


def cuda_allocator():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


def python():
    raise MemoryError


@pytest.mark.parametrize("exhaust", [cpu_allocator, cuda_allocator, python])
def test_a_run_that_ran_out_goes_on_as_the_line_says(tmp_path, monkeypatch, capsys, exhaust):
    options = [*TINY, f"data.train={token_pair(tmp_path / 'text')}", "steps=6", "checkpoint.every=2"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert main(["train", *options, f"out={whole}"]) == 0
    capsys.readouterr()
    plain, calls = GPTNeoX.forward, []

    def forward(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 6:  # two microbatches a step: in step 4
            exhaust()
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(GPTNeoX, "forward", forward)
        assert main(["train", *options, f"out={run}"]) == 1
    line = one_line(capsys.readouterr().err, "step 4 ran out of memory", "train.micro_batch_size=1")
    command = re.search(r"`neox (.+)`", line)[1].split()
    assert command == ["train", f"resume={run}", "train.micro_batch_size=1"]
    assert main([*command[:2], "train.micro_batch_size=2"]) == 0  # with the old one, to the bit
    assert_same_run(run, whole, tmp_path)


def test_other_errors_stay_as_they_are(tmp_path):
    config = load_config(overrides=TINY)
    with (
        pytest.raises(RuntimeError, match="^shapes differ$"),
        out_of_memory_explained(config, ParallelDims(Processes(), CPU, None), tmp_path, 1),
    ):
        raise RuntimeError("shapes differ")


def test_cuda_leaves_a_snapshot(tmp_path, monkeypatch):
    """With torch's own functions replaced: there is no CUDA device here."""
    calls = []
    for name in ("_record_memory_history", "_dump_snapshot"):
        monkeypatch.setattr(torch.cuda.memory, name, lambda *a, name=name, **k: calls.append((name, a, k)))
    properties = type("Properties", (), {"total_memory": 80e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    file = tmp_path / "memory_snapshot.pickle"
    dims = ParallelDims(Processes(), CUDA, None)
    with (
        pytest.raises(ValueError, match=rf"{file} shows .* 110 GB here of 80 GB: .*parallel\.zero=3"),
        remembered_allocations(CUDA),
        out_of_memory_explained(load_config(overrides=("preset=pythia-6.9b",)), dims, tmp_path, 1),
    ):
        cuda_allocator()
    assert [name for name, _, _ in calls] == ["_record_memory_history", "_dump_snapshot", "_record_memory_history"]
    assert calls[1][1] == (str(file),)
    assert calls[2][2] == {"enabled": None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_snapshot_on_cuda_names_who_allocated(tmp_path):
    config, dims = load_config(overrides=TINY), ParallelDims(Processes(), CUDA, None)
    with remembered_allocations(CUDA):
        kept = torch.zeros(1000, device=CUDA)
        with (
            pytest.raises(ValueError, match="memory_snapshot.pickle"),
            out_of_memory_explained(config, dims, tmp_path, 1),
        ):
            torch.empty(2**60, dtype=torch.uint8, device=CUDA)
    assert kept.device == CUDA
    assert b"test_memory.py" in (tmp_path / "memory_snapshot.pickle").read_bytes()


@pytest.mark.parametrize(
    ("options", "device", "expected"),
    [
        (("micro_batch_size=8",), CPU, r"train\.micro_batch_size=4"),
        (("micro_batch_size=1",), CPU, r"activation_checkpointing=selective"),
        (("micro_batch_size=1", "activation_checkpointing=selective"), CPU, r"activation_checkpointing=full"),
        (("micro_batch_size=1", "activation_checkpointing=full"), CPU, r"train\.loss_chunk=256"),
        (("micro_batch_size=1", "activation_checkpointing=full", "loss_chunk=256"), CUDA, r"train\.dtype=bf16"),
        (("micro_batch_size=1", "activation_checkpointing=full", "loss_chunk=256"), CPU, r"parallel\.cp"),
    ],
)
def test_advice_when_out_of_memory(options, device, expected):
    found = advice(load_config(overrides=options), ParallelDims(Processes(), device, None))
    assert re.search(expected, found), found


class Meshed(ParallelDims):
    """A layout of 16, without processes."""

    def size(self, axis):
        return {"dp_shard": 8, "tp": 2}.get(axis, 1)


def test_sharded_state_memory_is_counted_and_more_sharding_is_advised():
    """fp32: shards of weights and moments, gathered copies of the weights (ZeRO-3: of two blocks and the ends)."""
    dims = Meshed(Processes(0, 16), CUDA, None)
    parameters = 20_554_567_680  # GPT-NeoX-20B's
    ends = 2 * 50432 * 6144
    gathered = (2 * (parameters - ends) / 44 + ends) / parameters
    for zero, each in ((1, 4 + 4 + 12 / 8), (2, 4 + 16 / 8), (3, 4 * gathered + 16 / 8)):
        config = load_config(overrides=("preset=neox-20b", "parallel.tp=2", f"parallel.zero={zero}"))
        assert state_bytes(config, dims) == pytest.approx(parameters / 2 * each, rel=1e-6)
    config = load_config(overrides=("preset=neox-20b", "parallel.tp=2"))
    assert "parallel.zero=2" in advice(config, dims, 80 * 10**9)
