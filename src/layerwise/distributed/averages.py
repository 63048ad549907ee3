"""Gradients of units on their way to being added up over replicas.

Every replica's loss was taken times its portion of the batch (``core.unit.relative_size``), so the
sum of their gradients is that of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerwise.core.unit import Unit
from layerwise.distributed.world import naming_lost_ranks


class Bucket:
    """Gradients of some weights of one type, side by side, on their way to being added up.

    The last numbers say of which weights there is a gradient.

    Args:
        group: process group of the replicas' ranks.
    """

    def __init__(self, weights: Sequence[nn.Parameter], group: Any) -> None:
        self.weights = weights
        lengths = [weight.numel() for weight in weights]
        numbers = weights[0].new_zeros(sum(lengths) + len(weights))
        *self.parts, self.present = numbers.split([*lengths, len(weights)])
        self.missing = False
        for number, (weight, part) in enumerate(zip(weights, self.parts, strict=True)):
            if weight.grad is None:
                self.missing = True
                continue
            as_weight(part, weight).copy_(weight.grad)
            self.present[number] = 1.0
            weight.grad = None
        with naming_lost_ranks():
            self.work = dist.all_reduce(numbers, group=group, async_op=True)

    def give(self) -> None:
        """Wait for the sum and give it to the weights, except to those without any gradient."""
        with naming_lost_ranks():
            self.work.wait()
        present = self.present.tolist() if self.missing else [1.0] * len(self.weights)
        for weight, part, share in zip(self.weights, self.parts, present, strict=True):
            weight.grad = as_weight(part, weight) if share else None


def as_weight(numbers: Tensor, weight: Tensor) -> Tensor:
    """A view of numbers, (N,), that lies in memory as a weight does, for fused optimizers."""
    dense = weight.is_contiguous() or (
        weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    )
    if not dense:
        return numbers.view(weight.shape)
    return numbers.as_strided(weight.shape, weight.stride(), numbers.storage_offset())


@dataclass
class Average:
    """The gradients of a unit's update, on their way to being added up.

    Attributes:
        divisor: what their sum is divided by: the size of the whole batch relative to that of its
            first part, of all replicas.
    """

    unit: Unit
    divisor: float
    buckets: list[Bucket]

    @property
    def arrived(self) -> bool:
        return all(bucket.work.is_completed() for bucket in self.buckets)

    def finish(self) -> None:
        """Update the unit."""
        for bucket in self.buckets:
            bucket.give()
        assert self.unit.optimizer is not None
        self.unit.update(self.unit.optimizer, self.divisor)
