"""``layerwise reproduce``: the rows of the paper's tables, each as a run."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.cli.effects import check_effects
from layerwise.cli.engines import add_engine, engine_of
from layerwise.cli.options import Parser, add_fields, folder_name
from layerwise.cli.values import collect, given_options
from layerwise.errors import check_range, choose
from layerwise.experiments.states import DIVERGED
from layerwise.paper.rows import COLUMNS, DEPARTURES, SCALES, plan, select_rows
from layerwise.runs.ranges import MOST_SEEDS
from layerwise.runs.run import ON_RANKS, Execution, Run
from layerwise.utils.words import counted


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s [options] TABLE ..."
    parser.add_argument(
        "tables", nargs="+", type=int, metavar="TABLE", help="tables of the paper, 1 to 6"
    )
    parser.add_argument(
        "--scale",
        default="paper",
        help="paper: as published; middle: half the width, for two CPU cores over days; small: for "
        "two CPU cores (default: paper)",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["*"],
        metavar="NAME",
        help="names of rows, such as 'resnet18*' (default: all)",
    )
    parser.add_argument(
        "--rule",
        default="both",
        help="columns of the tables: layerwise, global or both (default: both)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each, with seeds from 0 on (default: 1)"
    )
    parser.add_argument(
        "--output",
        "-o",
        type=folder_name,
        metavar="FOLDER",
        help="folder for the runs (default: runs/ and the scale)",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the runs and train nothing")
    add_engine(parser)
    others = {item.name for item in fields(Run)} - set(DEPARTURES)
    scaled = {name: "the scale's" for scale in SCALES.values() for name in scale.options}
    add_fields(parser, Run, skip=others, declared=(), defaults=scaled)
    add_fields(parser, Execution, skip={"separability_against", *ON_RANKS})


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    column = choose("--rule", parsed.rule, [*COLUMNS, "both"])
    check_range("seeds", parsed.seeds, 1, MOST_SEEDS)
    choose("scale", parsed.scale, SCALES)
    rows = select_rows(parsed.tables, parsed.rows)
    changes = {name: getattr(parsed, name) for name in DEPARTURES if hasattr(parsed, name)}
    columns = list(COLUMNS) if column == "both" else [column]
    planned = plan(rows, parsed.scale, columns, range(parsed.seeds), **changes)
    engine = engine_of(parsed)
    from layerwise.experiments.reproduce import reproduce

    output = Path(parsed.output or Path("runs") / parsed.scale)
    execution = collect(parsed, Execution())
    runs = [each.run for each in planned] or [Run()]
    check_effects(given_options(parsed), (), runs, execution)
    return reproduce(planned, parsed.scale, output, execution, parsed.dry_run, engine)


def problem(result: dict[str, Any]) -> str | None:
    """A sentence on the runs whose loss diverged, which have no number; None: there are none."""
    folders = [run["folder"] for run in result["runs"] if run["state"] == DIVERGED]
    if not folders:
        return None
    return f"{counted(len(folders), 'run')} diverged and gave no number: {', '.join(folders)}."
