"""``layerwise show``: the units of a network: what each holds, its head, its loss."""

import argparse
from typing import Any

from layerwise.cli.options import Parser, add_config, add_fields, add_images, add_preset
from layerwise.cli.profile import NOT_PROFILED
from layerwise.cli.values import collect_both, images_of
from layerwise.runs.run import Execution, Run


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    add_preset(parser)
    add_images(parser)
    add_fields(parser, Run, skip={"model", "batch_size", "train_images", *NOT_PROFILED} - {"rule"})


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from layerwise.core.table import describe_units
    from layerwise.training.prepare import prepare

    described = collect_both(parsed)[0]
    images = images_of(parsed, described)
    prepared = prepare(described, Execution(device="cpu"))
    learner = prepared.make_learner(images)
    print(learner)
    return {"units": describe_units(learner.units), "span": learner.span}
