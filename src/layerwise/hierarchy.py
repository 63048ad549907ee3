"""Hierarchies: numbers of convolutions (VGG) or residual blocks (ResNet) between downsamplings.

A hierarchy is a tuple of positive integers, one per stage, shallow to deep, such as ``(2, 2, 2,
2)`` for ResNet18. This module imports no torch, so the command line can check a hierarchy at once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from layerwise.errors import InvalidInput, brief

Hierarchy = tuple[int, ...]
MOST_LAYERS = 1000  # convolutions or blocks of a network
MOST_TEXT = 10_000  # characters of a list of numbers


def parse_hierarchy(value: str | Iterable[int]) -> Hierarchy:
    """Read a hierarchy from ``"1,1,2,2"``, ``"[1,1,2,2]"`` or a sequence of integers.

    Raises:
        InvalidInput: an entry is not a positive whole number, or they are too many.
    """
    counts = whole_numbers(value)
    if sum(counts) > MOST_LAYERS:
        raise InvalidInput(
            f"Cannot use hierarchy {brief(repr(value))}: it has more than {MOST_LAYERS} layers. "
            "Give fewer."
        )
    if not counts or min(counts) < 1:
        raise InvalidInput(
            f"Cannot use hierarchy {brief(repr(value))}: it is not a list of positive whole "
            "numbers. Give one number of layers per stage, shallow to deep, such as 1,1,2,2."
        )
    return counts


def whole_numbers(value: str | Iterable[int]) -> tuple[int, ...]:
    """Read a list of whole numbers as users write one; empty if it cannot be read."""
    if isinstance(value, str) and len(value) > MOST_TEXT:
        return ()
    try:
        entries = value.strip("[]() ").split(",") if isinstance(value, str) else list(value)
        if any(isinstance(entry, float | bool) for entry in entries):
            raise ValueError
        return tuple(int(entry) for entry in entries)
    except (TypeError, ValueError):
        return ()


def parse_downsampling(value: str | Iterable[int]) -> tuple[int, ...]:
    """Read the numbers of convolutions or blocks after which maps are halved.

    They are counted from the first, and written as ``"1,4,6"`` or as integers.

    Raises:
        InvalidInput: an entry is not a whole number, or they do not increase.
    """
    places = whole_numbers(value)
    if not places or any(place >= following for place, following in pairwise(places)):
        raise InvalidInput(
            f"Cannot use downsample_after {brief(repr(value))}: it is not a list of increasing "
            "whole numbers. "
            "Give the numbers of convolutions or blocks after which maps are halved, such as "
            "1,4,6."
        )
    return places


def check_downsampling(name: str, places: Sequence[int], first: int, last: int) -> None:
    """Refuse places to halve maps that lie before the first or behind the last of a network.

    Raises:
        InvalidInput: naming the place, and the first and the last.
    """
    for place in places:
        if not first <= place <= last:
            raise InvalidInput(
                f"Cannot use downsample_after {brief(place)}: it is not a place in {name} of this "
                "depth. "
                f"Give numbers from {first} to {last}."
            )


@dataclass(frozen=True)
class Design:
    """The depths of a network's stages, and the places where its maps are halved.

    Attributes:
        hierarchy: convolutions or blocks per stage; a stage is a width.
        downsample_after: numbers of convolutions or blocks after which maps are halved; None: where
            stages end, as published.
    """

    hierarchy: Hierarchy
    downsample_after: tuple[int, ...] | None = None

    @property
    def text(self) -> str:
        """The design in words: ``[1,1,2,2]``, or ``[2,2,2,2] halved after 1,4,6``."""
        halved = (
            f" halved after {','.join(map(str, self.downsample_after))}"
            if self.downsample_after is not None
            else ""
        )
        return format_hierarchy(self.hierarchy) + halved

    def describe(self) -> dict[str, list[int] | None]:
        """The design as the commands' JSON shows it."""
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
    """The index of the first deep stage.

    Stages are split in the middle; the middle one of an odd number is deep (k < n/2).
    """
    return stages // 2


def shallow(hierarchy: Hierarchy) -> Hierarchy:
    """The counts of the shallow stages: the first two of ResNet18's four and of VGG16's five."""
    return hierarchy[: deep_start(len(hierarchy))]


def deep(hierarchy: Hierarchy) -> Hierarchy:
    """The counts of the stages that are not shallow."""
    return hierarchy[deep_start(len(hierarchy)) :]


