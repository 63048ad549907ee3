"""``layerwise train``: train a network by local losses, or globally."""

import argparse
import shlex
import sys
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.cli.options import (
    DECLARED,
    Parser,
    add_config,
    add_fields,
    add_preset,
    folder_name,
)
from layerwise.cli.values import collect_both, collect_execution, given_options, preset_of
from layerwise.errors import InvalidInput
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.utils.launch import is_first, restarts
from layerwise.utils.options import as_flag
from layerwise.utils.plugins import IMPORTED
from layerwise.utils.sizes import format_size
from layerwise.utils.words import as_word

if TYPE_CHECKING:
    from layerwise.experiments.presets import Preset


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    add_preset(parser)
    parser.add_argument(
        "--output",
        "-o",
        type=folder_name,
        metavar="FOLDER",
        help="folder for the run (default: runs/ and its name)",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        type=folder_name,
        metavar="RUN",
        help="go on with the run in --output, or in RUN",
    )
    add_fields(parser, Run, skip={"model"})
    add_fields(parser, Execution, skip=set())


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    names = [*(item.name for item in fields(Run)), "output", "config", "preset"]
    changed = [name for name in names if getattr(parsed, name, None) is not None]
    changed += [name.removeprefix(DECLARED) for name in vars(parsed) if name.startswith(DECLARED)]
    if parsed.resume is True and not changed:
        raise InvalidInput(
            "Cannot resume: --resume alone names no run. Give its folder, or the command that "
            "began it."
        )
    if parsed.resume is True and changed == ["output"] and not RunFolder(parsed.output).begun:
        raise InvalidInput(
            f"Cannot resume {parsed.output}: no run was begun there. Give its folder, or the "
            "command that began it."
        )
    if isinstance(parsed.resume, str) and changed:
        raise InvalidInput(
            f"Cannot change {as_flag(changed[0])} of a run that goes on: --resume {parsed.resume} "
            "takes it as it is. Leave it out."
        )
    check_finished(parsed)
    if not isinstance(parsed.resume, str):
        described, execution = collect_both(parsed)
        return train_one(described, parsed, execution, preset_of(parsed))
    folder = RunFolder(parsed.resume)
    return train_one(folder.run(), parsed, collect_execution(parsed, folder, going_on=True))


def check_finished(parsed: argparse.Namespace) -> None:
    """Refuse, or say, which options change nothing in a run that is named and finished.

    Raises:
        InvalidInput: separability is to be measured while it is trained; naming the command.
    """
    path, given = run_named(parsed), given_options(parsed)
    if path is None or not RunFolder(path).finished:
        return
    if any(name.startswith("separability_") for name in given):
        raise InvalidInput(
            f"Cannot measure separability while {path} is trained: it is finished. Measure it "
            f"with: layerwise separability {shlex.quote(as_word(path))}"
        )
    # the command that began it is given again with all its options, to go on or to see its result
    for name in given if path == parsed.resume and is_first() else ():
        note = f"layerwise: {as_flag(name)} changes nothing here: {path} is finished."
        print(note, file=sys.stderr, flush=True)


def run_named(parsed: argparse.Namespace) -> str | None:
    """The folder of the run that the command names, by ``--resume`` or ``--output``."""
    path: str | None = parsed.resume if isinstance(parsed.resume, str) else parsed.output
    return path


def train_one(
    described: Run,
    parsed: argparse.Namespace,
    execution: Execution,
    preset: "Preset | None" = None,
) -> dict[str, Any]:
    """Train a run in its folder: that of ``--resume`` or ``--output``, else in ``runs``.

    On several ranks each calls this, and the first writes and prints. Ranks that ``torchrun`` has
    started again go on with the run.

    Args:
        preset: whose settings it began from; it is recorded beside the run.
    """
    output = run_named(parsed)
    from layerwise.distributed import gathered, joined, print_once, together
    from layerwise.experiments.entry import folder_of
    from layerwise.profiling.budget import plan_run
    from layerwise.training.loop import Interrupted, train
    from layerwise.training.prepare import prepare
    from layerwise.training.progress import Progress, shown

    with joined(execution.device, execution.rank_timeout) as here:
        with together():
            described, plan = plan_run(described, execution)
            prepared = prepare(described, execution)
        if plan:
            prepared = replace(prepared, plan=asdict(plan))
            print_once(str(plan), sys.stdout)
        if preset:
            prepared = replace(prepared, preset=preset.record(prepared.run))
            print_once("\n".join(words_of(preset)), sys.stdout)
        folder = RunFolder(output) if output else folder_of(prepared.run, Path("runs"))
        # only the host of the rank that ended counts it
        resume = any(gathered(restarts() > 0 or parsed.resume is not None))
        try:
            with shown() if here.first else nullcontext(Progress()) as progress:
                result = train(prepared, folder, resume, progress)
        except Interrupted as interruption:
            again = command_to_resume(str(folder.path))
            raise KeyboardInterrupt(f"{interruption}. Go on with: {again}") from None
        print_once(summary(result), sys.stdout)
    return result


def command_to_resume(folder: str) -> str:
    """The command that goes on with a run, and lets the same files of code run."""
    words = ["layerwise", "train", "--resume", as_word(folder)]
    return shlex.join(words + [word for path in IMPORTED for word in ("--import", path)])


def words_of(preset: "Preset") -> list[str]:
    """What was published with a preset's settings, and what they leave out, in lines."""
    began = f"preset {preset.name}: {preset.units} units, {preset.published}; {preset.source}"
    return [began, *(f"  differs: {words}" for words in preset.differs)]


def summary(result: dict[str, Any]) -> str:
    best = ""
    if result["best_epoch"] is not None:
        best = (
            f", of the epoch best on validation ({result['best_epoch']}) "
            f"{result['best_test_accuracy']:.2f} %"
        )
    if "best_exit" in result:
        chosen = result["best_exit"]
        best += (
            f", of the head best on validation (unit {chosen['index']}) "
            f"{chosen['test_accuracy']:.2f} %"
        )
    if "ensemble" in result:
        best += f", of the ensemble of local heads {result['ensemble']['test_accuracy']:.2f} %"
    return (
        f"test accuracy of the last epoch {result['test_accuracy']:.2f} %{best}; written to "
        f"{result['run']}{over_budget(result)}"
    )


def over_budget(result: dict[str, Any]) -> str:
    """A line where the measured peak of memory exceeds the budget of the plan, else nothing."""
    budget = result.get("plan", {}).get("budget_bytes")
    peak = result["peak_memory_bytes"]
    if budget is None or peak is None or peak <= budget:
        return ""
    return (
        f"\nits peak of memory was {format_size(peak)}, over the {format_size(budget)} planned for"
    )
