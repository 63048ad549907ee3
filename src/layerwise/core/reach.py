"""Reach of losses: the first unit that the loss of each unit reaches.

A loss reaches neighbouring units: its own and some before it. ``reach`` has an index for each unit:
its own is plain local learning, 0 is all units so far, and one behind its own is a head alone: the
head learns from the feature, and no gradient goes into any unit. A span of w units reaches back to
unit max(0, k − w + 1) from unit k.
"""

from collections.abc import Sequence
from typing import NoReturn

from layerwise.core.unit import Unit
from layerwise.errors import InvalidInput, brief
from layerwise.utils.options import is_whole_number

Reach = tuple[int, ...]
# of all units, of each, or as text: 2; 1,1,2; or 1,4=3, which is 1 and from unit 4 on 3
Span = int | str | Sequence[int]


def local_reach(count: int) -> Reach:
    """The reach of so many losses, each of its own unit alone."""
    return tuple(range(count))


def reach_of_span(span: Span, count: int) -> Reach:
    """The first unit that each of ``count`` losses reaches.

    Raises:
        InvalidInput: the chain has no such span, or another number of units.
    """
    spans = spans_of(span, count)
    for number in spans:
        if not 1 <= number <= count:
            raise InvalidInput(
                f"Cannot use span {number}: the chain has {count} units. Give 1 to {count}."
            )
    return tuple(max(0, index - number + 1) for index, number in enumerate(spans))


def spans_of(span: Span, count: int) -> list[int]:
    """A span for each of ``count`` units.

    Raises:
        InvalidInput: they are of another number of units, or no numbers.
    """
    spans = parse_spans(span, count) if isinstance(span, str) else span
    if type(spans) is int:
        return [spans] * count
    if isinstance(spans, Sequence) and all(type(number) is int for number in spans):
        if len(spans) == count:
            return list(spans)
        raise InvalidInput(
            f"Cannot use span {brief(span_text(spans))}: it has {len(spans)} units, and the "
            f"chain has {count}. Give one number for all, or {count}."
        )
    refuse_text(span)


def parse_spans(text: str, count: int) -> int | list[int]:
    """Spans as text: one number, numbers joined by commas, or numbers from a unit on.

    Raises:
        InvalidInput: they are none, or are to begin at a unit that the chain does not have.
    """
    words = text.replace(" ", "").split(",")
    pairs = [word.split("=") for word in words]
    numbers = [number for pair in pairs for number in pair]
    if not all(map(is_whole_number, numbers)) or max(map(len, pairs)) > 2:
        refuse_text(text)
    if "=" not in text:
        return [int(word) for word in words] if len(words) > 1 else int(text)
    if len(pairs[0]) == 1:
        pairs[0] = ["0", *pairs[0]]
    if any(len(pair) == 1 for pair in pairs):
        refuse_text(text)
    starts = [int(start) for start, _ in pairs]
    if sorted(set(starts)) != starts or starts[-1] >= count:
        raise InvalidInput(
            f"Cannot use span {brief(text)}: it names units {', '.join(map(str, starts))}, and the "
            f"chain has 0 to {count - 1}. Give such units, in order."
        )
    spans = [1] * count
    for start, number in pairs:
        spans[int(start) :] = [int(number)] * (count - int(start))
    return spans


def refuse_text(span: object) -> NoReturn:
    raise InvalidInput(
        f"Cannot use span {brief(repr(span))}: it is not a number of units. Give one, such as 2; "
        "one for each unit, such as 1,1,2; or 1,4=3: 1, and from unit 4 on 3."
    )


def span_of_reach(reach: Reach) -> int | tuple[int, ...]:
    """Number of units that a loss reaches: one for all, else one for each unit, 0 of a head alone.

    The first losses of a chain reach all units so far if they could reach more.
    """
    spans = tuple(index - first + 1 for index, first in enumerate(reach))
    most = max(spans)
    alike = spans == tuple(min(most, index + 1) for index in range(len(reach)))
    return most if alike else spans


def span_text(span: int | Sequence[int]) -> str:
    """A span as the command line spells it."""
    return str(span) if isinstance(span, int) else ",".join(map(str, span))


def last_losses(reach: Reach) -> list[int]:
    """The unit whose loss is the last to reach each unit; itself, if none does."""
    last = list(range(len(reach)))
    for index, first in enumerate(reach):
        last[first : index + 1] = [index] * (index + 1 - first)
    return last


def check_reach(reach: Reach, units: Sequence[Unit]) -> None:
    """Refuse a reach under which a unit would not learn, or units that cannot be in a window.

    Raises:
        InvalidInput: as said.
    """
    if len(reach) != len(units) or not all(
        0 <= first <= index + 1 for index, first in enumerate(reach)
    ):
        raise InvalidInput(
            f"Cannot use reach {brief(repr(reach))}: it is not of this chain. Give each of its "
            f"{len(units)} units the first one that its loss reaches, at most one behind itself."
        )
    last = last_losses(reach)
    for index, first in enumerate(reach):
        if first > index == last[index]:
            raise InvalidInput(
                f"Cannot use reach {brief(repr(reach))}: no loss reaches unit {index} "
                f"({units[index].name}), so it would not learn. Let one reach it."
            )
    if reach != local_reach(len(units)) and any(unit.scaler is not None for unit in units):
        raise InvalidInput(
            f"Cannot use span {span_text(span_of_reach(reach))} with amp=torch.float16: each unit "
            "scales its own loss. Give amp=torch.bfloat16."
        )
