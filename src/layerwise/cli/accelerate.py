"""``layerwise accelerate``: hierarchies that learn better layer-wise, in a budget."""

import argparse
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.cli.engines import add_engine, engine_of
from layerwise.cli.options import Parser, add_config, add_fields, folder_name
from layerwise.cli.values import collect_both
from layerwise.runs.run import ON_RANKS, Execution, Run


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--output",
        "-o",
        type=folder_name,
        default="runs/accelerate",
        metavar="FOLDER",
        help="folder for the runs (default: %(default)s)",
    )
    parser.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="KIND=AMOUNT",
        help="most convolutions, parameters, multiply-adds or bytes of memory: "
        "convolutions=+2, memory=4GB, parameters=x1.2; may be repeated (default, also beside "
        "memory: convolutions=+0, as many as the base)",
    )
    parser.add_argument(
        "--move",
        default="convolutions",
        help="convolutions: fewer in shallow stages; downsampling: maps halved earlier (default: "
        "convolutions)",
    )
    parser.add_argument(
        "--rank",
        default="count",
        help="count: fewest shallow convolutions first; gain: by what the base's units add to a "
        "probe after a short training (default: %(default)s)",
    )
    parser.add_argument(
        "--finalists",
        type=int,
        default=3,
        help="proposals trained beside the base (default: 3)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each, with seeds from --seed on (default: 1)"
    )
    parser.add_argument(
        "--final-epochs",
        type=int,
        default=0,
        help="epochs of the finalists (default: a tenth of --epochs)",
    )
    parser.add_argument("--listed", type=int, default=5, help="proposals in the table (default: 5)")
    parser.add_argument(
        "--figure", metavar="FILE", help="draw accuracy against work, as .svg or .png"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="list the proposals with their costs and train nothing",
    )
    add_engine(parser)
    add_fields(parser, Run, skip={"model", "rule"}, declared=("model", "loss"))
    add_fields(
        parser, Execution, skip={"cache_dir", "cache_limit", "separability_against", *ON_RANKS}
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.experiments.accelerate import Search, accelerate

    names = [item.name for item in fields(Search) if item.name != "budgets"]
    choices = {name: getattr(parsed, name) for name in names}
    search = Search(budgets=tuple(parsed.budget), **choices)
    base, execution = collect_both(parsed)
    output, engine = Path(parsed.output), engine_of(parsed)
    return accelerate(base, search, output, execution, parsed.dry_run, engine)
