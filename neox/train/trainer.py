"""The training loop: one optimizer step at a time, every step a pure function of the state before it.

Reading order: `Trainer.fit` is the loop, `Trainer.train_step` is the step. Neither knows how the model lies on its
processes: `neox.parallel.build` gives the parts of it that are here, and the callable that runs a step through them.
"""

import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint import Saver, complete_steps, fill_state, is_due, load_initial, load_newest, set_aside_after
from neox.config import Config
from neox.counts import recomputed_share
from neox.data import Batch, Loader, build_datasets
from neox.data.loader import IGNORED
from neox.files import write_atomic
from neox.model import GPTNeoX
from neox.parallel import Layout, build, layout, whole_model
from neox.runtime import Processes, joined_processes, local_device, matmul_flops, peak_memory
from neox.train.corpus import check_named, discard, token_files
from neox.train.loss import cross_entropy
from neox.train.metrics import Meter, make_row
from neox.train.optim import build_optimizers, clip_gradients, set_lr
from neox.train.run import StopSignals, begun_by_this_launch, is_evaluated, note_launch, only_writer
from neox.train.scaler import build_scaler
from neox.train.schedule import lr_factor
from neox.train.sinks import Sink, build_sinks
from neox.train.statistics import norms
from neox.train.trackers import check_trackers
from neox.train.watch import Watch


@dataclass(frozen=True)
class Result:
    """How a call of `Trainer.fit` ended."""

    step: int  # optimizer steps done, over all calls
    finished: bool  # false where a signal ended the run early; it is saved and can be resumed
    signal: int = 0  # the signal that ended it, 0 for none
    loss: float | None = None  # of the last step of this call, None where it took none
    seconds: float | None = None  # from SIGTERM until it was saved, None without


