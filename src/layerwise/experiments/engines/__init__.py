"""Engines: programs that carry out the runs of a sweep on many workers, by name.

Each is a file here and an entry in ``ENGINES``. Its options are the fields that it declares.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from layerwise.errors import InvalidInput, choose
from layerwise.experiments.engines.base import Engine
from layerwise.experiments.engines.ray import Ray
from layerwise.experiments.engines.slurm import Slurm
from layerwise.utils.options import checked_options, options_of

LOCAL = "local"  # runs in turn, in this process
ENGINES: dict[str, Callable[..., Engine]] = {"slurm": Slurm, "ray": Ray}
PACKAGES = {"slurm": "submitit", "ray": "ray"}  # that engines need; the extra has the engine's name


def create_engine(name: str, options: Mapping[str, Any]) -> Engine | None:
    """An engine with its options, not connected to anything; None: in this process.

    Raises:
        InvalidInput: it is unknown, its package is not installed, or an option is not one of its.
    """
    choose("--on", name, [LOCAL, *ENGINES])
    if name == LOCAL:
        if options:
            raise InvalidInput(
                f"Cannot use --on-option {next(iter(options))}: runs are trained in turn in this "
                f"process, which has no options. Give --on {' or --on '.join(ENGINES)}."
            )
        return None
    for option in options:
        choose("--on-option", option, options_of(ENGINES[name]))
    engine = ENGINES[name](**checked_options("engine", [name], ENGINES, options))
    engine.check()
    if find_spec(PACKAGES[name]) is None:
        raise InvalidInput(
            f"Cannot use --on {name}: {PACKAGES[name]} is not installed. Install it with pip "
            f"install 'layerwise[{name}]'."
        )
    return engine


def options_in_words() -> str:
    """The options of every engine, by its name."""
    return "; ".join(f"{name}: {', '.join(options_of(ENGINES[name]))}" for name in ENGINES)
