"""``layerwise profile``: memory, work and time of a step by several rules."""

import argparse
from typing import Any

from layerwise.cli.options import Parser, add_config, add_fields, add_images, add_preset
from layerwise.cli.values import collect_both, images_of
from layerwise.runs.run import ON_RANKS, Execution, Run

# fields that say nothing about what a step costs
NOT_PROFILED = {
    *("data", "val_fraction", "rule", "epochs", "decay_rate", "decay_milestones", "augment"),
    *("crop_padding", "flip", "cutout", "views", "weights"),
}
NOT_EXECUTED = {
    *ON_RANKS,
    *("data_dir", "workers", "download", "eval_every", "save_every", "log", "cache_dir"),
    *("separability_every", "separability_measures", "separability_against", "memory"),
}


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    add_preset(parser)
    parser.add_argument(
        "--rules",
        metavar="A,B",
        help="orders of updates, joined by commas (default: all, simultaneous-span-2 and "
        "sequential-cached; global-accumulated and checkpointed-planned predict global training "
        "within the memory of simultaneous)",
    )
    add_images(parser)
    parser.add_argument(
        "--predict",
        action="store_true",
        help="only predict; nothing is computed, so a batch of any size will do",
    )
    parser.add_argument(
        "--memory",
        dest="fitting",  # an execution has another option of this name
        metavar="SIZE",
        help="find the largest batch that fits into 4GB, 4GiB, 500MB …",
    )
    parser.add_argument(
        "--per-unit", action="store_true", help="print a table of units for every rule"
    )
    parser.add_argument("--figure", metavar="FILE", help="draw memory over a step, as .svg or .png")
    add_fields(parser, Run, skip={"model", "cache", "bfloat16_features", *NOT_PROFILED})
    add_fields(parser, Execution, skip=NOT_EXECUTED)


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.profiling.profile import profile, profiled

    names = None
    if parsed.rules is not None:
        names = [name.strip() for name in parsed.rules.split(",")]
    described, execution = collect_both(parsed, names or list(profiled()))
    images = images_of(parsed, described)
    return profile(
        described,
        execution,
        names,
        images,
        parsed.predict,
        parsed.fitting,
        parsed.figure,
        parsed.per_unit,
    )
