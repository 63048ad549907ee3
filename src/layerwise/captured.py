"""A learner's step on a GPU, recorded once as a CUDA graph and then replayed.

A step of local learning is thousands of small kernels, since every unit has a head, a backward pass and an update of its own;
launching them takes a processor longer than computing them takes the GPU. A replay launches them all at once.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated, Targets
from layerwise.runs import Execution
from layerwise.units import Carried, Unit, detached, draw_seed

if TYPE_CHECKING:
    from layerwise.learner import Learner

WARM_UP = 3  # steps of a kind before it is recorded: by then optimizers have their state, and libraries their plans


@dataclass(frozen=True)
class Recording:
    """A recorded step: what it reads and what it writes.

    Attributes:
        losses, correct: (units,) each.
    """

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    losses: Tensor
    correct: Tensor


class CapturedSteps:
    """Makes a learner's steps by replaying recordings of them, one for every kind: shape of the batch, mode and settings.

    Random draws are a function of the learner's seed and the step, as those of single steps are, but not the same ones.

    Args:
        learner: on a GPU. Its tensors must stay where they are; ``load_state_dict`` sees to that itself. Settings of its
            optimizers are part of a recording: where a rate changes at every step, steps are made singly.
        streams: over how many streams the units take turns. With 2 or more, a unit's backward pass and update overlap with the
            next units' passes, and every unit's features stay until the step ends.

    Raises:
        InvalidInput: the learner is not on a GPU, or ``streams`` is below 1.
    """

    def __init__(self, learner: "Learner", streams: int = 1) -> None:
        self.learner, self.device = learner, next(learner.model.parameters()).device
        if self.device.type != "cuda":
            raise InvalidInput(
                f"steps can be recorded on a GPU only, and the learner is on {self.device}: move its model first"
            )
        if streams < 1:
            raise InvalidInput(f"streams {streams} is too small: give 1 or more")
        self.streams = [torch.cuda.Stream(self.device) for _ in range(streams)] if streams > 1 else []
        self.seed: int | None = next((unit.seed for unit in learner.units if unit.seed is not None), None)
        self.generator = torch.cuda.default_generators[self.device.index or 0]
        self.refusal: str | None = None
        self.forget()

    def forget(self) -> None:
        """Record anew from the next steps on."""
        self.recordings: dict[Any, Recording] = {}
        self.made: Counter[Any] = Counter()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of a learner makes its steps singly, since what is recorded is of the original's tensors."""

    def step_units(self, images: Tensor, labels: Tensor) -> list[Evaluated]:
        """As ``Learner.step_units``; what it returns stays as it is when others are made."""
        learner = self.learner
        batch = (images.shape, labels.dtype, learner.training)
        kind = (batch, tuple(map(settings, learner.units)))
        if kind not in self.recordings and self.refusal is None and self.made[kind] >= WARM_UP:
            self.record(kind, images, labels)
        recording = self.recordings.get(kind)
        with self.draws():
            if recording is None:
                self.made[kind] += 1
                with unseeded(learner.units):
                    return learner.step_units(images, labels)
            recording.images.copy_(images)
            recording.labels.copy_(labels)
            recording.graph.replay()
        return [Evaluated(*both) for both in zip(recording.losses.clone(), recording.correct.clone(), strict=True)]

    @contextmanager
    def draws(self) -> Iterator[None]:
        """Draw random numbers as a function of seed and step, and leave the device's generator as it was."""
        if self.seed is None:
            yield
            return
        state = self.generator.get_state()
        self.generator.manual_seed(draw_seed(self.seed, "step", self.learner.steps))
        try:
            yield
        finally:
            self.generator.set_state(state)

    def record(self, kind: Any, images: Tensor, labels: Tensor) -> None:
        """Record a step without making it; if that cannot be done, say why in ``refusal``."""
        if any(known[1] != kind[1] for known in self.recordings):  # the rate has changed: those of before are needed no more
            torch.cuda.synchronize(self.device)
            self.recordings.clear()
        if not self.recordings:
            self.pool = torch.cuda.graph_pool_handle()  # one whose last recording is gone cannot be used again
        try:
            self.recordings[kind] = self.recorded(images.clone(), labels.clone())
        except ChangedInPlace:
            self.streams = []
            self.record(kind, images, labels)
        except Exception as error:  # whatever it was, steps are made one by one, where an error of the step's own comes again
            self.generator.graphsafe_set_state(self.generator.clone_state())  # one that no longer takes part in a recording
            self.refusal = " ".join(str(first_cause(error)).split())[:200]
            warnings.warn(f"steps are made one by one, slower, since they could not be recorded: {self.refusal}", stacklevel=2)

    def recorded(self, images: Tensor, labels: Tensor) -> Recording:
        """Record a step of a batch, which is kept to be written over."""
        learner, graph = self.learner, torch.cuda.CUDAGraph()
        with unseeded(learner.units), capturable(learner.units, self.device), torch.cuda.graph(graph, pool=self.pool):
            if self.streams:
                evaluated = step_overlapping(learner, images, labels, self.streams)
            else:
                evaluated = learner.step_units(images, labels)
            losses = torch.stack([loss.float() for loss, _ in evaluated])
            correct = torch.stack([correct for _, correct in evaluated])
        return Recording(graph, images, labels, losses, correct)


