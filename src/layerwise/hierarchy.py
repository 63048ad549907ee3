"""Hierarchies: how many convolutions (VGG) or residual blocks (ResNet) stand between two
downsamplings.

A hierarchy is a tuple of positive integers, one per stage, shallow to deep, such as ``(2, 2, 2,
2)`` for ResNet18. It imports no torch, so that the command line can check one at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from layerwise.errors import InvalidInput

Hierarchy = tuple[int, ...]


def parse_hierarchy(value: str | Iterable[int]) -> Hierarchy:
    """Read a hierarchy from ``"1,1,2,2"``, ``"[1,1,2,2]"`` or a sequence of integers.

    Raises:
        InvalidInput: an entry is not a positive whole number.
    """
    counts = whole_numbers(value)
    if not counts or min(counts) < 1:
        raise InvalidInput(
            f"Cannot use hierarchy {value!r}: it is not a list of positive whole numbers. Give one "
            "number of layers per stage, shallow to deep, such as 1,1,2,2."
        )
    return counts


def whole_numbers(value: str | Iterable[int]) -> tuple[int, ...]:
    """Read a list of whole numbers as users write one; nothing where it cannot be read."""
    try:
        entries = value.strip("[]() ").split(",") if isinstance(value, str) else list(value)
        if any(isinstance(entry, float | bool) for entry in entries):
            raise ValueError
        return tuple(int(entry) for entry in entries)
    except (TypeError, ValueError):
        return ()


def parse_downsampling(value: str | Iterable[int]) -> tuple[int, ...]:
    """Read after how many convolutions or blocks, counted from the first, maps are halved:
    ``"1,4,6"`` or integers.

    Raises:
        InvalidInput: an entry is no whole number, or they do not increase.
    """
    places = whole_numbers(value)
    if not places or any(one >= other for one, other in pairwise(places)):
        raise InvalidInput(
            f"Cannot use downsample_after {value!r}: it is not a list of increasing whole numbers. "
            "Give after how many convolutions or blocks the map is halved, such as 1,4,6."
        )
    return places


def check_downsampling(name: str, places: Sequence[int], first: int, last: int) -> None:
    """Refuse to halve a map before the first or behind the last place where a network can.

    Raises:
        InvalidInput: naming the places.
    """
    for place in places:
        if not first <= place <= last:
            raise InvalidInput(
                f"Cannot use downsample_after {place}: it is not a place in {name} of this depth. "
                f"Give numbers from {first} to {last}."
            )


@dataclass(frozen=True)
class Design:
    """What this software moves in a network: how deep its stages are, and where its maps are
    halved.

    Attributes:
        hierarchy: convolutions or blocks per stage; a stage is a width.
        downsample_after: after how many convolutions or blocks maps are halved; None: where stages
            end, as published.
    """

    hierarchy: Hierarchy
    downsample_after: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        """In words: ``[1,1,2,2]``, or ``[2,2,2,2] halved after 1,4,6``."""
        halved = (
            f" halved after {','.join(map(str, self.downsample_after))}"
            if self.downsample_after is not None
            else ""
        )
        return format_hierarchy(self.hierarchy) + halved

    def describe(self) -> dict[str, list[int] | None]:
        """As the command's JSON shows it."""
        halved = None if self.downsample_after is None else list(self.downsample_after)
        return {"hierarchy": list(self.hierarchy), "downsample_after": halved}


def design_of(entry: Mapping[str, Any]) -> Design:
    """The design that a result or an entry of ``Design.describe`` names."""
    halved = entry.get("downsample_after")
    return Design(tuple(entry["hierarchy"]), tuple(halved) if halved else None)


def check_stages(name: str, hierarchy: Hierarchy, published: Hierarchy) -> None:
    """Refuse a hierarchy that has not as many stages as the network.

    Raises:
        InvalidInput: the lengths differ.
    """
    if len(hierarchy) != len(published):
        raise InvalidInput(
            f"Cannot use hierarchy {format_hierarchy(hierarchy)}: it has {len(hierarchy)} stages, "
            f"{name} has {len(published)}. Give {len(published)} numbers, such as "
            f"{format_hierarchy(published)}."
        )


def format_hierarchy(hierarchy: Iterable[int]) -> str:
    """Write a hierarchy the way the paper does: ``[1,1,2,2]``."""
    return "[" + ",".join(map(str, hierarchy)) + "]"


