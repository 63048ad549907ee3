"""``layerwise audit``: which weights the loss of each unit really reaches."""

import argparse
from typing import Any

from layerwise.cli.options import Parser, add_config, add_fields, add_images
from layerwise.cli.profile import NOT_PROFILED
from layerwise.cli.values import collect_both, images_of
from layerwise.runs.run import Execution, Run

IMAGES = 8  # in the batch that is differentiated


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    add_images(parser)
    add_fields(parser, Run, skip={"model", "train_images", *NOT_PROFILED} - {"rule"})


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    import torch

    from layerwise.core.audit import labels_in_pairs
    from layerwise.core.memory_format import set_memory_format
    from layerwise.profiling.audit import audit
    from layerwise.profiling.budget import plan_run
    from layerwise.profiling.trial_steps import trial_options
    from layerwise.training.prepare import prepare

    execution = Execution(device="cpu")
    described = collect_both(parsed)[0]
    images = images_of(parsed, described)
    described, plan = plan_run(described, execution, images)
    prepared = prepare(described, execution)
    described = prepared.run
    if plan:
        print(plan, flush=True)
    learner = prepared.make_learner(images)
    set_memory_format(learner, prepared.execution.memory_format)
    torch.manual_seed(described.seed)
    batch = torch.rand(IMAGES, *learner.image_shape, dtype=learner.image_type)
    labels = labels_in_pairs(IMAGES, learner.num_classes)
    options = trial_options(described)
    found = audit(learner, batch, labels, described.rule, described.batch_size, **options)
    print(found)
    memory = {"kept_bytes": found.kept_bytes, "peak_bytes": found.peak_bytes}
    return {**found.summary(), **memory, "losses": found.rows()}


def problem(result: dict[str, Any]) -> str | None:
    """A sentence on why the locality is not as declared; None: it is."""
    sentence: str | None = result["problem"]
    return sentence
