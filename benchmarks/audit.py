"""Locality of every registered loss on ResNet18, found by differentiating, as a table.

python benchmarks/audit.py --csv results/audit.csv
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from layerwise.core.audit import labels_in_pairs
from layerwise.core.memory_format import set_memory_format
from layerwise.losses import LOSSES
from layerwise.profiling.audit import audit
from layerwise.profiling.trial_steps import trial_images, trial_options
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare
from layerwise.utils.csv_text import write_csv
from layerwise.utils.options import Options

BATCH, IMAGES = 128, 8  # images that memory is predicted for, and those differentiated
SPANS = (1, 2)


def row(run: Run) -> dict[str, Any]:
    """What the audit finds of a run's losses."""
    prepared = prepare(run, Execution(device="cpu"))
    torch.manual_seed(0)
    learner = prepared.make_learner(trial_images(run))
    set_memory_format(learner, "auto")
    images = torch.rand(IMAGES, *learner.image_shape)
    labels = labels_in_pairs(IMAGES, 10)
    found = audit(learner, images, labels, run.rule, BATCH, **trial_options(prepared.run))
    memory = found.kept_bytes or 0, found.peak_bytes or 0
    return {
        "loss": run.loss if run.rule == "simultaneous" else run.rule,
        "units": len(found.units),
        "declared_span": found.declared_span,
        "span": found.span,
        "isolated": found.isolated,
        "leaking_parameters": len(found.leaks) + len(found.stray),
        "dead_parameters": len(found.dead),
        "statistics_updates": found.statistics_updates,
        "kept_mb": round(memory[0] / 1e6, 1),
        "peak_mb": round(memory[1] / 1e6, 1),
    }


def rows() -> list[dict[str, Any]]:
    """A row per loss and span, by blocks, at full width and 32 pixels, and of the global rules."""
    common: dict[str, Any] = {"model": "resnet18", "data": "cifar10", "at": "block"}
    runs = [
        Run(loss=loss, rule_options=Options({"span": span}), **common)
        for loss in LOSSES
        for span in SPANS
    ]
    runs += [Run(rule=rule, **common) for rule in ("global", "checkpointed")]
    table = []
    for run in runs:
        table.append(row(run))
        print(*table[-1].values(), flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True)
    parsed = parser.parse_args()
    table = rows()
    write_csv(parsed.csv, tuple(table[0]), table)


if __name__ == "__main__":
    main()
