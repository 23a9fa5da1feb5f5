"""Every option of neox: typed, validated, frozen.

A value is looked up in four places, the later one wins: the defaults in `neox.config.sections`, a preset, TOML files,
``key=value`` overrides. An error is one line that names the key and the source of its value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import model_validator

from neox.config import presets
from neox.config.options import SECTIONS, ConfigError, Section, parse_override, read_toml
from neox.config.sections.data import DataConfig, TokenizerConfig
from neox.config.sections.model import ModelConfig
from neox.config.sections.training import (
    CheckpointConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainConfig,
)
from neox.config.sections.types import OptionalStr
from neox.config.sections.usage import EvalConfig, GenerateConfig
from neox.config.spelling import did_you_mean


class Config(Section):
    """All sections of a run, checked against each other; see `load_config`."""

    preset: OptionalStr = None
    """Name of the preset that the values started from."""
    model: ModelConfig = ModelConfig()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    generate: GenerateConfig = GenerateConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        longest = self.model.max_position_embeddings
        if self.data.seq_length > longest:
            raise ValueError(
                f"data.seq_length: {self.data.seq_length} is more than model.max_position_embeddings ({longest})"
            )
        if self.checkpoint.keep_every and not self.checkpoint.keep_last:
            raise ValueError(
                "checkpoint.keep_every: keeps some of the checkpoints that keep_last removes; set checkpoint.keep_last"
            )
        if self.schedule.min_lr > self.optim.lr:
            raise ValueError(f"schedule.min_lr: {self.schedule.min_lr} is above optim.lr ({self.optim.lr})")
        horizon = self.schedule.horizon or self.train.steps
        warmup = self.schedule.warmup_updates(horizon)
        if warmup > horizon:
            raise ValueError(
                f"schedule.warmup: {warmup:g} updates are more than the {horizon} of "
                f"{'schedule.horizon' if self.schedule.horizon else 'train.steps'}"
            )
        decay = self.schedule.decay_updates(horizon) if self.schedule.name == "wsd" else 0
        if warmup + decay > horizon:
            raise ValueError(f"schedule.decay: {decay:g} updates after {warmup:g} of warmup are more than {horizon}")
        self._splits()
        self._pipeline()
        return self

    def _pipeline(self) -> None:
        parallel, layers = self.parallel, self.model.num_hidden_layers
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
        if self.model.tie_word_embeddings:
            raise ValueError(
                "parallel.pp: the embedding and the head lie on different stages, and model.tie_word_embeddings makes "
                "them one weight; set one of the two otherwise"
            )
        if parallel.zero != 1:
            raise ValueError(
                f"parallel.zero: {parallel.zero} would reduce or gather for each microbatch of a pipeline, which keeps "
                "parameters and gradients whole until the last one; with parallel.pp set it to 1"
            )

    def _splits(self) -> None:
        """Check that tensor and context parallelism split evenly."""
        model, tp, cp = self.model, self.parallel.tp, self.parallel.cp
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
        if self.data.seq_length % pieces:
            raise ValueError(
                f"parallel.cp: {cp} cuts a sequence into {pieces} slices, which do not divide data.seq_length "
                f"({self.data.seq_length})"
            )
        if not self.parallel.sequence_parallel:
            return
        if tp == 1:
            raise ValueError("parallel.sequence_parallel: splits sequences over the processes of parallel.tp; set tp")
        if self.data.seq_length // cp % tp:
            raise ValueError(
                f"parallel.sequence_parallel: tp={tp} does not divide the {self.data.seq_length // cp} tokens of "
                "data.seq_length" + (" that each process of cp has" if cp > 1 else "")
            )

    @property
    def microbatches(self) -> list[int]:
        """Sequences per microbatch of a data-parallel rank, as `neox.data.Loader` cuts them."""
        size, ranks = self.train.micro_batch_size, self.parallel.dp_replicate * self.parallel.shards
        share = -(-self.train.global_batch_size // ranks)
        return [min(size, share - start) for start in range(0, share, size)]

    def to_toml(self) -> str:
        """All resolved values as TOML; `load_config` reads an equal Config from it."""
        import tomli_w

        def plain(value: Any) -> Any:
            return "none" if value is None else list(value) if isinstance(value, tuple) else value

        tables = {s: {k: plain(v) for k, v in getattr(self, s)} for s in SECTIONS}
        return tomli_w.dumps({"preset": plain(self.preset), **tables})


SECTIONS.update(
    (name, field.annotation)
    for name, field in Config.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
)


def load_config(preset: str | None = None, files: Iterable[str | Path] = (), overrides: Iterable[str] = ()) -> Config:
    """Resolve defaults < preset < TOML files < ``key=value`` overrides, each in order.

    An override's key is ``section.key``, or ``key`` alone where only one section has it; its value is a TOML literal
    or, failing that, a bare string. A file or an override may name the preset (``preset = "pythia-160m"``); an
    override wins over the argument, the argument over a file.

    Raises ConfigError (a ValueError) with one line: the fault, the key, and its file and line.
    """
    values: dict[str, dict[str, Any]] = {s: {} for s in SECTIONS}
    origin: dict[str, str] = {}
    layers: list[tuple[dict[str, Any], dict[str, str]]] = []
    chosen: tuple[str | None, str] = (preset, "")
    for file in files:
        table, lines = read_toml(Path(file))
        named = table.pop("preset", "none")
        if not isinstance(named, str):
            raise ConfigError(f"preset: must be a name, got {named!r} ({lines.get('preset', file)})", "preset")
        if named != "none" and preset is None:
            chosen = (named, lines.get("preset", str(file)))
        layers.append((table, lines))
    for text in overrides:
        section, key, value = parse_override(text)
        if section:
            layers.append(({section: {key: value}}, {f"{section}.{key}": f"from {text}"}))
        else:
            chosen = (None if value == "none" else str(value), f"from {text}")

    name, where = chosen
    if name is not None:
        try:
            layers.insert(0, (presets.preset(name), {}))
        except ValueError as error:
            raise ConfigError(f"{error} ({where})" if where else str(error), "preset") from None
    for table, lines in layers:
        for section, keys in table.items():
            _check_section(section, keys, lines)
            for key, value in keys.items():
                values[section][key] = value
                origin[f"{section}.{key}"] = lines.get(f"{section}.{key}", lines.get(section, f"preset {name}"))
    try:
        sections: dict[str, Any] = {s: cls(**values[s]) for s, cls in SECTIONS.items()}
        return Config(preset=name, **sections)
    except ConfigError as error:
        source = origin.get(error.key.partition("[")[0])
        raise ConfigError(f"{error} ({source})" if source else str(error), error.key) from None


def _check_section(section: str, keys: Any, lines: Mapping[str, str]) -> None:
    where = f" ({lines[section]})" if section in lines else ""
    if section not in SECTIONS:
        options = [*SECTIONS, *(f"{s}.{section}" for s, cls in SECTIONS.items() if section in cls.model_fields)]
        raise ConfigError(f"{section}: no such section; {did_you_mean(section, options)}{where}", section)
    if not isinstance(keys, dict):
        raise ConfigError(f"{section}: is a section, write [{section}] and its keys below it{where}", section)
