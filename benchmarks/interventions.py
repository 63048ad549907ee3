"""Is poor separability of shallow features why layer-wise training fails in depth? Interventions.

ResNet18 [2,2,2,2] at small scale, layer-wise by predsim, the output layer a unit of its own.
Shallow units are the stem and the eight of stages 1 and 2. Each intervention changes one thing:

- supervision of the shallow units is weakened (another loss below) or strengthened (a better head
  or a window below), and for comparison the deep units' is;
- the shallow convolutions stay, but their maps are halved earlier.

If strong supervision of shallow units is the reason, weakening it must help, and strengthening
that of deep units alone must not. Differences from the base are paired over seeds.

    python benchmarks/interventions.py --data-dir DATA --runs runs/interventions --seeds 3 \\
        --csv results/interventions.csv
"""

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Evaluated, Site, Targets
from layerwise.losses.pred import Pred, cross_entropy
from layerwise.losses.predsim import PredSim
from layerwise.paper.rows import row_run, select_rows
from layerwise.runs.run import Execution, Run
from layerwise.utils.csv_text import write_csv
from layerwise.utils.options import Options
from runs import accuracies, carry_out

FIRST_DEEP = 9  # of ResNet18's 18 units, from 0
VEHICLES = (0, 1, 8, 9)  # airplane, automobile, ship, truck; the other six are animals
TEMPERATURE = 4.0


class Untrained(Pred):
    """A classifier that sends no gradient to the features: the unit stays as drawn."""

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        return super().forward(features.detach(), targets)


class Softened(Pred):
    """Cross-entropy of logits divided by a temperature."""

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        return cross_entropy(self.logits(features) / TEMPERATURE, targets)


class Coarse(PredSim):
    """predsim with two classes, vehicles and animals; its accuracy is of telling these apart."""

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        vehicles = torch.tensor(VEHICLES, device=targets.labels.device)
        labels = torch.isin(targets.labels, vehicles).long()
        return super().forward(features, Targets(labels, targets.num_classes))


class Reconstruction(nn.Module):
    """Mean squared error to the image, averaged to the features' size, of a 1×1 convolution.

    A classifier that sends nothing back tells how separable the features are.
    """

    reads_images = True

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.decoder = nn.Conv2d(site.shape[0], site.image_shape[0], 1)
        self.classifier = Pred(site)

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        assert targets.images is not None
        image = F.adaptive_avg_pool2d(targets.images, (features.shape[2], features.shape[3]))
        classified, correct = self.classifier(features.detach(), targets)
        error = F.mse_loss(self.decoder(features).float(), image.float())
        return Evaluated(error + classified, correct)


LOCAL: dict[str, Callable[..., nn.Module]] = {
    "untrained": Untrained,
    "softened": Softened,
    "coarse": Coarse,
    "reconstruction": Reconstruction,
}


@dataclass(frozen=True)
class Intervention:
    """A change of the base run.

    Attributes:
        kind: weaker below, stronger below, stronger above, resolution, or base.
        changes: fields of the run.
    """

    name: str
    kind: str
    text: str
    changes: dict[str, Any]


def below(loss: str) -> dict[str, Any]:
    return {"loss": loss, "loss_from": f"{FIRST_DEEP}=predsim"}


def above(loss: str) -> dict[str, Any]:
    return {"loss_from": f"{FIRST_DEEP}={loss}"}


def spans(text: str) -> dict[str, Any]:
    return {"rule_options": Options(span=text)}


