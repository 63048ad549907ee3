"""Rules of training, and what they share: positions, ticks, learning rates."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from layerwise.core.result import StepResult
from layerwise.core.unit import Unit
from layerwise.utils.options import keyword_only


@dataclass(frozen=True)
class Position:
    """A place in training: finished epochs, and finished batches of the present epoch."""

    epoch: int = 0
    batch: int = 0


START = Position()


@dataclass(frozen=True)
class Tick:
    """Report of a rule that one batch has been learned from.

    Attributes:
        after: position to go on from.
        first: index of the unit that the first entry of ``result`` belongs to.
        result: losses and accuracies of the units that learned.
        ends_epoch: whether this was the epoch's last batch.
        batches: number of batches in an epoch.
        epochs: number of epochs that the rule makes in all.
        resumable: whether training can go on from a state saved now: all units have learned from
            the same batches.
        kept_bytes: memory that the rule itself keeps between batches.
    """

    after: Position
    first: int
    result: StepResult
    ends_epoch: bool
    batches: int
    epochs: int
    resumable: bool = True
    kept_bytes: int = 0

    @property
    def ends_training(self) -> bool:
        return self.after.epoch == self.epochs


# share of training that is done, 0 to 1 -> factor of the learning rate
Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Rule:
    """An order of updates, with the cut of the network if the rule decides it.

    Attributes:
        order: generator ``(learner, batches, epochs, schedule, start, **options) -> ticks``.
        at: number of units, if it is fixed: global backpropagation is the chain with one unit.
        on_ranks: whether units can live on several ranks.
        replicated: whether several ranks can share every batch.
        trial: options with which single steps are predicted and measured, for an order that changes
            over training: its first steps, which take the most memory.
    """

    order: Callable[..., Iterator[Tick]]
    at: int | None = None
    on_ranks: bool = False
    replicated: bool = False
    trial: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes_limit(self) -> bool:
        """Whether the order keeps to a limit of memory, which it is then given as ``limit``."""
        return "limit" in keyword_only(self.order)


def neighbours(units: Sequence[Unit], count: int) -> list[Sequence[Unit]]:
    """So many groups of neighbouring units, their numbers of units equal to one."""
    bounds = [len(units) * number // count for number in range(count + 1)]
    return [units[low:high] for low, high in pairwise(bounds)]


def set_rates(units: Sequence[Unit], factor: float) -> None:
    """Set learning rates to a multiple of those that the optimizers were made with."""
    for unit in units:
        for group in unit.optimizer.param_groups if unit.optimizer else ():
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def tick_after(
    epoch: int, number: int, count: int, first: int, result: StepResult, epochs: int
) -> Tick:
    """The tick after batch ``number`` of ``count`` in an epoch."""
    ends = number == count
    return Tick(
        Position(epoch + 1, 0) if ends else Position(epoch, number),
        first,
        result,
        ends,
        count,
        epochs,
    )
