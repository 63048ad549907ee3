"""Options that commands share, added to a parser: fields of runs and what choices declare.

Their values are collected in ``values``.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NoReturn

from layerwise.errors import InvalidInput, brief
from layerwise.runs.fields import field_type
from layerwise.runs.run import Execution, Run
from layerwise.utils.changing import BETWEEN
from layerwise.utils.options import Option, as_flag, options_of, positional_options
from layerwise.utils.terminal import in_one_line

# what a network is given by fields of a run, where it takes them
SHARED = ("hierarchy", "width", "dropout", "downsample_after")
# words under the headings of help
GROUPS: dict[type, str] = {Run: "What is trained.", Execution: "Where and how it is trained."}
NUMBERS: dict[Any, str] = {int: "N", float: "X"}  # as help shows values of a type
MOST_DIGITS = 30  # of a whole number
# arguments that a network, a rule and a loss are called with, before their options
GIVEN = {"model": 3, "rule": 5, "loss": 1}
DECLARED = "declared:"  # begins the names of declared options among parsed arguments


def integer(text: str) -> int:
    """A whole number as a command line gives it.

    Raises:
        ValueError: it is none, or of more digits than any option has.
    """
    refuse_change(text)
    if len(text) > MOST_DIGITS:
        raise argparse.ArgumentTypeError(f"a number of {len(text)} digits is too large")
    return int(text)


def real(text: str) -> float:
    """A number as a command line gives it.

    Raises:
        ValueError: it is none.
    """
    refuse_change(text)
    return float(text)


def refuse_change(text: str) -> None:
    """Refuse the text of a change over training for an option that stays as it is."""
    if BETWEEN in text:
        raise argparse.ArgumentTypeError(
            f"{text} would change over training, which this option cannot; give one number"
        )


integer.__name__, real.__name__ = "int", "float"  # as argparse names them in refusals


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one sentence, like everything else here."""

    def __init__(self, **options: Any) -> None:
        # an option added later must not change what a script says
        super().__init__(**options, allow_abbrev=False)
        self.register("type", int, integer)
        self.register("type", float, real)

    def flags(self) -> list[str]:
        """All options as they are written, such as ``--batch-size``."""
        return [flag for action in self._actions for flag in action.option_strings]

    def error(self, message: str) -> NoReturn:
        words = brief(in_one_line(message))
        raise InvalidInput(f"Cannot read the command: {words}. See `{self.prog} --help`.")


# defaults of a command that looks at a run, in words
OF_THE_RUN = {item.name: "the run's" for item in fields(Execution)}


def folder_name(text: str) -> str:
    """The path of a folder.

    Raises:
        ArgumentTypeError: it is empty, which would be the current folder, or the default.
    """
    if not text:
        raise argparse.ArgumentTypeError("it is empty; name a folder")
    return text


def add_config(parser: Parser) -> None:
    parser.usage = "%(prog)s [options] [model]"
    parser.add_argument(
        "model",
        nargs="?",
        help="network: a name of `layerwise list models`, timm:NAME, torchvision:NAME, hf:NAME, or "
        "FILE.py:FUNCTION, which makes one (default: resnet18)",
    )
    parser.add_argument(
        "--config",
        "-c",
        metavar="FILE",
        help="YAML file of options, which the command line overrides",
    )


def add_images(parser: Parser) -> None:
    """Options of a command that reads no data: what images it supposes; see ``images_of``."""
    parser.add_argument(
        "--data",
        "--dataset",
        metavar="NAME",
        help="data set whose channels, size and classes are supposed; nothing is read (default: "
        "of --config or --preset, else colour images of 32 pixels and 10 classes)",
    )
    parser.add_argument(
        "--classes", type=int, help="number of classes (default: the data set's, or 10 of a folder)"
    )


def add_preset(parser: Parser) -> None:
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="published settings as defaults, which all other options override; see `layerwise "
        "list presets`",
    )


def add_fields(
    parser: Parser,
    kind: type[Run] | type[Execution],
    skip: set[str],
    declared: Sequence[str] = ("model", "rule", "loss"),
    defaults: Mapping[str, str] = {},
) -> None:
    """An option for every field, and for all that networks, losses and rules declare.

    Unset ones are left out of the parsed arguments, so that a file's values show through.

    Args:
        skip: fields and declared options that are left out.
        declared: kinds of choices whose declared options are added.
        defaults: defaults of fields in words, where they are not the field's own.
    """
    group = parser.add_argument_group(f"{kind.__name__.lower()} options", GROUPS[kind])
    for item in fields(kind):
        if item.name in skip or "of" in item.metadata:
            continue
        names = [as_flag(item.name), *item.metadata.get("also", ())]
        if "short" in item.metadata:
            names = [item.metadata["short"], *names]
        text = item.metadata["help"]
        if item.default is not None and "default" not in text:
            words = defaults.get(item.name) or default_text(item.default)
            text = f"{text} (default: {words})"
        others: dict[str, Any] = {}
        if "metavar" in item.metadata:
            others["metavar"] = item.metadata["metavar"]
        if "repeated" in item.metadata:
            others["action"] = Joined
        add_option(group, names, item.name, field_type(item), text, **others)
    if kind is Run:
        add_declared(parser, skip, declared)


