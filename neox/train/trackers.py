"""TensorBoard and Weights & Biases: pictures of a run elsewhere. metrics.jsonl is the record; these may fail."""

import html
import importlib.util
import json
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from neox.config import Config
from neox.files import write_atomic

Row = Mapping[str, Any]
RUNTIME = ("tokens_per_second", "mfu", "mfu_causal", "hfu", "memory", "seconds", "eta")


class Tracker(Protocol):
    """A sink that is not told of steps without a row."""

    def write(self, row: Row) -> None: ...
    def sample(self, row: Row) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """Raises ValueError where a tracker that the config asks for is not installed; imports none."""
    for key, wanted in (("tensorboard", config.log.tensorboard), ("wandb", config.log.wandb is not None)):
        if wanted and importlib.util.find_spec(key) is None:
            raise ValueError(f"log.{key} is set, but {key} is not installed: pip install 'neox[log]', or unset it")


def grouped(row: Row) -> dict[str, float]:
    """The numbers of a row under the names that trackers group them by: train/, runtime/, validation/."""
    named = {}
    for key, value in row.items():
        if key in ("step", "time") or not isinstance(value, int | float):
            continue
        if key.startswith("valid_"):
            named["validation/" + key.removeprefix("valid_")] = value
        else:
            named[key if "/" in key else f"{'runtime' if key in RUNTIME else 'train'}/{key}"] = value
    return named


class Guarded:
    """A tracker as a sink: the first time that it fails, one line says so, and the run goes on without it."""

    def __init__(self, name: str, build: Callable[[], Tracker], say: Callable[[str], None]) -> None:
        self.name, self.say = name, say
        self.tracker: Tracker | None = None
        self._try(lambda: setattr(self, "tracker", build()))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # of whatever kind: it comes from another program's network or disk
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            self.say(f"warning: {self.name} is left out from here on ({reason}); metrics.jsonl has every row")
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
    """RUN/tensorboard. Events that an earlier call wrote beyond this one's checkpoint are purged by their reader."""

    def __init__(self, config: Config, run: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A run that begins once more at step 0 writes that step's sample once more.
        purge = first_step + 1 if first_step else 0
        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=purge)
        self._text("config", config.to_toml(), first_step)

    def write(self, row: Row) -> None:
        for key, value in grouped(row).items():
            self.writer.add_scalar(key, value, row["step"], row.get("time"))

    def sample(self, row: Row) -> None:
        self._text("samples", row["prompt"] + row["text"], row["step"])

    def _text(self, tag: str, text: str, step: int) -> None:
        # Indented by four is Markdown for "as it stands".
        indented = "\n".join("    " + line for line in text.splitlines())
        self.writer.add_text(tag, indented, step)

    def sync(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """One W&B run for a run, however often it is resumed: RUN/wandb.json keeps the id.

    Where and whether it sends is up to W&B's own settings (`wandb login`, WANDB_MODE, WANDB_ENTITY ..).
    """

    def __init__(self, config: Config, run: Path) -> None:
        import wandb

        self.wandb, kept = wandb, run / "wandb.json"
        stored: Any = {}
        with suppress(OSError, ValueError):
            stored = json.loads(kept.read_bytes())
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
        # What W&B has of the steps beyond the checkpoint stays there: computed again they are the same, bit for bit.
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
