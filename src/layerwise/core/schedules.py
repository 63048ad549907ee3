"""Learning-rate schedules of units: checked when they are made, and advanced."""

from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from layerwise.core.factories import made
from layerwise.core.unit import Unit
from layerwise.errors import InvalidInput

SchedulerFactory = Callable[[Optimizer], Any]


def made_scheduler(maker: SchedulerFactory, optimizer: Optimizer, name: str) -> Any:
    """The schedule made for a unit's optimizer, if it can be advanced.

    Raises:
        InvalidInput: it cannot, or it was not made.
    """
    remedy = (
        "Give one that takes the optimizer, such as lambda optimizer: "
        "torch.optim.lr_scheduler.StepLR(optimizer, 10)."
    )
    scheduler = made(maker, optimizer, f"Cannot train unit {name!r}: scheduler=", remedy)
    if not callable(getattr(scheduler, "step", None)):
        raise InvalidInput(
            f"Cannot use scheduler=: it made {type(scheduler).__name__}, which is not a scheduler. "
            "Return one, such as torch.optim.lr_scheduler.StepLR(optimizer, 10)."
        )
    return scheduler


def advance(units: Sequence[Unit], metric: float | None) -> None:
    """Advance every unit's schedule; see ``Learner.end_epoch``.

    Raises:
        InvalidInput: as said there; none was advanced.
    """
    scheduled = [unit for unit in units if unit.scheduler is not None]
    reads_metric = [isinstance(unit.scheduler, ReduceLROnPlateau) for unit in scheduled]
    if any(reads_metric) and metric is None:
        raise InvalidInput(
            "Cannot end the epoch: ReduceLROnPlateau reads a metric. Give one, such as "
            "learner.end_epoch(validation_loss)."
        )
    if any(reads_metric) and not isinstance(metric, Real | Tensor):
        raise InvalidInput(
            f"Cannot end the epoch: metric is {type(metric).__name__}. Give a number, such as the "
            "validation loss."
        )
    for unit in scheduled:
        if getattr(unit.scheduler, "optimizer", unit.optimizer) is not unit.optimizer:
            raise InvalidInput(
                f"Cannot advance the schedule of unit {unit.index} ({unit.name}): its "
                "optimizer was replaced, and the scheduler sets the old one's rate. Make a new "
                "unit.scheduler from unit.optimizer."
            )
    for unit, reads in zip(scheduled, reads_metric, strict=True):
        unit.scheduler.step(*[metric] * reads)
