"""The trainer learns, and each of its steps is the step that transformers and torch's AdamW take."""

import math
import os

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from neox.config import load_config
from neox.data import Loader, TokenDataset, TokenWriter
from neox.model.decoder import GPTNeoX
from neox.train import Trainer
from neox.train.metrics import read_rows
from tests.train.helpers import TINY, VOCAB, complete, rows, tensors, token_pair


def config(tmp_path, *options: str, out: str = "run"):
    prefix = tmp_path / "train"
    if not prefix.with_suffix(".idx").exists():
        token_pair(prefix)
    options = (*TINY, f"data.train={prefix}", "steps=5", "checkpoint.every=0", f"out={tmp_path / out}", *options)
    return load_config(overrides=options)


def fit(tmp_path, *options: str, out: str = "run"):
    """Train, and return the rows and the trainer."""
    trainer = Trainer(config(tmp_path, *options, out=out), quiet=True)
    result = trainer.fit()
    assert result.finished
    assert result.loss == rows(tmp_path / out)[-1].get("loss", result.loss)
    return rows(tmp_path / out), trainer


@pytest.mark.parametrize(("name", "lr"), [("adamw", "3e-3"), ("muon", "3e-3")])
def test_it_learns_what_no_count_of_tokens_could_tell(tmp_path, name, lr):
    """Seven tokens in turn: a model that only counts tokens cannot go below the entropy ln 7 = 1.95 of their counts."""
    with TokenWriter(tmp_path / "train", np.uint16) as writer:
        writer.add_document(np.tile([3, 14, 15, 9, 2, 6, 5], 400))
    unigram = -sum(1 / 7 * math.log(1 / 7) for _ in range(7))
    found, _ = fit(tmp_path, "steps=60", f"optim.name={name}", f"lr={lr}")
    assert found[0]["loss"] > unigram
    assert found[-1]["loss"] < unigram / 4


