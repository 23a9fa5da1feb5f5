"""Resharding and train.init: any layout saves, any other resumes, any starts from the weights of a folder."""

from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.tensor import DTensor

import neox
from neox import cli
from neox.checkpoint import CheckpointError, huggingface, load_initial
from neox.config import Config, load_config
from neox.system.processes import Processes
from neox.train import Trainer
from tests.checkpoint import released
from tests.parallel.helpers import together
from tests.tiny import GPT_J, GPT_NEO, ours
from tests.train.helpers import TINY, cut_back, one_line, rows, token_pair


class Layout(NamedTuple):
    world: int
    options: tuple[str, ...] = ()


LAYOUTS = {
    "one": Layout(1),
    "fsdp2": Layout(2, ("parallel.zero=3",)),
    "fsdp4": Layout(4, ("parallel.zero=1",)),
}
# AdamW divides by the root of a moment that may be next to nothing: at its usual eps rounding alone moves weights.
STEADY = ("optim.eps=1e-3", "schedule.min_lr=1e-3", "schedule.warmup=0", "checkpoint.every=2")


def settings(folder: Path, out: str, *options: str) -> Config:
    return load_config(
        overrides=(*TINY, *STEADY, "steps=4", f"data.train={folder / 'train'}", f"out={folder / out}", *options)
    )


def fit(*each: Config, resume: bool = False) -> None:
    for config in each:
        Trainer(config, resume=resume, quiet=True).fit()


def resume(*each: Config) -> None:
    fit(*each, resume=True)


def run(layout: Layout, folder: Path, function, *each: Config) -> None:
    if layout.world == 1:
        function(*each)
    else:
        together(layout.world, folder / "ranks", function, *each)


@pytest.mark.parametrize("names", [("one", "fsdp2"), pytest.param(tuple(LAYOUTS), marks=pytest.mark.slow)])
def test_resharding_matrix_of_saving_and_resuming(tmp_path, names):
    token_pair(tmp_path / "train")
    layouts = {name: LAYOUTS[name] for name in names}
    for name, layout in layouts.items():
        run(layout, tmp_path, fit, settings(tmp_path, name, *layout.options))
    reference = [row["loss"] for row in rows(tmp_path / "one")]
    for saved, resumed in product(layouts, layouts):
        cut_back(tmp_path / saved, tmp_path / f"{saved}-{resumed}", 2)
    for resumed, layout in layouts.items():
        copies = [settings(tmp_path, f"{saved}-{resumed}", *layout.options) for saved in layouts]
        run(layout, tmp_path, resume, *copies)
    for saved, resumed in product(layouts, layouts):
        losses = [row["loss"] for row in rows(tmp_path / f"{saved}-{resumed}")]
        assert losses == pytest.approx(reference, abs=1e-6), (saved, resumed)
        # What was read is what was written: the step after it begins from the same weights, bit for bit.
        if saved == resumed:
            assert losses == [row["loss"] for row in rows(tmp_path / saved)]


# --- weights of a folder ----------------------------------------------------------------------------------------------


def weights(config: Config) -> tuple[dict[str, torch.Tensor], int, int]:
    """Full weights that a run starts with, number of elements that this rank read, and number that it holds."""
    read = 0
    plain = huggingface.HuggingFaceFolder._slice

    def counted(*arguments):
        nonlocal read
        found = plain(*arguments)
        read += found.numel()
        return found

    huggingface.HuggingFaceFolder._slice = counted
    found, held = {}, 0

    def look(trainer: Trainer, step: int) -> None:
        nonlocal held
        if not step:
            assert not any(state["exp_avg"].any() for state in trainer.optimizers[0].state.values())
            for name, parameter in trainer.model.named_parameters():
                value = parameter.detach()
                held += value.to_local().numel() if isinstance(value, DTensor) else value.numel()
                found[name] = (value.full_tensor() if isinstance(value, DTensor) else value).clone()

    try:
        Trainer(config, hooks=(look,), quiet=True).fit()
    finally:
        huggingface.HuggingFaceFolder._slice = plain
    return found, read, held


def option(key: str, value: object) -> str:
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else value
    return f"model.{key}={list(text) if isinstance(text, tuple) else text}"


