"""What all training rules share: positions, ticks, rates."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from layerwise.core.unit import StepResult, Unit


@dataclass(frozen=True)
class Position:
    """A place in training: epochs finished, and batches finished in the present one."""

    epoch: int = 0
    batch: int = 0


START = Position()


@dataclass(frozen=True)
class Tick:
    """One batch has been learned from.

    Attributes:
        after: the position to go on from.
        first: the unit that the first of ``result``'s entries belongs to.
        ends_epoch: whether this was the epoch's last batch.
        batches: batches in an epoch.
        epochs: how many epochs the rule will have made in the end.
        resumable: whether all units have learned from the same batches, so that the state can be
            saved and gone on from.
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


# share of the training done, 0 to 1 -> factor of the learning rate
Schedule = Callable[[float], float]


@dataclass(frozen=True)
class Rule:
    """An order of updates, and where the network is cut for it if the rule decides that.

    Attributes:
        order: the generator ``(learner, batches, epochs, schedule, start, **options) -> ticks``.
        at: a fixed cut: global backpropagation is the chain with one unit.
        one_thread: whether all work is done by the calling thread, whose memory can then be
            measured on a CPU.
    """

    order: Callable[..., Iterator[Tick]]
    at: int | None = None
    one_thread: bool = True


def set_rates(units: list[Unit], factor: float) -> None:
    """Scale the learning rates that the optimizers were made with."""
    for unit in units:
        for group in unit.optimizer.param_groups if unit.optimizer else ():
            group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def tick_after(
    epoch: int, number: int, count: int, first: int, result: StepResult, epochs: int
) -> Tick:
    ends = number == count
    return Tick(
        Position(epoch + 1, 0) if ends else Position(epoch, number),
        first,
        result,
        ends,
        count,
        epochs,
    )
