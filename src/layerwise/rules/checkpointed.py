"""Gradient checkpointing: global backpropagation that keeps few features.

It is the strong baseline for the memory of local learning. The network is cut into segments. Some
keep their input alone and are recomputed when the backward pass comes to them; the others keep
everything. By default all but the last are recomputed, which would be at once. With a limit of
memory, as little is recomputed as keeps to it (``checkpoint_plan``).
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from layerwise.core.cuts import balances
from layerwise.core.frozen import Entered
from layerwise.core.later import Joined
from layerwise.core.learner import Learner
from layerwise.core.split import Chain, split
from layerwise.core.unit import Activations, Unit, precision
from layerwise.errors import InvalidInput, TooLittleMemory
from layerwise.memory.accounting import persistent_bytes, storage_bytes
from layerwise.memory.fake_step import Footprint, SavedBytes, blank_batch, pretended
from layerwise.rules.base import START, Position, Schedule, Tick
from layerwise.rules.checkpoint_plan import Joint, Plan, least_work, merged, most_kept
from layerwise.rules.feature_cache import Batches
from layerwise.rules.simultaneous import simultaneous
from layerwise.utils.multiply_adds import MultiplyAdds
from layerwise.utils.sizes import Bytes, format_size

CANDIDATES = 6  # number of ways to cut for which a step is predicted
TRIES = 6  # plans for a limit whose steps are predicted, for each kind of cut


class Checkpointed(nn.Module):
    """Segments of a network, of which some are recomputed during the backward pass.

    Results are those of the plain network to the bit. Dropout is drawn again from the same state of
    the random generator. Buffers, such as running statistics, enter the second computation as they
    entered the first, and keep the values that the first gave them.

    Args:
        segments: one after the other.
        recomputed: whether each is recomputed; None: all but the last.
    """

    def __init__(
        self, segments: Sequence[nn.Module], recomputed: Sequence[bool] | None = None
    ) -> None:
        super().__init__()
        self.segments = nn.ModuleList(segments)
        self.recomputed = [True] * (len(segments) - 1) + [False]
        if recomputed is not None:
            self.recomputed = list(recomputed)

    def forward(self, *activations: Any) -> Activations:
        for segment, recomputed in zip(self.segments, self.recomputed, strict=True):
            if recomputed and torch.is_grad_enabled():
                activations = checkpoint(
                    segment,
                    *activations,
                    use_reentrant=False,
                    context_fn=partial(contexts, segment),
                )
            else:
                activations = segment(*activations)
        return activations


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


def joints_of(learner: Learner, batch_size: int) -> Iterator[list[Joint]]:
    """What a network can be cut into: blocks, between which one tensor passes, and layers."""
    sample, _ = blank_batch(learner, 2)  # only its size is used
    for at in ("block", "layer"):
        chain = split(learner.model, at, sample, learner.leaves, output=learner.output)
        yield find_joints(chain, learner, batch_size)


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
    for joints in joints_of(learner, batch_size):
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


def piece_within(learner: Learner, batch_size: int, limit: int) -> Checkpointed:
    """The network of a learner with one unit, with as little recomputed as a limit allows.

    A plan is reckoned and its step predicted; by what they differ, the next one's limit is moved.

    Args:
        limit: bytes of a step, counted whole.

    Raises:
        TooLittleMemory: no plan keeps to the limit.
        InvalidInput: the network changes its images in place.
    """
    spare = limit - lasting_bytes(learner)
    fitting: list[tuple[int, int, Checkpointed]] = []
    for joints in joints_of(learner, batch_size):
        reckoned, plans = spare, set[Plan]()
        for _ in range(TRIES):
            plan = least_work(joints, reckoned)
            if plan is None:  # what is reckoned is more than what a step needs
                reckoned += spare // 10
                continue
            if plan in plans:
                break
            plans.add(plan)
            piece = planned(plan, joints)
            peak = predicted_peak(piece, learner, batch_size)
            if peak <= spare:
                fitting.append((plan.work, peak, piece))
            reckoned += spare - peak
    if fitting:
        return min(fitting, key=lambda found: found[:2])[2]
    piece = checkpointed_piece(learner, batch_size, None)
    least = predicted_peak(piece, learner, batch_size)
    if least > spare:
        raise TooLittleMemory(
            f"Cannot checkpoint within {format_size(limit)}: a step needs "
            f"{format_size(least + limit - spare, up=True)} or more. Give as much, or lower the "
            "batch size."
        )
    return piece


def lasting_bytes(learner: Learner) -> int:
    """Bytes that stay between steps, once the optimizer has its state."""
    with pretended(learner) as copied, Footprint(copied):
        copied.train()
        copied.step(*blank_batch(copied, 2))
        return persistent_bytes(copied)


def planned(plan: Plan, joints: Sequence[Joint]) -> Checkpointed:
    """The network in the segments of a plan."""
    segments = [
        Joined([piece for joint in joints[start:end] for piece in joint.pieces])
        for start, end, _ in plan.segments
    ]
    return Checkpointed(segments, [recomputed for *_, recomputed in plan.segments])


def assemble(starts: Sequence[int], joints: Sequence[Joint]) -> Checkpointed:
    """The network in segments that begin at these joints."""
    groups = [joints[start:end] for start, end in pairwise([*starts, len(joints)])]
    return Checkpointed(
        [Joined([piece for joint in group for piece in joint.pieces]) for group in groups]
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
            with (
                SavedBytes(copied) as saved,
                precision(activations, copied.units[0].amp),
                MultiplyAdds() as counter,
            ):
                activations = double.train()(*activations)
            weights = sum(
                p.numel() * p.element_size() for p in piece.parameters() if p.requires_grad
            )
            work = counter.total
            joints.append(
                Joint([piece], dict(map(storage_bytes, entered)), saved.units[0], weights, work)
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


def checkpointed(
    learner: Learner,
    batches: Batches,
    epochs: int,
    schedule: Schedule,
    start: Position = START,
    *,
    segments: int | None = None,
    limit: Bytes | None = None,
) -> Iterator[Tick]:
    """Global backpropagation that keeps few features and recomputes the rest.

    Args:
        segments: number of segments, each of which keeps its input alone; by default the number
            that uses the least memory.
        limit: bytes of a step, counted whole; as little is then recomputed as keeps to it.

    Raises:
        TooLittleMemory: no plan keeps to the limit.
        InvalidInput: the network cannot be cut into so many segments or changes its images in
            place, segments and limit are both given, or the learner has more than one unit or
            frozen ones.
    """
    if len(learner.units) != 1:
        raise InvalidInput(
            f"Cannot train {len(learner.units)} units by the rule 'checkpointed': it trains a "
            "network as one unit. Localize with at=1."
        )
    if isinstance(learner.units[0].piece, Entered):
        raise InvalidInput(
            "Cannot train behind frozen units by the rule 'checkpointed': it computes the whole "
            "network anew. Give the rule 'simultaneous', or leave train_from out."
        )
    learner.structure.check(learner.units)  # before a copy is tried
    learner.step_singly()  # segments set random generators, which cannot be recorded
    batch_size = max(len(indices) for indices in batches.order(0))
    if limit is not None and segments is not None:
        raise InvalidInput(
            "Cannot use segments with a limit of memory: the limit decides what is recomputed. "
            "Give one of them."
        )
    if limit is None:
        piece = checkpointed_piece(learner, batch_size, segments)
    else:
        piece = piece_within(learner, batch_size, limit)
    return with_piece(
        learner.units[0], piece, simultaneous(learner, batches, epochs, schedule, start)
    )
