"""Options of a factory: its keyword-only arguments are the declaration.

A local loss, a training rule, a measure or a network that has an option of its own declares it in
its signature, ``(site, *, temperature: float = 1.0)``, and explains it under ``Args:`` in its
docstring. A default of a plain type will do in place of an annotation. The command line, a run's
record and every check read it from there.
"""

import inspect
import math
import re
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from typing import Any, Union, get_args, get_origin

from layerwise.errors import InvalidInput, brief, choose
from layerwise.utils.changing import BETWEEN, Changing

LARGEST = 2**31 - 1  # of whole numbers
MOST_DIGITS = 9  # of a whole number in place of text
KINDS = (bool, int, float, str)  # types of options that can be written on a command line
# annotations as text, as they are under ``from __future__ import annotations``
OPTIONAL = ("{} | None", "None | {}", "Optional[{}]", "typing.Optional[{}]")
WRITTEN = {kind.__name__: (kind, False) for kind in KINDS} | {
    form.format(kind.__name__): (kind, True) for kind in KINDS for form in OPTIONAL
}
# numbers of other types that stand for one of the type
NUMERIC: dict[type, type] = {int: Integral, float: Real}
NUMBERS = (int | str, "int | str")  # annotations of a whole number, or text such as a list of them


class Options(dict[str, Any]):
    """Values by option name. It is hashed, so it is not changed once made."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


@dataclass(frozen=True)
class Option:
    """An option as a signature declares it.

    Attributes:
        kind: the type of its values: bool, int, float or str.
        optional: whether None is a value too.
        text: its description in the docstring, or nothing.
        numbers: whether a whole number is a value too, beside text such as a list of them: declared
            as ``int | str``.
        changing: whether it may change over training: ``0.99..0.5`` is then a value too.
    """

    name: str
    kind: type
    optional: bool
    default: Any
    text: str
    numbers: bool = False
    changing: bool = False

    def check(self, value: Any, source: str) -> Any:
        """A value of the option's type; an integer passes for a float.

        Raises:
            InvalidInput: it is of another type, or a number that is too large or none.
        """
        if value is None and self.optional:
            return None
        if self.changing and isinstance(value, str) and BETWEEN in value:
            first, _, last = value.partition(BETWEEN)
            if not (first and last):
                raise InvalidInput(
                    f"Cannot use {self.name}={brief(value)} ({source}): it is not a linear change. "
                    f"Give its first and last number, such as 0.5{BETWEEN}1."
                )
            return f"{self.check(first, source)}{BETWEEN}{self.check(last, source)}"
        number: Any = self.converted(value)
        if type(number) is not self.kind and not (self.numbers and type(number) is int):
            raise InvalidInput(
                f"Cannot use {self.name}={brief(number)} ({source}): it is not of type "
                f"{self.kind.__name__}. Correct it."
            )
        if type(number) is float and not math.isfinite(number) and number != self.default:
            raise InvalidInput(
                f"Cannot use {self.name}={number} ({source}): it is not finite. Give a number."
            )
        most = self.largest
        if most is not None and number != self.default and not within(number, most):
            raise InvalidInput(
                f"Cannot use {self.name}={brief(number)} ({source}): it is out of range. Give at "
                f"most {most:.15g}."
            )
        return number

    @property
    def largest(self) -> float | None:
        """Largest number that can be given; None of an option that is no number."""
        return {int: LARGEST, float: sys.float_info.max}.get(self.kind)

    def converted(self, value: Any) -> Any:
        """A number as the option's type where it stands for one."""
        if self.numbers:
            return as_numbers(value)
        text = self.kind in (int, float) and isinstance(value, str)  # YAML reads 5e-4 as text
        number = isinstance(value, NUMERIC.get(self.kind, ())) and not isinstance(value, bool)
        if text or number:  # NumPy's numbers too
            try:
                return self.kind(value)
            except (ValueError, OverflowError):
                return repr(value) if text else value
        return value


def as_numbers(value: Any) -> Any:
    """A whole number, if it is one; a list, or text, as text without spaces."""
    text = ",".join(map(str, value)) if isinstance(value, list) else value
    if not isinstance(text, str):
        return value
    text = text.replace(" ", "")
    return int(text) if is_whole_number(text) else text


def is_whole_number(text: str) -> bool:
    """Whether text is a whole number from 0, of no more digits than any that counts units."""
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS


def within(number: Any, most: float) -> bool:
    """Whether a number is at most so far from 0; NaN is not."""
    return bool(abs(number) <= most)


