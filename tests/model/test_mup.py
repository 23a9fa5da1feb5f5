"""muP against the paper's table written out by hand, against its other form (factors in the forward pass), and against
Microsoft's package where that is installed."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from neox import cli
from neox.checkpoint import initial
from neox.config import Config, ModelConfig, OptimConfig, load_config
from neox.model.decoder import GPTNeoX, init_std
from neox.model.mup import scaling
from neox.planning import show
from neox.train.optim import build_optimizers, clip_gradients, set_lr
from tests.tiny import CONTEXT, GPT_J, GPT_NEO, VOCAB, read_by_transformers, relative, tokens

BASE, M = 16, 4  # the base model's width, and how many times as wide the model is
FAMILIES = {
    "gpt_neox": {},
    "normal": {"init_method": "normal", "initializer_range": 0.05},
    "tied": {"tie_word_embeddings": True, "intermediate_size": 96},
    "gptj": GPT_J,
    "gpt_neo": GPT_NEO,
}


def wide(multiple: int = M, base: int | None = BASE, **flags) -> ModelConfig:
    """A model `multiple` times as wide as the base, heads of 8."""
    shape = {"vocab_size": VOCAB, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    width = multiple * BASE
    if "intermediate_size" in flags:
        flags = flags | {"intermediate_size": flags["intermediate_size"] * multiple // M}
    return ModelConfig(**(shape | flags), hidden_size=width, num_attention_heads=width // 8, mup_base_width=base)


def paper(config: ModelConfig, name: str, shape: torch.Size, base_shape: torch.Size) -> tuple[float, float, float]:
    """Factors on std, AdamW's rate and eps, from the shapes of a parameter in the model and in the base model.

    Table 3 of arXiv 2203.03466: a parameter is an input, a bias or an output where one side alone grows, hidden where
    both do. Variances: input and bias 1 / fan_in, output 1 / fan_in^2, hidden 1 / fan_in; Adam's rates 1, 1 / fan_in,
    1 / fan_in. fan_in of inputs and biases does not grow. eps: the gradient's size, which is that of the logits' (1)
    for the output, and that of the hidden states' (1 / width) for all else.
    """
    assert len(shape) == len(base_shape)
    grows = [a // b for a, b in zip(shape, base_shape, strict=True)]
    assert set(grows) <= {1, M}
    if config.tie_word_embeddings and name.startswith("final_layer_norm"):
        # Table 8 has a factor 1 / width on what a tied head reads. Folded into the gain and bias before it, these
        # start at 1 / M, and take steps of 1 / M of the size.
        return 1 / M, 1 / M, 1.0
    if grows == [1]:
        return 1.0, 1.0, 1.0  # the head's bias: nothing of it grows
    if grows == [M]:
        return 1.0, 1.0, 1 / M  # biases and norms of width
    if grows == [M, M]:
        return math.sqrt(1 / M), 1 / M, 1 / M
    rows, columns = grows
    if name.startswith("embed_out"):
        assert (rows, columns) == (1, M)
        return 1 / M, 1 / M, 1.0
    assert name in ("embed_in.weight", "embed_positions.weight")  # stored [tokens, width]: the fan-in is the rows
    assert (rows, columns) == (1, M)
    return 1.0, 1.0, 1 / M


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_the_papers_std_rate_decay_and_eps(family):
    flags = FAMILIES[family]
    model, base = GPTNeoX(wide(**flags)).initialize(3), GPTNeoX(wide(1, None, **flags)).initialize(3)
    optim = OptimConfig(lr=3e-3, eps=1e-6, weight_decay=0.2)
    groups, base_groups = ({}, {})
    for network, found in ((model, groups), (base, base_groups)):
        names = {parameter: name for name, parameter in network.named_parameters()}
        (adamw,) = build_optimizers([network], optim)
        for group in adamw.param_groups:
            found.update({names[parameter]: group for parameter in group["params"]})
    shapes = {name: parameter.shape for name, parameter in base.named_parameters()}
    assert groups.keys() == base_groups.keys() == shapes.keys()
    for name, parameter in model.named_parameters():
        std, lr, eps = paper(model.config, name, parameter.shape, shapes[name])
        group, before = groups[name], base_groups[name]
        assert group["lr"] == group["peak_lr"] == pytest.approx(3e-3 * lr, rel=1e-12), name
        assert group["eps"] == pytest.approx(1e-6 * eps, rel=1e-12), name
        assert group["lr"] * group["weight_decay"] == pytest.approx(before["lr"] * before["weight_decay"], rel=1e-12)
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert (parameter == std).all(), name
        else:
            expected = init_std(base.config, name) * std
            # Five standard errors; the draw is fixed.
            assert parameter.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * parameter.numel())), name
            assert init_std(model.config, name) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_at_the_base_width_it_is_the_standard_parametrisation_bit_for_bit(family, optimizer):
    plain, same = (GPTNeoX(wide(1, base, **FAMILIES[family])).initialize(5) for base in (None, BASE))
    optim = OptimConfig(name=optimizer)
    for network in (plain, same):
        train(network, build_optimizers([network], optim), 2)
    for (name, a), (_, b) in zip(plain.named_parameters(), same.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def train(model, optimizers, steps: int) -> list[float]:
    batch, losses = tokens(4, 17, seed=1), []
    for _ in range(steps):
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), batch[:, 1:].reshape(-1))
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


OPTIM = OptimConfig(lr=1e-2, eps=1e-4, weight_decay=0.3)  # each of eps and decay changes the losses, see below


class Divided(torch.nn.Module):
    """A head whose input is divided by M: the paper's table 8, where the head's rate and eps are those of the base."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head(x / M)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_as_the_form_with_a_factor_on_the_logits(family):
    """The paper's table 8: the head starts at the base's std and takes the base's steps, its output is divided by M."""
    config = wide(**FAMILIES[family])
    ours = GPTNeoX(config).initialize(7)
    theirs = copy.deepcopy(ours)
    with torch.no_grad():
        if config.tie_word_embeddings:
            for parameter in theirs.final_layer_norm.parameters():
                parameter.mul_(M)
        else:
            theirs.embed_out.weight.mul_(M)
    theirs.embed_out = Divided(theirs.embed_out)
    groups = {}
    for name, parameter in theirs.named_parameters():
        hidden = name.startswith("layers.") and name.endswith("weight") and "norm" not in name
        decay = 0.0 if name.endswith("bias") or "norm" in name else OPTIM.weight_decay
        # All gradients have one size in this form, but for what is added behind the factor.
        eps = OPTIM.eps if name == "embed_out.head.bias" else OPTIM.eps / M
        key = (OPTIM.lr / M if hidden else OPTIM.lr, decay * M if hidden else decay, eps)
        groups.setdefault(key, []).append(parameter)
    reference = torch.optim.AdamW(
        [{"params": found, "lr": lr, "weight_decay": decay, "eps": eps} for (lr, decay, eps), found in groups.items()],
        betas=OPTIM.betas,
    )
    expected = train(theirs, [reference], 6)
    assert expected[-1] < expected[0] - 0.5
    assert train(ours, build_optimizers([ours], OPTIM), 6) == pytest.approx(expected, abs=1e-5)
    for change in ({"eps": OPTIM.eps * 2}, {"weight_decay": 0.0}, {"lr": 1.01e-2}):
        other = GPTNeoX(config).initialize(7)
        losses = train(other, build_optimizers([other], OPTIM.model_copy(update=change)), 6)
        assert losses != pytest.approx(expected, abs=1e-4), change


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_trains_as_microsofts_package_makes_it():
    mup = pytest.importorskip("mup")
    config = wide()
    ours = GPTNeoX(config).initialize(7)

    def made(multiple: int) -> GPTNeoX:
        model = GPTNeoX(wide(multiple, None))
        model.embed_out = mup.MuReadout(model.config.hidden_size, VOCAB, bias=False)
        return model

    theirs = made(M)
    mup.set_base_shapes(theirs, made(1), delta=made(2), rescale_params=False)
    with torch.no_grad():
        for (name, parameter), (_, own) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
            parameter.copy_(own * (M if name == "embed_out.weight" else 1))
    spared = [p for name, p in theirs.named_parameters() if name.endswith("bias") or "norm" in name]
    decayed = [p for name, p in theirs.named_parameters() if not (name.endswith("bias") or "norm" in name)]
    optimizer = mup.MuAdamW(
        [{"params": decayed, "weight_decay": OPTIM.weight_decay}, {"params": spared, "weight_decay": 0.0}],
        lr=OPTIM.lr,
        betas=OPTIM.betas,
        eps=OPTIM.eps / M,
    )
    expected = train(theirs, [optimizer], 6)
    assert train(ours, build_optimizers([ours], OPTIM), 6) == pytest.approx(expected, abs=1e-5)


