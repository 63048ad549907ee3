"""``layerwise evaluate``: accuracy of a trained network and of its units."""

import argparse
from typing import Any

from layerwise.cli.options import OF_THE_RUN, Parser, add_fields, folder_name
from layerwise.cli.values import collect_execution
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import ON_RANKS, Execution

# fields of an execution that say nothing about a run that is only looked at
TRAINING = {
    *ON_RANKS,
    *("graphs", "streams"),
    *("eval_every", "save_every", "log", "memory_format", "cache_dir", "cache_limit", "memory"),
    *("separability_every", "separability_measures", "separability_against"),
}


def add_arguments(parser: Parser) -> None:
    parser.usage = "%(prog)s [options] RUN"
    parser.add_argument("folder", type=folder_name, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--best", action="store_true", help="the best epoch's weights instead of the last's"
    )
    add_fields(parser, Execution, skip=TRAINING, defaults=OF_THE_RUN)


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.training.saved import evaluate

    folder = RunFolder(parsed.folder)
    return evaluate(folder, collect_execution(parsed, folder), parsed.best)