def options_of(factory: Callable[..., Any]) -> dict[str, Option]:
    """The options that a callable declares: its keyword-only arguments of a plain type, in order.

    Raises:
        InvalidInput: one of them has no default.
    """
    texts, changing = described(inspect.getdoc(factory) or ""), changing_options(factory)
    options = {}
    for parameter in inspect.signature(factory).parameters.values():
        name, default = parameter.name, parameter.default
        plain = plain_type_of(parameter)
        if parameter.kind is parameter.KEYWORD_ONLY and plain is not None:
            if default is parameter.empty:
                raise InvalidInput(
                    f"Cannot offer the option {name} of {factory}: it has no default. Give one."
                )
            text = texts.get(name, "")
            numbers = parameter.annotation in NUMBERS
            options[name] = Option(
                name, *plain, default, text, numbers=numbers, changing=name in changing
            )
    return options


def positional_options(factory: Callable[..., Any], given: int) -> list[str]:
    """Arguments that look like options but are none, since they are not keyword-only.

    Args:
        given: how many arguments the factory is called with.
    """
    parameters = list(inspect.signature(factory).parameters.values())[given:]
    return [
        parameter.name
        for parameter in parameters
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and type(parameter.default) in KINDS
    ]


def keyword_only(factory: Callable[..., Any]) -> list[str]:
    """Names of the keyword-only arguments of a callable, of whatever type."""
    parameters = inspect.signature(factory).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def required_arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a callable must be given."""
    return [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def changing_options(factory: Callable[..., Any]) -> list[str]:
    """Names of the options of a loss that may change over training; see ``Changing``."""
    names = keyword_only(factory)
    return [name for name in names if isinstance(getattr(factory, name, None), Changing)]


def first_line(thing: Any) -> str:
    """Short description of something: its ``text``, else its docstring's first line."""
    text = getattr(thing, "text", None) or thing.__doc__ or ""
    return str(text).strip().partition("\n\n")[0].replace("\n", " ").replace("    ", "")


def plain_type_of(parameter: inspect.Parameter) -> tuple[type, bool] | None:
    """As ``plain_type``, of an argument's annotation, or of its default where it has none."""
    if parameter.annotation in NUMBERS:
        return str, False
    annotated = parameter.annotation is not parameter.empty
    return plain_type(parameter.annotation if annotated else type(parameter.default))


def plain_type(annotation: Any) -> tuple[type, bool] | None:
    """The plain type that an annotation names and whether None is allowed; None for all others."""
    if isinstance(annotation, str):
        return WRITTEN.get(annotation)
    if annotation in KINDS:
        return annotation, False
    if get_origin(annotation) in (Union, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if len(kinds) == 1 and kinds[0] in KINDS:
            return kinds[0], True
    return None


def described(docstring: str) -> dict[str, str]:
    """Descriptions by name, from the section ``Args:`` of a docstring."""
    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)+)", docstring, re.MULTILINE)
    texts: dict[str, str] = {}
    names: list[str] = []
    for line in inspect.cleandoc("\n" + section[1]).splitlines() if section else ():
        if begins := re.match(r"(\w+(?:, \w+)*): (.*)", line):
            names = begins[1].split(", ")
            texts |= dict.fromkeys(names, begins[2])
        else:
            texts |= {name: f"{texts[name]} {line.strip()}".strip() for name in names}
    return texts


def as_flag(name: str) -> str:
    """An option as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def checked_options(
    kind: str,
    names: Sequence[str],
    registry: Mapping[str, Callable[..., Any]],
    values: Mapping[str, Any],
) -> Options:
    """The options given to registered factories, without those that are at their default.

    Args:
        kind: what the registry holds, for messages: ``loss``, ``rule``, ``measure``, ``model``.
        names: which of its entries; an option belongs to those that declare it.

    Raises:
        InvalidInput: an entry is unknown, none has such an option, or a value is of another type.
    """
    declared = [options_of(registry[choose(kind, name, registry)]) for name in names]
    words = f"the {kind} {', '.join(map(repr, names))}"
    changed = {}
    for option, value in values.items():
        owned = [options[option] for options in declared if option in options]
        if not owned:
            owners = [owner for owner in registry if option in options_of(registry[owner])]
            belongs = f"It belongs to {', '.join(owners)}." if owners else "No other has it either."
            accepted = ", ".join(map(as_flag, dict.fromkeys(chain(*declared)))) or "no options"
            raise InvalidInput(
                f"Cannot use {as_flag(option)} with {words}, which accepts "
                f"{accepted}. {belongs} Leave it out."
            )
        checked = [owner.check(value, f"option of {words}") for owner in owned]
        if any(owner.default != checked[0] for owner in owned):
            changed[option] = checked[0]
    return Options(changed)