def test_gradients_have_the_size_that_eps_follows():
    """Slopes of the gradients' root mean square over the width, after some steps: -1, and 0 for the head."""
    multiples, sizes = (1, 2, 4, 8, 16), []
    for multiple in multiples:
        model = GPTNeoX(wide(multiple, tie_word_embeddings=False, head_bias=True)).initialize(2)
        train(model, build_optimizers([model], OptimConfig(lr=1e-2)), 4)
        batch = tokens(4, 17, seed=1)
        F.cross_entropy(model(batch[:, :-1]).reshape(-1, VOCAB), batch[:, 1:].reshape(-1)).backward()
        sizes.append({name: p.grad.square().mean().sqrt().log() for name, p in model.named_parameters()})
    for name in sizes[0]:
        x = torch.tensor(multiples).log()
        x = x - x.mean()
        slope = (x * torch.stack([size[name] for size in sizes])).sum() / x.square().sum()
        expected = math.log(scaling(wide(M), name).eps) / math.log(M)
        assert slope.item() == pytest.approx(expected, abs=0.25), name


def test_what_it_makes_transformers_reads(tmp_path):
    import neox

    for family, flags in FAMILIES.items():
        model = GPTNeoX(wide(**flags)).initialize(1)
        train(model, build_optimizers([model], OptimConfig(lr=1e-2)), 2)
        neox.save(model, tmp_path / family)
        with torch.no_grad():
            assert relative(model(tokens()), read_by_transformers(tmp_path / family)(tokens()).logits) < 1e-5
        # A run goes on from it, with or without muP: it is no part of what the weights compute.
        part = GPTNeoX(wide(**flags))
        initial.load_initial(str(tmp_path / family), [part], neox.system.processes.Processes())
        assert all(torch.equal(a, b) for a, b in zip(part.parameters(), model.parameters(), strict=True))


