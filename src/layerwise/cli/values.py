"""Values of options: of the command line, else of the configuration file, else their defaults."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from layerwise.cli.effects import check_effects
from layerwise.cli.options import DECLARED, by_option
from layerwise.errors import InvalidInput, choose
from layerwise.hierarchy import parse_downsampling, parse_hierarchy
from layerwise.runs.command import flat
from layerwise.runs.fields import NO_OPTIONS, check_value
from layerwise.runs.folder import RunFolder
from layerwise.runs.formats import run_from
from layerwise.runs.losses import format_later_losses, parse_later_losses
from layerwise.runs.run import Execution, Run
from layerwise.utils.bounded import read_options, refuse_strange
from layerwise.utils.launch import is_first
from layerwise.utils.options import Options, as_flag, is_whole_number, options_of
from layerwise.utils.terminal import in_one_line

if TYPE_CHECKING:
    from layerwise.data import ImageFormat
    from layerwise.experiments.presets import Preset

Kind = TypeVar("Kind", Run, Execution)

# one spelling, one run
SPELLINGS: dict[str, Callable[[str], str]] = {
    "at": lambda text: str(int(text)) if is_whole_number(text) else text,
    "hierarchy": lambda text: ",".join(map(str, parse_hierarchy(text))),
    "downsample_after": lambda text: ",".join(map(str, parse_downsampling(text))),
    "loss_from": lambda text: format_later_losses(parse_later_losses(text)),
}
DEFAULTS = {item.name: item.default for kind in (Run, Execution) for item in fields(kind)}
# options that a configuration file does not hold: code runs only if the command line names it
ON_COMMAND_LINE = ("import", "output", "resume", "preset", "config", "json")


def preset_of(parsed: argparse.Namespace) -> "Preset | None":
    """The preset that a command names, if it names one.

    Raises:
        InvalidInput: it is unknown, or was published for another network.
    """
    name = getattr(parsed, "preset", None)
    if name is None:
        return None
    from layerwise.experiments.presets import choose_preset

    return choose_preset(name, parsed.model or read_config(parsed.config).get("model"))


def collect_both(parsed: argparse.Namespace, rules: Sequence[str] = ()) -> tuple[Run, Execution]:
    """A run and its execution, of which every option that was given has an effect.

    Args:
        rules: that the run is carried out by; none: its own.

    Raises:
        InvalidInput: an option would change nothing, or a file cannot be read.
    """
    preset = preset_of(parsed)
    run = collect(parsed, preset.run if preset else Run())
    execution = collect(parsed, Execution())
    runs = [replace(run, rule=rule) for rule in rules] or [run]
    config = read_config(getattr(parsed, "config", None))
    changed = [name for name, value in config.items() if value != DEFAULTS.get(name)]
    check_effects(given_options(parsed), changed, runs, execution)
    if "rule" in config and "--rule" not in parsed.command.flags() and is_first():
        print("layerwise: rule changes nothing here: the command has its own.", file=sys.stderr)
    return run, execution


def images_of(parsed: argparse.Namespace, run: Run) -> "ImageFormat":
    """The format of the images that a command supposes, since it reads none.

    A run's ``run.json`` has recorded it, and a data set, also a preset's, has it by name. Without
    either they are colour images of 32 pixels and 10 classes. --image-size and --classes change it.

    Raises:
        InvalidInput: there is no such data set, a number of classes is out of range, or the file
            was altered.
    """
    from layerwise.data import DATASETS
    from layerwise.profiling.trial_steps import trial_images

    size, channels, classes = run.image_size, 3, 10
    preset = getattr(parsed, "preset", None)
    if parsed.data is None and preset is None and (recorded := recorded_data(parsed.config)):
        size = size or recorded["image_size"]
        channels, classes = recorded["channels"], len(recorded["class_names"])
    elif parsed.data is not None or preset or "data" in read_config(parsed.config):
        named = DATASETS[choose("data set", run.data, DATASETS)].expected(size)
        size, channels, classes = named.image_size, named.channels, named.num_classes
    classes = classes if parsed.classes is None else parsed.classes
    return trial_images(replace(run, image_size=size), classes, channels)


def recorded_data(path: str | None) -> dict[str, Any]:
    """What a run's ``run.json`` says of its data; empty if the file is another or says nothing.

    Raises:
        InvalidInput: it was altered so that it describes no images.
    """
    from layerwise.training.networks import describes_images

    values = read_options(Path(path)) if path is not None else None
    found = values.get("data") if isinstance(values, dict) and "format" in values else None
    if found and not describes_images(found):
        raise InvalidInput(
            f"Cannot use {path}: its data section was altered. Restore it, or give --data."
        )
    return found or {}


def collect_execution(
    parsed: argparse.Namespace, folder: RunFolder, going_on: bool = False
) -> Execution:
    """The execution of a run that has begun, changed by the command line.

    A run that is only looked at may be of another machine: what the command does not offer is not
    taken from it, nor the number of threads.

    Args:
        going_on: whether the run goes on.

    Raises:
        InvalidInput: the run cannot be read.
    """
    recorded, flags = folder.execution(), parsed.command.flags()
    kept = {
        item.name: getattr(recorded, item.name)
        for item in fields(Execution)
        if going_on
        or item.name == "memory_format"
        or (as_flag(item.name) in flags and item.name != "cpu_threads")
    }
    execution = collect(parsed, replace(Execution(), **kept))
    check_effects(given_options(parsed), (), [folder.run()], execution)
    return execution


def given_options(parsed: argparse.Namespace) -> list[str]:
    """Names of the options of a run or its execution that the command line gives.

    One that is switched off, by --no-… or 0, is left out where it would be off without that.
    """
    given = {
        name.removeprefix(DECLARED): value
        for name, value in vars(parsed).items()
        if value is not None and (name in DEFAULTS or name.startswith(DECLARED))
    }
    return [name for name, value in given.items() if value or is_on(name)]


def is_on(name: str) -> bool:
    """Whether an option does something unless it is switched off."""
    from layerwise.training.declared_options import registries

    if name in DEFAULTS:
        return bool(DEFAULTS[name])
    owners = [by_option(registry).get(name, {}) for registry in registries().values()]
    return any(option.default for options in owners for option in options.values())


def collect(parsed: argparse.Namespace, base: Kind) -> Kind:
    """A run or an execution: values of the command line, else of the file, else of the base."""
    accepted = {item.name for item in fields(base)}
    options = read_config(getattr(parsed, "config", None))
    options |= {
        name.removeprefix(DECLARED): value
        for name, value in vars(parsed).items()
        if value is not None and (name in accepted or name.startswith(DECLARED))
    }
    values = {name: value for name, value in options.items() if name in accepted}
    for name, spell in SPELLINGS.items():
        if values.get(name):
            values[name] = spell(values[name])
    if isinstance(base, Execution):
        return replace(base, **values)
    return with_declared(without_options_of_others(replace(base, **values), base), options)


def without_options_of_others(run: Run, base: Run) -> Run:
    """The run without options of the base's network, rule or loss where it has another."""
    kinds = [item.metadata["of"] for item in fields(Run) if "of" in item.metadata]
    left: dict[str, Any] = {
        f"{kind}_options": NO_OPTIONS for kind in kinds if getattr(run, kind) != getattr(base, kind)
    }
    return replace(run, **left)


