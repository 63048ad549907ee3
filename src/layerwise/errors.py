"""What layerwise refuses, and how it says so.

Every refusal is one of these classes, its message one clear sentence or short paragraph: what was
wrong, what is accepted, what to do. The command line prints the message and exits with code 2; a
library user catches the class.
"""

from collections.abc import Iterable
from difflib import get_close_matches

MOST_NAMED = 50  # names in a refusal
ADDED_TO = ("model", "loss", "rule", "measure", "data set")  # kinds that users add to


class InvalidInput(ValueError):
    """An argument, a file or a batch that cannot be used."""


class Busy(InvalidInput):
    """A run that another process is training."""


class MissingData(InvalidInput):
    """A data set whose files are not where they were looked for."""


class CannotSplit(ValueError):
    """A network that cannot be cut into units as asked."""


class Diverged(ArithmeticError):
    """A loss that is no longer a finite number; the state before that update is kept."""


def choose(kind: str, name: str, known: Iterable[str]) -> str:
    """Return ``name`` if it is known, else refuse it and offer the nearest match.

    Raises:
        InvalidInput: ``name`` is not one of ``known``.
    """
    known = list(known)
    if name in known:
        return name
    near = get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    accepted = ", ".join(known[:MOST_NAMED]) + (
        f" and {len(known) - MOST_NAMED} more" if len(known) > MOST_NAMED else ""
    )
    own = "; of your own: give its Python file with --import" if kind in ADDED_TO else ""
    raise InvalidInput(f"unknown {kind} {name!r}: {hint}accepted: {accepted}{own}")
