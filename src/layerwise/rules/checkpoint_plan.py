"""Plans of gradient checkpointing: which segments of a network are recomputed.

A plan is reckoned from what each piece keeps for the backward pass and from the work of computing
it again. Nothing is computed here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import nn

FRONT = 64  # plans of a part of the network that are gone on with: others differ little in bytes


@dataclass
class Joint:
    """Pieces between two places where a segment may end, with what they keep for the backward pass.

    Attributes:
        pieces: pieces of the chain.
        entering: bytes of every storage that enters: all that is kept if a segment begins here.
        inside: bytes of every storage that is kept when the pieces are computed.
        weights: bytes of the parameters' gradients, which exist once the backward pass has come
            through.
        work: multiply-adds of the pieces' forward pass.
    """

    pieces: list[nn.Module]
    entering: dict[int, int]
    inside: dict[int, int]
    weights: int
    work: int = 0

    def storages(self) -> dict[int, int]:
        """Bytes of every storage that is kept or enters."""
        return self.entering | self.inside


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


@dataclass(frozen=True)
class Plan:
    """Segments of a network, and what they cost.

    Attributes:
        kept: bytes that they keep until the backward pass.
        work: multiply-adds that are made a second time.
        segments: of each, its first joint, the joint behind its last, and whether it is recomputed.
    """

    kept: int = 0
    work: int = 0
    segments: tuple[tuple[int, int, bool], ...] = ()

    @property
    def recomputes_last(self) -> bool:
        """Whether the last segment is recomputed, and keeps but what enters it."""
        return bool(self.segments) and self.segments[-1][2]


def least_work(joints: Sequence[Joint], limit: int) -> Plan | None:
    """The plan of the least work whose bytes, as reckoned, stay within a limit, if there is one.

    It is found by dynamic programming over the places where a segment may end. Of the plans that
    reach a place, those remain that no other beats in both bytes and work. Bytes are those of
    ``most_kept``: when the backward pass comes to a segment, what the segments before it keep and
    what the segment itself keeps once it is computed again are alive, with two gradients.
    """
    fronts: list[list[Plan]] = [[Plan()]] + [[] for _ in joints]
    for start, first in enumerate(joints):
        plans = best(fronts[start], limit)
        weights = sum(joint.weights for joint in joints[start:])
        before = joints[start - 1].storages() if start else {}
        storages, work = dict(first.entering), 0
        for end, joint in enumerate(joints[start:], start + 1):
            storages |= joint.inside
            work += joint.work
            need = sum(storages.values()) + 2 * max(storages.values()) + weights
            for plan in plans:
                if plan.kept + need > limit:
                    continue
                there = {} if plan.recomputes_last else before
                if end == start + 1:  # neighbours that are kept are segments of their own
                    fronts[end].append(extended(plan, start, end, beyond(there, storages), None))
                entering = beyond(there, first.entering)
                fronts[end].append(extended(plan, start, end, entering, work))
    return min(fronts[-1], key=lambda plan: (plan.work, plan.kept), default=None)


def beyond(there: Mapping[int, int], storages: Mapping[int, int]) -> int:
    """Bytes of the storages that are not there already."""
    return sum(size for storage, size in storages.items() if storage not in there)


def extended(plan: Plan, start: int, end: int, kept: int, work: int | None) -> Plan:
    """A plan with another segment, recomputed at the cost of some work, or kept."""
    segment = (start, end, work is not None)
    return Plan(plan.kept + kept, plan.work + (work or 0), (*plan.segments, segment))


def best(plans: Sequence[Plan], limit: int) -> list[Plan]:
    """The plans that no other beats in both bytes and work, thinned out to about ``FRONT``."""
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.kept, plan.work)):
        if not front or plan.work < front[-1].work:
            if front and (plan.kept - front[-1].kept) * FRONT < limit and len(front) > FRONT:
                front.pop()
            front.append(plan)
    return front


def merged(joints: Sequence[Joint]) -> Joint:
    """Several joints as a single one, inside which no segment can end."""
    inside: dict[int, int] = {}
    for joint in joints:
        inside |= joint.inside
    pieces = [piece for joint in joints for piece in joint.pieces]
    weights = sum(joint.weights for joint in joints)
    work = sum(joint.work for joint in joints)
    return Joint(pieces, joints[0].entering, inside, weights, work)
