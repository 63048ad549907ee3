"""Gradient checkpointing: global backpropagation that keeps few features.

It is the strong baseline for the memory of local learning. The network is cut into segments. Each
but the last keeps its input alone and is recomputed when the backward pass comes to it. The last
keeps everything, since it would be recomputed at once.
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

from layerwise.core.cuts import balances
from layerwise.core.learner import Learner
from layerwise.core.split import Chain, split
from layerwise.core.unit import Activations, Unit, precision
from layerwise.errors import InvalidInput
from layerwise.memory.accounting import storage_bytes
from layerwise.memory.fake_step import Footprint, SavedBytes, pretended
from layerwise.rules.base import START, Position, Schedule, Tick
from layerwise.rules.feature_cache import Batches
from layerwise.rules.simultaneous import simultaneous
from layerwise.utils.device import device_of

CANDIDATES = 6  # number of ways to cut for which a step is predicted


class Segment(nn.Module):
    """Neighbouring pieces of a chain, one after the other."""

    def __init__(self, pieces: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    def forward(self, *activations: Any) -> Activations:
        for piece in self.pieces:
            activations = piece(*activations)
        return activations


class Checkpointed(nn.Module):
    """Segments of a network, all but the last recomputed during the backward pass.

    Results are those of the plain network to the bit. Dropout is drawn again from the same state of
    the random generator. Buffers, such as running statistics, enter the second computation as they
    entered the first, and keep the values that the first gave them.
    """

    def __init__(self, segments: Sequence[nn.Module]) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)

    def forward(self, *activations: Any) -> Activations:
        *repeated, last = self.segments
        for segment in repeated:
            if torch.is_grad_enabled():
                activations = checkpoint(
                    segment,
                    *activations,
                    use_reentrant=False,
                    context_fn=partial(contexts, segment),
                )
            else:
                activations = segment(*activations)
        return last(*activations)


def contexts(
    segment: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of a segment's first and second computation."""
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


def with_piece(unit: Unit, piece: nn.Module, ticks: Iterator[Any]) -> Iterator[Any]:
    """Let a unit compute its part of the network in another way while a rule makes its ticks."""
    own, unit.piece = unit.piece, piece.train(unit.piece.training)
    try:
        yield from ticks
    finally:
        unit.piece = own


@dataclass
class Joint:
    """Pieces between two places where a segment may end, with what they keep for the backward pass.

    Attributes:
        pieces: pieces of the chain.
        entering: bytes of every storage that enters: all that is kept if a segment begins here.
        inside: bytes of every storage that is kept when the pieces are computed.
        weights: bytes of the parameters' gradients, which exist once the backward pass has come
            through.
    """

    pieces: list[nn.Module]
    entering: dict[int, int]
    inside: dict[int, int]
    weights: int


def most_kept(joints: Sequence[Joint], starts: Sequence[int]) -> int:
    """The most bytes that are kept at once if segments begin at these joints.

    Each storage counts once.
    """
    most, entered = 0, dict[int, int]()
    for start, end in pairwise([*starts, len(joints)]):
        entered |= joints[start].entering
        storages = dict(entered)
        for joint in joints[start:end]:
            storages |= joint.inside
        # of the largest tensor and of the one that it was computed from
        gradients = 2 * max(storages.values())
        weights = sum(joint.weights for joint in joints[start:])
        most = max(most, sum(storages.values()) + gradients + weights)
    return most


def checkpointed_piece(learner: Learner, batch_size: int, count: int | None) -> Checkpointed:
    """The network of a learner with one unit, in segments.

    Candidates are cut between blocks, where one tensor passes, and between layers. For each number
    of segments the costliest is made as cheap as possible. A step is predicted for those that keep
    the least and for the finest, and the candidate with the lowest peak is taken.

    Args:
        count: number of segments; None: the best number.

    Raises:
        InvalidInput: the network cannot be cut into so many segments, or it changes its images in
            place.
    """
    plans = []
    for at in ("block", "layer"):
        sample, _ = blank_batch(learner, 2)  # only its size is used
        chain = split(learner.model, at, sample, learner.leaves, output=learner.output)
        joints = find_joints(chain, learner, batch_size)
        costs = [sum(joint.inside.values()) for joint in joints]
        for number, lasts in enumerate(balances(costs), 1):
            if count in (None, number):
                starts = [0, *(last + 1 for last in lasts)]
                plans.append((number < len(joints), most_kept(joints, starts), starts, joints))
    if not plans:
        raise InvalidInput(
            f"Cannot cut into {count} segments: this network has {len(joints)} layers. Give 1 to "
            f"{len(joints)}."
        )
    likely = sorted(plans, key=lambda plan: plan[:2])[:CANDIDATES]
    candidates = [assemble(starts, joints) for _, _, starts, joints in likely]
    return min(candidates, key=lambda piece: predicted_peak(piece, learner, batch_size))


