"""Agreement: ranks that begin only if all can, on the same configuration, data and versions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from layerwise.distributed.world import REFUSALS, gathered, world
from layerwise.errors import InvalidInput, brief

Decided = TypeVar("Decided")


@contextmanager
def together() -> Iterator[None]:
    """Let what one rank refuses in this context be refused by all at its end.

    All ranks must enter it, and no rank may communicate inside: one that has refused is waiting at
    the end.

    Raises:
        InvalidInput, CannotSplit, Diverged: on all ranks, if one of them raised it.
    """
    refusal: Exception | None = None
    try:
        yield
    except REFUSALS as error:
        refusal = error
    raise_together(gathered(refusal))


def raise_together(refusals: list[Exception | None]) -> None:
    """Raise the refusal of the first rank that has one, on all ranks.

    The ranks that did not all refuse for the same reason are told whose it is.
    """
    for rank, refusal in enumerate(refusals):
        if refusal is None:
            continue
        if len({str(other) for other in refusals}) > 1:
            refusal = type(refusal)(f"{refusal} (So says rank {rank}.)")
        refusal.of_all_ranks = True  # type: ignore[attr-defined]
        raise refusal


def decided_by_first(make: Callable[[], Decided]) -> Decided:
    """What the first rank makes, on all ranks; a refusal of it is one of all.

    The value travels between processes, so it must be one that can be pickled.
    """
    if world().size == 1:
        return make()
    value, refusal = None, None
    if world().first:
        try:
            value = make()
        except REFUSALS as error:
            refusal = error
    value, refusal = gathered((value, refusal))[0]
    raise_together([refusal] * world().size)
    return value


def agree(**facts: Mapping[str, Any]) -> None:
    """Refuse ranks that were given different things; nothing was written yet.

    Args:
        facts: tables by what they are: the configuration, the data, the versions.

    Raises:
        InvalidInput: on all ranks, naming the first difference.
    """
    everyone = gathered(facts)
    for name, first in everyone[0].items():
        for rank, facts_there in enumerate(everyone):
            there = facts_there[name]
            for key in [*first, *there]:
                if first.get(key) != there.get(key):
                    refusal = InvalidInput(
                        f"Cannot train together: the {name} of rank {rank} is not that of rank 0 "
                        f"({key}: {brief(there.get(key))} against {brief(first.get(key))}). Start "
                        "all ranks with the same command, version and data."
                    )
                    raise_together([refusal] * len(everyone))
