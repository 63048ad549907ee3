"""``layerwise export``: a trained network, or its first units, as a file that others load."""

import argparse
from dataclasses import fields, replace
from typing import Any

from layerwise.cli.options import OF_THE_RUN, Parser, add_fields, folder_name
from layerwise.cli.values import collect_execution
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution

BEST = "best"  # of --units
READING = ("data_dir", "download", "workers")  # fields of an execution that concern the data


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s [options] --format FORMAT RUN"
    parser.add_argument("folder", type=folder_name, metavar="RUN", help="folder of a finished run")
    parser.add_argument(
        "--format",
        required=True,
        help="safetensors (weights under the network's own names), torch-export (a program that "
        "torch alone loads) or onnx (needs pip install 'layerwise[onnx]')",
    )
    parser.add_argument(
        "--output",
        "-o",
        metavar="FILE",
        help="file to write; none is overwritten (default: here, named like the run)",
    )
    parser.add_argument(
        "--units",
        type=number_of_units,
        metavar="K",
        help="only the first K units, with the local head of the last: an early exit; best: those "
        "up to the head that is best on validation images",
    )
    parser.add_argument(
        "--ensemble",
        action="store_true",
        help="the network that ends in all its local heads: the mean of their probabilities",
    )
    parser.add_argument(
        "--best", action="store_true", help="the best epoch's weights instead of the last's"
    )
    parser.add_argument(
        "--images",
        type=int,
        metavar="N",
        default=64,
        help="test images on which the file is compared with the network (default: %(default)s)",
    )
    skipped = {item.name for item in fields(Execution)} - set(READING)
    add_fields(parser, Execution, skip=skipped, defaults=OF_THE_RUN)


def number_of_units(text: str) -> int | str:
    try:
        return text if text == BEST else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number, nor {BEST}") from None


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.training.export import export

    folder = RunFolder(parsed.folder)
    execution = replace(collect_execution(parsed, folder), device="cpu")
    choices = {
        name: getattr(parsed, name) for name in ("output", "units", "best", "images", "ensemble")
    }
    return export(folder, execution, parsed.format, **choices)
