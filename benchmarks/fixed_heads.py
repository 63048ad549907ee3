"""Does local training make an ensemble good, or do its heads? The same heads on fixed features.

The loss `fixed-strided` has the head of `strided`, and sends no gradient to the features. On a
network that was trained globally it tells what these heads add to backpropagation, and how
separable its features are by them:

    SMALL="--data cifar10 --width 0.25 --image-size 16 --train-images 15000 --val-fraction 0.1"
    SMALL="$SMALL --crop-padding 2 --epochs 20 --batch-size 128 --lr 2e-3 --amp --seed 0"
    layerwise train resnet18 $SMALL --rule global --output GLOBAL
    layerwise train resnet18 $SMALL --weights GLOBAL/model.safetensors --loss fixed-strided \\
        --import benchmarks/fixed_heads.py --at block --last-lr-factor 1e-6 --output FIXED
    layerwise train resnet18 $SMALL --loss strided --at block --output LOCAL
    python benchmarks/fixed_heads.py FIXED LOCAL --csv results/fixed-heads.csv

The output layer learns by its own loss, as everywhere, so its rate is made nearly nothing. The
table has a line per run: test accuracy of each unit's head, and of all together.
"""

import argparse
from pathlib import Path
from typing import Any

from torch import Tensor

from layerwise.losses import LOSSES, Evaluated, Targets
from layerwise.losses.strided import Strided
from layerwise.runs.folder import RunFolder
from layerwise.utils.csv_text import write_csv


class FixedStrided(Strided):
    """The loss `strided` of features that stay."""

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        return super().forward(features.detach(), targets)


LOSSES["fixed-strided"] = FixedStrided


def line_of(folder: RunFolder) -> dict[str, Any]:
    run, result = folder.run(), folder.result()
    return {
        "model": run.model,
        "data": run.data,
        "loss": run.loss,
        "lr": run.lr,
        "seed": run.seed,
        **{f"unit {unit['index']}": unit["test_accuracy"] for unit in result["exits"]},
        "all": result["ensemble"]["test_accuracy"],
        "commit": folder.facts()["commit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--csv", type=Path, required=True)
    arguments = parser.parse_args()
    lines = [line_of(RunFolder(path)) for path in arguments.runs]
    for line in lines:
        print(*line.values(), sep="  ")
    write_csv(arguments.csv, tuple(lines[0]), lines)


if __name__ == "__main__":
    main()
