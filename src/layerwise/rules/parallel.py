"""The parallel rule: groups of units in threads, which pass only activations on, forward."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.core.result import StepResult
from layerwise.core.unit import Activations, Unit
from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated, Targets
from layerwise.rules.base import (
    START,
    Position,
    Schedule,
    Tick,
    neighbours,
    set_rates,
    tick_after,
)
from layerwise.rules.feature_cache import Batches

DEPTH = 2  # batches that may wait between two groups
PATIENCE = 0.1  # seconds between looks at whether the pipeline has been stopped


class Stopped(Exception):
    """The pipeline was closed while a thread waited."""


@dataclass
class Job:
    """A batch on its way through the units.

    Attributes:
        step: number of steps made before.
        activations: activations that enter the next unit, in a list to pop them from.
        targets: targets of the batch.
        results: results of the units passed.
    """

    step: int
    activations: list[Activations]
    targets: Targets
    results: list[Evaluated] = field(default_factory=list)


class Pipeline:
    """Threads, one per group of neighbouring units, joined by short queues.

    It is a context, which ends its threads.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Unit]],
        learner: Learner,
        batches: Iterable[tuple[Tensor, Tensor]],
    ) -> None:
        self.learner = learner
        self.closed = threading.Event()
        self.queues: list[queue.Queue[Any]] = [queue.Queue(DEPTH) for _ in range(len(groups) + 1)]
        self.threads = [
            threading.Thread(target=self.guard, args=(self.feed, 0, batches), daemon=True)
        ]
        for number, group in enumerate(groups):
            self.threads.append(
                threading.Thread(
                    target=self.guard, args=(self.work, number + 1, group), daemon=True
                )
            )

    def __enter__(self) -> "Pipeline":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed.set()
        for thread in self.threads:
            thread.join()

    def __iter__(self) -> Iterator[StepResult]:
        """Results of every batch that has passed all groups, in order.

        An error that a group raised is raised here.
        """
        for job in self.receive(len(self.queues) - 1):
            self.learner.steps += 1
            yield StepResult(job.results, len(job.targets.labels))

    def guard(self, task: Callable[[int, Any], None], number: int, argument: Any) -> None:
        """Run a thread's task, and pass its end, or the error that ended it, to the next queue."""
        try:
            task(number, argument)
            self.put(number, None)
        except Stopped:
            return
        except BaseException as error:
            # the thread that reads the results raises it
            try:
                self.put(number, error)
            except Stopped:
                return

    def feed(self, number: int, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        for step, (images, labels) in enumerate(batches, start=self.learner.steps):
            self.learner.check(images, labels)
            targets = Targets(labels, self.learner.num_classes, images)
            self.put(number, Job(step, [(images,)], targets))

    def work(self, number: int, group: Sequence[Unit]) -> None:
        for job in self.receive(number - 1):
            for unit in group:
                passed, evaluated = unit.step(job.activations.pop(), job.targets, job.step)
                job.activations.append(passed)
                del passed
                job.results.append(evaluated)
            self.put(number, job)

    def put(self, number: int, item: Any) -> None:
        while not self.closed.is_set():
            try:
                return self.queues[number].put(item, timeout=PATIENCE)
            except queue.Full:
                continue
        raise Stopped

    def receive(self, number: int) -> Iterator[Job]:
        while not self.closed.is_set():
            try:
                item = self.queues[number].get(timeout=PATIENCE)
            except queue.Empty:
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
        raise Stopped


def parallel(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
    *,
    threads: int = 2,
) -> Iterator[Tick]:
    """Groups of units work at the same time, a thread each; to the bit as ``simultaneous``.

    Each group works on the batch that the group before has finished with. Only activations pass
    between groups, forward. An epoch's last batch passes all groups before the next epoch begins.

    Args:
        threads: number of groups of neighbouring units, one thread each.

    Raises:
        InvalidInput: ``threads`` is below 1, the learner has windows, or a loss reads weights of
            later units.
    """
    if threads < 1:
        raise InvalidInput(f"Cannot use threads {threads}: it is too small. Give 1 or more.")
    learner.refuse_windows("parallel")
    refuse_reading_ahead(learner.units)
    learner.step_singly()
    return parallel_epochs(learner, batches, epochs, schedule, start, threads)


def refuse_reading_ahead(units: Sequence[Unit]) -> None:
    """Refuse losses that read weights of later units, which other threads change meanwhile.

    Raises:
        InvalidInput: naming the first unit.
    """
    for unit in units:
        if unit.reads_later_weights:
            raise InvalidInput(
                f"Cannot train by the rule 'parallel': the loss of unit {unit.index} ({unit.name}) "
                "reads weights of a later unit, which another thread may be changing. Use the rule "
                "'simultaneous', or another loss."
            )


def parallel_epochs(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position,
    threads: int,
) -> Iterator[Tick]:
    """The ticks of ``parallel``, which refuses first and then returns this generator."""
    groups = neighbours(learner.units, min(threads, len(learner.units)))
    for epoch in range(start.epoch, epochs):
        learner.train()
        set_rates(learner.units, schedule(epoch / epochs))
        learner.set_progress(epoch / epochs)
        first = start.batch if epoch == start.epoch else 0
        with Pipeline(groups, learner, batches.batches(epoch, first)) as results:
            for number, result in enumerate(results, start=first + 1):
                tick = tick_after(epoch, number, len(batches), 0, result, epochs)
                # inside an epoch, the first groups are some batches ahead
                yield replace(tick, resumable=tick.ends_epoch)
