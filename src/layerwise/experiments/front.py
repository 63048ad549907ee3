"""The front of accuracy against cost: what nothing else is better than."""

from collections.abc import Sequence


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether each of some points, an accuracy and a cost each, is dominated by no other.

    A point dominates another if it is at least as accurate and as cheap, and better in one of both.
    """
    return [
        not any(
            other != point and other[0] >= point[0] and other[1] <= point[1] for other in points
        )
        for point in points
    ]
