"""A run in options of the command line: its command, and how it differs from another. No torch."""

import shlex
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.runs.run import Run, plain_values, without_idle
from layerwise.utils.options import as_flag


def flat(run: Run) -> dict[str, Any]:
    """A run's values by the names of the command line's options."""
    values = plain_values(run)
    for item in fields(Run):
        if "of" in item.metadata:
            values |= values.pop(item.name)
    return values


def differences(run: Run, reference: Run) -> list[str]:
    """The options in which two runs differ, as the command line spells them."""
    values = flat(run), flat(reference)
    names = [
        name for name in {**values[0], **values[1]} if values[0].get(name) != values[1].get(name)
    ]
    return [
        f"{as_flag(name)} {values[0].get(name)} against {values[1].get(name)}" for name in names
    ]


def command(run: Run, imported: Iterable[str] = ()) -> str:
    """The command that trains a run, quoted for a shell.

    Data that lie in a folder are named without where it is. What has no effect is left out.

    Args:
        imported: Python files that it imports.
    """
    defaults = flat(Run())
    words = ["layerwise", "train", run.model]
    for path in imported:
        words += [] if run.model.startswith(f"{path}:") else ["--import", str(path)]
    for name, value in flat(without_idle(run)).items():
        if name != "model" and (name not in defaults or value != defaults[name]):
            words += spelled(name, Path(value).name if name == "data" else value)
    return shlex.join(words)


def spelled(name: str, value: Any) -> list[str]:
    """An option as the command line spells it."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    text = str(value)
    return [f"--{flag}={text}"] if text.startswith("-") else [f"--{flag}", text]
