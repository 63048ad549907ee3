"""``layerwise compare``: several hierarchies, layer-wise and globally, in one table."""

import argparse
from pathlib import Path
from typing import Any

from layerwise.cli.options import Parser, add_config, add_fields, collect_both
from layerwise.runs.run import Execution, Run


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--output",
        "-o",
        default="runs",
        metavar="FOLDER",
        help="folder for the runs (default: runs)",
    )
    parser.add_argument(
        "--hierarchies", nargs="+", metavar="H", help="hierarchies, such as 2,2,2,2 1,1,2,2"
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        default=["simultaneous", "global"],
        metavar="RULE",
        help="orders of updates (default: simultaneous global)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each, with seeds from --seed on (default: 1)"
    )
    add_fields(parser, Run, skip={"model", "hierarchy", "rule"})
    add_fields(parser, Execution, skip={"separability_against"})


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.experiments.compare import compare

    base, execution = collect_both(parsed, parsed.rules)
    output = Path(parsed.output)
    return compare(base, parsed.hierarchies, parsed.rules, parsed.seeds, output, execution)
