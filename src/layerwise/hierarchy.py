"""Hierarchies: how many convolutions (VGG) or residual blocks (ResNet) stand between two downsamplings.

A hierarchy is a tuple of positive integers, one per stage, shallow to deep, such as ``(2, 2, 2, 2)`` for ResNet18. It imports
no torch, so that the command line can check one at once.
"""

from collections.abc import Iterable

from layerwise.errors import InvalidInput

Hierarchy = tuple[int, ...]


def parse_hierarchy(value: str | Iterable[int]) -> Hierarchy:
    """Read a hierarchy from ``"1,1,2,2"``, ``"[1,1,2,2]"`` or a sequence of integers.

    Raises:
        InvalidInput: an entry is not a positive whole number.
    """
    try:
        entries = value.strip("[]() ").split(",") if isinstance(value, str) else list(value)
        if any(isinstance(entry, float | bool) for entry in entries):
            raise ValueError
        counts = tuple(int(entry) for entry in entries)
    except (TypeError, ValueError):
        counts = ()
    if not counts or min(counts) < 1:
        raise InvalidInput(
            f"hierarchy {value!r} is not a list of positive whole numbers: give one number of layers per stage, "
            "shallow to deep, such as 1,1,2,2"
        )
    return counts


def check_stages(name: str, hierarchy: Hierarchy, published: Hierarchy) -> None:
    """Refuse a hierarchy that has not as many stages as the network.

    Raises:
        InvalidInput: the lengths differ.
    """
    if len(hierarchy) != len(published):
        raise InvalidInput(
            f"hierarchy {format_hierarchy(hierarchy)} has {len(hierarchy)} stages, {name} has {len(published)}: "
            f"give {len(published)} numbers, such as {format_hierarchy(published)}"
        )


def format_hierarchy(hierarchy: Iterable[int]) -> str:
    """Write a hierarchy the way the paper does: ``[1,1,2,2]``."""
    return "[" + ",".join(map(str, hierarchy)) + "]"
