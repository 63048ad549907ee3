"""``layerwise predict``: the five likeliest classes of images."""

import argparse
from typing import Any

from layerwise.cli.options import Parser
from layerwise.runs.folder import RunFolder


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument(
        "--best", action="store_true", help="the best epoch's weights instead of the last's"
    )


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.training.saved import predict

    return predict(RunFolder(parsed.folder), parsed.images, parsed.best)
