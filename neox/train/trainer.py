"""The training loop: one optimizer step at a time, every step a pure function of the state before it.

Reading order: `Trainer.fit` is the loop, `Trainer.train_step` is the step. Neither knows how the model lies on its
processes: `neox.parallel.build` gives the parts of it that are here, and the callable that runs a step through them.
"""

import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neox.checkpoint import (
    Saver,
    complete_steps,
    invalidate_after,
    is_due,
    load_initial,
    load_latest,
    step_folder,
    step_number,
)
from neox.config import Config
from neox.data import Loader, build_datasets
from neox.data.datasets import check_named
from neox.data.prefetch import Prefetch
from neox.model.decoder import GPTNeoX
from neox.model.flops import recomputed_share
from neox.parallel import Layout, Plan, build, layout, whole_model
from neox.system.device import local_device, matmul_flops, peak_memory
from neox.system.files import write_atomic
from neox.system.processes import OtherProcessFailed, Processes, joined_processes
from neox.train.batches import Batches
from neox.train.blend_history import began_with
from neox.train.goodput import Goodput
from neox.train.lr_schedule import lr_factor
from neox.train.memory import out_of_memory_explained, remembered_allocations
from neox.train.metrics import Meter, make_row
from neox.train.norms import copies, norms, update_norms
from neox.train.optim import build_optimizers, clip_gradients, set_lr
from neox.train.profile import Profile
from neox.train.run_directory import (
    StopSignals,
    begun_by_this_launch,
    discard,
    is_evaluated,
    note_launch,
    only_writer,
    refuse_existing,
)
from neox.train.sinks import Sinks, build_sinks
from neox.train.state import Progress
from neox.train.trackers import check_trackers
from neox.train.watchdog import Watch

