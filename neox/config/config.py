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
from neox.config.layout_checks import check_pipeline_stages, check_splits
from neox.config.options import SECTIONS, ConfigError, Section, did_you_mean, parse_override
from neox.config.sections import OptionalStr
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
from neox.config.sections.usage import EvalConfig, GenerateConfig
from neox.config.structured import read_toml


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
        check_splits(self.model, self.parallel, self.data.seq_length)
        check_pipeline_stages(self.model, self.parallel)
        return self

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
