"""Recorded steps of a learner: on a GPU, a step is recorded as a CUDA graph and then replayed.

A step of local learning is thousands of small kernels, since every unit has a head, a backward pass
and an update of its own. Launching them takes a processor longer than computing them takes the GPU.
A replay launches them all at once.
"""

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.core.settings import refuse_changes
from layerwise.core.unit import Activations, Unit, detached, step_units
from layerwise.errors import InvalidInput, check_least, reason_of
from layerwise.losses import Evaluated, Targets
from layerwise.utils.device import device_of
from layerwise.utils.seeds import derived_seed

# steps of a kind before one is recorded: by then optimizers have their state, libraries their plans
WARM_UP = 3


@dataclass(frozen=True)
class Recording:
    """A recorded step, with the tensors that it reads and writes.

    Attributes:
        graph: the recording.
        images, labels: the batch that it reads.
        losses, correct: the result that it writes, (units,) each.
    """

    graph: torch.cuda.CUDAGraph
    images: Tensor
    labels: Tensor
    losses: Tensor
    correct: Tensor


class CapturedSteps:
    """Recorded steps of a learner, one for every shape of batch and mode.

    A recording repeats the step that was made while it was recorded. When settings of the
    optimizers, modes of modules, or the weights that learn change, steps are recorded anew; where a
    rate changes at every step, they are made operation by operation, as are steps on parts of a
    batch. After any other change, such as a hook, call ``forget``, as ``Learner.load_state_dict``
    does.

    With a seed, random draws depend on seed and step alone, as without recordings, but they are
    other draws.

    Attributes:
        refusal: the reason why steps cannot be recorded, or None.

    Args:
        learner: a learner on a GPU.
        streams: number of streams over which the units take turns. With 2 or more, a unit's
            backward pass and update overlap with the next units' passes, and every unit's features
            stay until the step ends. Units do not overlap where a loss reads weights of later ones.

    Raises:
        InvalidInput: the learner is not on a GPU, or ``streams`` is below 1.
    """

    def __init__(self, learner: Learner, streams: int = 1) -> None:
        self.device = device_of(learner.model)
        if self.device.type != "cuda":
            raise InvalidInput(
                "Cannot record steps: they can be recorded on a GPU only, and the learner is on "
                f"{self.device}. Move its model first."
            )
        check_least(1, streams=streams)
        overlap = streams > 1 and not any(unit.reads_later_weights for unit in learner.units)
        self.streams = [torch.cuda.Stream(self.device) for _ in range(streams)] if overlap else []
        self.recorder = torch.cuda.Stream(self.device)
        self.seed: int | None = next(
            (unit.seed for unit in learner.units if unit.seed is not None), None
        )
        self.generator = torch.cuda.default_generators[self.device.index or 0]
        self.recordings: dict[Any, Recording] = {}
        self.forget()

    def forget(self) -> None:
        """Record anew from the next steps on."""
        if self.recordings:
            torch.cuda.synchronize(self.device)  # one may still be replayed
            self.recordings.clear()
        self.made: Counter[Any] = Counter()
        self.settings: Any = None
        self.refusal: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """``step_units``, since a recording reads and writes its own learner's tensors."""
        return step_units

    def __call__(
        self, units: Sequence[Unit], images: Tensor, targets: Targets, step: int
    ) -> list[Evaluated]:
        """As ``step_units``; later steps do not change the returned tensors."""
        refuse_changes(unit.piece for unit in units)  # a recording does not look
        labels = targets.labels
        kind = (images.shape, images.device, labels.shape, labels.dtype, labels.device)
        settings = settings_of(units)
        with torch.cuda.device(self.device):
            if settings != self.settings:
                refusal = self.refusal
                self.forget()
                self.settings, self.refusal = settings, refusal
            if kind not in self.recordings and self.refusal is None and self.made[kind] >= WARM_UP:
                self.record(kind, units, images, targets)
            recording = self.recordings.get(kind)
            with self.draws(step):
                if recording is None:
                    self.made[kind] += 1
                    with unseeded(units):
                        return step_units(units, images, targets, step)
                recording.images.copy_(images)
                recording.labels.copy_(labels)
                recording.graph.replay()
            return [
                Evaluated(*both)
                for both in zip(recording.losses.clone(), recording.correct.clone(), strict=True)
            ]

    @contextmanager
    def draws(self, step: int) -> Iterator[None]:
        """Draw random numbers from seed and step; the device's generator keeps its state."""
        if self.seed is None:
            yield
            return
        state = self.generator.get_state()
        self.generator.manual_seed(derived_seed(self.seed, "step", step))
        try:
            yield
        finally:
            self.generator.set_state(state)

    def record(self, kind: Any, units: Sequence[Unit], images: Tensor, targets: Targets) -> None:
        """Record a step without making it; where that fails, ``refusal`` says why."""
        if not self.recordings:
            # a pool whose last recording is gone cannot be used again
            self.pool = torch.cuda.graph_pool_handle()
        try:
            refuse_scaling(units)
            images = images.clone()
            copied = replace(targets, labels=targets.labels.clone(), images=images)
            self.recordings[kind] = self.recorded(units, images, copied)
        except ChangedInPlace:
            self.streams = []
            self.record(kind, units, images, targets)
        except Exception as error:
            # steps go on without recordings, and an error of the step itself is raised again there
            self.refusal = reason_of(error)
            warnings.warn(
                f"Cannot record steps: {self.refusal}. They are made one by one, which is slower.",
                stacklevel=2,
            )

    def recorded(self, units: Sequence[Unit], images: Tensor, targets: Targets) -> Recording:
        """Record a step of a batch, whose tensors later batches are written into.

        Raises:
            BaseException: the first error; the learner is as before, and earlier recordings are
                gone.
        """
        graph, first = torch.cuda.CUDAGraph(), None
        recording = torch.cuda.graph(
            graph, pool=self.pool, stream=self.recorder, capture_error_mode="thread_local"
        )
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                unseeded(units),
                capturable(units, self.device),
                recording,
            ):
                try:
                    if self.streams:
                        evaluated = step_overlapping(units, images, targets, self.streams)
                    else:
                        evaluated = step_units(units, images, targets, 0)
                    losses = torch.stack([loss.float() for loss, _ in evaluated])
                    correct = torch.stack([correct for _, correct in evaluated])
                except BaseException as error:
                    first = error
                    raise
        except BaseException as error:  # also Ctrl-C, which the end of a recording would hide
            for unit in units:  # gradients that were recorded and never computed
                if unit.optimizer is not None:
                    unit.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize(self.device)
            self.recordings.clear()  # they draw from the generator's earlier state
            # a state that takes part in no recording
            self.generator.graphsafe_set_state(self.generator.clone_state())
            raise (first or error) from None
        return Recording(graph, images, targets.labels, losses, correct)


