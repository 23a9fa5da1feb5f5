"""TensorBoard and Weights & Biases. metrics.jsonl is the record; these may fail."""

import html
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from neox.config import Config
from neox.config.structured import read_json
from neox.system.console import one_line
from neox.system.files import write_atomic

Row = Mapping[str, Any]
RUNTIME = ("tokens_per_second", "mfu", "mfu_causal", "hfu", "memory", "seconds", "eta", "spent")


class Tracker(Protocol):
    """A sink that takes rows only, no steps without one."""

    def write(self, row: Row) -> None: ...
    def sample(self, row: Row) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


def grouped(row: Row) -> dict[str, float]:
    """Numbers of a row under the names that trackers group them by: train/, runtime/, validation/."""
    named = {}
    for key, value in row.items():
        if key in ("step", "time") or not isinstance(value, int | float):
            continue
        if key.startswith("valid_"):
            named["validation/" + key.removeprefix("valid_")] = value
        else:
            named[key if "/" in key else f"{'runtime' if key in RUNTIME else 'train'}/{key}"] = value
    return named


def build_trackers(config: Config, run: Path, first_step: int, say: Callable[[str], None]) -> "list[Guarded]":
    """The trackers that a config names, as sinks of a run that goes on after `first_step`."""
    trackers = []
    if config.log.tensorboard:
        trackers.append(Guarded("TensorBoard", lambda: TensorBoard(config, run, first_step), say))
    if config.log.wandb is not None:
        trackers.append(Guarded("Weights & Biases", lambda: WeightsAndBiases(config, run), say))
    return trackers


class Guarded:
    """A tracker as a sink; at its first failure one line says so, and the run continues without it."""

    def __init__(self, name: str, build: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.tracker: Tracker | None = None
        self._try(lambda: setattr(self, "tracker", build()))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of whatever kind: it comes from another program's network or disk
            self.say(f"warning: {self.name} is disabled from here on ({one_line(error)}); metrics.jsonl has every row")
            failed, self.tracker = self.tracker, None
            if failed:
                with suppress(Exception):
                    failed.close()

    def step(self, step: int) -> None:
        pass

    def write(self, row: Row) -> None:
        if tracker := self.tracker:
            self._try(lambda: tracker.write(row))

    def sample(self, row: Row) -> None:
        if tracker := self.tracker:
            self._try(lambda: tracker.sample(row))

    def sync(self) -> None:
        if tracker := self.tracker:
            self._try(tracker.sync)

    def close(self) -> None:
        if tracker := self.tracker:
            self._try(tracker.close)


class TensorBoard:
    """An event file in RUN/tensorboard. Events of earlier calls beyond this one's checkpoint are hidden by the reader.

    Not through SummaryWriter: its thread tells of a full disk late, and by a traceback.
    """

    def __init__(self, config: Config, run: Path, first_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.event, self.summary = Event, summary
        folder = run / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}"
        self.file = open(folder / name, "wb", buffering=0)  # noqa: SIM115
        self.records = RecordWriter(self.file)
        self._add(0, file_version="brain.Event:2")
        # A run that begins once more at step 0 writes that step's sample once more.
        self._add(first_step + 1 if first_step else 0, session_log=SessionLog(status=SessionLog.START))
        self._add(first_step, summary=summary.text("config", _as_it_stands(config.to_toml())))

    def _add(self, step: int, wall_time: float | None = None, **what: Any) -> None:
        event = self.event(step=step, wall_time=wall_time or time.time(), **what)
        self.records.write(event.SerializeToString())

    def write(self, row: Row) -> None:
        for key, value in grouped(row).items():
            self._add(row["step"], row.get("time"), summary=self.summary.scalar(key, value))

    def sample(self, row: Row) -> None:
        self._add(row["step"], summary=self.summary.text("samples", _as_it_stands(row["prompt"] + row["text"])))

    def sync(self) -> None:
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def _as_it_stands(text: str) -> str:
    """Indent a text by four, which TensorBoard's Markdown leaves alone."""
    return "\n".join("    " + line for line in text.splitlines())


class WeightsAndBiases:
    """One W&B run for a run, however often it is resumed: RUN/wandb.json keeps the id.

    Where and whether it sends is up to W&B's own settings (`wandb login`, WANDB_MODE, WANDB_ENTITY ..).
    """

    def __init__(self, config: Config, run: Path) -> None:
        import wandb

        self.wandb, kept = wandb, run / "wandb.json"
        stored: Any = {}
        with suppress(OSError, ValueError):
            stored = read_json(kept)
        project = config.log.wandb
        if not isinstance(stored, dict) or stored.get("project") != project or "id" not in stored:
            stored = {"project": project, "id": secrets.token_hex(4)}
            write_atomic(kept, json.dumps(stored).encode() + b"\n")
        self.run = wandb.init(
            project=project,
            id=stored["id"],
            resume="allow",
            name=run.resolve().name,
            dir=str(run),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),  # it would record every frame of the progress bar
        )
        # What W&B has of the steps beyond the checkpoint stays there: computed again they are the same, bit for bit,
        # but for those that a rewind gives up (docs/surviving.md).
        self.first = self.run.starting_step

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self.first:
            self.run.log(values, step=step)

    def write(self, row: Row) -> None:
        self._log(row["step"], grouped(row))

    def sample(self, row: Row) -> None:
        text = f"<pre><b>{html.escape(row['prompt'])}</b>{html.escape(row['text'])}</pre>"
        self._log(row["step"], {"samples": self.wandb.Html(text, inject=False)})

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self.run.finish()
