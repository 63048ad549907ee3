"""The memory that training needs, counted whole: what stays between steps and the peak of what a step adds."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from layerwise.learner import Learner


class Peak:
    """Bytes that a measured stretch of code had alive at once, beyond those alive when it began."""

    transient_bytes = 0


@contextmanager
def measured(device: torch.device) -> Iterator[Peak]:
    """Measure a stretch of code by the device's allocator. On a CPU, only this thread's allocations are seen."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.transient_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield peak
    alive = 0
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak.transient_bytes = max(peak.transient_bytes, alive)


def persistent_bytes(learner: Learner) -> int:
    """Bytes of weights, buffers, heads, gradients and optimizer state, each storage once."""
    tensors: list[Tensor] = []
    for module in (learner.model, *(unit.loss for unit in learner.units)):
        for parameter in module.parameters():
            tensors += [parameter] if parameter.grad is None else [parameter, parameter.grad]
        tensors += module.buffers()
    for unit in learner.units:
        for state in unit.optimizer.state.values() if unit.optimizer else ():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