def refuse_scaling(units: Sequence[Unit]) -> None:
    """Refuse to record units that scale their loss.

    Raises:
        RuntimeError: a unit does so; whether its gradients are finite is asked in Python.
    """
    if any(unit.scaler is not None for unit in units):
        raise RuntimeError("gradients of torch.float16 are scaled by numbers that steps change")


class ChangedInPlace(Exception):
    """A unit changes its input, which another may still be reading."""


def step_overlapping(
    units: Sequence[Unit], images: Tensor, targets: Targets, streams: Sequence[torch.cuda.Stream]
) -> list[Evaluated]:
    """``step_units`` with units that take turns on several streams.

    A unit begins when the unit before has computed its features and loss, and computes beside that
    one's backward pass and update.

    Raises:
        ChangedInPlace: a unit changes its input, so units cannot overlap.
    """
    # all of them to the end, since memory freed on one stream may still be read on another
    activations: list[Activations] = [(images.detach(),)]
    results, changed = [], False
    begun = torch.cuda.current_stream()
    ready = begun.record_event()
    used: list[torch.cuda.Stream] = []
    try:
        for unit, stream in zip(units, cycle(streams)):
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                used.append(stream)
                tensors = [value for value in activations[-1] if isinstance(value, Tensor)]
                versions = [value._version for value in tensors]
                passed, (loss, correct) = unit.evaluate(activations[-1], targets)
                ready = stream.record_event()
                unit.learn(loss)
            changed = changed or [value._version for value in tensors] != versions
            activations.append(detached(passed))
            results.append(Evaluated(loss.detach(), correct))
    finally:  # a recording ends with all streams joined, whatever happened
        # after an error that ended the recording there is nothing to join
        with suppress(RuntimeError):
            for stream in used[-len(streams) :]:
                begun.wait_stream(stream)
    if changed:
        raise ChangedInPlace
    return results


def settings_of(units: Sequence[Unit]) -> tuple[Any, ...]:
    """The values that a recording fixes: numbers of modules, weights, numbers of optimizers."""
    of_modules = tuple(
        value
        for unit in units
        for part in (unit.piece, unit.loss)
        for module in part.modules()
        for value in vars(module).values()
        if isinstance(value, int | float | str)
    )
    groups = [group for unit in units if unit.optimizer for group in unit.optimizer.param_groups]
    numbers = tuple(
        setting(value) for group in groups for name, value in group.items() if name != "params"
    )
    weights = tuple(
        (weight.requires_grad, weight.data_ptr()) for unit in units for weight in unit.held()
    )
    optimizers = tuple(id(unit.optimizer) for unit in units)
    return of_modules, tuple(unit.clip_grad for unit in units), numbers, weights, optimizers


def setting(value: Any) -> Any:
    """A setting as a value to compare.

    It is a number, the number in a tensor on the CPU, or the address of a tensor on the device.
    """
    if not isinstance(value, Tensor):
        return value
    return value.tolist() if value.device.type == "cpu" else value.data_ptr()


@contextmanager
def unseeded(units: Sequence[Unit]) -> Iterator[None]:
    """Let units draw from the device's generator as it is.

    The generator must not be set while a step is recorded.
    """
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
    """Tell optimizers that they are recorded, and move their counts of steps to the device.

    They may keep these counts on the CPU.

    Raises:
        RuntimeError: an optimizer counts in Python, where a replay does not count.
    """
    optimizers = [unit.optimizer for unit in units if unit.optimizer]
    groups = [
        group
        for optimizer in optimizers
        for group in optimizer.param_groups
        if "capturable" in group
    ]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    capturable_before = [group["capturable"] for group in groups]
    before = [dict(state) for state in states]
    for group in groups:
        group["capturable"] = True
    for state in states:
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(device)
    try:
        yield
        for state, old in zip(states, before, strict=True):
            if any(
                isinstance(value, int | float) and value != old.get(name)
                for name, value in state.items()
            ):
                raise RuntimeError(
                    "an optimizer counts its steps in Python, where a replay does not count"
                )
    except BaseException:
        for state, old in zip(states, before, strict=True):
            state.update(old)
        raise
    finally:
        for group, was in zip(groups, capturable_before, strict=True):
            group["capturable"] = was