def with_declared(run: Run, options: Mapping[str, Any]) -> Run:
    """A run with the declared options that are given, each with the choices that it may belong to.

    An option that no choice of the run declares goes to a kind of which some entry does: there it
    is refused in words.
    """
    from layerwise.training.declared_options import choices, registries

    own = {item.name for item in fields(Run)} | {item.name for item in fields(Execution)}
    taken: dict[str, dict[str, Any]] = {kind: {} for kind in registries()}
    for name, value in options.items():
        if name not in own:
            kinds = [kind for kind, registry in registries().items() if name in by_option(registry)]
            chosen = [
                kind
                for kind in kinds
                if any(declares(registries()[kind], entry, name) for entry in choices(run)[kind])
            ]
            for kind in chosen or kinds[:1]:
                taken[kind][name] = value
    merged: dict[str, Any] = {
        f"{kind}_options": Options({**getattr(run, f"{kind}_options"), **values})
        for kind, values in taken.items()
    }
    return replace(run, **merged)


def declares(registry: Mapping[str, Callable[..., Any]], entry: str, name: str) -> bool:
    return entry in registry and name in options_of(registry[entry])


def read_config(path: str | None) -> dict[str, Any]:
    """Options from a YAML file (or a run's JSON), checked by name and type.

    Raises:
        InvalidInput: the file cannot be read, or holds something else than options.
    """
    if path is None:
        return {}
    from layerwise.training.declared_options import registries

    try:
        values = read_options(Path(path)) or {}
        refuse_strange(values)
    except OSError as error:
        raise InvalidInput(
            f"Cannot read --config {path}: {error.strerror}. Give the path of a YAML file."
        ) from None
    except ValueError as error:
        reason = in_one_line(str(error))[:150]
        raise InvalidInput(
            f"Cannot read {path} as YAML: {reason}. Give lines such as `epochs: 10`."
        ) from None
    if isinstance(values, dict) and "format" in values and isinstance(values.get("run"), dict):
        run = run_from(values["run"], values["format"], path)  # a run's own configuration file
        return {name: value for name, value in flat(run).items() if value is not None}
    if not isinstance(values, dict):
        raise InvalidInput(
            f"Cannot use {path}: it holds no options. Give lines such as `epochs: 10`."
        )
    own = {item.name: item for kind in (Run, Execution) for item in fields(kind)}
    declared = [name for registry in registries().values() for name in by_option(registry)]
    checked = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in checked:
            raise InvalidInput(f"Cannot use {path}: it gives {name} twice. Leave one of them out.")
        if name in ON_COMMAND_LINE:
            raise InvalidInput(
                f"Cannot use {name} of {path}: it is given on the command line alone. Give "
                f"{as_flag(name)} there."
            )
        choose(
            f"option in {path}",
            name,
            [name for name in own if "of" not in own[name].metadata] + declared,
        )
        checked[name] = check_value(path, own[name], value) if name in own else value
    return checked
