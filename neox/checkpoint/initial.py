"""A new run's weights out of a model that exists: each process reads only the slices that it holds."""

import shlex
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from neox.checkpoint import families
from neox.checkpoint.huggingface import CheckpointError, broken, check_names, find, read_bin, read_config, weight_files
from neox.checkpoint.steps import agreed, is_step, load_tensors, newest_sound, read_step
from neox.config import ModelConfig
from neox.config.spelling import spell
from neox.model.decoder import GPTNeoX
from neox.system.runtime import Processes

# No part of what the weights compute; the sizes are compared as what they come to.
_FREE = {
    *("init_method", "initializer_range", "mup_base_width"),
    *("hidden_dropout", "attention_dropout", "embedding_dropout"),
    *("intermediate_size", "rotary_pct", "max_position_embeddings"),
}


def load_initial(source: str, parts: Sequence[GPTNeoX], processes: Processes) -> None:
    """Fill the parts of a model with the weights of a Hugging Face folder, a hub id, a run directory or a step folder.

    Any layout of the parameters over the processes, which call this together. Raises CheckpointError where the weights
    are not of such a model, with the options that would make it one.
    """
    with processes.first_alone():  # it may have to be fetched
        folder = find(source)
    config = parts[0].config
    if (folder / "config.json").exists():
        agreed(lambda: _fill_from_huggingface(folder, parts), processes)
        return

    def use(step: Path) -> bool:
        stored, _ = agreed(lambda: read_step(step), processes)
        _check_model(step / "config.toml", stored.model, config)
        load_tensors(step, parts, (), processes)
        return True

    use(folder) if is_step(folder) else newest_sound(folder, use, processes)


def _check_model(path: Path, stored: ModelConfig, ours: ModelConfig) -> None:
    def differs(key: str) -> bool:
        return bool(getattr(stored, key) != getattr(ours, key))

    wrong = [key for key in type(ours).model_fields if key not in _FREE and differs(key)]
    if ours.rotary_emb_base != stored.rotary_emb_base and not ours.rotary_dim:
        wrong.remove("rotary_emb_base")
    wrong += ["rotary_pct"] if differs("rotary_dim") else []
    wrong += ["intermediate_size"] if differs("ffn_size") else []
    if ours.position_embedding == "learned" and differs("max_position_embeddings"):
        wrong.append("max_position_embeddings")
    if wrong:
        values = {key: stored.ffn_size if key == "intermediate_size" else getattr(stored, key) for key in wrong}
        options = " ".join(f"model.{key}={shlex.quote(spell(value))}" for key, value in values.items())
        raise CheckpointError(f"{path}: the weights of train.init are of another model than the run's: {options}")


@torch.no_grad()
def _fill_from_huggingface(folder: Path, parts: Iterable[GPTNeoX]) -> bool:
    config = read_config(folder)
    with torch.device("meta"):
        names = dict(GPTNeoX(config).named_parameters())
    stored = {families.canonical(config, name): (name, file) for name, file in weight_files(folder).items()}
    wanted = {theirs for name in names for theirs in families.their_names(config, name)}
    check_names(folder, config, wanted, set(stored))
    with ExitStack() as stack:
        weights = _Weights(stored, config, stack)
        for part in parts:
            _check_model(folder / "config.json", config, part.config)
            for name, parameter in part.named_parameters():
                shape, offset = tuple(parameter.shape), (0,) * parameter.ndim
                local = parameter.detach()
                if isinstance(local, DTensor):
                    shape, offset = compute_local_shape_and_global_offset(
                        local.shape, local.device_mesh, local.placements
                    )
                    local = local.to_local()
                if local.numel():
                    ranges = [slice(begin, begin + size) for begin, size in zip(offset, shape, strict=True)]
                    local.copy_(weights.read(name, ranges, names[name].shape))
    return True


class _Weights:
    """Slices of the parameters that a Hugging Face folder holds, under our names."""

    def __init__(self, stored: dict[str, tuple[str, Path]], config: ModelConfig, stack: ExitStack) -> None:
        self.stored, self.config, self.stack = stored, config, stack
        self.open: dict[Path, Any] = {}

    def read(self, name: str, ranges: Sequence[slice], shape: torch.Size) -> Tensor:
        """The part `ranges` of parameter `name`, whose whole shape is `shape`."""
        theirs = families.their_names(self.config, name)
        expected = [shape[0] // len(theirs), *shape[1:]]
        if len(theirs) == 1:
            return self._slice(theirs[0], ranges, expected)
        # Whole heads of each of the three, of which the rows that are asked for are a part.
        rows, width = ranges[0], self.config.head_dim
        first, last = rows.start // (3 * width), -(-rows.stop // (3 * width))
        heads = [slice(first * width, last * width), *ranges[1:]]
        fused = families.fuse(self.config, [self._slice(each, heads, expected) for each in theirs])
        return fused[rows.start - first * 3 * width : rows.stop - first * 3 * width]

    def _slice(self, theirs: str, ranges: Sequence[slice], expected: list[int]) -> Tensor:
        name, path = self.stored[theirs]
        if path.suffix != ".safetensors":
            if path not in self.open:
                self.open[path] = read_bin(path)
            if name not in self.open[path]:
                raise CheckpointError(f"{path}: the index names tensor {name}, which is not in the file")
            found, shape = self.open[path][name], list(self.open[path][name].shape)
        else:
            from safetensors import SafetensorError, safe_open

            try:
                if path not in self.open:
                    self.open[path] = self.stack.enter_context(safe_open(path, "pt"))
                found = self.open[path].get_slice(name)
                shape = found.get_shape()
            except SafetensorError as error:
                raise broken(path, error) from None
        if shape != expected:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {shape}, config.json says {expected}: the weights and the config do "
                "not belong together"
            )
        return found[tuple(ranges)]
