"""Weights of one model in any format: names, shapes, stored dtype, slices on demand.

A format costs one module with a subclass of `WeightSource` and one line in `formats.FORMATS`. Loading, the start of a
new run and export are written against this class alone. A format that is only written takes a `WeightSource` as
`huggingface_writer` does.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from neox.config import ModelConfig, structured
from neox.model.decoder import GPTNeoX

if TYPE_CHECKING:
    from neox.tokenizer import Tokenizer

Transform = Callable[[str, torch.nn.Module], torch.nn.Module]
"""(name, nn.Linear or nn.Embedding) -> the module to use instead, or the layer itself. Called while weights are loaded,
so that a layer can be packed before the next one is read. A tied head and embedding are left alone."""


NO_HEAD = "the model was saved without a head (as GPTNeoXModel): it gives hidden states (head=False), no logits"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names file, fault and remedy."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError."""
    try:
        content: dict[str, Any] = structured.read_json(path)
    except ValueError as error:
        raise CheckpointError(f"{error}; fetch or write it again") from None
    return content


class WeightSource(ABC):
    """Weights of one model under NeoX's parameter names, read slice by slice.

    Opening one reads the model's config and the table of tensors, and checks that they belong together; weights are
    read by `read` alone. Raises CheckpointError.
    """

    shares_memory = True
    """`read` may return memory of the file or of another model: copy it before it is kept or changed."""

    headless = False
    """The weights have no head: the model gives hidden states only."""

    def __init__(self, config_file: Path, config: ModelConfig) -> None:
        self.config_file = config_file  # for messages
        self.reshape(config)

    def reshape(self, config: ModelConfig) -> None:
        """Take `config` for the model's, with the shapes of its parameters."""
        self.config = config
        with torch.device("meta"):
            self.shapes = {name: parameter.shape for name, parameter in GPTNeoX(config).named_parameters()}

    @classmethod
    @abstractmethod
    def matches(cls, folder: Path) -> bool:
        """Tell from its file names that a folder is of this format."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type that the weights are stored in."""

    def names(self) -> Iterable[str]:
        """Names of all parameters, in the order in which to read them: embedding and head first.

        These are the largest. Read last, a copy of one of them beside all other weights would be the peak of memory.
        """
        return sorted(self.shapes, key=lambda name: not name.startswith("embed_"))

    @abstractmethod
    def read(self, name: str, shape: Sequence[int] | None = None, offsets: Sequence[int] | None = None) -> Tensor:
        """Return a parameter, or its slice of `shape` at `offsets`, in the stored dtype."""

    def tokenizer(self) -> "Tokenizer | None":
        """Tokenizer that is stored beside the weights, None where there is none."""
        return None


class ModelWeights(WeightSource):
    """The weights of a model in memory: the source of `save`."""

    def __init__(self, model: GPTNeoX, tokenizer: "Tokenizer | None" = None) -> None:
        super().__init__(Path(), model.config)
        self._parameters = dict(model.named_parameters())
        self._tokenizer = tokenizer
        if absent := [name for name in self.shapes if name not in self._parameters]:
            raise ValueError(
                f"{absent[0]} is not there as it was trained: save a model before it is quantized, and with its head"
            )

    @classmethod
    def matches(cls, folder: Path) -> bool:
        return False

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self._parameters.values())).dtype

    def read(self, name: str, shape: Sequence[int] | None = None, offsets: Sequence[int] | None = None) -> Tensor:
        return self._parameters[name].detach()[slices(self.shapes[name], shape, offsets)]

    def tokenizer(self) -> "Tokenizer | None":
        return self._tokenizer


def slices(whole: Sequence[int], shape: Sequence[int] | None, offsets: Sequence[int] | None) -> tuple[slice, ...]:
    """Index of the slice of `shape` at `offsets` of a tensor of shape `whole`."""
    shape, offsets = whole if shape is None else shape, offsets or [0] * len(whole)
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, shape, strict=True))
