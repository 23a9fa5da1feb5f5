"""Checks of a parallel layout against the model's shape."""

from __future__ import annotations

from neox.config.sections.model import ModelConfig
from neox.config.sections.training import ParallelConfig


def check_splits(model: ModelConfig, parallel: ParallelConfig, seq_length: int) -> None:
    """Check that tensor and context parallelism split evenly. Raises ValueError with the key."""
    tp, cp = parallel.tp, parallel.cp
    for key, size in (
        ("num_attention_heads", model.num_attention_heads),
        ("intermediate_size", model.ffn_size),
        ("vocab_size", model.vocab_size),
    ):
        if size % tp:
            advice = f"raise it to {-(-size // tp) * tp}" if key == "vocab_size" else "choose a tp that divides it"
            raise ValueError(f"parallel.tp: {tp} does not divide model.{key} ({size}): {advice}")
    # Each process of cp has a slice from the sequence's first half and one from its second.
    pieces = 1 if cp == 1 else 2 * cp
    if seq_length % pieces:
        raise ValueError(
            f"parallel.cp: {cp} cuts a sequence into {pieces} slices, which do not divide data.seq_length "
            f"({seq_length})"
        )
    if cp > 1 and model.rope_scaling == "dynamic":
        raise ValueError(
            "parallel.cp: a process sees a slice of the positions, but rope_scaling = dynamic needs them all"
        )
    if not parallel.sequence_parallel:
        return
    if tp == 1:
        raise ValueError("parallel.sequence_parallel: splits sequences over the processes of parallel.tp; set tp")
    if seq_length // cp % tp:
        raise ValueError(
            f"parallel.sequence_parallel: tp={tp} does not divide the {seq_length // cp} tokens of "
            "data.seq_length" + (" that each process of cp has" if cp > 1 else "")
        )


def check_pipeline_stages(model: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that the layers can be distributed over the stages of a pipeline. Raises ValueError with the key."""
    layers = model.num_hidden_layers
    if parallel.pp == 1:
        if parallel.stage_layers:
            raise ValueError(
                "parallel.stage_layers: distributes layers over the stages of parallel.pp; set parallel.pp"
            )
        return
    if parallel.stages > layers:
        raise ValueError(
            f"parallel.pp: {parallel.stages} stages of {parallel.schedule} are more than "
            f"model.num_hidden_layers ({layers})"
        )
    given = parallel.stage_layers
    if given and not (len(given) == parallel.stages and sum(given) == layers and min(given) > 0):
        raise ValueError(
            f"parallel.stage_layers: {list(given)} must give each of {parallel.stages} stages at least one layer, "
            f"{layers} together"
        )
    if model.tie_word_embeddings:
        raise ValueError(
            "parallel.pp: the embedding and the head lie on different stages, and model.tie_word_embeddings makes "
            "them one weight; set one of the two otherwise"
        )
    if parallel.zero != 1:
        raise ValueError(
            f"parallel.zero: {parallel.zero} would reduce or gather for each microbatch of a pipeline, which keeps "
            "parameters and gradients whole until the last one; with parallel.pp set it to 1"
        )
