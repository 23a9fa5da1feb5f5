"""The coordinate check over four widths: flat under muP, rising under the standard parametrisation."""

import numpy as np
import pytest
import torch
from PIL import Image

import neox
from neox import cli
from neox.analysis.coordinates import MOMENTS, OUTPUTS, at_width, coordinates, coordinates_figure, slopes
from neox.config import load_config
from neox.model.decoder import GPTNeoX
from neox.model.mup import Scaling, scaling
from neox.train import optim
from tests.tiny import GPT_J, GPT_NEO, read_by_transformers

WIDTHS = (64, 128, 256, 512)
SMALL = ("model.vocab_size=64", "num_hidden_layers=2", "seq_length=16", "micro_batch_size=4", "device=cpu")
SHAPE = (*SMALL, "hidden_size=64", "num_attention_heads=4", "optim.lr=1e-2")
FLAT = 0.15  # four widths and three seeds leave the slopes so uncertain; what muP must prevent is 0.5 and more


def fitted(base: int | None, *options: str, steps: int = 4, seeds=(1, 2, 3)) -> dict[str, dict[str, float]]:
    """{moment: {kind: slope}}, of the geometric means over seeds."""
    logs = [
        [np.log(coordinates(load_config(overrides=(*SHAPE, *options, f"train.seed={seed}")), width, base, steps).sizes)
         for width in WIDTHS]
        for seed in seeds
    ]  # fmt: skip
    found = slopes(WIDTHS, np.exp(np.mean(logs, axis=0)))
    return {moment: dict(zip(OUTPUTS, row, strict=True)) for moment, row in zip(MOMENTS, found, strict=True)}


def assert_flat(found: dict[str, dict[str, float]], least_logits: float = -FLAT) -> None:
    for kind in OUTPUTS:
        for moment in ("after", "change"):
            least = least_logits if kind == "logits" else -FLAT
            assert least < found[moment][kind] < FLAT, (moment, kind)
        # Before the first step the logits are sums of random terms that cancel: they shrink as the root of the width.
        assert found["start"][kind] == pytest.approx(-0.5 if kind == "logits" else 0.0, abs=0.1), kind


def test_mup_outputs_and_changes_do_not_depend_on_the_width():
    assert_flat(fitted(64))


def test_standard_parametrisation_outputs_grow_with_the_width():
    found = fitted(None)
    for kind in ("attention", "mlp", "block", "logits"):
        assert found["change"][kind] > 0.5, kind
    for kind in ("attention", "mlp", "block"):
        assert found["change"][kind] > 1.2, kind
    # small_init: the embedding's std is sqrt(2 / (5 C)), and nothing else depends on the width at the start.
    assert found["start"] == pytest.approx(dict.fromkeys(OUTPUTS, 0.0) | {"embedding": -0.5}, abs=0.1)


@pytest.mark.parametrize(
    "half",
    [lambda *a: scaling(*a)._replace(lr=1.0), lambda *a: Scaling(lr=1.0 if a[1] == "embed_out.weight" else 0.25)],
)
def test_coordinate_check_sees_learning_rates_that_do_not_follow_the_width(half, monkeypatch):
    monkeypatch.setattr(optim, "scaling", half)
    found = fitted(64, seeds=(1,))
    assert max(found["change"].values()) > 0.4


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        GPT_J,
        GPT_NEO,
        GPT_NEO | {"init_method": "normal", "tie_word_embeddings": False},
        {"tie_word_embeddings": True, "use_parallel_residual": False},
    ],
)
def test_mup_holds_for_gptj_and_gpt_neo(flags):
    options = [f"model.{key}={list(v) if isinstance(v, tuple) else str(v).lower()}" for key, v in flags.items()]
    options.append("optim.lr=3e-3")  # with the weights of "normal", 1e-2 is so much that no two seeds agree
    assert_flat(fitted(64, *options), least_logits=-0.5)  # the random part is still seen
    assert max(fitted(None, *options, seeds=(1,))["change"].values()) > 0.5


@pytest.mark.slow
def test_muon_updates_follow_the_width_without_mup():
    options = ("optim.name=muon", "muon_lr=0.05")
    assert_flat(fitted(64, *options, seeds=(1,)))
    assert fitted(None, *options, seeds=(1,))["change"]["logits"] > 0.4  # the head is AdamW's


