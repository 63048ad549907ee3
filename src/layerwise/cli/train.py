"""``layerwise train``: train a network by local losses, or globally."""

import argparse
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.cli.options import (
    DECLARED,
    Parser,
    add_config,
    add_fields,
    collect_both,
    collect_execution,
    given_options,
)
from layerwise.errors import InvalidInput
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.utils.options import as_flag


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--output", "-o", metavar="FOLDER", help="folder for the run (default: runs/ and its name)"
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="RUN",
        help="go on with the run in --output, or in RUN",
    )
    add_fields(parser, Run, skip={"model"})
    add_fields(parser, Execution, skip=set())


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    if parsed.output == "" or parsed.resume == "":
        raise InvalidInput("Cannot use an empty --output or --resume: name a folder.")
    if parsed.resume is True and not (parsed.model or parsed.output or parsed.config):
        raise InvalidInput(
            "Cannot resume: --resume alone names no run. Give its folder, or the command that "
            "began it."
        )
    refuse_finished(parsed)
    if not isinstance(parsed.resume, str):
        described, execution = collect_both(parsed)
        return train_one(described, parsed.output, execution, bool(parsed.resume))
    folder = RunFolder(parsed.resume)
    names = [*(item.name for item in fields(Run)), "output", "config"]
    changed = [name for name in names if getattr(parsed, name, None) is not None]
    changed += [name.removeprefix(DECLARED) for name in vars(parsed) if name.startswith(DECLARED)]
    if changed:
        raise InvalidInput(
            f"Cannot change {as_flag(changed[0])} of a run that goes on: --resume {parsed.resume} "
            "takes it as it is. Leave it out."
        )
    return train_one(folder.run(), parsed.resume, collect_execution(parsed, folder), True)


def refuse_finished(parsed: argparse.Namespace) -> None:
    """Refuse to measure separability while a run is trained that is finished.

    Raises:
        InvalidInput: naming the command that measures it.
    """
    path = parsed.resume if isinstance(parsed.resume, str) else parsed.output
    asked = any(name.startswith("separability_") for name in given_options(parsed))
    if asked and path and RunFolder(path).finished:
        raise InvalidInput(
            f"Cannot measure separability while {path} is trained: it is finished. Measure it "
            f"with: layerwise separability {shlex.quote(path)}"
        )


def train_one(
    described: Run, output: str | None, execution: Execution, resume: bool
) -> dict[str, Any]:
    """Train a run in a folder; None: in ``runs``, under the run's name."""
    from layerwise.experiments.sweep import folder_of
    from layerwise.training.loop import Interrupted, train
    from layerwise.training.prepare import prepare
    from layerwise.training.progress import shown

    prepared = prepare(described, execution)
    folder = RunFolder(output) if output else folder_of(prepared.run, Path("runs"))
    try:
        with shown() as progress:
            result = train(prepared, folder, resume, progress)
    except Interrupted as interruption:
        raise KeyboardInterrupt(
            f"{interruption}. Go on with: layerwise train --resume {folder.path}"
        ) from None
    print(summary(result), flush=True)
    return result


def summary(result: dict[str, Any]) -> str:
    best = ""
    if result["best_epoch"] is not None:
        best = (
            f", of the epoch best on validation ({result['best_epoch']}) "
            f"{result['best_test_accuracy']:.2f} %"
        )
    return (
        f"test accuracy of the last epoch {result['test_accuracy']:.2f} %{best}; written to "
        f"{result['run']}"
    )