Number = float | torch.Tensor


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
    holds: in a pipeline there is no other, and a hook that communicates must do so on all processes alike. `tp_plan`
    replaces the table of tensor parallelism (`neox.parallel.tp_plan`). Both the constructor and `fit` raise ValueError
    for a config, data or run directory that cannot be used, `fit` also OSError where the disk is full.

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
        tp_plan: Plan | None = None,
    ) -> None:
        self.config, self.hooks, self.quiet, self.tp_plan = config, hooks, quiet, tp_plan
        self.run = Path(config.log.out)
        self.resume = resume
        check_named(config)
        check_trackers(config)
        self.progress: Progress
        self.sinks = Sinks()  # of the call of `fit` that is under way, on rank 0: a hook may write to them
        self.stop_signal = 0
        self.news: dict[str, Any] = {}  # for the row of the next step

        self.layout = Layout(Processes(), torch.device("cpu"), None)  # until `fit` has joined the others

    def fit(self) -> Result:
        """Train up to `train.steps`, saving as configured; Ctrl-C and SIGTERM save and return early."""
        with joined_processes(self.config.train.device, lambda: f", after step {self.step}") as processes:
            self.device = local_device(self.config.train.device)
            self.layout = layout(self.config.parallel, processes, self.device)
            self.quiet = self.quiet or processes.rank > 0
            self.run.mkdir(parents=True, exist_ok=True)
            with only_writer(self.run, processes):
                self.resume = bool(processes.all_reduce_max(self.resume or begun_by_this_launch(self.run)))
                # Looked at under the lock: a run that another process has just finished must not be begun again.
                if not self.resume:
                    refuse_existing(self.run)
                if not processes.rank:
                    note_launch(self.run)
                self.goodput = Goodput.of(self.run) if self.resume else Goodput()
                with Watch(self.config.train, self.run, processes) as self.watch:
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
        if self.layout.size("pp") > 1:
            raise ValueError(
                f"parallel.pp={self.config.parallel.pp}: no process holds the whole model; use trainer.parts, or a "
                "saved step"
            )
        return self.parts[0]

    @property
    def step(self) -> int:
        """Steps done; 0 until `fit` knows."""
        return self.progress.step if hasattr(self, "progress") else 0

    @property
    def processes(self) -> Processes:
        return self.layout.processes

    def _loop(self, signals: StopSignals) -> Result:
        config, steps = self.config, self.config.train.steps
        loss = seconds = None
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
                updates, began = self.progress.updates, time.perf_counter()
                with (
                    profile.step(self.step + 1),
                    out_of_memory_explained(config, self.layout, self.run, self.step + 1),
                ):
                    loss, norm, lr, more = self.train_step()
                self.progress.step += 1
                meter.step()
                if self._logged(self.step) or more.keys() & {"left_out", "rewound_from"}:
                    row = self._row(float(loss), float(norm), lr, *meter.take()) | more | self.saver.take_timings()
                    self.sinks.write(row)
                else:
                    self.sinks.step(self.step)
                took = time.perf_counter() - began
                self.watch.done(self.step, took)
                if self.progress.updates > updates:
                    self.goodput.seconds["training"] += took
                saves = self.step == steps or is_due(config.checkpoint, self.step)
                with meter.paused(bool(saves or self.hooks or self._evaluates())):
                    if config.train.guard and self.progress.guard.gives_up:
                        self._rewind(more["left_out"])
                        continue
                    # Asked once a step: a signal that comes after this line ends, and saves, the next step.
                    self._ask(signals)
                    hurry = self.stop_signal == signal.SIGTERM
                    if hurry:
                        self.watch.terminate()  # it may have come to another process
                    else:
                        self._look(signals)
                    self.saver.poll()
                    if saves or self.stop_signal:
                        # A resumed run drops what is beyond its checkpoint, and could not make up for less.
                        self.sinks.sync()
                        self.save()
                        self.watch.saved(self.saver.slowest)
                    if hurry:
                        self.saver.wait()
                        seconds = self.watch.since_sigterm()
                        if self.step == steps:  # no other call would make up for it
                            self._look(signals)
        finally:
            profile.close()
            self.sinks.close()
        with self.goodput.spending("saving"):
            self.saver.wait()
        if not self.quiet:
            print(self.goodput.line(), file=sys.stderr)
        return Result(self.step, self.step >= steps, self.stop_signal, None if loss is None else float(loss), seconds)

    def _ask(self, signals: StopSignals) -> None:
        """Whether any process has had a signal to stop; all of them ask together."""
        self.stop_signal = self.processes.all_reduce_max(max(self.stop_signal, signals.number))

    def _look(self, signals: StopSignals) -> None:
        """What is done between two steps to see how the model does."""
        with self.goodput.spending("evaluating"):
            if self._evaluate():
                self._ask(signals)
            self._call_hooks()

    def _open_sinks(self) -> None:
        if not self.processes.rank:
            self.sinks = build_sinks(self.config, self.run, self.step, self.quiet)

    def train_step(self) -> tuple[Number, Number, float, dict[str, Any]]:
        """One optimizer step: its mean loss per token, the gradient norm before clipping, the learning rate, and what
        else there is to tell.

        Where the guard finds the step bad, and in fp16 on an overflow, the update is left out: nothing changes but the
        guard's count and the loss scale.
        """
        config, progress = self.config, self.progress
        batches, valid = self.prefetch(self.step)
        loss_scale = progress.scaler.scale if progress.scaler else 1.0
        tokens = self.layout.sum_over_data(valid)
        for part in self.parts:
            part.train()
        mean = self.forward_backward(batches, loss_scale / tokens) / loss_scale
        more, self.news = self.news, {}
        with_norms = config.log.norms and self._logged(self.step + 1)
        if with_norms:
            more |= norms(self.parts, loss_scale, self.layout)
        total = clip_gradients(self.parts, config.optim.clip, loss_scale, self.layout)
        loss, norm, bad = self._judged(mean, total) if config.train.guard else (mean, total, None)
        if bad:
            more["left_out"] = bad
        overflow = progress.scaler is not None and not math.isfinite(norm)
        if progress.scaler:
            more["loss_scale"] = loss_scale
            try:
                progress.scaler.update(overflow)
            except ValueError as error:
                raise ValueError(f"{self.run}: step {self.step + 1}: {error}") from None
        factor = lr_factor(config.schedule, config.optim.lr, progress.updates, config.train.steps)
        set_lr(self.optimizers, factor)
        before = copies(self.parts) if with_norms else []
        left_out = overflow or bool(bad)
        for optimizer in self.optimizers:
            if not left_out:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if with_norms:
            more |= update_norms(self.parts, before, self.layout)
        progress.updates += not left_out
        if progress.scaler or progress.updates <= self.step:
            more["skipped"] = self.step + 1 - progress.updates
        return loss, norm, config.optim.lr * factor, more

    def _judged(self, loss: torch.Tensor, norm: torch.Tensor) -> tuple[float, float, str | None]:
        """Loss and gradient norm on the host, and what is wrong with them. The one place where a step waits for the
        device: the update depends on it, and is soon launched."""
        progress = self.progress
        mean, total = torch.stack((loss.float(), norm.float())).tolist()
        bad = progress.guard.judge(mean, total, scaled=progress.scaler is not None)
        # Rounding may differ from one process to the next, and they must all do the same.
        if self.processes.all_reduce_max(bad is not None):
            bad = bad or "another process found the step bad"
        progress.guard.count(mean, total, bad is not None)
        return mean, total, bad

    def _rewind(self, because: str) -> None:
        """Back to a checkpoint from before the bad steps, and past their data. All processes call it together."""
        progress = self.progress
        self.saver.wait()
        kept = [step_number(folder) for folder in complete_steps(self.run)]
        try:
            left, to, first = self.step, *progress.guard.way_back(self.step, kept)
        except ValueError as error:
            if self.processes.rank:
                raise OtherProcessFailed("no way back") from None  # rank 0 says so
            raise ValueError(f"{self.run}: {error}") from None
        loader, rewinds = progress.loader.step_over(first, left), progress.guard.rewinds
        with self.processes.rank_zero_first():
            if not self.processes.rank:
                invalidate_after(self.run, step_folder(self.run, to), "superseded")
        self.sinks.close()
        folder, state = load_latest(self.run, self.parts, self.optimizers, self.processes)
        if not self.processes.rank:
            invalidate_after(self.run, folder, "damaged")
        progress.move(folder, state)
        # All that is kept of the way that led astray.
        progress.loader, progress.guard.rewinds = loader, [*rewinds, (left, self.step)]
        self.news = {"rewound_from": left, "rewound_because": because, "stepped_over": loader.stepped_over}
        if not self.quiet:
            print(
                f"neox: {progress.guard.limit} updates in a row left out up to step {left}: back to step {self.step}, "
                f"and past the data of steps {first + 1} to {left}",
                file=sys.stderr,
            )
        self._open_sinks()

    def _logged(self, step: int) -> bool:
        return step % self.config.log.every == 0 or step in (1, self.config.train.steps)

    def _evaluates(self) -> bool:
        every = self.config.eval.every
        return every > 0 and (self.step % every == 0 or self.step == self.config.train.steps)

    def _evaluate(self) -> bool:
        """Evaluate where the step is one after which that is due; whether it was."""
        if due := self._evaluates():
            self.sinks.write({"step": self.step, "valid_loss": self.validate()})
        return due

    def validate(self) -> float:
        """Mean loss per token over the first `eval.batches` global batches of the held-out text."""
        if self.valid is None:
            raise ValueError("data.valid is empty: name held-out text")
        for part in self.parts:
            part.eval()
        wanted = self.config.eval.batches * self.config.train.global_batch_size
        # One batch of as many windows as there are: a short text is not read twice.
        batches, tokens = self.batches(Loader(self.valid, min(wanted, self.valid.num_windows)), 0)
        total = self.forward_backward(batches, 1.0, backward=False)
        return total.item() / self.layout.sum_over_data(tokens)

    def whole_model(self) -> GPTNeoX | None:
        """The model in one piece on rank 0, None elsewhere: what a hook may run. All processes call it together."""
        return whole_model(self.parts, self.layout)

    def save(self) -> Path:
        """Write the checkpoint of the current step, or begin to, and let expired ones go."""
        with self.goodput.spending("saving"):
            # Of a run that may have to go back nothing older is let go.
            sound = not self.progress.guard.bad_in_a_row
            return self.saver.save(self.parts, self.optimizers, self.config, self.progress.state(), prunes=sound)

    def _build(self) -> None:
        """Model, optimizers and data, at the newest complete checkpoint of the run where it is resumed."""
        config, processes = self.config, self.processes
        done = complete_steps(self.run) if self.resume else []
        samples = config.train.steps * config.train.global_batch_size
        if config.data.order == "megatron" and not config.data.num_samples:
            # The order depends on it: a run that is made longer keeps the one it began with.
            data = config.data.model_copy(update={"num_samples": samples})
            self.config = config = config.model_copy(update={"data": data})
        # Tokenizing may take any time, for those who wait for it too.
        with self.watch.paused(), processes.rank_zero_first():
            if not self.resume and not processes.rank:
                discard(config, self.run)
            if not done:  # before the text is tokenized, which may take long: from now on `resume=` continues
                self._write_config()
            files = _token_files(config, self.run, self.quiet)
        self.peak_flops = matmul_flops(self.device, config.train.dtype)
        with self.watch.paused(), processes.rank_zero_first():  # rank 0 writes a large order down, the others map it
            datasets = build_datasets(
                config.data,
                files.train,
                files.valid,
                config.train.seed,
                samples,
                not self.quiet,
                began_with(done),
                self.run / "order",
            )
        self.progress = Progress(config, datasets.train, datasets.fingerprint, self.goodput, datasets.weights)
        self.progress.epochs()  # what is wrong with the notes beside the tokens is said before the first step
        self.valid = datasets.valid
        self.batches = Batches(config, self.layout, self.device)
        self.prefetch = Prefetch(lambda step: self.batches(self.progress.loader, step), config.train.steps, self.device)
        self.parts, self.forward_backward = build(config, self.layout, self.tp_plan)
        self.optimizers = build_optimizers(self.parts, config.optim)
        self.saver = Saver(self.run, config.checkpoint, processes)
        if not done:
            if config.train.init:
                load_initial(config.train.init, self.parts, processes)
            return
        folder, state = load_latest(self.run, self.parts, self.optimizers, processes)
        self.progress.move(folder, state)
        self.goodput.resume(state["seconds"])
        if not processes.rank:
            invalidate_after(self.run, folder, "damaged")
        self._write_config()  # with what was changed for this call, now that it is known to fit

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
            samples=self.progress.loader.position(self.step),
            spent=self.goodput.elapsed,
            memory=peak_memory(self.device),
            peak_flops=self.peak_flops,
            now=time.time(),
            world_size=self.processes.world,
            recomputed=recomputed_share(model, length, self.config.train.activation_checkpointing),
            epochs=self.progress.epochs(),
        )

    def _call_hooks(self) -> None:
        # Hooks generate and evaluate, at shapes that blocks were not compiled for.
        with torch.compiler.set_stance("force_eager"):
            for hook in self.hooks:
                hook(self, self.step)


def _token_files(config: Config, run: Path, quiet: bool) -> Any:
    """Token files of the run's data; text is tokenized first.

    The one way from training to `corpus`, imported here because a run on prepared tokens needs none of it.
    """
    from neox.corpus.for_training import token_files

    return token_files(config, run, quiet)
