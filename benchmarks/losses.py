"""Cost of every local loss, term and window: predicted, as a table and a picture.

python benchmarks/losses.py --csv results/losses.csv --figure docs/images/losses.svg
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from layerwise.losses import LOSSES
from layerwise.profiling.predict import predict_steps
from layerwise.profiling.trial_steps import trial_images, trial_options
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare
from layerwise.utils.csv_text import write_csv
from layerwise.utils.options import Options

BATCH = 128
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    **{name: (name, {}, {}) for name in LOSSES},
    "pred + transport": ("pred", {"transport": 0.1}, {}),
    "pred + own input": ("pred", {"own_input": 0.1}, {}),
    "pred, span 2": ("pred", {}, {"span": 2}),
}


def cost(run: Run) -> tuple[int, int, int]:
    """Multiply-adds of a step, parameters of the heads, predicted peak in bytes."""
    prepared = prepare(run, Execution(device="cpu"))
    learner = prepared.make_learner(trial_images(run))
    (step,) = predict_steps(run.rule, learner, BATCH, trial_options(prepared.run), "auto")
    heads = sum(w.numel() for unit in learner.units for w in unit.loss.parameters())
    return sum(step.multiply_adds.values()), heads, max(step.peaks().values())


def rows() -> list[dict[str, Any]]:
    """A row per method and cut of ResNet18, 32 pixels, full width."""
    common: dict[str, Any] = {"model": "resnet18", "data": "cifar10", "batch_size": BATCH}
    whole = cost(Run(rule="global", **common))
    table: list[dict[str, Any]] = []
    for at in ("layer", "block"):
        for name, (loss, loss_options, rule_options) in VARIANTS.items():
            run = Run(
                loss=loss,
                loss_options=Options(loss_options),
                rule_options=Options(rule_options),
                at=at,
                **common,
            )
            work, heads, peak = cost(run)
            table.append(
                {
                    "at": at,
                    "method": name,
                    "multiply_adds_of_global": round(work / whole[0], 2),
                    "head_parameters": heads,
                    "peak_of_global": round(peak / whole[2], 2),
                }
            )
            print(*table[-1].values(), flush=True)
    return table


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Bars of multiply-adds against a global step's, by layers and by blocks."""
    names = list(VARIANTS)
    plt.rcParams["svg.hashsalt"] = "layerwise"
    figure, axes = plt.subplots(figsize=(7, 6), layout="constrained")
    for shift, at in ((-0.2, "layer"), (0.2, "block")):
        widths = [row["multiply_adds_of_global"] for row in table if row["at"] == at]
        axes.barh([place + shift for place in range(len(names))], widths, 0.4, label=f"by {at}s")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("multiply-adds of a step, relative to global training")
    axes.legend()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--figure", type=Path, required=True)
    parsed = parser.parse_args()
    table = rows()
    write_csv(parsed.csv, tuple(table[0]), table)
    draw(table, parsed.figure)


if __name__ == "__main__":
    main()
