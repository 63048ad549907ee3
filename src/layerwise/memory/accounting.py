"""The memory of training, counted whole: between steps, and the peak that a step adds to it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from layerwise.core.learner import Learner
from layerwise.core.unit import Unit

FROZEN, FORWARD, BACKWARD, UPDATE = "frozen", "forward", "backward", "update"  # phases of a step
MARK = "layerwise"  # prefix of our marks in the profiler


class Mark(NamedTuple):
    """The begin of a phase of a unit's step; a frozen unit passes features on without learning."""

    time: int
    unit: int
    phase: str


@dataclass
class Timeline:
    """Bytes alive while some code runs, beyond those alive when it began.

    Attributes:
        points: (time, bytes) after every change, in order; times are nanoseconds, or operations
            where nothing is computed.
        marks: begins of phases, in order, on the same clock.
    """

    points: list[tuple[int, int]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)

    def unit_peaks(self) -> dict[int, int]:
        """The most bytes alive during each unit's step, by its index.

        A unit's step includes what comes before it: loading its batch, and passing frozen units.
        """
        learning = [mark for mark in self.marks if mark.phase != FROZEN]
        peaks = {mark.unit: 0 for mark in learning}
        begins = [
            mark
            for before, mark in zip([None, *self.marks], self.marks, strict=False)
            if starts_unit(before, mark)
        ]
        position, alive = 0, 0
        for number, begin in enumerate(begins):
            unit = next(mark.unit for mark in learning if mark.time >= begin.time)
            end = begins[number + 1].time if number + 1 < len(begins) else None
            peaks[unit] = max(peaks[unit], alive)
            while position < len(self.points) and (end is None or self.points[position][0] < end):
                alive = self.points[position][1]
                peaks[unit] = max(peaks[unit], alive)
                position += 1
        return peaks


def starts_unit(before: Mark | None, mark: Mark) -> bool:
    """Whether a unit's turn begins with this mark.

    It begins with the unit's forward pass, or with that of the frozen units before it.
    """
    return mark.phase in (FROZEN, FORWARD) and (
        before is None or before.phase not in (FROZEN, FORWARD)
    )


class Peak:
    """The bytes that measured code had alive, beyond those alive when it began.

    Attributes:
        transient_bytes: the most at once.
        timeline: the bytes over time; only on a CPU.
    """

    def __init__(self) -> None:
        self.transient_bytes = 0
        self.timeline = Timeline()


@contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """Measure the memory of some code by the device's allocator.

    On a CPU, only this thread's allocations are seen.
    """
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.transient_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    results = profiler.profiler.kineto_results
    held: dict[int, int] = {}  # bytes by address
    alive = 0
    for time, address, size in sorted(allocations(results.experimental_event_tree())):
        if size > 0:
            held[address] = size
        elif held.pop(address, 0) != -size:
            continue  # of an earlier measurement: PyTorch takes a new block at its address for it
        alive += size
        peak.timeline.points.append((time, alive))
        peak.transient_bytes = max(peak.transient_bytes, alive)
    for event in sorted(results.events(), key=lambda event: event.start_ns()):
        if event.name().startswith(MARK + "/"):
            _, unit, phase = event.name().split("/")
            peak.timeline.marks.append(Mark(event.start_ns(), int(unit), phase))


def allocations(events: Iterable[Any]) -> Iterator[tuple[int, int, int]]:
    """Time in nanoseconds, address and size of every block allocated; freed ones below 0."""
    for event in events:
        kind, fields = event.typed
        if kind == _EventType.Allocation:
            yield event.start_time_ns, fields.ptr, fields.alloc_size
        yield from allocations(event.children)


def profiler_mark(unit: int, phase: str) -> None:
    """Leave a mark in the timeline of ``measured``."""
    with record_function(f"{MARK}/{unit}/{phase}"):
        pass


@contextmanager
def phases(learner: Learner, mark: Callable[[int, str], None]) -> Iterator[None]:
    """Call ``mark(unit, phase)`` whenever a unit begins a phase of its step.

    In windows, a unit's weights are differentiated after the last loss that reaches them: a second
    backward phase, behind phases of later units.
    """
    handles: list[Any] = []
    for unit in learner.units:

        def forward(*_: Any, index: int = unit.index) -> None:
            mark(index, FORWARD if torch.is_grad_enabled() else FROZEN)

        def backward(*_: Any, index: int = unit.index) -> None:
            mark(index, BACKWARD)

        def update(*_: Any, index: int = unit.index) -> None:
            mark(index, UPDATE)

        handles += [
            unit.piece.register_forward_pre_hook(forward),
            unit.loss.register_forward_hook(backward),
        ]
        if unit.optimizer is not None:
            handles.append(unit.optimizer.register_step_pre_hook(update))
    try:
        with ExitStack() as marking:
            for unit in learner.units if learner.windowed else ():
                marking.enter_context(marked_backward(unit, mark))
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def marked_backward(unit: Unit, mark: Callable[[int, str], None]) -> Iterator[None]:
    """Call ``mark`` before the unit's weights are differentiated."""
    accumulate, attributes = unit.accumulate, dict(vars(unit))

    def marking(*arguments: Any) -> None:
        mark(unit.index, BACKWARD)
        accumulate(*arguments)

    vars(unit)["accumulate"] = marking
    try:
        yield
    finally:
        del vars(unit)["accumulate"]
        if "accumulate" in attributes:  # of a mark around this one
            vars(unit)["accumulate"] = attributes["accumulate"]


def persistent_tensors(learner: Learner) -> list[Tensor]:
    """Weights, buffers, heads, gradients and optimizer state."""
    tensors = kept_by(learner.model)
    for unit in learner.units:
        # a piece also holds tensors that forward makes of none of its input
        tensors += [*unit.piece.buffers(), *kept_by(unit.loss), *state_tensors(unit)]
    return tensors


def kept_by(module: nn.Module) -> list[Tensor]:
    """A module's weights, gradients and buffers."""
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    return [*module.parameters(), *gradients, *module.buffers()]


def state_tensors(unit: Unit) -> list[Tensor]:
    states = unit.optimizer.state.values() if unit.optimizer else ()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]


def persistent_bytes(learner: Learner) -> int:
    """Bytes of weights, buffers, heads, gradients and optimizer state, each storage once."""
    return bytes_of(persistent_tensors(learner))


def unit_bytes(unit: Unit) -> int:
    """The part of ``persistent_bytes`` that belongs to a unit.

    Every weight is in one unit, so the parts add up to the whole.
    """
    return bytes_of(unit_tensors(unit))


def unit_tensors(unit: Unit) -> list[Tensor]:
    """A unit's weights, buffers, head, gradients and optimizer state."""
    return kept_by(unit.piece) + kept_by(unit.loss) + state_tensors(unit)


def bytes_of(tensors: list[Tensor]) -> int:
    return sum(dict(map(storage_bytes, tensors)).values())


def storage_bytes(tensor: Tensor) -> tuple[int, int]:
    """A key that tells a tensor's storage from all others alive, and its size in bytes."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()
