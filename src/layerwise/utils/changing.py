"""Options that change over training: numbers as functions of progress, from 0 to 1."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.errors import InvalidInput, brief, raised

BETWEEN = ".."  # stands between the first and the last number of a linear change, as text


class Changing:
    """A number of a loss that may change over training, and its range; an attribute of its class.

    It has the name of the option. The constructor sets it and forward reads it, like any attribute.

    Args:
        holds: whether a number is in range.
        accepted: the range in words, behind "Give".
    """

    def __init__(self, holds: Callable[[Any], bool], accepted: str) -> None:
        self.holds, self.accepted = holds, accepted

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        if self.name not in vars(owner):
            raise AttributeError(f"{self.name!r} is not set yet")
        return vars(owner)[self.name]

    def __set__(self, owner: Any, value: Any) -> None:
        self.check(value)
        vars(owner)[self.name] = value

    def check(self, value: Any) -> None:
        """Refuse a number out of range.

        Raises:
            InvalidInput: naming the range.
        """
        if not self.holds(value):
            raise InvalidInput(
                f"Cannot use {self.name} {value}: it is out of range. Give {self.accepted}."
            )


@dataclass(frozen=True)
class Change:
    """The value of an option as a function of progress."""

    name: str
    function: Callable[[float], Any]

    def at(self, progress: float) -> float:
        """The value at a share of training.

        Raises:
            InvalidInput: the function fails there, or gives no number.
        """
        try:
            return float(self.function(progress))
        except Exception as error:  # the user's code runs here: anything can be raised
            raise InvalidInput(
                f"Cannot change {self.name} over training: its function "
                f"{raised(error)} at progress {progress:g}. Give a function "
                "from progress, 0 to 1, to a number."
            ) from error


@dataclass(frozen=True)
class Linear:
    """A number that goes linearly from one value to another."""

    first: float
    last: float

    def __call__(self, progress: float) -> float:
        return (1 - progress) * self.first + progress * self.last


def linear_change(name: str, text: str) -> Linear:
    """A linear change of an option as text has it, such as ``0.99..0.5``.

    Raises:
        InvalidInput: the text is no such thing.
    """
    first, _, last = text.partition(BETWEEN)
    try:
        return Linear(float(first), float(last))
    except ValueError:
        raise InvalidInput(
            f"Cannot use {name} {brief(repr(text))}: it is not a linear change. Give its first and "
            f"last number, such as 0.5{BETWEEN}1."
        ) from None


def value_at(value: Any, progress: float) -> Any:
    """The value of an option at a share of training, whether it changes or not."""
    return value.at(progress) if isinstance(value, Change) else value


def set_values(owners: Iterable[object], values: Mapping[str, float]) -> None:
    """Set numbers by name, in every object whose class declares them.

    Raises:
        InvalidInput: a number is out of range.
    """
    for owner in owners:
        for name, value in values.items():
            if isinstance(getattr(type(owner), name, None), Changing):
                setattr(owner, name, value)
