"""``layerwise report``: runs beside the paper's numbers, as one page."""

import argparse
from typing import Any

from layerwise.cli.options import Parser


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "runs", nargs="*", default=["runs"], metavar="RUNS", help="folders of runs (default: runs)"
    )
    parser.add_argument(
        "--output",
        "-o",
        default="report.html",
        metavar="FILE",
        help="the page (default: report.html)",
    )
    parser.add_argument(
        "--figures", metavar="FOLDER", help="also write every figure, as SVG and PNG"
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        help="also write a line per run, and the claims into another file beside it",
    )
    parser.add_argument(
        "--latex",
        metavar="FOLDER",
        help="also write the paper's tables with what was measured, as LaTeX",
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.report import report

    return report(parsed.runs, parsed.output, parsed.figures, parsed.csv, parsed.latex)
