"""Global training within the memory of local training, which is to be compared with it.

Its gradients are accumulated over the fewest parts of a batch, or as little of it is recomputed, as
keeps to the predicted peak of the rule ``simultaneous``.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Any

from layerwise.errors import InvalidInput, TooLittleMemory
from layerwise.utils.sizes import Bytes, format_size

# a rule and options of it -> what is predicted of its step
Predict = Callable[[str, dict[str, Any]], dict[str, Any]]
# such a function, images of a batch, bytes -> what is predicted within them; None: nothing is
Opponent = Callable[[Predict, int, int], dict[str, Any] | None]

LOCAL = "simultaneous"  # the rule whose peak they keep to


def accumulated(predict: Predict, batch_size: int, limit: int) -> dict[str, Any] | None:
    """Global training in the fewest parts of a batch, of 2 images or more, that keep to a limit.

    From two parts on, the peak falls with their number. A batch in one part is apart: no gradients
    of earlier parts wait while it passes, so it may need less than two.
    """

    def in_parts(count: int) -> dict[str, Any]:
        return predict("global", {"micro_batches": count}) | {"micro_batches": count}

    def fits(count: int) -> bool:
        return bool(in_parts(count)["predicted_peak_bytes"] <= limit)

    if fits(1):
        return in_parts(1)
    counts = range(2, batch_size // 2 + 1)
    fitting = bisect_left(counts, True, key=fits)
    return in_parts(counts[fitting]) if fitting < len(counts) else None


def planned(predict: Predict, batch_size: int, limit: int) -> dict[str, Any] | None:
    """Global training that recomputes as little as keeps to a limit."""
    try:
        return predict("checkpointed", {"limit": Bytes(limit), "segments": None})
    except TooLittleMemory:
        return None


OPPONENTS: dict[str, Opponent] = {
    "global-accumulated": accumulated,
    "checkpointed-planned": planned,
}


def opponents_among(names: Sequence[str], limit: int | None) -> list[str]:
    """The names of ``OPPONENTS`` among those of rules to profile.

    Args:
        limit: bytes that the largest batch is looked for in, if it is.

    Raises:
        InvalidInput: it is looked for, and there is such a name.
    """
    opponents = [name for name in names if name in OPPONENTS]
    if opponents and limit is not None:
        raise InvalidInput(
            f"Cannot use --memory with {opponents[0]}: its memory is that of {LOCAL}. Give one of "
            "them."
        )
    return opponents


def add_opponents(
    rules: dict[str, Any], names: Sequence[str], predict: Predict, batch_size: int
) -> None:
    """Add what is predicted of global training within the peak of local training, by rule.

    A line says where nothing keeps to that peak.
    """
    for name in names:
        limit = rules[LOCAL]["predicted_peak_bytes"]
        rule = OPPONENTS[name](predict, batch_size, limit)
        if rule is None:
            print(f"{name}: nothing keeps to the {format_size(limit)} of {LOCAL}", flush=True)
        else:
            rules[name] = rule