@pytest.mark.parametrize("kind", ["gpt_neox", "gptj", "gpt_neo"])
@pytest.mark.parametrize("shards", [1, 8])
def test_train_init_from_a_hugging_face_folder(tmp_path, kind, shards):
    model = ours(seed=3, **{"gpt_neox": {}, "gptj": GPT_J, "gpt_neo": GPT_NEO}[kind])
    neox.save(model, tmp_path / "hf", shard_bytes=10**9 if shards == 1 else 40_000)
    shape = [option(key, value) for key, value in model.config]
    size = model.config.vocab_size
    token_pair(tmp_path / "train", vocab=size)
    begin = [*shape, "data.seq_length=16", "steps=1", f"train.init={tmp_path / 'hf'}"]
    expected = dict(model.named_parameters())
    for world in (1, 2) if shards > 1 else (1,):
        config = settings(tmp_path, f"run-{world}", *begin, "parallel.zero=3")
        found = [weights(config)] if world == 1 else together(world, tmp_path / "ranks", weights, config)
        for values, read, held in found:
            assert values.keys() == expected.keys()
            for name, value in values.items():
                assert torch.equal(value, expected[name]), name
            # Of a fused projection whole heads are read, else no element that is not held.
            assert held <= read <= held * (1 if kind == "gpt_neox" else 1.3)
            assert held <= sum(p.numel() for p in expected.values()) / world + 4 * size * 8


def test_train_init_from_another_run(tmp_path, capsys):
    token_pair(tmp_path / "train")
    fit(settings(tmp_path, "first"))
    model, _ = neox.load(tmp_path / "first")
    for source in ("first", "first/step_00000004"):
        config = settings(tmp_path, f"next-{len(source)}", f"train.init={tmp_path / source}", "steps=1")
        found, _, _ = weights(config)
        assert all(torch.equal(value, found[name]) for name, value in model.named_parameters())
    config = settings(tmp_path, "sharded", f"train.init={tmp_path / 'first'}", "steps=1", "parallel.zero=3")
    for found, _, _ in together(2, tmp_path / "ranks", weights, config):
        assert all(torch.equal(value, found[name]) for name, value in model.named_parameters())
    # A resumed run goes on with what it has.
    assert cli.main(["train", f"resume={tmp_path / 'next-5'}", "steps=2"]) == 0
    assert len(rows(tmp_path / "next-5")) == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ("model.hidden_size=64",),
            ("hf/config.json: the weights of train.init are of another", "hidden_size=32"),
        ),
        (("model.rotary_pct=1.0",), ("model.rotary_pct=0.25$",)),
        (("model.use_parallel_residual=false",), ("model.use_parallel_residual=true$",)),
        (("model.vocab_size=128",), ("model.vocab_size=",)),
        (("train.init=nowhere",), ("nowhere: no such folder",)),
    ],
)
def test_train_init_with_weights_of_another_model(tmp_path, capsys, tokenizer, options, words):
    folder = released.write(tmp_path / "hf", released.CONFIG_PYTHIA, released.state(3), "sharded", tokenizer)
    shape = [option(key, value) for key, value in neox.load(folder)[0].config]
    token_pair(tmp_path / "train")
    base = [
        *TINY,
        *shape,
        "data.seq_length=16",
        "steps=1",
        f"data.train={tmp_path / 'train'}",
        f"out={tmp_path / 'run'}",
    ]
    assert cli.main(["train", *base, f"train.init={folder}", *options]) == 1
    one_line(capsys.readouterr().err, *words)


def test_train_init_fits_with_the_options_of_the_error(tmp_path, tokenizer):
    folder = released.write(tmp_path / "hf", released.CONFIG_PYTHIA, released.state(3), "sharded", tokenizer)
    token_pair(tmp_path / "train")
    with pytest.raises(CheckpointError) as caught:
        Trainer(settings(tmp_path, "a", f"train.init={folder}"), quiet=True).fit()
    options = str(caught.value).partition("the run's: ")[2].split()
    config = settings(tmp_path, "b", *options, f"train.init={folder}", "steps=1")
    found, _, _ = weights(config)
    assert all(torch.equal(value, found[name]) for name, value in neox.load(folder)[0].named_parameters())


def test_train_init_names_a_damaged_shard(tmp_path, tokenizer):
    folder = released.write(tmp_path / "hf", released.CONFIG_PYTHIA, released.state(3), "sharded", tokenizer)
    model = neox.load(folder)[0]
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=f"{shard.name}: cannot be read"):
        load_initial(str(folder), [model], Processes())