def reference_steps(settings, steps: int):
    """Loss and gradient norm of each step, and the final weights, by transformers and torch alone."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    model = settings.model
    theirs = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_hidden_layers,
            num_attention_heads=model.num_attention_heads,
            intermediate_size=4 * model.hidden_size,
            rotary_pct=model.rotary_pct,
            hidden_act="gelu",
            attn_implementation="eager",
        )
    )
    start = GPTNeoX(model).initialize(settings.train.seed).state_dict()
    head = theirs.get_output_embeddings().weight  # its name depends on the version
    ours = {
        name: "embed_out.weight" if parameter is head else name.removeprefix("gpt_neox.")
        for name, parameter in theirs.named_parameters()
    }
    theirs.load_state_dict({name: start[ours[name]] for name in ours})
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=settings.optim.lr,
        betas=(0.9, 0.95),
        eps=settings.optim.eps,
        foreach=False,
    )
    dataset = TokenDataset(settings.data.train, settings.data.seq_length, settings.train.seed)
    loader = Loader(dataset, settings.train.global_batch_size)
    found = []
    for step in range(steps):
        batch = loader.batch(step)
        logits = theirs(batch.tokens).logits
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), batch.labels.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), settings.optim.clip or math.inf)
        peak, low = settings.optim.lr, settings.schedule.min_lr
        lr = low + (peak - low) / 2 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        found.append((loss.item(), norm.item(), lr))
    return found, {ours[name]: p.detach() for name, p in theirs.named_parameters()}


@pytest.mark.parametrize("clip", [1.0, 0.05, 0.0])
def test_a_step_is_that_of_transformers_and_torch(tmp_path, clip):
    """Also with clipping that takes hold (0.05), or none. eps=1e-4 so that rounding in gradients that are zero but for
    it (those of the keys' biases) is not blown up to the size of a step."""
    options = (f"optim.clip={clip}", "schedule.warmup=0", "lr=1e-2", "optim.eps=1e-4")
    found, trainer = fit(tmp_path, *options)
    expected, weights = reference_steps(config(tmp_path, *options), 5)
    for row, (loss, norm, lr) in zip(found, expected, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert row["lr"] == pytest.approx(lr, rel=1e-12)
    assert len({row["loss"] for row in found}) == 5
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, weights[name], rtol=1e-4, atol=2e-5)


def test_decay_spares_norms_and_biases_and_nothing_else(tmp_path):
    trainer = Trainer(config(tmp_path, "steps=1"), quiet=True)
    trainer.fit()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    decay = {names[p]: group["weight_decay"] for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert set(decay) == set(names.values())
    for parameter, name in names.items():
        assert decay[name] == (0.1 if parameter.ndim == 2 else 0.0), name


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    """1e-6: float32 sums of 4 x 32 tokens in another order; eps as above."""
    runs = {}
    for micro in (1, 2, 4):
        options = (f"micro_batch_size={micro}", "steps=3", "optim.eps=1e-4")
        found, trainer = fit(tmp_path, *options, out=f"micro-{micro}")
        runs[micro] = found, dict(trainer.model.named_parameters())
    for micro in (1, 2):
        for row, expected in zip(runs[micro][0], runs[4][0], strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-6)
            assert row["tokens"] == expected["tokens"]
        for name, parameter in runs[micro][1].items():
            torch.testing.assert_close(parameter, runs[4][1][name], rtol=0, atol=1e-6)


def test_a_microbatch_that_does_not_divide_the_batch(tmp_path):
    """The loss is the mean over tokens, not over microbatches: 3 + 1 sequences are not two equal halves."""
    uneven, _ = fit(tmp_path, "micro_batch_size=3", "steps=2", out="uneven")
    whole, _ = fit(tmp_path, "micro_batch_size=4", "steps=2", out="whole")
    assert [row["loss"] for row in uneven] == pytest.approx([row["loss"] for row in whole], abs=1e-6)


@pytest.mark.parametrize(("batches", "windows"), [(1, 4), (100, 10)])
def test_validation_is_the_mean_over_each_window_once(tmp_path, batches, windows):
    """Ten windows and a batch of four: the last batch is short, and no window is counted twice to fill it."""
    prefix = token_pair(tmp_path / "valid", tokens=10 * 32 + 20, seed=9)
    options = ("steps=2", "eval.every=1", f"eval.batches={batches}", f"data.valid={prefix}", "micro_batch_size=3")
    found, trainer = fit(tmp_path, *options)
    found = [row for row in found if "valid_loss" in row]
    assert [row["step"] for row in found] == [1, 2]
    ids = torch.from_numpy(np.fromfile(prefix.with_suffix(".bin"), np.uint16).astype(np.int64))
    cut = torch.stack([ids[i * 32 : i * 32 + 33] for i in range(windows)])
    with torch.no_grad():
        logits = trainer.model(cut[:, :-1])
    expected = F.cross_entropy(logits.reshape(-1, VOCAB), cut[:, 1:].reshape(-1)).item()
    assert found[-1]["valid_loss"] == pytest.approx(expected, abs=1e-6)


def test_bf16_is_near_fp32_and_keeps_fp32_weights(tmp_path):
    low, _ = fit(tmp_path, "dtype=bf16", out="low")
    high, _ = fit(tmp_path, out="high")
    assert low != high
    assert [row["loss"] for row in low] == pytest.approx([row["loss"] for row in high], rel=5e-3)
    assert {tensor.dtype for tensor in tensors(complete(tmp_path / "low")[-1], tmp_path).values()} == {torch.float32}


def test_rows_carry_what_they_should(tmp_path):
    fit(tmp_path, "steps=25", "log.every=10")
    found = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 10, 20, 25]
    for row in found:
        assert row["tokens"] == row["step"] * 4 * 32
        assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["seconds"])
        assert 0 < row["mfu"] < 1
        assert row["memory"] > 1 << 20
        assert all(math.isfinite(value) for value in row.values())
    assert found[-1]["lr"] < found[1]["lr"] <= 1e-3


def test_hooks_are_called_before_the_first_step_and_after_each(tmp_path):
    seen = []
    hook = lambda trainer, step: seen.append((step, trainer.step))  # noqa: E731
    Trainer(config(tmp_path, "steps=3"), hooks=(hook,), quiet=True).fit()
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]


def test_rows_are_on_disk_before_the_checkpoint_that_covers_them(tmp_path, monkeypatch):
    """What a power cut would leave: of each file, the bytes it had when it was last synced.

    The moment a checkpoint reads as complete, the rows up to it must be among those bytes, and so must its config,
    state and tensors: a resumed run drops rows, but cannot write those of steps it does not take again.
    """
    synced, checked = {}, []
    sync, rename = os.fsync, os.rename

    def fsync(handle):
        sync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def renamed(source, target, **named):
        if str(target).endswith(".metadata"):
            folder = os.path.dirname(target)
            step = int(folder[-8:])
            metrics = tmp_path / "run" / "metrics.jsonl"
            durable = metrics.read_bytes()[: synced.get(metrics.stat().st_ino, 0)]
            assert [line for line in durable.splitlines() if b'"loss"' in line][step - 1]
            assert durable.count(b"valid_loss") == -(-step // 2)  # at 2, 4 and the last
            for name in ("config.toml", "state.json", "__0_0.distcp"):
                status = os.stat(os.path.join(folder, name))
                assert synced[status.st_ino] == status.st_size > 0
            assert synced[os.stat(source).st_ino] == os.stat(source).st_size
            checked.append(step)
        rename(source, target, **named)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renamed)
    valid = token_pair(tmp_path / "valid")
    fit(tmp_path, "steps=5", "checkpoint.every=2", "eval.every=2", "eval.batches=1", f"data.valid={valid}")
    assert checked == [2, 4, 5]