def assemble(starts: Sequence[int], joints: Sequence[Joint]) -> Checkpointed:
    """The network in segments that begin at these joints."""
    groups = [joints[start:end] for start, end in pairwise([*starts, len(joints)])]
    return Checkpointed(
        [Segment([piece for joint in group for piece in joint.pieces]) for group in groups]
    )


def predicted_peak(piece: Checkpointed, learner: Learner, batch_size: int) -> int:
    """The most bytes alive at once in a step with this piece, beyond those between steps."""
    with pretended((learner, piece)) as (copied, double), Footprint(copied) as footprint:
        [unit] = copied.units
        unit.piece = double
        if unit.optimizer is not None:
            # an update would add its state, which is the same for every candidate
            unit.optimizer.step = lambda: None
        copied.train()
        images, labels = blank_batch(copied, batch_size)
        copied.step(images, labels)
        return max(size for _, size in footprint.timeline.points)


def blank_batch(learner: Learner, batch_size: int) -> tuple[Tensor, Tensor]:
    images = torch.empty(
        batch_size, *learner.image_shape, dtype=learner.image_type, device=device_of(learner.model)
    )
    return images, torch.zeros(batch_size, dtype=torch.int64, device=images.device)


def find_joints(chain: Chain, learner: Learner, batch_size: int) -> list[Joint]:
    """The joints of a chain: the pieces between the places where a segment may end.

    A piece that changes its input, or that of a piece before it, in place could not be recomputed,
    so it is joined to the piece that made the tensor.

    Raises:
        InvalidInput: the images are changed.
    """
    joints: list[Joint] = []
    with pretended((learner, list(chain.pieces))) as (copied, doubles):
        copied.train()
        activations: Activations = blank_batch(copied, batch_size)[:1]
        # the tensors that entered each joint, with their versions then
        history: list[list[tuple[Tensor, int]]] = []
        alive = []  # keeps storages alive, so that each has its own identity
        for piece, double in zip(chain.pieces, doubles, strict=True):
            alive.append(activations)
            entered = [value for value in activations if isinstance(value, Tensor)]
            history.append([(value, value._version) for value in entered])
            with SavedBytes(copied) as saved, precision(activations, copied.units[0].amp):
                activations = double.train()(*activations)
            weights = sum(
                p.numel() * p.element_size() for p in piece.parameters() if p.requires_grad
            )
            joints.append(
                Joint([piece], dict(map(storage_bytes, entered)), saved.units[0], weights)
            )
            changed = [
                any(value._version != version for value, version in values) for values in history
            ]
            if any(changed):
                first = changed.index(True) - 1  # the joint that made the changed tensor
                if first < 0:
                    raise InvalidInput(
                        "Cannot recompute the network: it changes its images in place. Let its "
                        "first operation make a new tensor, or train with the rule 'global'."
                    )
                joints[first:] = [merged(joints[first:])]
                history[first + 1 :] = []
    return joints


def merged(joints: Sequence[Joint]) -> Joint:
    """Several joints as a single one, inside which no segment can end."""
    inside: dict[int, int] = {}
    for joint in joints:
        inside |= joint.inside
    pieces = [piece for joint in joints for piece in joint.pieces]
    return Joint(pieces, joints[0].entering, inside, sum(joint.weights for joint in joints))


def checkpointed(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
    *,
    segments: int | None = None,
) -> Iterator[Tick]:
    """Global backpropagation that keeps few features and recomputes the rest.

    Args:
        segments: number of segments, each of which keeps its input alone; by default the number
            that uses the least memory.

    Raises:
        InvalidInput: the network cannot be cut into so many segments, or the learner has more than
            one unit.
    """
    if len(learner.units) != 1:
        raise InvalidInput(
            f"Cannot train {len(learner.units)} units by the rule 'checkpointed': it trains a "
            "network as one unit. Localize with at=1."
        )
    learner.structure.check(learner.units)  # before a copy is tried
    learner.step_singly()  # segments set random generators, which cannot be recorded
    piece = checkpointed_piece(learner, max(len(indices) for indices in batches.order(0)), segments)
    return with_piece(
        learner.units[0], piece, simultaneous(learner, batches, epochs, schedule, start)
    )