def fulfils_equation_7(hierarchy: Hierarchy, strict: bool = True) -> bool:
    """Whether every shallow stage has fewer convolutions than every deep one.

    Equation 7: k(d_i) < k(d_j) for all i shallow, j deep. The paper writes of layers; here d_i is a
    stage and k(d_i) its number of convolutions (VGG) or blocks (ResNet). The paper's [1,1,2,2] and
    [1,2,6,3] fulfil it, its [1,1,1,1] and [2,3,6,3] only with ≤.

    Args:
        hierarchy: counts per stage.
        strict: read the sign as <; otherwise as ≤, "no more than".
    """
    most, fewest = max(shallow(hierarchy), default=0), min(deep(hierarchy))
    return most < fewest if strict else most <= fewest


def downsamplings(hierarchy: Hierarchy) -> Hierarchy:
    """The numbers of convolutions or blocks after which shallow stages end, and maps are halved."""
    return tuple(accumulate(shallow(hierarchy)))


def downsamples_earlier(hierarchy: Hierarchy, reference: Hierarchy) -> bool:
    """Whether maps are halved earlier than in a reference: equation 8 in relation to it.

    No shallow layer's map is larger and at least one is smaller. That is: no shallow stage ends
    after more convolutions than the reference's, and at least one ends after fewer.
    """
    pairs = list(zip(downsamplings(hierarchy), downsamplings(reference), strict=True))
    return all(end <= theirs for end, theirs in pairs) and any(
        end < theirs for end, theirs in pairs
    )


def segments(design: Design) -> Hierarchy:
    """The numbers of convolutions or blocks between halvings of the map, which equation 7 counts.

    As published, they are the hierarchy: a pooling behind the last convolution begins no segment.
    """
    if design.downsample_after is None:
        return design.hierarchy
    total = sum(design.hierarchy)
    ends = (*(place for place in design.downsample_after if place < total), total)
    return tuple(end - begin for begin, end in pairwise((0, *ends)))


def shallow_scale(hierarchy: Hierarchy, resolutions: Sequence[int], layers: int) -> float:
    """The mean height in pixels of the maps of the first ``layers`` convolutions or blocks.

    It is Scale(X_i), i ≤ k, of equation 8. Deep stages count with the first deep stage's
    resolution: the equation is of the shallow part, and alone it would put every convolution into
    the last stage.

    Args:
        hierarchy: counts per stage.
        resolutions: pixels a side of the maps of each stage.
        layers: k: the number of layers in the shallow stages of the reference hierarchy.
    """
    start = deep_start(len(hierarchy))
    heights = [
        height
        for count, height in zip(hierarchy[:start], resolutions, strict=False)
        for _ in range(count)
    ][:layers]
    return (sum(heights) + (layers - len(heights)) * resolutions[start]) / layers


def accelerated(hierarchy: Hierarchy, reference: Hierarchy) -> bool:
    """Whether a hierarchy is a reference with convolutions moved from shallow to deep stages.

    Their number is equal, no shallow stage has more than the reference's, no deep stage has fewer,
    and they differ: ResNet18's [1,1,2,4] against [2,2,2,2].
    """
    shallow_pairs = zip(shallow(hierarchy), shallow(reference), strict=True)
    deep_pairs = zip(deep(hierarchy), deep(reference), strict=True)
    fewer = all(count <= theirs for count, theirs in shallow_pairs)
    more = all(count >= theirs for count, theirs in deep_pairs)
    return hierarchy != reference and equal_depth(hierarchy, reference) and fewer and more


def equal_depth(hierarchy: Hierarchy, reference: Hierarchy) -> bool:
    """Whether both have as many convolutions or blocks."""
    return sum(hierarchy) == sum(reference)


def deeper(hierarchy: Hierarchy, reference: Hierarchy) -> bool:
    """Whether a hierarchy has more convolutions or blocks than a reference."""
    return sum(hierarchy) > sum(reference)


def relation(hierarchy: Hierarchy, reference: Hierarchy) -> str:
    """The relation of a hierarchy to a reference, in a word or two.

    It is "the same", "accelerated", "equal depth", "deeper" or "shallower".
    """
    if hierarchy == reference:
        return "the same"
    if accelerated(hierarchy, reference):
        return "accelerated"
    if equal_depth(hierarchy, reference):
        return "equal depth"
    return "deeper" if deeper(hierarchy, reference) else "shallower"
