"""Refusals: the classes of layerwise's errors.

A message is one clear sentence or a short paragraph: "Cannot X: Y. Do Z." It says what was wrong,
what is accepted and what to do. The command line prints it and exits with code 2; a library user
catches the class.
"""

import os
import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches

MOST_SHOWN = 200  # characters of a value that a refusal repeats
MOST_QUOTED = 200  # characters of what another program says of its error
MOST_NAMED = 50  # names in a refusal
IMPORT_HINT = "To use one of your own, give its Python file with --import."
ADDED_TO = ("model", "loss", "rule", "measure", "data set")  # kinds that users add to


class InvalidInput(ValueError):
    """An argument, a file or a batch that cannot be used."""


class Busy(InvalidInput):
    """A run that another process is training."""


class MissingData(InvalidInput):
    """A data set whose files are not where they were looked for."""


class TooLittleMemory(InvalidInput):
    """A limit of memory that no way to make a step keeps to."""


class LostRank(RuntimeError):
    """A process that trains with this one and has ended, or does not answer."""


class CannotSplit(ValueError):
    """A network that cannot be cut into units as asked."""


class Diverged(ArithmeticError):
    """A loss that is no longer a finite number; the state before that update is kept."""


def check_range(name: str, value: float, least: float, most: float) -> None:
    """Refuse a number out of range.

    Raises:
        InvalidInput: naming the range.
    """
    if not least <= value <= most:
        raise InvalidInput(
            f"Cannot use {name} {brief(value)}: it is out of range. Give {least} or more, up to "
            f"{most}."
        )


def check_least(least: int, **values: float | None) -> None:
    """Refuse numbers below the least; None is not given.

    Raises:
        InvalidInput: naming the argument.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise InvalidInput(f"Cannot use {name} {value}: it is too small. Give {least} or more.")


def check_flags(**flags: object) -> None:
    """Refuse what is neither true nor false, such as the text "no", which Python takes for true.

    Raises:
        InvalidInput: naming the argument.
    """
    for name, value in flags.items():
        if value not in (True, False):
            raise InvalidInput(
                f"Cannot use {name}={brief(repr(value))}: it is not a boolean. Give True or False."
            )


def names_in(argument: str, given: object) -> list[str]:
    """Names given as a list; text alone, which would be read letter by letter, is refused.

    Raises:
        InvalidInput: naming the argument.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        example = f", such as [{brief(repr(given))}]" if isinstance(given, str) else ""
        raise InvalidInput(
            f"Cannot use {argument}={brief(repr(given))}: it is no list of names. Give a list"
            f"{example}."
        )
    return [*given]


def brief(value: object) -> str:
    """A value in words, its middle left out where it is long."""
    try:
        text = str(value)
    except ValueError:  # a whole number of more digits than Python writes
        return "of thousands of digits"
    if len(text) <= MOST_SHOWN:
        return text
    return f"{text[: MOST_SHOWN // 2]} … {text[-MOST_SHOWN // 4 :]}"


def reason_of(error: BaseException) -> str:
    """What an error says and where it comes from, in one line; its class where it says nothing."""
    text = " ".join(str(error).split())[:MOST_QUOTED] or type(error).__name__
    return text + place_of(error)


def first_line_of(error: BaseException) -> str:
    """The first line of what an error says; its class where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MOST_QUOTED]


def last_line_of(error: BaseException) -> str:
    """The last line of what an error says, such as of a traceback; its class where it is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1].strip()


def raised(error: BaseException) -> str:
    """That an error was raised, its class, what it says and where, for the middle of a sentence."""
    text = " ".join(str(error).split())[:MOST_QUOTED]
    place = place_of(error)
    return f"raised {type(error).__name__}" + (f" ({text})" if text else "") + place


def place_of(error: BaseException) -> str:
    """File and line of the user's own code that an error comes from; empty where none is known.

    Libraries, this one among them, lie where Python's packages do, or under its own folder.
    """
    libraries = (os.path.dirname(__file__), sysconfig.get_path("stdlib"))
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if os.path.exists(frame.filename)
        and not frame.filename.startswith(libraries)
        and "-packages" not in frame.filename
    ]
    return f" at {os.path.basename(own[-1].filename)}, line {own[-1].lineno}" if own else ""


def choose(kind: str, name: str, accepted: Iterable[str]) -> str:
    """Return ``name`` if it is accepted, else refuse it and offer the nearest match.

    Raises:
        InvalidInput: ``name`` is not one of ``accepted``.
    """
    names = list(accepted)
    if name in names:
        return name
    nearest = get_close_matches(str(name).lower(), names, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    own = f" {IMPORT_HINT}" if kind in ADDED_TO else ""
    raise InvalidInput(
        f"Cannot use {kind} {brief(repr(name))}: it is unknown.{hint} "
        f"Accepted: {', '.join(names[:MOST_NAMED])}{more}.{own}"
    )