INTERVENTIONS = (
    Intervention("base", "base", "predsim everywhere", {}),
    Intervention(
        "untrained-below", "weaker below", "shallow units stay as drawn", below("untrained")
    ),
    Intervention("dgl-cnn-below", "stronger below", "DGL's cnn head below", below("dgl-cnn")),
    Intervention("dgl-cnn-above", "stronger above", "DGL's cnn head above", above("dgl-cnn")),
    Intervention("strided-below", "stronger below", "strided heads below", below("strided")),
    Intervention("strided-above", "stronger above", "strided heads above", above("strided")),
    Intervention(
        "halved-first",
        "resolution",
        "maps halved after blocks 0, 2 and 4 instead of 2, 4 and 6",
        {"downsample_after": "0,2,4"},
    ),
    Intervention(
        "halved-first-global",
        "resolution",
        "the same, by backpropagation",
        {"rule": "global", "downsample_after": "0,2,4"},
    ),
    Intervention(
        "coarse-below", "weaker below", "two classes below, vehicles and animals", below("coarse")
    ),
    Intervention(
        "reconstruction-below", "weaker below", "reconstruction below", below("reconstruction")
    ),
    Intervention(
        "softened-below", "weaker below", "pred at temperature 4 below", below("softened")
    ),
    Intervention("pred-below", "weaker below", "pred below", below("pred")),
    Intervention("pred-above", "stronger above", "pred above", above("pred")),
    Intervention("window-below", "stronger below", "windows of 2 below", spans("2,9=1")),
    Intervention("window-above", "stronger above", "windows of 2 above", spans("1,9=2")),
    Intervention(
        "accelerated",
        "base",
        "[1,1,2,2], for comparison",
        {"hierarchy": "1,1,2,2"},
    ),
    Intervention("global", "base", "backpropagation, for comparison", {"rule": "global"}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds the data set's files")
    parser.add_argument("--runs", type=Path, default=Path("runs/interventions"))
    names = [item.name for item in INTERVENTIONS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="default: all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each (default: 3)")
    parser.add_argument("--cpu-threads", type=int, help="threads of each operation on a CPU")
    parser.add_argument(
        "--table-only", action="store_true", help="train nothing: show what there is"
    )
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    LOSSES.update(LOCAL)
    chosen = [item for item in INTERVENTIONS if item.name in arguments.only]
    execution = Execution(
        data_dir=arguments.data_dir, cpu_threads=arguments.cpu_threads, eval_every=5
    )
    for seed in range(0 if arguments.table_only else arguments.seeds):
        for item in chosen:
            carry_out(run_of(item, seed), arguments.runs, execution)
    try:
        table = list(lines(chosen, arguments.runs, arguments.seeds))
    except InvalidInput as error:
        raise SystemExit(str(error)) from None
    if not any(line["seeds"] for line in table):
        raise SystemExit(f"no finished run of these is in {arguments.runs}: no table is written")
    for line in table:
        print("  ".join(f"{value!s:<20}" for value in line.values()))
    if arguments.csv:
        write_csv(arguments.csv, tuple(table[0]), table)


def run_of(item: Intervention, seed: int) -> Run:
    """The base run with the intervention's changes."""
    (row,) = select_rows([5], ["resnet18"])
    changes = dict(item.changes)
    rule = changes.pop("rule", None)
    run = row_run(row, "small", "global" if rule == "global" else "layerwise", seed)
    return replace(run, **changes)


def lines(chosen: Sequence[Intervention], output: Path, seeds: int) -> Iterable[dict[str, Any]]:
    """A line per intervention: accuracies, and differences from the base paired over seeds."""
    base = accuracies(partial(run_of, INTERVENTIONS[0]), output, seeds)
    for item in chosen:
        numbers = accuracies(partial(run_of, item), output, seeds)
        paired = [numbers[seed] - base[seed] for seed in numbers if seed in base]
        several = len(paired) > 1 and item.name != "base"
        yield {
            "name": item.name,
            "kind": item.kind,
            "text": item.text,
            "seeds": len(numbers),
            "test_accuracy": f"{mean(numbers.values()):.2f}" if numbers else "",
            "deviation": f"{stdev(numbers.values()):.2f}" if len(numbers) > 1 else "",
            "difference": f"{mean(paired):+.2f}" if paired and item.name != "base" else "",
            "standard_error": f"{stdev(paired) / sqrt(len(paired)):.2f}" if several else "",
        }


if __name__ == "__main__":
    main()