def deep_start(stages: int) -> int:
    """The first deep stage: stages are split in the middle, and a middle one of an odd number is
    deep (k < n/2).
    """
    return stages // 2


def shallow(hierarchy: Hierarchy) -> Hierarchy:
    """The counts of the shallow stages: of ResNet18 the first two of four, of VGG16 the first two
    of five.
    """
    return hierarchy[: deep_start(len(hierarchy))]


def deep(hierarchy: Hierarchy) -> Hierarchy:
    """The counts of the stages that are not shallow."""
    return hierarchy[deep_start(len(hierarchy)) :]


def fulfils_equation_7(hierarchy: Hierarchy, strict: bool = True) -> bool:
    """Whether every shallow stage has fewer convolutions than every deep one: k(d_i) < k(d_j) for
    all i shallow, j deep.

    The paper writes of layers; here d_i is a stage and k(d_i) how many convolutions (VGG) or blocks
    (ResNet) it has. Its [1,1,2,2] and [1,2,6,3] fulfil this, its [1,1,1,1] and [2,3,6,3] only with
    ≤.

    Args:
        strict: read the sign as <; otherwise as ≤, "no more than".
    """
    most, fewest = max(shallow(hierarchy), default=0), min(deep(hierarchy))
    return most < fewest if strict else most <= fewest


def downsamplings(hierarchy: Hierarchy) -> Hierarchy:
    """After how many convolutions or blocks each shallow stage ends, where the map is next made
    smaller.
    """
    return tuple(accumulate(shallow(hierarchy)))


def downsamples_earlier(one: Hierarchy, other: Hierarchy) -> bool:
    """Equation 8, relative to another hierarchy: no shallow layer's map is larger, and at least one
    is smaller.

    That is: no shallow stage ends after more convolutions than the other's, and at least one ends
    after fewer.
    """
    pairs = list(zip(downsamplings(one), downsamplings(other), strict=True))
    return all(mine <= its for mine, its in pairs) and any(mine < its for mine, its in pairs)


def segments(design: Design) -> Hierarchy:
    """How many convolutions or blocks stand between two halvings of the map, which is what equation
    7 counts.

    As published, that is the hierarchy (a last pooling behind the last convolution begins no
    segment).
    """
    if design.downsample_after is None:
        return design.hierarchy
    total = sum(design.hierarchy)
    ends = (*(place for place in design.downsample_after if place < total), total)
    return tuple(end - begin for begin, end in pairwise((0, *ends)))


def shallow_scale(hierarchy: Hierarchy, resolutions: Sequence[int], layers: int) -> float:
    """Scale(X_i), i ≤ k, of equation 8: the mean height in pixels of the maps of the first
    ``layers`` convolutions or blocks.

    Deep stages count with the first deep stage's resolution: equation 8 is of the shallow part, and
    would else alone put every convolution into the last stage.

    Args:
        resolutions: pixels a side of the maps of each stage.
        layers: k; those of the shallow stages of the hierarchy that others are compared with.
    """
    start = deep_start(len(hierarchy))
    heights = [
        height
        for count, height in zip(hierarchy[:start], resolutions, strict=False)
        for _ in range(count)
    ][:layers]
    return (sum(heights) + (layers - len(heights)) * resolutions[start]) / layers


def accelerated(one: Hierarchy, other: Hierarchy) -> bool:
    """Whether one is the other with convolutions moved from shallow to deep stages, their number
    being equal.

    No shallow stage has more than the other's, no deep stage fewer, and they differ: ResNet18's
    [1,1,2,4] against [2,2,2,2].
    """
    fewer = all(mine <= its for mine, its in zip(shallow(one), shallow(other), strict=True))
    more = all(mine >= its for mine, its in zip(deep(one), deep(other), strict=True))
    return one != other and equal_depth(one, other) and fewer and more


def equal_depth(one: Hierarchy, other: Hierarchy) -> bool:
    """Whether both have as many convolutions or blocks."""
    return sum(one) == sum(other)


def deeper(one: Hierarchy, other: Hierarchy) -> bool:
    """Whether one has more convolutions or blocks than the other."""
    return sum(one) > sum(other)


def relation(one: Hierarchy, other: Hierarchy) -> str:
    """One's relation to the other in a word or two: the same, accelerated, equal depth, deeper or
    shallower.
    """
    if one == other:
        return "the same"
    if accelerated(one, other):
        return "accelerated"
    return (
        "equal depth"
        if equal_depth(one, other)
        else "deeper"
        if deeper(one, other)
        else "shallower"
    )
