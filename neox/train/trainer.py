"""The training loop: one optimizer step at a time, every step a pure function of the state before it.

Reading order: `Trainer.fit` is the loop, `Trainer.train_step` is the step.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint import complete_steps, load_tensors, read_step, save_step
from neox.config import Config, load_config
from neox.data import Batch, Loader, TokenDataset
from neox.data.loader import IGNORED
from neox.files import write_atomic
from neox.model import GPTNeoX
from neox.runtime import matmul_flops, peak_memory, resolve_device
from neox.train.corpus import check_named, discard, token_files
from neox.train.loss import cross_entropy
from neox.train.metrics import Meter, make_row
from neox.train.optim import build_optimizers, clip_gradients, lr_factor, set_lr
from neox.train.sinks import Sink, build_sinks
from neox.train.trackers import check_trackers


@dataclass(frozen=True)
class Result:
    """How a call of `Trainer.fit` ended."""

    step: int  # optimizer steps done, over all calls
    finished: bool  # false where a signal ended the run early; it is saved and can be resumed
    signal: int = 0  # the signal that ended it, 0 for none
    loss: float | None = None  # of the last step of this call, None where it took none


def run_config(run: Path, overrides: Iterable[str] = ()) -> Config:
    """The config that a resumed run goes on with: its own, overrides on top.

    RUN/config.toml holds what the run was last started or resumed with; a copy without it has its newest checkpoint's.
    Raises ValueError where the directory holds neither.
    """
    files = [run / "config.toml", *(step / "config.toml" for step in reversed(complete_steps(run)))]
    kept = next((file for file in files if file.is_file()), None)
    if kept is None:
        raise ValueError(f"{run}: holds no run (no config.toml): start one with `neox train ... out={run}`")
    config = load_config(files=[kept], overrides=overrides)
    # The run may have been moved: it is where it was found.
    return config.model_copy(update={"log": config.log.model_copy(update={"out": str(run)})})


class Trainer:
    """Trains the model that a config describes, in a run directory that holds all that a resumed run needs.

    `hooks` are called as hook(trainer, step) once before the first step and after each one: samples, evaluations,
    pictures come in that way. `trainer.model` is the live model. Both the constructor and `fit` raise ValueError for a
    config, data or run directory that cannot be used, `fit` also OSError where the disk is full.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        hooks: tuple[Callable[["Trainer", int], None], ...] = (),
        quiet: bool = False,
    ) -> None:
        self.config, self.hooks, self.quiet = config, hooks, quiet
        self.run = Path(config.log.out)
        self.resume = resume
        check_named(config)
        check_trackers(config)
        self.sinks: list[Sink] = []  # of the call of `fit` that is under way: a hook may write to them
        self.device = resolve_device(config.train.device)
        self.step = 0
        self.stop_signal = 0

    def fit(self) -> Result:
        """Train up to `train.steps`, saving as configured; Ctrl-C and SIGTERM save and return early."""
        self.run.mkdir(parents=True, exist_ok=True)
        with _only_writer(self.run):
            # Looked at under the lock: a run that another process has just finished must not be begun again.
            if not self.resume and (complete_steps(self.run) or (self.run / "metrics.jsonl").exists()):
                raise ValueError(
                    f"{self.run}: holds a run: continue it with `neox train resume={self.run}`, or choose another out="
                )
            self._build()
            # Only the steps are worth saving: before them, Ctrl-C and SIGTERM act at once.
            with self._signals():
                return self._loop()

    def _loop(self) -> Result:
        steps, every = self.config.train.steps, self.config.checkpoint.every
        self.sinks = build_sinks(self.config, self.run, self.step, self.quiet)
        loss = None
        try:
            self._call_hooks()
            meter = Meter(self.device)
            stop = 0
            while self.step < steps and not stop:
                loss, norm, lr = self.train_step()
                self.step += 1
                meter.step()
                if self.step % self.config.log.every == 0 or self.step in (1, steps):
                    row = self._row(loss.item(), norm.item(), lr, *meter.take())
                    for sink in self.sinks:
                        sink.write(row)
                else:
                    for sink in self.sinks:
                        sink.step(self.step)
                with meter.paused():
                    if self.config.eval.every and (self.step % self.config.eval.every == 0 or self.step == steps):
                        valid = {"step": self.step, "valid_loss": self.validate()}
                        for sink in self.sinks:
                            sink.write(valid)
                    self._call_hooks()
                    stop = self.stop_signal  # once: a signal that comes after this line ends, and saves, the next step
                    if self.step == steps or stop or (every and self.step % every == 0):
                        for sink in self.sinks:
                            # A resumed run drops what is beyond its checkpoint, and could not make up for less.
                            sink.sync()
                        self.save()
        finally:
            for sink in self.sinks:
                sink.close()
        return Result(self.step, self.step >= steps, self.stop_signal, None if loss is None else loss.item())

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One optimizer step: its mean loss per token, the gradient norm before clipping, the learning rate."""
        config = self.config
        batches = list(self.loader.microbatches(self.step, config.train.micro_batch_size))
        valid_tokens = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
        self.model.train()
        loss = torch.zeros((), device=self.device)
        for batch in batches:
            loss += self._loss(batch, 1 / valid_tokens, backward=True)
        norm = clip_gradients(self.model, config.optim.clip)
        factor = lr_factor(config.schedule, config.optim.lr, self.step, config.train.steps)
        set_lr(self.optimizers, factor)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss, norm, config.optim.lr * factor

    def _loss(self, batch: Batch, scale: float, backward: bool) -> torch.Tensor:
        """Loss of one microbatch times `scale`; with `backward` its gradients are added."""
        vocab = self.config.model.vocab_size
        for token in (int(batch.tokens.max()), int(batch.labels.max()), int(batch.tokens.min())):
            if not 0 <= token < vocab:
                raise ValueError(
                    f"the data holds token {token}, model.vocab_size is {vocab}: raise it, or prepare the data again"
                )
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.dtype == "bf16"):
            hidden = self.model(
                batch.tokens.to(self.device),
                positions=batch.positions.to(self.device),
                segments=None if batch.segments is None else batch.segments.to(self.device),
                head=False,
            )
            labels = batch.labels.to(self.device)
            loss = cross_entropy(hidden, self.model.embed_out, labels, chunk=self.config.train.loss_chunk, scale=scale)
        if backward:
            loss.backward()
        return loss.detach()

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss per token over the first `eval.batches` global batches of the held-out text."""
        if self.valid is None:
            raise ValueError("data.valid is empty: name held-out text")
        self.model.eval()
        total, tokens = 0.0, 0
        wanted = self.config.eval.batches * self.config.train.global_batch_size
        # One batch of as many windows as there are: a short text is not read twice.
        windows = Loader(self.valid, min(wanted, self.valid.num_windows))
        for batch in windows.microbatches(0, self.config.train.micro_batch_size):
            total += self._loss(batch, 1.0, backward=False).item()
            tokens += int((batch.labels != IGNORED).sum())
        return total / tokens

    def save(self) -> Path:
        """Write the checkpoint of the current step."""
        state = {"step": self.step, "samples": self.step * self.config.train.global_batch_size}
        return save_step(self.run, self.model, self.optimizers, self.config, state)

    def _build(self) -> None:
        """Model, optimizers and data, at the newest complete checkpoint of the run where it is resumed."""
        config = self.config
        done = complete_steps(self.run) if self.resume else []
        state = read_step(done[-1])[1] if done else {"step": 0, "samples": 0}
        self.step = state["step"]
        if self.step and state["samples"] != self.step * config.train.global_batch_size:
            raise ValueError(
                f"{self.run}: took {state['samples'] // self.step} sequences a step: a run keeps its "
                "train.global_batch_size"
            )
        if not self.resume:
            discard(config, self.run)
        if not done:  # before the text is tokenized, which may take long: from now on `resume=` continues
            self._write_config()
        self.peak_flops = matmul_flops(self.device, config.train.dtype)
        files = token_files(config, self.run, quiet=self.quiet)
        self.loader = Loader(
            TokenDataset(files.train, config.data.seq_length, config.train.seed, config.data.order),
            config.train.global_batch_size,
        )
        self.valid = (
            TokenDataset(files.valid, config.data.seq_length, config.train.seed, "sequential") if files.valid else None
        )
        with torch.device("meta"):
            self.model = GPTNeoX(config.model)
        self.model.to_empty(device=self.device)
        self.model.tie()
        self.optimizers = build_optimizers(self.model, config.optim)
        if done:
            load_tensors(done[-1], self.model, self.optimizers)
            self._write_config()  # with what was changed for this call, now that it is known to fit
        else:
            self.model.initialize(config.train.seed)

    def _write_config(self) -> None:
        write_atomic(self.run / "config.toml", self.config.to_toml().encode())

    def _row(self, loss: float, norm: float, lr: float, seconds: float, elapsed: float) -> dict[str, Any]:
        return make_row(
            self.config,
            step=self.step,
            loss=loss,
            norm=norm,
            lr=lr,
            seconds=seconds,
            elapsed=elapsed,
            samples=self.step * self.config.train.global_batch_size,
            memory=peak_memory(self.device),
            peak_flops=self.peak_flops,
            now=time.time(),
        )

    def _call_hooks(self) -> None:
        for hook in self.hooks:
            hook(self, self.step)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM asks for a save after the current step; a second Ctrl-C interrupts at once."""

        def ask(number: int, _: Any) -> None:
            self.stop_signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if not self.quiet:  # not through a stream: it may be in the middle of a write
                os.write(2, b"\nneox: stopping after this step; Ctrl-C again stops at once, without saving\n")

        if threading.current_thread() is not threading.main_thread():  # whoever runs us there handles signals
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _only_writer(run: Path) -> Iterator[None]:
    """Refuse a second writer on a run directory; the lock goes with the process, also when it is killed."""
    import fcntl

    handle = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            process = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            raise ValueError(
                f"{run}: process {process} is writing this run: wait for it, stop it, or choose another out="
            ) from None
        with contextlib.suppress(OSError):  # the number is a courtesy: on a full disk the lock holds all the same
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)
