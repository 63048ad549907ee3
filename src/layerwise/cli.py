"""The command line. Each command is a function of its parsed arguments; torch is imported by the commands that need it."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from layerwise import __version__
from layerwise.errors import CannotSplit, Diverged, InvalidInput, choose
from layerwise.options import Parser, add_command, add_fields, collect
from layerwise.paper import COLUMNS, DEPARTURES, SCALES, plan, select_rows
from layerwise.runs import Execution, Run, RunFolder, run_name

REFUSED, INTERRUPTED, PIPE_CLOSED = 2, 130, 141  # exit codes
CACHES = {"cache_dir", "cache_limit"}
ONE_RUN = {"separability_against"}  # options of a single training
# options of training alone
NOT_TRAINED = {"eval_every", "save_every", "separability_every", "separability_measures", "log", "memory_format", *ONE_RUN}
LISTS = ("models", "losses", "rules", "datasets", "measures")

# fields of a run that say nothing about what a step costs
NOT_PROFILED = frozenset(
    {"data", "val_fraction", "rule", "cache", "threads", "epochs", "decay_rate", "decay_milestones", "augment", "crop_padding"}
    | {"flip", "cutout", "views"}
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 2 refused, 130 interrupted."""
    # torch's profiler, which counts memory, else writes of itself to stderr
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # threads that wait spin only shortly: as fast on an idle machine, 17 times faster when another program takes a core
    # (docs/log.md, 2026-11-23)
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # large tensors in large pages: a new map's first touch else costs several times what is computed (docs/log.md, 2026-11-23)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        parsed = build_parser().parse_args(arguments)
        result = parsed.command(parsed)
        if parsed.json:
            print(json.dumps(result, allow_nan=False), flush=True)
    except (InvalidInput, CannotSplit, Diverged) as error:
        leave(f"layerwise: {error}", REFUSED)
    except KeyboardInterrupt as interruption:
        leave(f"layerwise: {interruption or 'interrupted'}", INTERRUPTED)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error) and "out of memory" not in str(error):
            raise
        leave("layerwise: there is not enough memory for this: lower --batch-size, --width or --image-size", REFUSED)
    except BrokenPipeError:  # the reader of a pipe, such as head, has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(PIPE_CLOSED)
    except OSError as error:
        leave(f"layerwise: {error.filename or 'a file'} cannot be used ({error.strerror or error}): give another path", REFUSED)


