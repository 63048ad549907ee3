"""Fields of runs and executions: declared as options, checked as files have them. No torch."""

import contextlib
from dataclasses import Field, field
from pathlib import Path
from typing import Any, get_args

from layerwise.errors import InvalidInput, brief
from layerwise.utils.bounded import refuse_strange
from layerwise.utils.options import Options

NO_OPTIONS = Options()


def option(default: Any, text: str, **extra: Any) -> Any:
    """A field that is an option of the command line; ``short`` and ``also`` give it more names."""
    return field(default=default, metadata={"help": text, **extra})


def declared(of: str) -> Any:
    """A field that holds the options of a registered choice, which the field ``of`` names."""
    return field(default=NO_OPTIONS, metadata={"of": of})


def field_type(item: Field[Any]) -> type:
    """The type that a field's text is read as, without None."""
    return (get_args(item.type) or (item.type,))[0]


def check_value(source: str | Path, item: Field[Any], value: Any) -> Any:
    """A field's value from a file, made of the field's type.

    Raises:
        InvalidInput: it is of another type.
    """
    wanted = field_type(item)
    try:
        refuse_strange(value)
    except ValueError as error:
        raise InvalidInput(f"Cannot use {item.name} of {source}: {error}. Correct it.") from None
    if "of" in item.metadata:
        return check_options(source, item.name, value)
    if value is None and item.default is None:
        return None
    if wanted is str and isinstance(value, list):
        return ",".join(map(str, value))
    if wanted is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if wanted is float and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            return float(value)  # YAML reads 5e-4 as text
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise InvalidInput(
            f"Cannot use {item.name} of {source}: {brief(repr(value))} is not of type "
            f"{wanted.__name__}. Correct it."
        )
    return value


def check_options(source: str | Path, name: str, value: Any) -> Options:
    """Options from a file: plain values by name. Their owner checks them when it is known."""
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(item, bool | int | float | str | None)
        for key, item in value.items()
    ):
        raise InvalidInput(
            f"Cannot use {name} of {source}: it is not a table of plain values. Correct it."
        )
    return Options(value)
