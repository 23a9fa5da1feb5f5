"""The training loop: one optimizer step at a time, each a pure function of the state before it.

Reading order: `Trainer.fit` is the loop, `Trainer.train_step` is the step. Neither knows how the model is split over
processes: `neox.parallel.build` returns the parts of this process, and the callable that runs a step through them.
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from neox.checkpoint.step_weights import load_latest
from neox.checkpoint.steps import complete_steps, invalidate_after, is_due, step_folder, step_number
from neox.checkpoint.writer import Saver
from neox.config import Config
from neox.data.datasets import check_named
from neox.data.loader import Loader
from neox.model.decoder import GPTNeoX
from neox.parallel.build import build
from neox.parallel.fsdp import whole_model
from neox.parallel.mesh import ParallelDims, parallel_dims
from neox.system.device import local_device, matmul_flops, peak_memory
from neox.system.files import write_atomic
from neox.system.processes import OtherProcessFailed, Processes, joined_processes
from neox.train.batches import Batches, Prefetch, run_datasets
from neox.train.goodput import Goodput
from neox.train.lr_schedule import lr_factor
from neox.train.memory import check_weights_fit, out_of_memory_explained, remembered_allocations
from neox.train.metrics import Meter, make_row
from neox.train.optim import build_optimizers, clip_gradients, set_lr
from neox.train.run_directory import StopSignals, discard, is_evaluated, opened
from neox.train.sinks import Sinks, build_sinks, check_trackers
from neox.train.state import TrainState, frozen_samples
from neox.train.watchdog import Watchdog

if TYPE_CHECKING:
    from neox.parallel.tp_plan import Plan

Number = float | torch.Tensor


@dataclass(frozen=True)
class Result:
    """Result of a call of `Trainer.fit`."""

    step: int  # optimizer steps done, over all calls
    finished: bool  # false where a signal ended the run early; it is saved and can be resumed
    signal: int = 0  # the signal that ended it, 0 for none
    loss: float | None = None  # of the last step of this call, None where it took none
    seconds: float | None = None  # from SIGTERM until it was saved, None without


class Trainer:
    """Trainer of the model that a config describes, in a run directory that holds all that a resumed run needs.

    `hooks` are called as hook(trainer, step) once before the first step and after each one: samples, evaluations,
    pictures come in that way. `trainer.model` is the live model, `trainer.model_parts` the parts of it that this
    process holds: in a pipeline there is no other, and a hook that communicates must do so on all processes alike.
    `tp_plan` replaces the table of tensor parallelism (`neox.parallel.tp_plan`). Both the constructor and `fit` raise
    ValueError for a config, data or run directory that cannot be used, `fit` also OSError where the disk is full.

    Started by torchrun, all processes of the run make the same calls; rank 0 writes what is written once. A run that
    torchrun begins anew goes on, as with `resume`.
    """

    def __init__(
        self,
        config: Config,
        *,
        resume: bool = False,
        from_step: int | None = None,
        hooks: tuple[Callable[["Trainer", int], None], ...] = (),
        quiet: bool = False,
        tp_plan: "Plan | None" = None,
    ) -> None:
        self.config, self.hooks, self.quiet, self.tp_plan = config, hooks, quiet, tp_plan
        self.run = Path(config.log.out)
        self.resume, self.from_step = resume, from_step
        check_named(config)
        check_trackers(config)
        self.state: TrainState
        self.sinks = Sinks()  # of the call of `fit` that is under way, on rank 0: a hook may write to them
        self.stop_signal = 0
        self.news: dict[str, Any] = {}  # for the row of the next step
        self.dims = ParallelDims(Processes(), torch.device("cpu"), None)  # until `fit` has joined the others

    def fit(self) -> Result:
        """Train up to `train.steps`, saving as configured; Ctrl-C and SIGTERM save and return early."""
        with joined_processes(self.config.train.device, lambda: f", after step {self.step}") as processes:
            self.device = local_device(self.config.train.device)
            self.dims = parallel_dims(self.config.parallel, processes, self.device)
            self.quiet = self.quiet or processes.rank > 0
            with opened(self.run, self.resume, processes, self.from_step) as self.resume:
                self.goodput = Goodput.of(self.run) if self.resume else Goodput()
                with Watchdog(self.config.train, self.run, processes) as self.watchdog:
                    with self.goodput.spending("starting"):
                        self._build()
                    # Only the steps are worth saving: before them, Ctrl-C and SIGTERM act at once.
                    with (
                        StopSignals(self.quiet) as signals,
                        self.saver,
                        self.prefetch,
                        remembered_allocations(self.device),
                    ):
                        return self._loop(signals)

    @property
    def model(self) -> GPTNeoX:
        """The whole model. Raises ValueError in a pipeline, where no process holds it."""
        if self.dims.size("pp") > 1:
            raise ValueError(
                f"parallel.pp={self.config.parallel.pp}: no process holds the whole model; use trainer.model_parts, or "
                "a saved step"
            )
        return self.model_parts[0]

    @property
    def step(self) -> int:
        """Steps done; 0 until `fit` knows."""
        return self.state.step if hasattr(self, "state") else 0

    @property
    def processes(self) -> Processes:
        return self.dims.processes

    def _loop(self, signals: StopSignals) -> Result:
        config, steps = self.config, self.config.train.steps
        loss = seconds = profile = None
        if config.train.profile_step:
            from neox.train.profile import Profile

            profile = Profile(config.train, self.run / "profile", self.device, self.processes.rank, self.quiet)
        self._open_sinks()
        try:
            with self.goodput.spending("evaluating"):
                # SIGTERM leaves out what was due after the last step; hooks see for themselves.
                if self.processes.all_reduce_max(self.step > 0 and not is_evaluated(self.run, self.step)):
                    self._evaluate()
                self._call_hooks()
            if not self.step and is_due(config.checkpoint, 0):
                self.save()
            meter = Meter(self.device)
            while self.step < steps and not self.stop_signal:
                updates, began = self.state.updates, time.perf_counter()
                with (
                    profile.step(self.step + 1) if profile else nullcontext(),
                    out_of_memory_explained(config, self.dims, self.run, self.step + 1),
                ):
                    loss, norm, lr, more = self.train_step()
                self.state.step += 1
                meter.step()
                if self._logged(self.step) or more.keys() & {"skip_reason", "rewound_from"}:
                    row = self._row(float(loss), float(norm), lr, *meter.take()) | more | self.saver.take_timings()
                    self.sinks.write(row)
                else:
                    self.sinks.step(self.step)
                took = time.perf_counter() - began
                self.watchdog.done(self.step, took)
                if self.state.updates > updates:
                    self.goodput.seconds["training"] += took
                saves = self.step == steps or is_due(config.checkpoint, self.step)
                with meter.paused(bool(saves or self.hooks or self._evaluates())):
                    if config.train.guard and self.state.spikes.should_rewind:
                        self._rewind(more["skip_reason"])
                        continue
                    # Asked once a step: a signal that comes after this line ends, and saves, the next step.
                    self._ask(signals)
                    hurry = self.stop_signal == signal.SIGTERM
                    if hurry:
                        self.watchdog.terminate()  # it may have come to another process
                    else:
                        self._look(signals)
                    self.saver.poll()
                    if saves or self.stop_signal:
                        # A resumed run drops what is beyond its checkpoint, and could not make up for less.
                        self.sinks.sync()
                        self.save()
                        self.watchdog.saved(self.saver.slowest)
                    if hurry:
                        self.saver.wait()
                        seconds = self.watchdog.since_sigterm()
                        if self.step == steps:  # no other call would make up for it
                            self._look(signals)
        finally:
            if profile:
                profile.close()
            self.sinks.close()
        with self.goodput.spending("saving"):
            self.saver.wait()
        if not self.quiet:
            print(self.goodput.line(), file=sys.stderr)
        return Result(self.step, self.step >= steps, self.stop_signal, None if loss is None else float(loss), seconds)

    def _ask(self, signals: StopSignals) -> None:
        """Note a signal to stop that any process has had; all of them ask together."""
        self.stop_signal = self.processes.all_reduce_max(max(self.stop_signal, signals.number))

    def _look(self, signals: StopSignals) -> None:
        """Evaluate and call the hooks, between two steps."""
        with self.goodput.spending("evaluating"):
            if self._evaluate():
                self._ask(signals)
            self._call_hooks()

    def _open_sinks(self) -> None:
        if not self.processes.rank:
            self.sinks = build_sinks(self.config, self.run, self.step, self.quiet)

    def train_step(self) -> tuple[Number, Number, float, dict[str, Any]]:
        """Take one optimizer step: (mean loss per token, gradient norm before clipping, learning rate, more figures).

        For a bad step (see `SpikeDetector`), and in fp16 for an overflow, the update is skipped: nothing changes but
        the detector's count and the loss scale.
        """
        config, state = self.config, self.state
        batches, valid = self.prefetch(state.loader, state.step)
        loss_scale = state.scaler.scale if state.scaler else 1.0
        tokens = self.dims.sum_over_data(valid)
        for part in self.model_parts:
            part.train()
        mean = self.forward_backward(batches, loss_scale / max(1, tokens)) / loss_scale
        more, self.news = self.news, {}
        with_norms = config.log.norms and self._logged(self.step + 1)
        if with_norms:
            from neox.train.norms import copies, norms, update_norms

            more |= norms(self.model_parts, loss_scale, self.dims)
        total = clip_gradients(self.model_parts, config.optim.clip, loss_scale, self.dims)
        loss, norm, bad = state.check(mean, total, self.processes, tokens)
        if bad:
            more["skip_reason"] = bad
        overflow = state.scaler is not None and not math.isfinite(norm)
        if state.scaler:
            more["loss_scale"] = loss_scale
            state.scaler.update(overflow, f"{self.run}: step {self.step + 1}: ")
        factor = lr_factor(config.schedule, config.optim.lr, state.updates, config.train.steps)
        set_lr(self.optimizers, factor)
        before = copies(self.model_parts) if with_norms else []
        skipped = overflow or bool(bad)
        for optimizer in self.optimizers:
            if not skipped:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if with_norms:
            more |= update_norms(self.model_parts, before, self.dims)
        state.updates += not skipped
        if state.scaler or state.updates <= self.step:
            more["skipped"] = self.step + 1 - state.updates
        return loss, norm, config.optim.lr * factor, more

    def _rewind(self, because: str) -> None:
        """Rewind to a checkpoint before the bad steps and skip their data. All processes call it together."""
        state = self.state
        self.saver.wait()
        kept = [step_number(folder) for folder in complete_steps(self.run)]
        try:
            left, to, first = self.step, *state.spikes.rewind_target(self.step, kept)
        except ValueError as error:
            if self.processes.rank:
                raise OtherProcessFailed("no checkpoint to rewind to") from None  # rank 0 says so
            raise ValueError(f"{self.run}: {error}") from None
        with self.processes.rank_zero_first():
            if not self.processes.rank:
                invalidate_after(self.run, step_folder(self.run, to), "superseded")
        self.sinks.close()
        folder, stored = load_latest(self.run, self.model_parts, self.optimizers, self.processes)
        if not self.processes.rank:
            invalidate_after(self.run, folder, "damaged")
        state.rewind(folder, stored, first)
        self.news = {"rewound_from": left, "rewind_reason": because, "stepped_over": state.loader.stepped_over}
        if not self.quiet:
            print(
                f"neox: {state.spikes.limit} consecutive updates skipped (last: step {left}); rewinding to step "
                f"{self.step} and skipping the data of steps {first + 1}-{left}",
                file=sys.stderr,
            )
        self._open_sinks()

    def _logged(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step in (1, self.config.train.steps)

    def _evaluates(self) -> bool:
        every = self.config.eval.every
        return every > 0 and (self.step % every == 0 or self.step == self.config.train.steps)

    def _evaluate(self) -> bool:
        """Evaluate if that is due after this step; return whether it was."""
        if due := self._evaluates():
            self.sinks.write({"step": self.step, "valid_loss": self.validate()})
        return due

    def validate(self) -> float:
        """Mean loss per token over the first `eval.batches` global batches of held-out text."""
        if self.valid is None:
            raise ValueError("data.valid is empty: name held-out text")
        for part in self.model_parts:
            part.eval()
        wanted = self.config.eval.batches * self.config.train.global_batch_size
        # One batch of as many windows as there are: a short text is not read twice.
        batches, tokens = self.batches(Loader(self.valid, min(wanted, self.valid.num_windows)), 0)
        total = self.forward_backward(batches, 1.0, backward=False)
        return total.item() / (self.dims.sum_over_data(tokens) or math.nan)

    def whole_model(self) -> GPTNeoX | None:
        """The whole model on rank 0, for a hook to run; None elsewhere. All processes call it together."""
        return whole_model(self.model_parts, self.dims)

    def save(self) -> Path:
        """Write the checkpoint of the current step, or begin to, and remove expired ones."""
        with self.goodput.spending("saving"):
            # A run that may have to rewind keeps its older checkpoints.
            sound = not self.state.spikes.skipped_in_a_row
            return self.saver.save(self.model_parts, self.optimizers, self.config, self.state.save(), prunes=sound)

    def _build(self) -> None:
        """Build model, optimizers and data, at the newest complete checkpoint of the run if it is resumed."""
        processes, done = self.processes, complete_steps(self.run) if self.resume else []
        self.config, samples = frozen_samples(self.config, done)
        config = self.config
        check_weights_fit(config, self.dims)
        with processes.rank_zero_first():
            if not self.resume and not processes.rank:
                discard(config, self.run)
            if not done:  # before the text is tokenized, which may take long: from now on `resume=` continues
                self._write_config()
        with self.watchdog.paused():  # tokenizing may take any time, for those who wait for it too
            datasets = run_datasets(config, self.run, done, samples, processes, self.quiet)
        self.peak_flops = matmul_flops(self.device, config.train.dtype)
        self.state = TrainState(config, datasets.train, datasets.fingerprint, self.goodput, datasets.weights)
        self.state.epochs()  # what is wrong with the notes beside the tokens is said before the first step
        self.valid = datasets.valid
        self.batches = Batches(config, self.dims, self.device, datasets.check)
        self.prefetch = Prefetch(self.batches, config.train.steps, self.device)
        self.model_parts, self.forward_backward = build(config, self.dims, self.tp_plan)
        self.optimizers = build_optimizers(self.model_parts, config.optim)
        self.saver = Saver(self.run, config.checkpoint, processes)
        if not done:
            if config.train.init:
                from neox.checkpoint.initial import load_initial

                load_initial(config.train.init, self.model_parts, processes)
            return
        folder, stored = load_latest(self.run, self.model_parts, self.optimizers, processes)
        self.state.load(folder, stored)
        self.goodput.resume(stored["seconds"])
        if not processes.rank:
            invalidate_after(self.run, folder, "damaged")
        self._write_config()  # with what was changed for this call, now that it is known to fit

    def _write_config(self) -> None:
        if not self.processes.rank:
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
            loader=self.state.loader,
            spent=self.goodput.elapsed,
            memory=peak_memory(self.device),
            peak_flops=self.peak_flops,
            now=time.time(),
            world_size=self.processes.world,
            epochs=self.state.epochs(),
        )

    def _call_hooks(self) -> None:
        # Hooks generate and evaluate, at shapes that blocks were not compiled for.
        with torch.compiler.set_stance("force_eager"):
            for hook in self.hooks:
                hook(self, self.step)
