"""Coordinate check: do activations keep their size as a model grows wider, while it trains?

After a few steps, the mean absolute value of each kind of output is laid against the width, on two logarithmic axes. A
slope of zero means that the width does not matter, so that settings which suit a narrow model suit a wide one; what
rises breaks at some width (Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466, appendix D.1).
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from neox.config import Config, ModelConfig
from neox.model.decoder import GPTNeoX
from neox.system.device import resolve_device
from neox.system.pictures import COLOURS, INK, dress, new_figure, value_ticks, write_png
from neox.train import build_optimizers, clip_gradients

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OUTPUTS = {  # kind: the modules whose output it is
    "embedding": r"embed_in",
    "attention": r"layers\.\d+\.attention",
    "mlp": r"layers\.\d+\.mlp",
    "block": r"layers\.\d+",
    "logits": r"embed_out",
}
MOMENTS = {"start": "at the start", "after": "after {} steps", "change": "change in {} steps"}


class Coordinates(NamedTuple):
    """Mean absolute values [MOMENTS, OUTPUTS] of one model: at the start, after the steps, and of the difference."""

    sizes: NDArray[np.float64]
    losses: list[float]  # before each step, and after the last


def at_width(model: ModelConfig, width: int, base: int | None) -> ModelConfig:
    """Change hidden_size and the number of heads of a model, without dropout.

    The parametrisation is standard where `base` is None, else muP.

    Raises ValueError where head_dim or the ratio of the MLP's width to hidden_size could not stay.
    """
    if width % model.head_dim:
        raise ValueError(f"widths: {width} does not split into heads of {model.head_dim}, which stay: see --help")
    if width * model.ffn_size % model.hidden_size:
        raise ValueError(
            f"widths: {width} * {model.ffn_size} / {model.hidden_size}, the MLP's width, is no whole number"
        )
    changes = {
        "hidden_size": width,
        "num_attention_heads": width // model.head_dim,
        "intermediate_size": width * model.ffn_size // model.hidden_size,
        "mup_base_width": base,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "embedding_dropout": None,
    }
    return ModelConfig(**(model.model_dump() | changes))


def coordinates(config: Config, width: int, base: int | None, steps: int) -> Coordinates:
    """Train a model at another width on one batch and measure its outputs.

    The learning rate is the peak rate, without a schedule.

    The batch is drawn at random from train.seed, as the weights are: micro_batch_size sequences of seq_length tokens.
    The same one at each step, so that outputs can be compared token by token. Raises ValueError as `at_width` does.
    """
    seed, device = config.train.seed, resolve_device(config.train.device)
    model = GPTNeoX(at_width(config.model, width, base)).to(device).initialize(seed)
    optimizers = build_optimizers([model], config.optim)
    shape = config.train.micro_batch_size, config.data.seq_length + 1
    generator = torch.Generator().manual_seed(seed)
    # As often as in text (Zipf's law), so that there is something that all positions learn.
    drawn = torch.multinomial(
        1 / torch.arange(1.0, config.model.vocab_size + 1), math.prod(shape), True, generator=generator
    )
    tokens, labels = drawn.view(shape)[:, :-1].to(device), drawn.view(shape)[:, 1:].to(device)
    losses = []
    for step in range(steps + 1):
        with recorded(model) as outputs:
            loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
        losses.append(loss.item())
        if not step:
            start = outputs
        if step < steps:
            loss.backward()
            clip_gradients([model], config.optim.clip)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
    changes = {kind: [b - a for a, b in zip(start[kind], outputs[kind], strict=True)] for kind in OUTPUTS}
    moments = [[_size(found[kind]) for kind in OUTPUTS] for found in (start, outputs, changes)]
    return Coordinates(np.array(moments), losses)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """Record the outputs of the modules of each kind in the forward pass that runs inside."""
    outputs: dict[str, list[Tensor]] = {kind: [] for kind in OUTPUTS}
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output, kind=kind: outputs[kind].append(output.detach()))
        for name, module in model.named_modules()
        for kind, pattern in OUTPUTS.items()
        if re.fullmatch(pattern, name)
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _size(outputs: list[Tensor]) -> float:
    return float(np.mean([output.abs().mean().item() for output in outputs]))


def slopes(widths: Sequence[int], sizes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slopes of the least-squares lines through log(sizes [widths, ...]) over log(widths)."""
    flat = np.log(sizes).reshape(len(widths), -1)
    return np.polyfit(np.log(widths), flat, 1)[0].reshape(sizes.shape[1:])


def table(widths: Sequence[int], found: dict[str, NDArray[np.float64]]) -> str:
    """Table of the slopes of each parametrisation's sizes [widths, MOMENTS, OUTPUTS]."""
    lines = [" " * 10 + "".join(f"{title:>28}" for title in found)]
    lines.append(" " * 10 + f"{'':4}{''.join(f'{moment:>8}' for moment in MOMENTS)}" * len(found))
    fitted = [slopes(widths, sizes) for sizes in found.values()]
    for number, kind in enumerate(OUTPUTS):
        cells = ("".join(f"{value:>+8.2f}" for value in slope[:, number]) for slope in fitted)
        lines.append(f"{kind:<10}" + "".join(f"{'':4}{cell}" for cell in cells))
    return "\n".join(lines)


def write_coordinates(path: Path, widths: Sequence[int], found: dict[str, NDArray[np.float64]], steps: int) -> None:
    """Write the picture of each parametrisation's sizes [widths, MOMENTS, OUTPUTS], as a PNG."""
    write_png(path, coordinates_figure(widths, found, steps))


def coordinates_figure(widths: Sequence[int], found: dict[str, NDArray[np.float64]], steps: int) -> "Figure":
    """Draw the sizes over the width: rows are parametrisations, columns are moments, lines are kinds of output."""
    figure = new_figure(12, 0.8 + 3.2 * len(found))
    panels = figure.subplots(len(found), len(MOMENTS), sharex=True, sharey="col", squeeze=False)
    for row, (title, sizes) in zip(panels, found.items(), strict=True):
        for column, (axes, moment) in enumerate(zip(row, MOMENTS.values(), strict=True)):
            for number, kind in enumerate(OUTPUTS):
                axes.loglog(widths, sizes[:, column, number], "o-", color=COLOURS[number], label=kind, markersize=4)
            dress(axes, title, moment.format(steps), grid="both", size=11)
            value_ticks(axes.xaxis, widths)
    for axes in panels[-1]:
        axes.set_xlabel("width")
    for row in panels:
        row[0].set_ylabel("mean absolute value")
    lines, kinds = panels[0, 0].get_legend_handles_labels()
    figure.legend(lines, kinds, loc="outside lower center", ncols=len(kinds), frameon=False, labelcolor=INK)
    return figure