def test_muons_matrices_keep_their_rate_and_start_as_mup_has_it():
    model = GPTNeoX(wide())
    adamw, muon = build_optimizers([model], OptimConfig(name="muon", muon_lr=0.03, weight_decay=0.2, lr=1e-2))
    (group,) = muon.param_groups
    assert (group["peak_lr"], group["weight_decay"]) == (0.03, 0.2)
    assert len(group["params"]) == 8  # four matrices a block
    rates = {id(p): group["peak_lr"] for group in adamw.param_groups for p in group["params"]}
    assert rates[id(model.embed_out.weight)] == 1e-2 / M
    assert rates[id(model.embed_in.weight)] == rates[id(model.layers[0].mlp.dense_4h_to_h.bias)] == 1e-2


TEXT = torch.tensor(list((Path(__file__).parents[2] / "LICENSE").read_bytes()))
RATES = (-8, -7, -6, -5, -4)  # powers of two; at width 32 the fourth is best


def final_loss(width: int, base: int | None, rate: int, seed: int, steps: int = 60) -> float:
    """Mean loss of the last third of a short run on the bytes of a text, with warmup and linear decay."""
    shape = {"vocab_size": 256, "num_hidden_layers": 2, "max_position_embeddings": 32}
    model = GPTNeoX(
        ModelConfig(**shape, hidden_size=width, num_attention_heads=width // 16, mup_base_width=base)
    ).initialize(seed)
    optimizers = build_optimizers([model], OptimConfig(lr=2.0**rate))
    generator, losses = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        begins = torch.randint(len(TEXT) - 32, (8, 1), generator=generator)
        batch = TEXT[begins + torch.arange(33)]
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        clip_gradients([model], 1.0)
        set_lr(optimizers, min(1, (step + 1) / 10) * (1 - step / steps))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / 20


@pytest.mark.slow
def test_the_best_rate_of_a_narrow_model_is_that_of_a_wide_one():
    """Width 32 to 256. Five seeds on other text gave shifts of 0 and -1 under muP, and -3 in the standard one."""

    def losses(width: int, base: int | None) -> list[float]:
        return [sum(final_loss(width, base, rate, seed) for seed in (1, 2)) / 2 for rate in RATES]

    narrow, mup, standard = losses(32, None), losses(256, 32), losses(256, None)
    best = narrow.index(min(narrow))
    assert RATES[best] == -5
    assert abs(mup.index(min(mup)) - best) <= 1
    assert mup[best] - min(mup) < 0.03  # what it costs to take over the rate
    assert standard.index(min(standard)) - best <= -2
    assert standard[best] - min(standard) > 0.08


def test_a_base_that_could_not_be_is_refused(capsys):
    assert cli.main(["show", "hidden_size=64", "num_attention_heads=4", "mup_base_width=24"]) == 1
    assert "model.mup_base_width: 24 does not split into heads of 16" in capsys.readouterr().err


def test_show_says_it():
    text = show(load_config(overrides=["hidden_size=512", "num_attention_heads=8", "mup_base_width=64", "lr=4e-3"]))
    assert "Width transfer (muP) from a model of width 64" in text
    assert "0.0005" in next(line for line in text.splitlines() if "peak rate" in line)
    assert "muP" not in show(Config())
