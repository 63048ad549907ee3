"""Global backpropagation that keeps few features: gradient checkpointing, the strong baseline of local learning's memory.

The network is cut into segments. Of each but the last only what enters it is kept; what happens inside is computed again when
the backward pass comes to it. The last is kept whole, since it would be computed again at once.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerwise.chain import balance, split
from layerwise.errors import InvalidInput
from layerwise.footprint import SavedBytes, pretended
from layerwise.learner import Learner
from layerwise.memory import device_of, storage_bytes
from layerwise.units import Carried, Unit, precision


class Segment(nn.Module):
    """Neighbouring pieces of a chain, one after the other."""

    def __init__(self, pieces: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    def forward(self, *carried: Any) -> Carried:
        for piece in self.pieces:
            carried = piece(*carried)
        return carried


class Checkpointed(nn.Module):
    """A network's segments, all but the last computed again during the backward pass; to the bits of the plain network.

    Dropout is drawn again from the same state of the random generator, and buffers (the running statistics of batch
    normalisation) enter the second computation as they entered the first and keep what the first made of them.
    """

    def __init__(self, segments: Sequence[nn.Module]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)

    def forward(self, *carried: Any) -> Carried:
        *repeated, last = self.segments
        for segment in repeated:
            if torch.is_grad_enabled():
                carried = checkpoint(segment, *carried, use_reentrant=False, context_fn=partial(contexts, segment))
            else:
                carried = segment(*carried)
        return last(*carried)


def contexts(segment: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds a segment's first and second computation."""
    values = [
        (module, name, buffer.clone())
        for module in segment.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    return nullcontext(), buffers_replaced(values)


@contextmanager
def buffers_replaced(values: Sequence[tuple[nn.Module, str, Tensor]]) -> Iterator[None]:
    """Let modules read and change other buffers than their own."""
    own = [module._buffers[name] for module, name, _ in values]
    for module, name, value in values:
        module._buffers[name] = value
    try:
        yield
    finally:
        for (module, name, _), buffer in zip(values, own, strict=True):
            module._buffers[name] = buffer


@contextmanager
def piece_replaced(unit: Unit, piece: nn.Module) -> Iterator[None]:
    """Let a unit compute its part of the network in another way."""
    own, unit.piece = unit.piece, piece.train(unit.piece.training)
    try:
        yield
    finally:
        unit.piece = own


@dataclass
class Costs:
    """What the pieces of a chain keep for the backward pass, in bytes, one entry per piece.

    Attributes:
        entering: what enters the piece: all that is kept of it if a segment begins there.
        inside: what is kept besides when it is computed.
        weights: gradients of its parameters, which exist once the backward pass has come through.
    """

    entering: list[int]
    inside: list[int]
    weights: list[int]

    def peak(self, starts: Sequence[int]) -> int:
        """The most that is kept at once if segments begin at these pieces."""
        ends = [*starts[1:], len(self.inside)]
        return max(
            sum(self.entering[s] for s in starts[: number + 1]) + sum(self.inside[start:end]) + sum(self.weights[start:])
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        )


def checkpointed_piece(learner: Learner, batch_size: int, count: int | None) -> Checkpointed:
    """The network of a learner with one unit, in segments.

    Args:
        count: how many segments; None: the number that keeps the least, of all numbers and both ways to cut (between blocks,
            where one tensor passes, or between layers). For each number, the dearest segment is made as cheap as can be.

    Raises:
        InvalidInput: there are not so many segments to be had, or the network changes its images in place.
    """
    [unit] = learner.units
    chains = [split(learner.model, at, leaves=learner.leaves) for at in ("block", "layer")]
    plans = []
    for chain in chains:
        pieces, costs = separable(list(chain.pieces), learner, batch_size)
        for number in range(1, len(pieces) + 1) if count is None else [count] if count <= len(pieces) else []:
            starts = [0, *(last + 1 for last in balance(costs.inside, number))]
            plans.append((costs.peak(starts), number, starts, pieces))
    if not plans:
        raise InvalidInput(f"segments {count} are not to be had: this network has {len(pieces)} layers; give 1 to that many")
    _, _, starts, pieces = min(plans, key=lambda plan: plan[:2])
    return Checkpointed([Segment(pieces[start:end]) for start, end in pairwise([*starts, len(pieces)])])


def separable(pieces: list[nn.Module], learner: Learner, batch_size: int) -> tuple[list[nn.Module], Costs]:
    """Pieces between which segments may end, and what they keep.

    A piece that changes in place what enters it could not be computed again, so it is joined to the one before.
    """
    joined: list[list[nn.Module]] = []
    costs = Costs([], [], [])
    with pretended((learner, pieces)) as (copied, doubles):
        images = torch.empty(batch_size, *copied.image_shape, dtype=copied.image_type, device=device_of(copied))
        carried: Carried = (images,)
        for piece, double in zip(pieces, doubles, strict=True):
            entered = [value for value in carried if isinstance(value, Tensor)]
            versions = [value._version for value in entered]
            with SavedBytes(copied) as saved, precision(carried, copied.units[0].amp):
                carried = double(*carried)
            entering = dict(map(storage_bytes, entered))
            inside = sum(size for key, size in saved.storages.items() if key not in entering)
            weights = sum(p.numel() * p.element_size() for p in piece.parameters() if p.requires_grad)
            if versions == [value._version for value in entered]:
                joined.append([piece])
                costs.entering.append(sum(entering.values()))
                costs.inside.append(inside)
                costs.weights.append(weights)
            elif joined:
                joined[-1].append(piece)
                costs.inside[-1] += inside
                costs.weights[-1] += weights
            else:
                raise InvalidInput(
                    "the network changes its images in place, so they cannot be used again: let its first operation make a new "
                    "tensor, or train with the rule 'global'"
                )
    return [Segment(group) for group in joined], costs