def test_coordinate_sizes_are_those_of_transformers_outputs(tmp_path):
    config = load_config(overrides=(*SHAPE, "train.seed=4"))
    found = coordinates(config, 128, 64, 1)
    model = GPTNeoX(at_width(config.model, 128, 64)).initialize(4)
    neox.save(model, tmp_path / "model")
    weights = 1 / torch.arange(1.0, 65)
    drawn = torch.multinomial(weights, 4 * 17, True, generator=torch.Generator().manual_seed(4)).view(4, 17)
    with torch.no_grad():
        theirs = read_by_transformers(tmp_path / "model")(drawn[:, :-1], output_hidden_states=True)
    sizes = dict(zip(OUTPUTS, found.sizes[0], strict=True))
    assert sizes["embedding"] == pytest.approx(theirs.hidden_states[0].abs().mean().item(), rel=1e-5)
    assert sizes["logits"] == pytest.approx(theirs.logits.abs().mean().item(), rel=1e-5)
    loss = torch.nn.functional.cross_entropy(theirs.logits.flatten(0, 1), drawn[:, 1:].flatten())
    assert found.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    assert len(found.losses) == 2


def test_slopes_are_exponents():
    powers = np.array([[0.0, 1.0], [-0.5, 2.5]])
    sizes = np.array([3 * float(width) ** powers for width in WIDTHS])
    np.testing.assert_allclose(slopes(WIDTHS, sizes), powers, atol=1e-12)


def test_the_picture_has_a_line_of_each_kind_in_each_panel():
    sizes = np.arange(1.0, 31).reshape(2, 3, 5)
    figure = coordinates_figure((64, 128), {"standard": sizes, "mup": 2 * sizes}, 7)
    assert len(figure.axes) == 6
    for number, axes in enumerate(figure.axes):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert axes.get_title("left") == ("standard", "mup")[number // 3]
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == list(OUTPUTS)
        for kind, line in zip(OUTPUTS, lines.values(), strict=True):
            expected = sizes[:, number % 3, list(OUTPUTS).index(kind)] * (1 + number // 3)
            assert line.get_xdata().tolist() == [64, 128]
            assert line.get_ydata().tolist() == expected.tolist()
    assert figure.axes[2].get_title("right") == "change in 7 steps"


def test_the_command_prints_slopes_and_writes_the_picture(tmp_path, capsys):
    out = tmp_path / "c.png"
    small = (*SMALL, "hidden_size=32", "num_attention_heads=4", f"out={out}")
    assert cli.main(["inspect", "coordinates", *small, "widths=32,8,16", "steps=1"]) == 0
    said = capsys.readouterr()
    assert [line.split(":")[0] for line in said.err.splitlines()] == [
        f"{kind}, width {width}" for kind in ("standard", "mup") for width in (8, 16, 32)
    ]
    rows = {line.split()[0]: line.split()[1:] for line in said.out.splitlines() if line.split()[0] in OUTPUTS}
    assert list(rows) == list(OUTPUTS)
    assert all(len(row) == 6 for row in rows.values())
    assert float(rows["embedding"][0]) == pytest.approx(-0.5, abs=0.1)  # standard, at the start
    assert Image.open(out).format == "PNG"
    assert cli.main(["inspect", "coordinates", *small, "widths=8,16", "steps=1", "only=mup"]) == 0
    assert "standard" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("widths=64,100", "widths: 100 does not split into heads of 64"),
        ("widths=64", "widths=64: a slope needs two widths, such as 64,128,256,512"),
        ("widths=64,64", "widths=64: a slope needs two widths"),
        ("widths=64,a", "widths[1]: must be a valid integer, got 'a' (from widths=64,a)"),
        ("steps=0", "steps: must be greater than 0, got 0 (from steps=0)"),
        ("only=sp", "only: must be 'mup' or 'standard', got 'sp'"),
        ("out=a.html", "must end in .png"),
        ("model.intermediate_size=257", "widths: 64 * 257 / 256"),
        ("mup_base_width=96", "mup_base_width: 96 does not split"),
        ("nothing=1", "no such key"),
    ],
)
def test_coordinates_errors_are_one_line(option, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "coordinates", option]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())
