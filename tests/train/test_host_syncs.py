"""An unlogged step never asks an accelerator for a value: the host would wait for the queue to run empty.

The real step runs on tensors that have no values, and in the branches that accelerators take: whatever needs a value on
the host (.item(), float(), bool(), .tolist(), nonzero, a mask as index) raises there.
"""

import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from neox.config import load_config
from neox.data import Batch
from neox.model.decoder import GPTNeoX
from neox.parallel import ParallelDims, build
from neox.system.processes import Processes
from neox.train import Trainer, build_optimizers
from neox.train.goodput import Goodput
from neox.train.metrics import Meter
from neox.train.state import TrainState
from tests.train.helpers import TINY, token_pair

CPU = torch.device("cpu")


def to_empty(model: nn.Module, device: torch.device) -> None:
    """nn.Module.to_empty, which cannot swap parameters of this kind."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))


def trainer_without_values(monkeypatch, *options: str) -> Trainer:
    monkeypatch.setattr(GPTNeoX, "to_empty", to_empty)
    monkeypatch.setattr(sys.modules["neox.parallel.build"], "_initialize", lambda model, seed: None)
    for module in ("parallel.loss", "train.optim"):
        monkeypatch.setattr(sys.modules[f"neox.{module}"], "readable", lambda tensor: False)
    trainer = Trainer(
        load_config(overrides=(*TINY, "data.train=none", "log.every=1000", "train.guard=false", *options)), quiet=True
    )
    config = trainer.config
    trainer.device, trainer.dims = CPU, ParallelDims(Processes(), CPU, None)
    trainer.model_parts, trainer.forward_backward = build(config, trainer.dims)
    trainer.optimizers = build_optimizers(trainer.model_parts, config.optim)
    trainer.state = TrainState(config, None, "", Goodput())
    trainer.state.step = trainer.state.updates = 1

    def prefetch(loader, step):
        ids = torch.zeros((2, 32), dtype=torch.int64)
        return [Batch(ids, ids, ids, ids if config.data.segments else None)] * 2, 128

    trainer.prefetch = prefetch
    return trainer


CASES = [
    (),
    ("train.dtype=bf16",),
    ("activation_checkpointing=full", "clip=0", "hidden_dropout=0.1"),
    ("activation_checkpointing=selective", "shared_layer_norm=true"),
    ("data.segments=true", "use_parallel_residual=false"),
    ("model_type=gpt_neo", "position_embedding=learned", "local_window=8", "local_layers=[1]", "head_bias=true"),
    ("optim.name=muon", "tie_word_embeddings=true"),
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(options) or "plain")
def test_an_unlogged_step_reads_nothing_from_the_device(monkeypatch, options):
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = trainer_without_values(monkeypatch, *options)
        loss, norm, _, more = trainer.train_step()
        assert loss.shape == norm.shape == ()
        assert more == {}
        assert trainer.state.updates == 2


def test_the_spike_detector_reads_in_one_place(monkeypatch):
    monkeypatch.setattr(TrainState, "check", lambda self, loss, norm, processes, tokens: (1.0, 1.0, None))
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = trainer_without_values(monkeypatch, "train.guard=true")
        assert trainer.train_step()[:2] == (1.0, 1.0)
        monkeypatch.undo()
        with pytest.raises(DataDependentOutputException):
            trainer.train_step()


def test_a_read_would_be_caught(monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = trainer_without_values(monkeypatch)
        with pytest.raises(DataDependentOutputException):
            trainer.train_step()[0].item()
        with pytest.raises(DynamicOutputShapeException):
            trainer.model_parts[0].embed_in.weight.nonzero()
        monkeypatch.undo()
        with pytest.raises(DataDependentOutputException):
            trainer.train_step()  # on a CPU, where the step looks at what costs nothing


def test_a_logged_step_may_read(monkeypatch):
    with FakeTensorMode(allow_non_fake_inputs=True):
        trainer = trainer_without_values(monkeypatch, "log.norms=true")
        trainer.train_step()
        trainer.state.step = 999
        with pytest.raises(DataDependentOutputException):
            trainer.train_step()


def test_the_loop_waits_for_the_queue_only_where_something_happens(tmp_path, monkeypatch):
    waits = []
    plain = Meter.paused
    monkeypatch.setattr(Meter, "paused", lambda self, wait=True: (waits.append(wait), plain(self, wait))[1])
    pair = token_pair(tmp_path / "text")
    options = (*TINY, f"data.train={pair}", f"data.valid={pair}", f"out={tmp_path / 'run'}", "steps=8", "log.every=1")
    Trainer(load_config(overrides=(*options, "eval.every=3", "checkpoint.every=5")), quiet=True).fit()
    assert waits == [step in (3, 5, 6, 8) for step in range(1, 9)]


def test_a_pause_in_which_nothing_happens_does_not_wait(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    meter = Meter(torch.device("cuda"))
    with meter.paused(wait=False):
        assert waited == []
    with meter.paused():
        assert waited == [torch.device("cuda")]