def default_text(value: Any) -> str:
    """A default in words."""
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


class Joined(argparse.Action):
    """An option that may be repeated: its values, joined by commas."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, values if before is None else f"{before},{values}")


def number_or_change(text: str) -> float | str:
    """A number, or the text of a linear change such as ``0.99..0.5``, whose owner checks it.

    Raises:
        ValueError: it is neither.
    """
    return text if BETWEEN in text else float(text)


number_or_change.__name__ = "number"  # as argparse names it in refusals


def add_option(
    group: Any, names: list[str], dest: str, kind: Callable[[str], Any], text: str, **others: Any
) -> None:
    text = text.replace("%", "%%")
    if kind is bool:
        group.add_argument(
            *names,
            dest=dest,
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            help=text,
        )
        return
    metavar = names[-1].lstrip("-").replace("-", "_").upper() if len(names) == 1 else None
    metavar = NUMBERS.get(kind) or metavar or dest.removeprefix(DECLARED).upper()
    described = {"type": kind, "default": argparse.SUPPRESS, "metavar": metavar, "help": text}
    group.add_argument(*names, dest=dest, **{**described, **others})


def add_declared(parser: Parser, skip: set[str], declared: Sequence[str]) -> None:
    """An option for everything that networks, losses and rules declare, each once.

    Raises:
        InvalidInput: the command has another option of that name.
    """
    from layerwise.training.declared_options import registries

    taken = set(skip)
    for kind in declared:
        say_positional(kind, registries()[kind])
        group = parser.add_argument_group(f"options of a {kind}")
        for name, owners in by_option(registries()[kind]).items():
            if kind == "model" and name in SHARED:
                continue
            refuse_field(kind, name, owners)
            if name not in taken:
                taken.add(name)
                first = next(iter(owners.values()))
                plain = {option.kind for option in owners.values()}
                words = (first.text or name).rstrip(".")
                changing = any(option.changing for option in owners.values())
                changes = "; X..Y goes from X to Y over training" if changing else ""
                text = f"{', '.join(owners)}: {words}{changes}{defaults_in_words(owners)}"
                flag = as_flag(name)
                try:
                    common_kind: Callable[[str], Any] = first.kind if len(plain) == 1 else str
                    if changing and common_kind is float:
                        common_kind = number_or_change
                    add_option(group, [flag], DECLARED + name, common_kind, text)
                except argparse.ArgumentError:
                    refuse_name(kind, name, owners)


def say_positional(kind: str, registry: Mapping[str, Callable[..., Any]]) -> None:
    """Say on stderr which arguments are no options, though they were perhaps meant to be."""
    for entry, factory in registry.items():
        for name in positional_options(factory, GIVEN[kind]):
            print(
                f"layerwise: {name} of the {kind} {entry!r} is not offered as {as_flag(name)}: it "
                "is not keyword-only. Put a * before it in the signature.",
                file=sys.stderr,
            )


def refuse_field(kind: str, name: str, owners: Mapping[str, Option]) -> None:
    """Refuse a declared option that has the name of one of every run."""
    if name in {item.name for described in (Run, Execution) for item in fields(described)}:
        refuse_name(kind, name, owners)


def refuse_name(kind: str, name: str, owners: Mapping[str, Option]) -> NoReturn:
    raise InvalidInput(
        f"Cannot offer {as_flag(name)} of the {kind} {next(iter(owners))!r}: this "
        "command has another option of that name. Rename it."
    )


def by_option(registry: Mapping[str, Callable[..., Any]]) -> dict[str, dict[str, Option]]:
    """Every option that entries of a registry declare, by its name and its owner's."""
    owners: dict[str, dict[str, Option]] = {}
    for entry, factory in registry.items():
        for name, option in options_of(factory).items():
            owners.setdefault(name, {})[entry] = option
    return owners


def defaults_in_words(owners: Mapping[str, Option]) -> str:
    values = {
        owner: option.default for owner, option in owners.items() if option.default is not None
    }
    if not values:
        return ""
    if len(set(values.values())) == 1 and len(values) == len(owners):
        return f" (default: {default_text(next(iter(values.values())))})"
    return f" (default: {', '.join(f'{value} in {owner}' for owner, value in values.items())})"