class Trainer:
    """Trains the model that a config describes, in a run directory that holds all that a resumed run needs.

    `hooks` are called as hook(trainer, step) once before the first step and after each one: samples, evaluations,
    pictures come in that way. `trainer.model` is the live model, `trainer.parts` those parts of it that this process
    holds: in a pipeline there is no other, and a hook that communicates must do so on all processes alike. Both the
    constructor and `fit` raise ValueError for a config, data or run directory that cannot be used, `fit` also OSError
    where the disk is full.

    Started by torchrun, all processes of the run make the same calls; rank 0 writes what is written once. A run that
    torchrun begins anew goes on, as with `resume`.
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
        self.sinks: list[Sink] = []  # of the call of `fit` that is under way, on rank 0: a hook may write to them
        self.step = 0
        self.stop_signal = 0

        self.layout = Layout(Processes(), torch.device("cpu"), None)  # until `fit` has joined the others

    def fit(self) -> Result:
        """Train up to `train.steps`, saving as configured; Ctrl-C and SIGTERM save and return early."""
        with joined_processes(self.config.train.device, lambda: f", after step {self.step}") as processes:
            self.device = local_device(self.config.train.device)
            self.layout = layout(self.config.parallel, processes, self.device)
            self.quiet = self.quiet or processes.rank > 0
            self.run.mkdir(parents=True, exist_ok=True)
            with only_writer(self.run, processes):
                self.resume = bool(processes.largest(self.resume or begun_by_this_launch(self.run)))
                # Looked at under the lock: a run that another process has just finished must not be begun again.
                if not self.resume and (complete_steps(self.run) or (self.run / "metrics.jsonl").exists()):
                    raise ValueError(
                        f"{self.run}: holds a run: continue it with `neox train resume={self.run}`, "
                        "or choose another out="
                    )
                if not processes.rank:
                    note_launch(self.run)
                with Watch(self.config.train, self.run, processes) as self.watch:
                    self._build()
                    # Only the steps are worth saving: before them, Ctrl-C and SIGTERM act at once.
                    with StopSignals(self.quiet) as signals, self.saver:
                        return self._loop(signals)

    @property
    def model(self) -> GPTNeoX:
        """The whole model. Raises ValueError in a pipeline, where no process holds it."""
        if self.layout.size("pp") > 1:
            raise ValueError(
                f"parallel.pp={self.config.parallel.pp}: no process holds the whole model; use trainer.parts, or a "
                "saved step"
            )
        return self.parts[0]

    @property
    def processes(self) -> Processes:
        return self.layout.processes

    def _loop(self, signals: StopSignals) -> Result:
        config, steps = self.config, self.config.train.steps
        if not self.processes.rank:
            self.sinks = build_sinks(config, self.run, self.step, self.quiet)
        loss = seconds = None
        try:
            # SIGTERM leaves out what was due after the last step; hooks see for themselves.
            if self.processes.largest(self.step > 0 and not is_evaluated(self.run, self.step)):
                self._evaluate()
            self._call_hooks()
            if not self.step and is_due(config.checkpoint, 0):
                self.save()
            meter = Meter(self.device)
            while self.step < steps and not self.stop_signal:
                began = time.monotonic()
                loss, norm, lr, more = self.train_step()
                self.step += 1
                meter.step()
                if self._logged(self.step):
                    row = self._row(loss.item(), norm.item(), lr, *meter.take()) | more | self.saver.take_timings()
                    for sink in self.sinks:
                        sink.write(row)
                else:
                    for sink in self.sinks:
                        sink.step(self.step)
                with meter.paused():
                    self.watch.done(self.step, time.monotonic() - began)
                    # Asked once a step: a signal that comes after this line ends, and saves, the next step.
                    self.stop_signal = self.processes.largest(max(self.stop_signal, signals.number))
                    hurry = self.stop_signal == signal.SIGTERM
                    if not hurry:
                        if self._evaluate():
                            self.stop_signal = self.processes.largest(max(self.stop_signal, signals.number))
                        self._call_hooks()
                    self.saver.poll()
                    if self.step == steps or self.stop_signal or is_due(config.checkpoint, self.step):
                        for sink in self.sinks:
                            # A resumed run drops what is beyond its checkpoint, and could not make up for less.
                            sink.sync()
                        self.save()
                        self.watch.saved(self.saver.slowest)
                    if hurry:
                        self.saver.wait()
                        seconds = self.watch.since_sigterm()
                    if hurry and self.step == steps:  # no other call would make up for it
                        self._evaluate()
                        self._call_hooks()
        finally:
            for sink in self.sinks:
                sink.close()
        return Result(self.step, self.step >= steps, self.stop_signal, None if loss is None else loss.item(), seconds)

    def train_step(self) -> tuple[torch.Tensor, torch.Tensor, float, dict[str, Any]]:
        """One optimizer step: its mean loss per token, the gradient norm before clipping, the learning rate, and what
        else the config makes it tell. In fp16 an overflow skips the update and nothing changes but the loss scale.
        """
        config = self.config
        batches = self._microbatches(self.loader, self.step)
        loss_scale = self.scaler.scale if self.scaler else 1.0
        tokens = self.layout.sum_over_data(_valid_tokens(batches))
        for part in self.parts:
            part.train()
        loss = self.forward_backward(batches, loss_scale / tokens) / loss_scale
        more: dict[str, Any] = {}
        if config.log.norms and self._logged(self.step + 1):
            more |= norms(self.parts, loss_scale, self.layout)
        norm = clip_gradients(self.parts, config.optim.clip, loss_scale, self.layout)
        overflow = self.scaler is not None and not norm.isfinite()
        if self.scaler:
            more |= {"loss_scale": loss_scale, "skipped": self.step + overflow - self.updates}
            try:
                self.scaler.update(overflow)
            except ValueError as error:
                raise ValueError(f"{self.run}: step {self.step + 1}: {error}") from None
        factor = lr_factor(config.schedule, config.optim.lr, self.updates, config.train.steps)
        set_lr(self.optimizers, factor)
        for optimizer in self.optimizers:
            if not overflow:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.updates += not overflow
        return loss, norm, config.optim.lr * factor, more

    def _logged(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step in (1, self.config.train.steps)

    def _microbatches(self, loader: Loader, step: int) -> list[Batch]:
        """This rank's microbatches of a step. Raises ValueError where they hold what is no token of the model."""
        size, vocab = self.config.train.micro_batch_size, self.config.model.vocab_size
        batches = list(loader.microbatches(step, size, self.layout.dp_rank, self.layout.dp_size))
        for batch in batches:
            for token in (int(batch.tokens.max()), int(batch.labels.max()), int(batch.tokens.min())):
                if not 0 <= token < vocab and token != IGNORED:
                    raise ValueError(
                        f"the data holds token {token}, model.vocab_size is {vocab}: raise it, or prepare the data "
                        "again"
                    )
        return batches

    def _evaluate(self) -> bool:
        """Evaluate where the step is one after which that is due; whether it was."""
        every = self.config.eval.every
        due = every > 0 and (self.step % every == 0 or self.step == self.config.train.steps)
        if due:
            valid = {"step": self.step, "valid_loss": self.validate()}
            for sink in self.sinks:
                sink.write(valid)
        return due

    def validate(self) -> float:
        """Mean loss per token over the first `eval.batches` global batches of the held-out text."""
        if self.valid is None:
            raise ValueError("data.valid is empty: name held-out text")
        for part in self.parts:
            part.eval()
        wanted = self.config.eval.batches * self.config.train.global_batch_size
        # One batch of as many windows as there are: a short text is not read twice.
        batches = self._microbatches(Loader(self.valid, min(wanted, self.valid.num_windows)), 0)
        total = self.forward_backward(batches, 1.0, backward=False)
        return total.item() / self.layout.sum_over_data(_valid_tokens(batches))

    def whole_model(self) -> GPTNeoX | None:
        """The model in one piece on rank 0, None elsewhere: what a hook may run. All processes call it together."""
        return whole_model(self.parts, self.layout)

    def save(self) -> Path:
        """Write the checkpoint of the current step, or begin to, and let expired ones go."""
        state = {
            "step": self.step,
            "samples": self.step * self.config.train.global_batch_size,
            "updates": self.updates,
            "loss_scaler": self.scaler.state() if self.scaler else {},
            "order": self.order,
        }
        return self.saver.save(self.parts, self.optimizers, self.config, state)

    def _build(self) -> None:
        """Model, optimizers and data, at the newest complete checkpoint of the run where it is resumed."""
        config, processes = self.config, self.processes
        done = complete_steps(self.run) if self.resume else []
        samples = config.train.steps * config.train.global_batch_size
        if config.data.order == "megatron" and not config.data.num_samples:
            # The order depends on it: a run that is made longer keeps the one it began with.
            data = config.data.model_copy(update={"num_samples": samples})
            self.config = config = config.model_copy(update={"data": data})
        with processes.first_alone():
            if not self.resume and not processes.rank:
                discard(config, self.run)
            if not done:  # before the text is tokenized, which may take long: from now on `resume=` continues
                self._write_config()
            with self.watch.paused():
                files = token_files(config, self.run, quiet=self.quiet)
        self.peak_flops = matmul_flops(self.device, config.train.dtype)
        datasets = build_datasets(config.data, files.train, files.valid, config.train.seed, samples, not self.quiet)
        self.order = datasets.fingerprint
        self.loader, self.valid = Loader(datasets.train, config.train.global_batch_size), datasets.valid
        self.parts, self.forward_backward = build(config, self.layout, self._head_loss)
        self.optimizers = build_optimizers(self.parts, config.optim)
        fill_state(self.optimizers)
        self.saver = Saver(self.run, config.checkpoint, processes)
        if not done:
            self.updates, self.scaler = 0, build_scaler(config, {})
            if config.checkpoint.init:
                load_initial(config.checkpoint.init, self.parts, processes)
            return
        folder, state = load_newest(self.run, self.parts, self.optimizers, processes)
        self._go_on_from(folder, state)
        if not processes.rank:
            set_aside_after(self.run, folder)
        self._write_config()  # with what was changed for this call, now that it is known to fit

    def _go_on_from(self, folder: Path, state: dict[str, Any]) -> None:
        """Take over what state.json says. Raises ValueError where the run would not go on as it began."""
        self.step = state["step"]
        try:
            self.updates = int(state["updates"])
            self.scaler = build_scaler(self.config, state["loss_scaler"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'state.json'}: its updates or loss_scaler cannot be read ({error}): remove the folder, "
                "and the run resumes at the step before it"
            ) from None
        if self.step and state["samples"] != self.step * self.config.train.global_batch_size:
            raise ValueError(
                f"{self.run}: took {state['samples'] // self.step} sequences a step: a run keeps its "
                "train.global_batch_size"
            )
        if state["order"] not in ("", self.order):
            raise ValueError(
                f"{self.run}: its data would be read in another order than before step {self.step}: a run keeps "
                "train.seed, its text, and data.order, seq_length, weights, split and num_samples"
            )

    def _head_loss(self, head: torch.nn.Linear, hidden: torch.Tensor, labels: torch.Tensor, scale: float) -> Any:
        return cross_entropy(hidden, head, labels, chunk=self.config.train.loss_chunk, scale=scale)

    def _write_config(self) -> None:
        if not self.processes.rank:
            write_atomic(self.run / "config.toml", self.config.to_toml().encode())

    def _row(self, loss: float, norm: float, lr: float, seconds: float, elapsed: float) -> dict[str, Any]:
        model, length = self.config.model, self.config.data.seq_length
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
            world_size=self.processes.world,
            recomputed=recomputed_share(model, length, self.config.train.activation_checkpointing),
        )

    def _call_hooks(self) -> None:
        for hook in self.hooks:
            hook(self, self.step)


def _valid_tokens(batches: list[Batch]) -> int:
    return sum(int((batch.labels != IGNORED).sum()) for batch in batches)
