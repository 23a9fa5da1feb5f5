"""Summary of a config on one page: parameters, FLOPs and memory.

Everything is arithmetic on a config, without torch. Legend: C hidden_size, L layers, F MLP width, V vocab rows,
T tokens of context. GB is 10^9 bytes.
"""

from __future__ import annotations

import textwrap

from neox.config import SECTIONS, Config, ModelConfig, presets
from neox.config.options import spell
from neox.model.flops import forward_flops, parameters, train_flops_per_token
from neox.model.training_memory import STATE, one_device
from neox.quantization.kinds import FORMATS, KINDS, Kind
from neox.system.console import human_bytes, human_count


def kv_bytes_per_token(model: ModelConfig, bytes_per_value: int = 2) -> int:
    """Bytes of one token in the KV cache, all layers: 2 L C values."""
    return 2 * model.num_hidden_layers * model.hidden_size * bytes_per_value


def weight_bytes(model: ModelConfig, kind: Kind) -> int:
    """Bytes of the weights held in `kind`: linear layers with their scales; all else takes 16 bits, in fp32 32."""
    c, f, blocks = model.hidden_size, model.ffn_size, FORMATS[kind]
    head = FORMATS[blocks.head or kind]
    linear = [(blocks, *shape) for shape in ((3 * c, c), (c, c), (f, c), (c, f))] * model.num_hidden_layers
    linear += [] if model.tie_word_embeddings else [(head, model.vocab_size, c)]
    rest = parameters(model).total - sum(outputs * inputs for _, outputs, inputs in linear)
    return sum(form.bytes(*shape) for form, *shape in linear) + rest * max(2, blocks.bits // 8)


def _weights(model: ModelConfig) -> list[tuple[str, int]]:
    """(names of the kinds that take so many bytes, bytes), in the order of their table."""
    names: dict[int, list[str]] = {}
    for kind in KINDS:
        names.setdefault(weight_bytes(model, kind), []).append(kind)
    return [(", ".join(kinds), size) for size, kinds in names.items()]


def show(config: Config) -> str:
    """Write the resolved config and its cost as plain text of at most 100 columns."""
    model, train = config.model, config.train
    p, context, length = parameters(model), model.max_position_embeddings, config.data.seq_length
    tokens_per_step = train.global_batch_size * length
    full, causal = (train_flops_per_token(model, length, causal=kind) for kind in (False, True))
    starts = [0, *(end for _, end in train.batch_warmup)]
    lacking = [
        (train.global_batch_size - size) * (min(end, train.steps) - min(start, train.steps))
        for start, (size, end) in zip(starts, train.batch_warmup, strict=False)
    ]
    run = (train.global_batch_size * train.steps - sum(lacking)) * length
    memory = one_device(config)
    state = sum(memory[kind] for kind in STATE)
    parts = [
        ("embedding", p.embedding),
        ("attention", p.attention),
        ("mlp", p.mlp),
        ("norms", p.norms),
        ("head", p.head),
    ]
    lines = [f"{config.preset or 'config'}: {human_count(p.total)} parameters, context {context}", ""]
    for section in SECTIONS:
        values = "  ".join(f"{key}={spell(value)}" for key, value in getattr(config, section))
        lines += textwrap.wrap(f"[{section}]  {values}", 100, subsequent_indent="    ", break_long_words=False)
    lines += [
        "",
        "Parameters",
        f"  {'total':<34}{p.total:>22,}",
        f"  {'non-embedding':<34}{p.non_embedding:>22,}",
        *(f"    {name:<32}{count:>22,}" for name, count in parts),
        "",
        f"Training, {length} tokens a sequence, {train.global_batch_size} sequences a step, {train.steps:,} steps",
        f"  {'tokens per step':<34}{tokens_per_step:>22,}",
        f"  {'tokens in all':<34}{run:>22,}",
        f"  {'FLOPs per token, full attention':<34}{full:>22.4g}",
        f"  {'FLOPs per token, causal':<34}{causal:>22.4g}",
        f"  {'FLOPs in all, full attention':<34}{full * run:>22.4g}",
        "",
        f"Memory to train, {train.micro_batch_size} sequences at once, {train.dtype}, one device, nothing sharded",
        f"  {'weights, gradients, moments':<34}{human_bytes(state):>22}",
        f"  {'activations, buffers (estimate)':<34}{human_bytes(sum(memory.values()) - state):>22}",
        f"  {'total (estimate)':<34}{human_bytes(sum(memory.values())):>22}",
        "",
        "Memory to run",
        *(f"  {f'weights, {names}':<34}{human_bytes(size):>22}" for names, size in _weights(model)),
        *(
            f"  {f'KV cache per token, {label}':<34}{human_bytes(kv_bytes_per_token(model, size)):>22}"
            f"  full context {human_bytes(kv_bytes_per_token(model, size) * context)}"
            for label, size in (("fp32", 4), ("fp16 or bf16", 2))
        ),
        f"  {'FLOPs per token at full context':<34}{forward_flops(model, 1, past=context - 1):>22.4g}",
    ]
    if model.mup_base_width:
        growth = model.hidden_size / model.mup_base_width
        lines += [
            "",
            f"Width transfer (muP) from a model of width {model.mup_base_width}, see docs/width_transfer.md",
            f"  {'width multiplier':<34}{growth:>22.4g}",
            f"  {'peak rate of scaled matrices':<34}{config.optim.lr / growth:>22.4g}",
        ]
    notes = presets.notes(config.preset) if config.preset else ()
    if notes:
        lines += ["", "Notes"]
        for note in notes:
            lines += textwrap.wrap(note, 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)


def table() -> str:
    """List the presets, one a line, with parameters and shape."""
    lines = [f"{'preset':<14}{'parameters':>17}{'layers':>8}{'hidden':>8}{'heads':>7}{'vocab':>8}{'context':>9}"]
    for name in presets.names():
        model = ModelConfig(**presets.preset(name)["model"])
        lines.append(
            f"{name:<14}{parameters(model).total:>17,}{model.num_hidden_layers:>8}{model.hidden_size:>8}"
            f"{model.num_attention_heads:>7}{model.vocab_size:>8}{model.max_position_embeddings:>9}"
        )
    return "\n".join(lines)
