"""Maximal update parametrisation (muP): how initialisation and optimizer follow the width, so that settings transfer.

What is tuned on a narrow model then holds for a wide one (Yang et al. 2022, "Tensor Programs V", arXiv 2203.03466).
This is their table 3, the form without factors in the forward pass: a model trained this way is an ordinary one. With
m = hidden_size / mup_base_width, and everything as it is in the model of the base width where m is one:

    parameter                            initial std   AdamW's rate   decay   eps
    embeddings                           1             1              1       1 / m
    matrices of the blocks               1 / sqrt(m)   1 / m          m       1 / m
    biases and norms of the blocks       1             1              -       1 / m
    output head                          1 / m         1 / m          m       1
    its bias                             1             1              -       1
    final norm                           1             1              -       1 / m
    final norm before a tied head        1 / m         1 / m          -       1

The base model has this one's head_dim, depth and ratio of MLP width to hidden_size: what grows is the number of heads,
and the scale of the attention scores stays.

Decay: AdamW shrinks a weight by rate times decay, and that product must not depend on the width for rates to transfer
beyond the first steps (Wang & Aitchison 2024, arXiv 2405.13698; Kosson et al. 2025, arXiv 2510.19093).
eps: follows the size of the gradient's entries, which is 1 / m for all but the last parameters (Everett et al. 2024,
arXiv 2407.05872, find that an eps that does not is what fails first at large width).
A tied head would need a factor on the logits (the paper's table 8). The final norm's gain and bias carry it: they are
all that the head reads.
Muon: its update has spectral norm sqrt(rows / columns), up to a constant that the base model shares, which is muP's own
condition (Yang, Simon & Bernstein 2023, arXiv 2310.17813): the rate of its matrices stays as it is, and so their decay.
"""

from __future__ import annotations

from typing import NamedTuple

from neox.config import ModelConfig


class Scaling(NamedTuple):
    """Factors on what a parameter has in the model of the base width."""

    std: float = 1.0
    """On the standard deviation it is drawn with; on the ones of a norm."""
    lr: float = 1.0
    """On AdamW's learning rate."""
    eps: float = 1.0
    """On AdamW's eps."""

    @property
    def decay(self) -> float:
        """On AdamW's weight decay: the rate times the decay stays."""
        return 1 / self.lr


def scaling(model: ModelConfig, name: str) -> Scaling:
    """The row of the table for the parameter `name`; all ones without `mup_base_width`, and at the base width."""
    if model.mup_base_width is None or model.mup_base_width == model.hidden_size:
        return Scaling()
    shrunk = model.mup_base_width / model.hidden_size
    if name == "embed_out.bias":
        return Scaling()
    if name == "embed_out.weight" or (model.tie_word_embeddings and name.startswith("final_layer_norm.")):
        return Scaling(std=shrunk, lr=shrunk)
    if name.startswith("layers.") and name.endswith("weight") and "norm" not in name:
        return Scaling(std=shrunk**0.5, lr=shrunk, eps=shrunk)
    return Scaling(eps=shrunk)
