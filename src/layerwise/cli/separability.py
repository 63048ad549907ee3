"""``layerwise separability``: where in depth the classes become separable."""

import argparse
from typing import Any

from layerwise.cli.evaluate import TRAINING
from layerwise.cli.options import OF_THE_RUN, Parser, add_fields, folder_name
from layerwise.cli.values import collect_execution
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s [options] RUN"
    parser.add_argument(
        "folder", type=folder_name, metavar="RUN", help="folder of a run, finished or not"
    )
    parser.add_argument(
        "--measures",
        metavar="A,B",
        help="measures, joined by commas; gains are of the first (default: all)",
    )
    parser.add_argument(
        "--against",
        type=folder_name,
        metavar="RUN",
        help="compare features with this run's, by linear CKA",
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        default=10_000,
        help="use at most N images, evenly over the classes (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        default="test",
        help="images to measure on: test or validation (default: %(default)s)",
    )
    parser.add_argument(
        "--pooled-to",
        type=int,
        metavar="N",
        default=1024,
        help="pool the features of an image to at most N numbers (default: %(default)s)",
    )
    parser.add_argument("--csv", metavar="FILE", help="write the table as CSV")
    add_fields(parser, Execution, skip=TRAINING, defaults=OF_THE_RUN)


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.analysis.table import show_run

    folder = RunFolder(parsed.folder)
    choices = {name: getattr(parsed, name) for name in ("against", "pooled_to", "images", "split")}
    execution = collect_execution(parsed, folder)
    return show_run(folder, execution, parsed.measures, parsed.csv, choices)
