"""Measurements of a training run: losses, accuracies, time, memory, the best epoch."""

import time
from collections.abc import Iterator
from typing import Any

import torch

from layerwise.core.cuda_graphs import WARM_UP
from layerwise.core.learner import Learner
from layerwise.core.unit import refuse_divergence
from layerwise.distributed import decided_by_first, gathered, world
from layerwise.memory.accounting import measured, persistent_bytes
from layerwise.rules.base import Tick
from layerwise.utils.device import device_of, synchronise

CHECK_EVERY = 50  # steps between looks at the losses on a GPU: each look waits for the device
SAVED = (
    "images",
    "seconds",
    "train_seconds",
    "images_trained",
    "peak_bytes",
    "units",
    "best",
    "latest",
)  # with a state


class Meter:
    """Sums over the epoch and over the run.

    Nothing is read from a GPU before an epoch ends or ``CHECK_EVERY`` steps are made.

    Where units live on several ranks, each measures its own, and ``collect`` brings sums together.
    Results of replicas are those of the whole batch on every rank.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner = learner
        self.names = [unit.name for unit in learner.units]
        self.device = device_of(learner.model)
        # losses, correct
        self.sums = torch.zeros(2, len(self.names), dtype=torch.float64, device=self.device)
        self.images = 0  # in this epoch
        self.unchecked: list[Tick] = []
        self.steps_alike = 0  # since the units that learn last changed
        self.first: int | None = None
        # of the whole run; of its steps, without evaluating, saving and measuring
        self.seconds = self.train_seconds = 0.0
        self.images_trained = 0
        # what the units that learn now have alive at once, without what the rule keeps
        self.step_bytes = 0
        self.peak_bytes: int | None = None
        self.units: dict[int, dict[str, Any]] = {}  # latest record of every unit that has learned
        self.best: dict[str, Any] = {}
        self.latest: dict[str, Any] = {}
        self.clock = time.perf_counter()
        self.training_since: float | None = None  # the clock runs while the rule makes steps

    def next_tick(self, ticks: Iterator[Tick]) -> Tick | None:
        """Let the rule make its next step, and take its measure.

        The second step of each unit is the one whose memory counts: in the first, the optimizer has
        no state yet. Where steps are recorded, those up to the recording count.
        """
        if 1 <= self.steps_alike <= (1 if self.learner.captured is None else WARM_UP):
            return self.measured_tick(ticks)
        if self.training_since is None:
            self.training_since = time.perf_counter()
        tick = next(ticks, None)
        if tick is not None:
            self.add(tick)
            self.images_trained += tick.result.size
            if tick.ends_epoch:
                self.stop_clock()
        return tick

    def measured_tick(self, ticks: Iterator[Tick]) -> Tick | None:
        """A step whose memory is measured; its time is not counted, since measuring takes some."""
        self.stop_clock()
        with measured(self.device) as peak:
            tick = next(ticks, None)
        if tick is not None:
            self.step_bytes = max(
                self.step_bytes, persistent_bytes(self.learner) + peak.transient_bytes
            )
            self.add(tick)
        return tick

    def add(self, tick: Tick) -> None:
        if tick.first != self.first:
            self.first, self.steps_alike, self.step_bytes = tick.first, 0, 0
        self.steps_alike += 1
        if self.step_bytes:
            self.peak_bytes = max(self.peak_bytes or 0, self.step_bytes + tick.kept_bytes)
        losses, correct = tick.result.loss_tensor(), tick.result.correct_tensor()
        units = slice(tick.first, tick.first + len(losses))
        self.sums[0, units] += losses * tick.result.size
        self.sums[1, units] += correct
        self.images += tick.result.size
        if self.device.type != "cpu":  # on a CPU the step itself refuses a loss that is not finite
            self.unchecked.append(tick)
            if tick.ends_epoch or len(self.unchecked) >= CHECK_EVERY:
                self.check()

    def stop_clock(self) -> None:
        """Count the time of the steps since the clock started.

        It waits until the device has finished them.
        """
        if self.training_since is not None:
            synchronise(self.device)
            self.train_seconds += time.perf_counter() - self.training_since
            self.training_since = None

    def check(self) -> None:
        """Name the first unit and step of a loss that is not finite."""
        ticks, self.unchecked = self.unchecked, []
        if not ticks:
            return
        for tick, losses in zip(
            ticks, torch.stack([tick.result.loss_tensor() for tick in ticks]).cpu(), strict=True
        ):
            for offset, loss in enumerate(losses):
                step = (
                    (tick.after.epoch - tick.ends_epoch) * tick.batches
                    + (tick.after.batch or tick.batches)
                    - 1
                )
                refuse_divergence(self.learner.units[tick.first + offset], step, loss)

    def running(self) -> tuple[float, float]:
        """Mean loss and accuracy (percent) in this epoch of the last unit that learns.

        It waits for the device.
        """
        index = (
            int(torch.nonzero(self.sums[0])[-1]) if self.images and bool(self.sums[0].any()) else 0
        )
        loss, correct = (self.sums[:, index] / max(1, self.images)).tolist()
        return loss, 100.0 * correct

    def images_per_second(self) -> float:
        """Images per second of training.

        A sequential rule counts an image once for every unit that learns from it.
        """
        running = (
            time.perf_counter() - self.training_since if self.training_since is not None else 0.0
        )
        return self.images_trained / (self.train_seconds + running) if self.images_trained else 0.0

    def collect(self) -> None:
        """Bring the sums of all ranks to the first one; all ranks must call this."""
        if self.learner.stage is not None:
            replica = gathered(self.sums.cpu())[: self.learner.stage.place.length]
            sums = torch.stack(replica).sum(0)
            self.sums.copy_(sums if world().first else torch.zeros_like(sums))

    def end_epoch(self, tick: Tick, scores: dict[str, Any]) -> dict[str, Any]:
        """Close the epoch and return its record.

        Args:
            scores: what evaluation gave: ``units``, a list of ``UnitScore``; ``val_accuracy`` and
                ``test_accuracy`` in percent.

        Raises:
            Diverged: a unit's loss on the validation images is not finite.
        """
        losses, correct = (self.sums / self.images).tolist()
        units = []
        for offset in range(len(tick.result.loss_tensor())):
            index = tick.first + offset
            record = {
                "index": index,
                "name": self.names[index],
                "loss": losses[index],
                "accuracy": 100.0 * correct[index],
            }
            if "units" in scores:
                refuse_divergence(
                    self.learner.units[index],
                    self.learner.steps,
                    torch.tensor(scores["units"][offset].loss),
                )
                record |= {
                    "val_loss": scores["units"][offset].loss,
                    "val_accuracy": scores["units"][offset].accuracy,
                }
            units.append(record)
            self.units[index] = record
        validation, test = scores.get("val_accuracy"), scores.get("test_accuracy")
        best = validation is not None and validation > self.best.get("val_accuracy", -1.0)
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        record = {
            "epoch": tick.after.epoch,
            "epochs": tick.epochs,
            "val_accuracy": validation,
            "test_accuracy": test,
            "best": best,
            "images_per_second": self.images_per_second(),
            "seconds": self.seconds,
            "units": units,
        }
        if best:
            self.best = {key: record[key] for key in ("epoch", "val_accuracy", "test_accuracy")}
        self.latest = {
            "epochs": tick.after.epoch,
            "val_accuracy": validation,
            "test_accuracy": test,
        }
        self.sums.zero_()
        self.images = 0
        return record

    def result(self) -> dict[str, Any]:
        """The run's numbers; accuracies in percent.

        ``best`` is chosen on the validation images, never on the test images.
        """
        return {
            **self.latest,
            "best_epoch": self.best.get("epoch"),
            "best_val_accuracy": self.best.get("val_accuracy"),
            "best_test_accuracy": self.best.get("test_accuracy"),
            "parameters": sum(parameter.numel() for parameter in self.learner.model.parameters()),
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "images_per_second": self.images_per_second(),
            "peak_memory_bytes": self.peak_bytes,
            "units": [self.units[index] for index in sorted(self.units)],
        }

    def state_dict(self) -> dict[str, Any]:
        self.stop_clock()
        now = time.perf_counter()
        self.seconds, self.clock = self.seconds + now - self.clock, now
        return {"sums": self.sums.cpu(), **{name: getattr(self, name) for name in SAVED}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        for name in SAVED:
            setattr(self, name, state[name])

    def share(self, alike: bool = False) -> None:
        """Go on from the first rank's state; all ranks must call this.

        Args:
            alike: whether all ranks measure the same. Otherwise sums and memory, which each
                measures of its own units, stay the first one's alone.
        """
        if world().size > 1:
            self.load_state_dict(decided_by_first(self.state_dict))
            if not world().first and not alike:
                self.sums.zero_()
                self.peak_bytes = None
