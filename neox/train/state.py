"""Where a run stands, besides weights and optimizer state: what a checkpoint's state.json holds."""

from pathlib import Path
from typing import Any

from neox.config import Config
from neox.data import Loader
from neox.data.blend import BlendedDataset
from neox.data.windows import Dataset
from neox.train.blend_history import Account, blended
from neox.train.goodput import Goodput
from neox.train.scaler import build_scaler
from neox.train.spikes import Guard


class Progress:
    """The numbers that a resumed run goes on with, and the objects that hold them."""

    def __init__(
        self, config: Config, dataset: Dataset, order: str, goodput: Goodput, weights: tuple[float, ...] = ()
    ) -> None:
        """At the beginning of a run; `order` is the fingerprint of the order of `dataset`, and `weights` are those that
        it is to be blended by from where the run stands, none where the config names none."""
        self.config, self.order, self.goodput, self.weights = config, order, goodput, weights
        self.step = 0  # steps done
        self.updates = 0  # of them applied
        self.scaler = build_scaler(config, {})
        self.guard = Guard(config.train)
        self.loader = Loader(dataset, config.train.global_batch_size)
        self.account = Account()

    def epochs(self) -> dict[str, float]:
        """How often each entry of data.train has been read, by its name."""
        return self.account.epochs(self.step, self.loader)

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "samples": self.loader.position(self.step),
            "stepped_over": self.loader.stepped_over,
            "updates": self.updates,
            "loss_scaler": self.scaler.state() if self.scaler else {},
            "guard": self.guard.state(),
            "seconds": self.goodput.state(),
            "order": self.order,
            "read": self.account.up_to(self.step, self.loader),
            "blend": data.history.phases if isinstance(data := self.loader.dataset, BlendedDataset) else [],
        }

    def move(self, folder: Path, state: dict[str, Any]) -> None:
        """Go to where the checkpoint `folder` stands, whose state.json holds `state`.

        Raises ValueError where it cannot be read, and where the run would not go on as it began.
        """
        run, batch = folder.parent, self.config.train.global_batch_size
        step, samples = state["step"], state["samples"]
        try:
            updates = int(state["updates"])
            scaler = build_scaler(self.config, state["loss_scaler"])
            guard = Guard(self.config.train, state["guard"])
            over = [(int(first), int(last)) for first, last in state["stepped_over"]]
            seconds = dict(state["seconds"])
            dataset = blended(self.loader.dataset, state["blend"], self.weights, samples)
            account = Account(step, state["read"], self.account.names)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / 'state.json'}: cannot be read ({error}): remove the folder, and the run resumes at the "
                "step before it"
            ) from None
        loader = Loader(dataset, batch, over)
        if loader.position(step) != samples:
            read = samples - sum(min(last, samples) - min(first, samples) for first, last in over)
            raise ValueError(f"{run}: took {read // step} sequences a step: a run keeps its train.global_batch_size")
        if state["order"] not in ("", self.order):
            raise ValueError(
                f"{run}: its data would be read in another order than before step {step}: a run keeps "
                "train.seed, its text, and data.order, seq_length, split and num_samples, and whether it has weights"
            )
        self.step, self.updates = step, updates
        self.scaler, self.guard, self.loader, self.account = scaler, guard, loader, account
        self.goodput.move(seconds)