def capture(learner: "Learner", execution: Execution) -> str:
    """Let a learner's steps be recorded if it is on a GPU and the run asks for it; says so in words, or nothing."""
    learner.captured = None
    if not execution.graphs or next(learner.model.parameters()).device.type != "cuda":
        return ""
    learner.captured = CapturedSteps(learner, execution.streams)
    return f"recorded steps on {execution.streams} stream{'s' if execution.streams > 1 else ''}"


def first_cause(error: BaseException) -> BaseException:
    """The error that others came of: one inside a recording makes its end fail too."""
    while error.__context__ is not None:
        error = error.__context__
    return error


class ChangedInPlace(Exception):
    """A unit changes what it is handed, which another may still be reading."""


def step_overlapping(
    learner: "Learner", images: Tensor, labels: Tensor, streams: Sequence[torch.cuda.Stream]
) -> list[Evaluated]:
    """``Learner.step_units`` with units that take turns on several streams.

    A unit begins when the one before has computed its features and loss, beside whose backward pass and update it computes.

    Raises:
        ChangedInPlace: so units cannot overlap.
    """
    targets = Targets(labels.long(), learner.num_classes)
    kept: list[Carried] = [(images.detach(),)]  # to the end, since memory freed on one stream says nothing of the others
    results, changed = [], False
    begun = torch.cuda.current_stream()
    ready = begun.record_event()
    for unit, stream in zip(learner.units, cycle(streams)):
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            tensors = [value for value in kept[-1] if isinstance(value, Tensor)]
            versions = [value._version for value in tensors]
            passed, (loss, correct) = unit.evaluate(kept[-1], targets)
            ready = stream.record_event()
            unit.learn(loss)
        changed = changed or [value._version for value in tensors] != versions
        kept.append(detached(passed))
        results.append(Evaluated(loss.detach(), correct))
    for stream in streams[: len(learner.units)]:
        begun.wait_stream(stream)
    if changed:  # only now, since a recording ends with all streams joined
        raise ChangedInPlace
    return results


def settings(unit: Unit) -> tuple[Any, ...]:
    """What a recording of a unit's update has as fixed numbers."""
    groups: Sequence[dict[str, Any]] = unit.optimizer.param_groups if unit.optimizer else ()
    return tuple(value for group in groups for value in group.values() if isinstance(value, int | float | tuple))


@contextmanager
def unseeded(units: Sequence[Unit]) -> Iterator[None]:
    """Let units draw from the device's generator as it is, which must not be set while a step is recorded."""
    seeds = [unit.seed for unit in units]
    for unit in units:
        unit.seed = None
    try:
        yield
    finally:
        for unit, seed in zip(units, seeds, strict=True):
            unit.seed = seed


@contextmanager
def capturable(units: Sequence[Unit], device: torch.device) -> Iterator[None]:
    """Tell optimizers that they are recorded, and move their counts of steps, which they may keep on the CPU, to the device."""
    optimizers = [unit.optimizer for unit in units if unit.optimizer]
    groups = [group for optimizer in optimizers for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    for state in (state for optimizer in optimizers for state in optimizer.state.values()):
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)
    try:
        yield
    finally:
        for group, told in zip(groups, before, strict=True):
            group["capturable"] = told
