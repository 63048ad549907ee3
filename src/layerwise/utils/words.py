"""Numbers with their nouns, and lists of names, for what is printed."""

from collections.abc import Callable, Iterable


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as ``1 run``, ``1,024 runs`` and ``2 batches``."""
    ending = "es" if noun.endswith("tch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"


def plus_minus(deviation: float | None) -> str:
    """A deviation or standard error behind its mean; nothing where none is known."""
    return "" if deviation is None else f" ± {deviation:.2f}"


def as_word(path: object) -> str:
    """A path as a word of a command that no program takes for an option."""
    text = str(path)
    return f"./{text}" if text.startswith("-") else text


def few(names: Iterable[object], most: int, shown: Callable[[object], str] = str) -> str:
    """A few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(map(shown, listed[:most])) + more
