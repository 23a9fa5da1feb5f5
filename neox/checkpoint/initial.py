"""Start of a new run from a model's weights: each process reads only its slices."""

import shlex
from collections.abc import Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from neox.checkpoint import families
from neox.checkpoint.formats import use_weights
from neox.checkpoint.weight_source import NO_HEAD, CheckpointError, WeightSource
from neox.config import ModelConfig
from neox.config.options import spell
from neox.model.decoder import GPTNeoX
from neox.system.processes import Processes

# Options without influence on the computed function; sizes are compared by their resolved values.
_FREE = {
    *("init_method", "initializer_range", "mup_base_width"),
    *("hidden_dropout", "attention_dropout", "embedding_dropout"),
    *("intermediate_size", "rotary_pct", "max_position_embeddings"),
}


def load_initial(source: str, parts: Sequence[GPTNeoX], processes: Processes) -> None:
    """Fill the parts of a model with the weights of `source`.

    `source` is all that `load` takes; the parts may be sharded in any way. All processes call this together. Raises
    CheckpointError where the weights are those of another model, with the options that would fit them.
    """
    use_weights(source, lambda weights: _fill(weights, parts), processes)


@torch.no_grad()
def _fill(weights: WeightSource, parts: Sequence[GPTNeoX]) -> None:
    for part in parts:
        _check_model(weights, part.config)
        parameters = dict(part.named_parameters())
        for name in (name for name in weights.names() if name in parameters):
            local, shape, offsets = parameters[name].detach(), None, None
            if isinstance(local, DTensor):
                shape, offsets = compute_local_shape_and_global_offset(local.shape, local.device_mesh, local.placements)
                local = local.to_local()
            if local.numel():
                local.copy_(weights.read(name, shape, offsets))


def _check_model(weights: WeightSource, ours: ModelConfig) -> None:
    stored = weights.config
    if weights.headless:
        raise CheckpointError(f"{weights.config_file}: {NO_HEAD}")

    def differs(key: str) -> bool:
        return bool(getattr(stored, key) != getattr(ours, key))

    free = _FREE | families.ROPE_OPTIONS if stored.rope_scaling == "none" else _FREE  # a context may be stretched
    wrong = [key for key in type(ours).model_fields if key not in free and differs(key)]
    if ours.rotary_emb_base != stored.rotary_emb_base and not ours.rotary_dim:
        wrong.remove("rotary_emb_base")
    wrong += ["rotary_pct"] if differs("rotary_dim") else []
    wrong += ["intermediate_size"] if differs("ffn_size") else []
    if ours.position_embedding == "learned" and differs("max_position_embeddings"):
        wrong.append("max_position_embeddings")
    if wrong:
        values = {key: stored.ffn_size if key == "intermediate_size" else getattr(stored, key) for key in wrong}
        options = " ".join(f"model.{key}={shlex.quote(spell(value))}" for key, value in values.items())
        raise CheckpointError(
            f"{weights.config_file}: the weights of train.init are of another model than the run's: {options}"
        )
