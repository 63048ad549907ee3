"""Designs ranked by successive halving of short layer-wise trainings.

After epochs 1, 3, 9 … the best third by validation accuracy goes on, and the others are ranked by
it (Jamieson & Talwalkar 2016). This is how the designs in results/accelerate-*.json were ranked;
their ``ranking`` names those that were tried. The same command goes on where it was stopped.

    python benchmarks/halving.py vgg13 --designs results/accelerate-vgg13.json --epochs 3 --amp \
        --data cifar10 --width 0.25 --image-size 16 --train-images 15000 --crop-padding 2 \
        --lr 1e-3 --output-layer separate
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.cli.options import Parser, add_fields
from layerwise.cli.values import collect
from layerwise.experiments.accelerate.costs import with_design
from layerwise.experiments.entry import folder_of
from layerwise.hierarchy import Design, design_of
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.loop import train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress

FACTOR = 3  # of every three designs one is trained on


def main() -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="network")
    parser.add_argument("--designs", type=Path, required=True, help="JSON file with a ranking")
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/halving"), help="of runs")
    add_fields(parser, Run, skip={"model", "rule", "hierarchy", "downsample_after"})
    add_fields(parser, Execution, skip=set())
    parsed = parser.parse_args()
    base, execution = collect(parsed, Run()), collect(parsed, Execution())
    designs = [design_of(entry) for entry in json.loads(parsed.designs.read_text())["ranking"]]
    values, ranking = halve(base, designs, parsed.output, execution)
    for rank, (name, epochs) in enumerate(ranking, start=1):
        print(f"{rank:3d}  {name}  {values[name].get(epochs, 0.0):.2f} % at epoch {epochs}")


def halve(
    base: Run, designs: Sequence[Design], output: Path, execution: Execution
) -> tuple[dict[str, dict[int, float]], list[tuple[str, int]]]:
    """Train designs, fewer and fewer of them; their accuracies by epoch, and their places."""
    runs = {
        design.text: replace(with_design(base, design), rule="simultaneous") for design in designs
    }
    values: dict[str, dict[int, float]] = {name: {} for name in runs}
    names = list(runs)
    for epochs in rungs(base.epochs):
        for name in names:
            folder = folder_of(runs[name], output)
            accuracy = train_until(runs[name], folder, epochs, execution)
            print(f"{name} after epoch {epochs}: {accuracy} %", flush=True)
            if accuracy is not None:
                values[name][epochs] = accuracy
        names, _ = ordered(names, epochs, values)
    return values, places(list(runs), base.epochs, values)


class Reached(Exception):
    """The epoch to stop at has been trained, saved and logged."""


class Until(Progress):
    """Stops a training after an epoch; it can go on later."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def epoch(self, record: dict[str, Any]) -> None:
        if record["epoch"] >= self.epochs:
            raise Reached


def train_until(run: Run, folder: RunFolder, epochs: int, execution: Execution) -> float | None:
    """Train a run as far as an epoch; its validation accuracy then, in percent, if evaluated.

    A run that came as far before is not trained.

    Raises:
        InvalidInput, Diverged, Busy, Interrupted: see ``train``.
    """
    if len(folder.log()) < epochs:
        progress = Until(epochs) if epochs < run.epochs else Progress()
        with contextlib.suppress(Reached):
            train(prepare(run, execution), folder, resume=True, progress=progress)
    scores = [record["val_accuracy"] for record in folder.log()[:epochs]]
    return next((score for score in reversed(scores) if score is not None), None)


def places(
    names: list[str], last: int, values: dict[str, dict[int, float]]
) -> list[tuple[str, int]]:
    """Designs by how far they came, the best first, each with the epoch after which it was behind.

    Args:
        last: the epoch at which the last are compared.
        values: validation accuracies of each, by epoch.
    """
    ranking: list[tuple[str, int]] = []
    for epochs in rungs(last):
        names, behind = ordered(names, epochs, values)
        ranking = [(name, epochs) for name in behind] + ranking
    return [(name, last) for name in names] + ranking


def ordered(
    names: list[str], epochs: int, values: dict[str, dict[int, float]]
) -> tuple[list[str], list[str]]:
    """The best third of some designs after an epoch, at least one, and the others. Best first.

    Of equals the first is better. Where none was evaluated then, all are among the best.
    """
    evaluated = [name for name in names if epochs in values[name]]
    evaluated.sort(key=lambda name: -values[name][epochs])
    if not evaluated:
        return names, []
    count = max(1, len(evaluated) // FACTOR)
    rest = [name for name in names if name not in evaluated]
    return evaluated[:count], evaluated[count:] + rest


def rungs(last: int) -> Iterator[int]:
    """The epochs at which designs are compared: powers of ``FACTOR`` below the last, the last."""
    epochs = 1
    while epochs < last:
        yield epochs
        epochs *= FACTOR
    yield last


if __name__ == "__main__":
    main()
