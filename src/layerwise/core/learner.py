"""Learner: a network and the units that train it in place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from layerwise.core.split import follow_network
from layerwise.core.table import table_of_units
from layerwise.core.unit import StepResult, Unit, step_units
from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated, Targets

# (units, images, targets, steps made before) -> each unit's loss and number of correct examples
MakeStep = Callable[[Sequence[Unit], Tensor, Targets, int], list[Evaluated]]

STATE_VERSION = 1
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Learner:
    """A network and the units that train it in place; made by ``localize``.

    Attributes:
        model: the user's network.
        units: its units, in order.
        num_classes: number of classes.
        leaves: paths of the network's modules that are kept whole.
        image_shape, image_type: shape of an image and its number type, as the sample had them.
        steps: number of steps made.
        make_step: function that makes the step of all units on a batch: ``step_units``, or recorded
            steps.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        num_classes: int,
        sample: Tensor,
        leaves: Iterable[str] = (),
    ) -> None:
        self.model = model
        self.units = list(units)
        self.num_classes = num_classes
        self.leaves = tuple(leaves)
        self.image_shape, self.image_type = sample.shape[1:], sample.dtype
        self.steps = 0
        self.make_step: MakeStep = step_units
        self.training = model.training

    def __repr__(self) -> str:
        """A table of the chain: what each unit holds, its head, its loss, its parameters."""
        return table_of_units(self.units)

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """One simultaneous local update: every unit learns from this batch.

        Args:
            images: (B, ...) with B ≥ 2, on the model's device.
            labels: (B,), integers from 0 to num_classes − 1.

        Returns:
            The loss and the local accuracy of each unit.

        Raises:
            InvalidInput: the batch cannot be used; nothing was updated.
            Diverged: a unit's loss is not finite; it and the units behind it were not updated.
        """
        self.check(images, labels)
        if images.shape[1:] != self.image_shape or images.dtype != self.image_type:
            raise InvalidInput(
                f"Cannot learn from images of shape {tuple(images.shape)} and type "
                f"{images.dtype}: the sample had shape "
                f"(B, {', '.join(map(str, self.image_shape))}) and type {self.image_type}. Give "
                "such images."
            )
        if self.training != self.model.training:
            self.train(self.model.training)
        targets = Targets(labels.long(), self.num_classes)
        results = self.make_step(self.units, images, targets, self.steps)
        self.steps += 1
        return StepResult(results, len(labels))

    @property
    def captured(self) -> Any:
        """Recorded steps of the learner, on a GPU; None: steps are made operation by operation."""
        return None if self.make_step is step_units else self.make_step

    @captured.setter
    def captured(self, recorded: MakeStep | None) -> None:
        self.make_step = recorded or step_units

    def step_singly(self) -> None:
        """Make steps operation by operation, for an order of updates that cannot be recorded."""
        self.captured = None

    def train(self, mode: bool = True, only: Unit | None = None) -> None:
        """Put the network and all heads in training or evaluation mode.

        A network that keeps parts of itself frozen by a ``train`` of its own has the last word.

        Args:
            only: the one unit that trains while all others are in evaluation mode; None: all.
        """
        for unit in self.units:
            unit.train(mode)
        self.model.train(mode)
        for unit in self.units:
            follow_network(unit.piece)
            if only is not None and unit is not only:
                unit.train(False)
        self.training = mode

    def check(self, images: Tensor, labels: Tensor) -> None:
        """Refuse a batch that cannot be learned from.

        Values on a GPU are not read, since that would wait for the device.

        Raises:
            InvalidInput: saying what is wrong with the batch.
        """
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            raise InvalidInput(
                f"Cannot learn from {type(images).__name__} and {type(labels).__name__}: images "
                "and labels must be tensors. Convert arrays and lists with torch.as_tensor."
            )
        if not torch.is_grad_enabled():
            raise InvalidInput(
                "Cannot make a step: gradients are switched off here. Take the step out of "
                "torch.no_grad()."
            )
        kind = images.device.type
        if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != self.units[0].amp:
            raise InvalidInput(
                "Cannot make a step: autocast is on around it, and units compute in the precision "
                f"that localize was given. Make the units with amp={torch.get_autocast_dtype(kind)}"
                ", and take the step out of torch.autocast."
            )
        if len(images) < 2:
            raise InvalidInput(
                f"Cannot learn from a batch of {len(images)}: batch normalisation and similarity "
                "compare examples. Give batches of 2 or more, and drop the last one of an epoch "
                "if it is smaller."
            )
        if labels.dim() != 1 or len(labels) != len(images) or labels.dtype not in INTEGERS:
            raise InvalidInput(
                f"Cannot learn from labels of shape {tuple(labels.shape)} and type "
                f"{labels.dtype}: they do not fit {len(images)} images. Give one integer per image."
            )
        if (
            labels.device.type == "cpu"
            and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes
        ):
            raise InvalidInput(
                f"Cannot learn from labels from {int(labels.min())} to {int(labels.max())}: with "
                f"num_classes={self.num_classes} they go from 0 to {self.num_classes - 1}. Give "
                "such labels, or another num_classes."
            )
        if images.device.type == "cpu" and not bool(torch.isfinite(images).all()):
            raise InvalidInput(
                "Cannot learn from the images: they hold NaN or infinite values. Clean or clip "
                "them before the step."
            )

    def end_epoch(self, metric: float | None = None) -> None:
        """Advance every unit's learning-rate schedule.

        Args:
            metric: number that ``ReduceLROnPlateau`` looks at; other schedules do not read it.

        Raises:
            InvalidInput: a schedule needs the metric, and it is not given; none was advanced.
        """
        schedulers = [unit.scheduler for unit in self.units if unit.scheduler is not None]
        reads_metric = [isinstance(each, ReduceLROnPlateau) for each in schedulers]
        if any(reads_metric) and metric is None:
            raise InvalidInput(
                "Cannot end the epoch: ReduceLROnPlateau reads a metric. Give one, such as "
                "learner.end_epoch(validation_loss)."
            )
        for scheduler, reads in zip(schedulers, reads_metric, strict=True):
            scheduler.step(*[metric] * reads)

    def state_dict(self) -> dict[str, Any]:
        """State to go on from: network, heads, every unit's optimizer and schedule.

        It holds tensors and plain types only.
        """
        return {
            "version": STATE_VERSION,
            "units": [unit.name for unit in self.units],
            "steps": self.steps,
            "model": self.model.state_dict(),
            "losses": [unit.loss.state_dict() for unit in self.units],
            "optimizers": [
                unit.optimizer.state_dict() if unit.optimizer else None for unit in self.units
            ],
            "optimizer_kinds": [type(unit.optimizer).__name__ for unit in self.units],
            "schedulers": [
                unit.scheduler.state_dict() if unit.scheduler else None for unit in self.units
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned.

        Raises:
            InvalidInput: the state belongs to another network, cut, loss or optimizer; nothing was
                loaded.
        """
        names = [unit.name for unit in self.units]
        if state.get("version") != STATE_VERSION or state.get("units") != names:
            raise InvalidInput(
                f"Cannot load the state: it is of {len(state.get('units') or [])} units (version "
                f"{state.get('version')}), this learner has {len(names)} (version "
                f"{STATE_VERSION}). Build the learner with the same model and the same at= as "
                "when the state was saved."
            )
        kinds = [type(unit.optimizer).__name__ for unit in self.units]
        entries = ("model", "losses", "optimizers", "schedulers", "steps")
        missing = [entry for entry in entries if entry not in state]
        pairs = (
            [
                (self.model, state["model"]),
                *zip((u.loss for u in self.units), state["losses"], strict=False),
            ]
            if not missing
            else []
        )
        misfit = next(
            (reason for module, saved in pairs if (reason := difference(module, saved))), None
        )
        if missing or misfit or state.get("optimizer_kinds") != kinds:
            reason = (
                f"it has no {missing[0]}"
                if missing
                else misfit or "its optimizers are of other kinds"
            )
            raise InvalidInput(
                f"Cannot load the state: it does not fit this learner, since {reason}. Build the "
                "learner as when the state was saved."
            )
        for module, saved in pairs:
            module.load_state_dict(saved)
        for unit, optimizer, scheduler in zip(
            self.units, state["optimizers"], state["schedulers"], strict=True
        ):
            if unit.optimizer is not None:
                unit.optimizer.load_state_dict(optimizer)
                unit.match_optimizer()
            if unit.scheduler is not None and scheduler is not None:
                unit.scheduler.load_state_dict(scheduler)
        self.steps = state["steps"]
        if self.captured is not None:
            self.captured.forget()  # they read the optimizers' state where it was before


def difference(module: nn.Module, saved: Mapping[str, Tensor]) -> str | None:
    """The first difference between a module and a saved state, in words; None: it fits."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in sorted(own.keys() ^ saved.keys()):
        return f"{name!r} is only in the {'learner' if name in own else 'state'}"
    for name, shape in own.items():
        if saved[name].shape != shape:
            return (
                f"{name!r} has shape {tuple(saved[name].shape)} in the state and {tuple(shape)} in "
                "the learner"
            )
    return None
