"""Options of the command line: one for every field of a run and of how it is carried out, and values from files."""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from layerwise.errors import InvalidInput, choose
from layerwise.hierarchy import parse_downsampling, parse_hierarchy
from layerwise.runs import Execution, Run, check_value, field_type, renamed, without_retired

Options = TypeVar("Options", Run, Execution)


class Parser(argparse.ArgumentParser):
    """An argument parser that refuses in one sentence, like everything else here."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)  # an option added later must not change what a script says

    def error(self, message: str) -> NoReturn:
        raise InvalidInput(f"{message}; see `{self.prog} --help`")


def add_command(commands: Any, name: str, function: Any, text: str) -> Parser:
    command: Parser = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(command=function)
    command.add_argument("--json", action="store_true", help="print the result as one JSON object, the last line of stdout")
    return command


def add_fields(parser: Parser, kind: type[Run] | type[Execution], skip: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """An option for every field. Unset ones are left out of the parsed arguments, so that a file's values show through."""
    group = parser.add_argument_group(kind.__name__.lower() + " options")
    for item in fields(kind):
        if item.name in skip:
            continue
        names = [
            *filter(None, [item.metadata.get("short")]),
            "--" + item.name.replace("_", "-"),
            *item.metadata.get("also", ()),
        ]
        text = item.metadata["help"] + (
            "" if item.default is None or "default" in item.metadata["help"] else f" (default: {item.default})"
        )
        text = text.replace("%", "%%")
        if field_type(item) is bool:
            group.add_argument(
                *names, dest=item.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            group.add_argument(
                *names,
                dest=item.name,
                type=field_type(item),
                default=argparse.SUPPRESS,
                metavar=item.name.upper(),
                help=text,
            )


def collect(parsed: argparse.Namespace, base: Options) -> Options:
    """A ``Run`` or ``Execution`` of the base's values, the configuration file and the command line, the last going first."""
    known = {item.name for item in fields(base)}
    values = {name: value for name, value in read_config(getattr(parsed, "config", None)).items() if name in known}
    values |= {name: value for name, value in vars(parsed).items() if name in known and value is not None}
    if values.get("hierarchy"):
        values["hierarchy"] = ",".join(map(str, parse_hierarchy(values["hierarchy"])))  # one spelling, one run
    if values.get("downsample_after"):
        values["downsample_after"] = ",".join(map(str, parse_downsampling(values["downsample_after"])))
    return replace(base, **values)


def read_config(path: str | None) -> dict[str, Any]:
    """Options from a YAML file (or a run's JSON), checked by name and type.

    Raises:
        InvalidInput: the file cannot be read, or holds something else than options.
    """
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidInput(
            f"{path} cannot be read as YAML ({' '.join(str(error).split())[:150]}): give lines such as `epochs: 10`"
        ) from None
    if isinstance(values, dict) and "format" in values and isinstance(values.get("run"), dict):
        values = without_retired(path, values["run"])  # a run's own configuration file
    if not isinstance(values, dict):
        raise InvalidInput(f"{path} does not hold options: give lines such as `epochs: 10`")
    known = {item.name: item for kind in (Run, Execution) for item in fields(kind)}
    checked = {}
    for key, value in renamed({str(key).replace("-", "_"): value for key, value in values.items()}).items():
        name = choose(f"option in {path}", key, known)
        checked[name] = check_value(path, known[name], value)
    return checked