def leave(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


def build_parser() -> Parser:
    parser = Parser(prog="layerwise", description="Train networks without global backpropagation, unit by unit.")
    parser.add_argument("--version", action="version", version=f"layerwise {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    train = add_command(commands, "train", run_train, "train a network by local losses, or globally")
    train.add_argument("model", nargs="?", help="network; see `layerwise list models` (default: resnet18)")
    train.add_argument("--config", "-c", metavar="FILE", help="YAML file of options; the command line goes before it")
    train.add_argument("--output", "-o", metavar="FOLDER", help="folder of the run (default: runs/ and a name)")
    train.add_argument("--resume", nargs="?", const=True, metavar="RUN", help="go on with the run in --output, or in RUN")
    add_fields(train, Run, skip={"model"})
    add_fields(train, Execution)

    compare = add_command(commands, "compare", run_compare, "several hierarchies, layer-wise and globally, in one table")
    compare.add_argument("model", nargs="?", help="network; see `layerwise list models` (default: resnet18)")
    compare.add_argument("--config", "-c", metavar="FILE", help="YAML file of options; the command line goes before it")
    compare.add_argument("--output", "-o", default="runs", metavar="FOLDER", help="folder that holds the runs (default: runs)")
    compare.add_argument("--hierarchies", nargs="+", metavar="H", help="hierarchies, such as 2,2,2,2 1,1,2,2")
    compare.add_argument("--rules", nargs="+", default=["simultaneous", "global"], metavar="RULE", help="default: both kinds")
    compare.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds from --seed on (default: 1)")
    add_fields(compare, Run, skip={"model", "hierarchy", "rule"})
    add_fields(compare, Execution, skip=ONE_RUN)

    reproduce = add_command(commands, "reproduce", run_reproduce, "the rows of the paper's tables, each as a run")
    reproduce.add_argument("tables", nargs="+", type=int, metavar="TABLE", help="tables of the paper, 1 to 6")
    reproduce.add_argument("--scale", default="paper", help="paper: as published; small: for 2 CPU cores (default: paper)")
    reproduce.add_argument("--rows", nargs="+", default=["*"], metavar="NAME", help="such as 'resnet18*' (default: all rows)")
    reproduce.add_argument("--rule", default="both", help="columns: layerwise, global or both (default: both)")
    reproduce.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds from 0 on (default: 1)")
    reproduce.add_argument("--output", "-o", metavar="FOLDER", help="folder that holds the runs (default: runs/ and the scale)")
    reproduce.add_argument("--dry-run", action="store_true", help="show the runs and train nothing")
    add_fields(reproduce, Run, skip={item.name for item in fields(Run)} - set(DEPARTURES))
    add_fields(reproduce, Execution, skip=ONE_RUN)

    report = add_command(commands, "report", run_report, "runs beside the paper's numbers, as one page")
    report.add_argument("runs", nargs="*", default=["runs"], metavar="RUNS", help="folders of runs (default: runs)")
    report.add_argument("--output", "-o", default="report.html", metavar="FILE", help="the page (default: report.html)")
    report.add_argument("--figures", metavar="FOLDER", help="also write every figure, as SVG and PNG")
    report.add_argument("--csv", metavar="FILE", help="also write a line per run, and the claims into another file beside it")
    report.add_argument("--latex", metavar="FOLDER", help="also write the paper's tables with what was measured, as LaTeX")

    profile = add_command(commands, "profile", run_profile, "memory, work and time of a step by several rules")
    profile.add_argument("model", nargs="?", help="network; see `layerwise list models` (default: resnet18)")
    profile.add_argument("--config", "-c", metavar="FILE", help="YAML file of options; the command line goes before it")
    profile.add_argument("--rules", metavar="A,B", help="orders of updates (default: all, sequential-cached too)")
    profile.add_argument("--classes", type=int, default=10, help="classes; no data is read (default: 10)")
    profile.add_argument("--predict", action="store_true", help="predict only; nothing is computed, so any batch will do")
    profile.add_argument("--memory", metavar="SIZE", help="find the largest batch that fits into 4GB, 4GiB, 500MB …")
    profile.add_argument("--per-unit", action="store_true", help="print a table of units for every rule")
    profile.add_argument("--figure", metavar="FILE", help="draw memory over a step, as .svg or .png")
    add_fields(profile, Run, skip={"model", *NOT_PROFILED})
    unused = {"data_dir", "workers", "download", *NOT_TRAINED - {"memory_format"}, *CACHES - {"cache_limit"}}
    add_fields(profile, Execution, skip=unused)

    evaluate = add_command(commands, "evaluate", run_evaluate, "accuracy of a trained network and of its units")
    evaluate.add_argument("run", help="folder of a run")
    evaluate.add_argument("--best", action="store_true", help="the best epoch's weights instead of the last's")
    add_fields(evaluate, Execution, skip={*NOT_TRAINED, *CACHES})

    separability = add_command(commands, "separability", run_separability, "where in depth the classes become separable")
    separability.add_argument("run", help="folder of a run, finished or not")
    separability.add_argument("--measures", metavar="A,B", help="gains are of the first (default: all)")
    separability.add_argument("--against", metavar="RUN", help="compare features with this run's, by linear CKA")
    separability.add_argument(
        "--images", type=int, default=10_000, help="at most so many, evenly over the classes (%(default)s)"
    )
    separability.add_argument("--split", default="test", help="images to measure on: test or validation (default: %(default)s)")
    separability.add_argument("--pooled-to", type=int, default=1024, help="numbers that features are pooled to (%(default)s)")
    separability.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    add_fields(separability, Execution, skip={*NOT_TRAINED, *CACHES})

    accelerate = add_command(commands, "accelerate", run_accelerate, "designs that learn better layer-wise, in a budget")
    accelerate.add_argument("model", nargs="?", help="network; see `layerwise list models` (default: resnet18)")
    accelerate.add_argument("--config", "-c", metavar="FILE", help="YAML file of options; the command line goes before it")
    accelerate.add_argument("--output", "-o", default="runs/accelerate", metavar="FOLDER", help="of all runs (%(default)s)")
    accelerate.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="KIND=AMOUNT",
        help="at most so many convolutions, parameters or multiply-adds, or bytes of memory: convolutions=+2, memory=4GB, "
        "parameters=x1.2; may be repeated (default, also beside memory: convolutions=+0, as many as the base)",
    )
    accelerate.add_argument(
        "--move",
        default="convolutions",
        help="convolutions: fewer in shallow stages; downsampling: maps halved earlier (default: convolutions)",
    )
    accelerate.add_argument(
        "--rank",
        default="count",
        help="count: fewest shallow convolutions first; gain: by what the base's units add, trained shortly (%(default)s)",
    )
    accelerate.add_argument("--finalists", type=int, default=3, help="proposals trained beside the base (default: 3)")
    accelerate.add_argument("--seeds", type=int, default=1, help="runs of each, with seeds from --seed on (default: 1)")
    accelerate.add_argument("--final-epochs", type=int, default=0, help="of the finalists (default: a tenth of --epochs)")
    accelerate.add_argument("--listed", type=int, default=5, help="proposals in the table (default: 5)")
    accelerate.add_argument("--figure", metavar="FILE", help="draw accuracy against work, as .svg or .png")
    accelerate.add_argument("--dry-run", action="store_true", help="list the proposals with their costs and train nothing")
    add_fields(accelerate, Run, skip={"model", "rule", "cache", "segments", "threads"})
    add_fields(accelerate, Execution, skip={*CACHES, *ONE_RUN})

    predict = add_command(commands, "predict", run_predict, "the five likeliest classes of images")
    predict.add_argument("run", help="folder of a run")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    predict.add_argument("--best", action="store_true", help="the best epoch's weights instead of the last's")

    listing = add_command(commands, "list", run_list, "what can be chosen from")
    listing.add_argument("what", metavar="{" + ",".join(LISTS) + "}", help="what to list")
    return parser


def run_train(parsed: argparse.Namespace) -> dict[str, Any]:
    if parsed.output == "" or parsed.resume == "":
        raise InvalidInput("--output and --resume cannot be empty: name a folder")
    if parsed.resume is True and not (parsed.model or parsed.output or parsed.config):
        raise InvalidInput("--resume alone names no run: give its folder, or the command that began it")
    if not isinstance(parsed.resume, str):
        run = collect(parsed, Run())
        folder = RunFolder(parsed.output or Path("runs") / run_name(run))
        return train_one(run, folder, collect(parsed, Execution()), bool(parsed.resume))
    folder = RunFolder(parsed.resume)
    run, execution = folder.run(), folder.execution()
    given = [
        name for name in (*(item.name for item in fields(Run)), "output", "config") if getattr(parsed, name, None) is not None
    ]
    if given:
        raise InvalidInput(f"--resume {parsed.resume} goes on with that run as it is: leave out {given[0]}")
    return train_one(run, folder, collect(parsed, execution), True)


def train_one(run: Run, folder: RunFolder, execution: Execution, resume: bool) -> dict[str, Any]:
    from layerwise.progress import shown
    from layerwise.train import Interrupted, train

    try:
        with shown() as progress:
            result = train(run, folder, execution, resume, progress)
    except Interrupted as interruption:
        raise KeyboardInterrupt(f"{interruption}. Go on with: layerwise train --resume {folder.path}") from None
    print(summary(result), flush=True)
    return result


def summary(result: dict[str, Any]) -> str:
    best = ""
    if result["best_epoch"] is not None:
        best = f", of the epoch best on validation ({result['best_epoch']}) {result['best_test_accuracy']:.2f} %"
    return f"test accuracy of the last epoch {result['test_accuracy']:.2f} %{best}; written to {result['run']}"


def run_compare(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.compare import compare

    base, execution = collect(parsed, Run()), collect(parsed, Execution())
    return compare(base, parsed.hierarchies, parsed.rules, parsed.seeds, Path(parsed.output), execution)


def run_reproduce(parsed: argparse.Namespace) -> dict[str, Any]:
    columns = list(COLUMNS) if choose("--rule", parsed.rule, [*COLUMNS, "both"]) == "both" else [parsed.rule]
    if parsed.seeds < 1:
        raise InvalidInput(f"seeds {parsed.seeds} is too small: give 1 or more")
    choose("scale", parsed.scale, SCALES)
    rows = select_rows(parsed.tables, parsed.rows)
    changes = {name: getattr(parsed, name) for name in DEPARTURES if hasattr(parsed, name)}
    planned = plan(rows, parsed.scale, columns, range(parsed.seeds), **changes)
    from layerwise.reproduce import reproduce

    output = Path(parsed.output or Path("runs") / parsed.scale)
    return reproduce(planned, parsed.scale, output, collect(parsed, Execution()), parsed.dry_run)


def run_report(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.report import report

    return report(parsed.runs, parsed.output, parsed.figures, parsed.csv, parsed.latex)


def run_profile(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.profile import PROFILED, profile

    names = [name.strip() for name in parsed.rules.split(",")] if parsed.rules is not None else list(PROFILED)
    base, execution = collect(parsed, Run()), collect(parsed, Execution())
    return profile(base, execution, names, parsed.classes, parsed.predict, parsed.memory, parsed.figure, parsed.per_unit)


def run_evaluate(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.trained import evaluate

    folder = RunFolder(parsed.run)
    return evaluate(folder, collect(parsed, folder.execution()), parsed.best)


def run_separability(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.survey_table import show_run

    folder = RunFolder(parsed.run)
    choices = {name: getattr(parsed, name) for name in ("against", "pooled_to", "images", "split")}
    return show_run(folder, collect(parsed, folder.execution()), parsed.measures, parsed.csv, choices)


def run_accelerate(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.accelerate import Search, accelerate

    choices = {item.name: getattr(parsed, item.name) for item in fields(Search) if item.name != "budgets"}
    search = Search(budgets=tuple(parsed.budget), **choices)
    return accelerate(collect(parsed, Run()), search, Path(parsed.output), collect(parsed, Execution()), parsed.dry_run)


def run_predict(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.trained import predict

    return predict(RunFolder(parsed.run), parsed.images, parsed.best)


def run_list(parsed: argparse.Namespace) -> dict[str, Any]:
    choose("list", parsed.what, LISTS)
    from layerwise.listing import listing

    return listing(parsed.what)


if __name__ == "__main__":
    main()
