"""A learner's step on a GPU, recorded once as a CUDA graph and then replayed.

A step of local learning is thousands of small kernels, since every unit has a head, a backward pass
and an update of its own; launching them takes a processor longer than computing them takes the GPU.
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
from layerwise.core.unit import Carried, Unit, detached, step_units
from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated, Targets
from layerwise.utils.device import device_of
from layerwise.utils.seeds import derived_seed

# steps of a kind before it is recorded: by then optimizers have their state, and libraries their
# plans
WARM_UP = 3


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
    """Recorded steps of a learner, one for every shape of batch and mode.

    A recording repeats what was done when it was made. Settings of the optimizers and modes of
    modules are looked at: when they change, steps are recorded anew, and where a rate changes at
    every step, they are made singly. Of other changes, such as a hook or a parameter that was
    replaced, it learns by ``forget``, which ``Learner.load_state_dict`` calls.

    With a seed, random draws are a function of it and of the step, as those of single steps are,
    but not the same ones.

    Attributes:
        refusal: why steps cannot be recorded, or None.

    Args:
        learner: on a GPU.
        streams: over how many streams the units take turns. With 2 or more, a unit's backward pass
            and update overlap with the next units' passes, and every unit's features stay until the
            step ends.

    Raises:
        InvalidInput: the learner is not on a GPU, or ``streams`` is below 1.
    """

    def __init__(self, learner: Learner, streams: int = 1) -> None:
        self.device = device_of(learner.model)
        if self.device.type != "cuda":
            raise InvalidInput(
                f"steps can be recorded on a GPU only, and the learner is on {self.device}: move "
                "its model first"
            )
        if streams < 1:
            raise InvalidInput(f"streams {streams} is too small: give 1 or more")
        self.streams = (
            [torch.cuda.Stream(self.device) for _ in range(streams)] if streams > 1 else []
        )
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
        """Steps made singly: a recording is of the tensors of the learner that it was made of."""
        return step_units

    def __call__(
        self, units: Sequence[Unit], images: Tensor, targets: Targets, step: int
    ) -> list[Evaluated]:
        """As ``step_units``; what it returns stays as it is when others are made."""
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
        """Draw random numbers as a function of seed and step; the device's generator stays."""
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
        """Record a step without making it; if that cannot be done, say why in ``refusal``."""
        if not self.recordings:
            # one whose last recording is gone cannot be used again
            self.pool = torch.cuda.graph_pool_handle()
        try:
            copied = replace(targets, labels=targets.labels.clone())
            self.recordings[kind] = self.recorded(units, images.clone(), copied)
        except ChangedInPlace:
            self.streams = []
            self.record(kind, units, images, targets)
        except Exception as error:
            # whatever it was, steps are made singly, where an error of the step's own comes again
            self.refusal = " ".join(str(error).split())[:200] or type(error).__name__
            warnings.warn(
                (
                    "steps are made one by one, slower, since they could not be recorded: "
                    f"{self.refusal}"
                ),
                stacklevel=2,
            )

    def recorded(self, units: Sequence[Unit], images: Tensor, targets: Targets) -> Recording:
        """Record a step of a batch, which is kept to be written over.

        Raises:
            BaseException: what happened first; the learner is as before, and recordings of before
                are gone.
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
            self.recordings.clear()  # they draw from the generator's state of before
            # one that takes part in no recording
            self.generator.graphsafe_set_state(self.generator.clone_state())
            raise (first or error) from None
        return Recording(graph, images, targets.labels, losses, correct)


class ChangedInPlace(Exception):
    """A unit changes what it is handed, which another may still be reading."""


def step_overlapping(
    units: Sequence[Unit], images: Tensor, targets: Targets, streams: Sequence[torch.cuda.Stream]
) -> list[Evaluated]:
    """``step_units`` with units that take turns on several streams.

    A unit begins when the one before has computed its features and loss, beside whose backward pass
    and update it computes.

    Raises:
        ChangedInPlace: so units cannot overlap.
    """
    # to the end, since memory freed on one stream says nothing of the others
    kept: list[Carried] = [(images.detach(),)]
    results, changed = [], False
    begun = torch.cuda.current_stream()
    ready = begun.record_event()
    used: list[torch.cuda.Stream] = []
    try:
        for unit, stream in zip(units, cycle(streams)):
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                used.append(stream)
                tensors = [value for value in kept[-1] if isinstance(value, Tensor)]
                versions = [value._version for value in tensors]
                passed, (loss, correct) = unit.evaluate(kept[-1], targets)
                ready = stream.record_event()
                unit.learn(loss)
            changed = changed or [value._version for value in tensors] != versions
            kept.append(detached(passed))
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
    """What a recording has as fixed values: modes, and the numbers that optimizers are set to."""
    modes = tuple(
        module.training
        for unit in units
        for part in (unit.piece, unit.loss)
        for module in part.modules()
    )
    groups = [group for unit in units if unit.optimizer for group in unit.optimizer.param_groups]
    numbers = tuple(
        setting(value) for group in groups for name, value in group.items() if name != "params"
    )
    return modes, tuple(unit.clip_grad for unit in units), numbers


def setting(value: Any) -> Any:
    """A setting as something to compare: a number, the number in a tensor on the CPU, the place of
    one on the device.
    """
    if not isinstance(value, Tensor):
        return value
    return value.tolist() if value.device.type == "cpu" else value.data_ptr()


@contextmanager
def unseeded(units: Sequence[Unit]) -> Iterator[None]:
    """Let units draw from the device's generator as it is, which must not be set while a step is
    recorded.
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
    """Tell optimizers that they are recorded, and move their counts of steps, which they may keep
    on the CPU, to the device.

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
    told = [group["capturable"] for group in groups]
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
        for group, was in zip(groups, told, strict=True):
            group["capturable"] = was
