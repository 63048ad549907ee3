"""How should a network's output learn beside local losses? Ways to treat it, trained over seeds.

Every way trains the same network by the simultaneous rule and differs only in its end:

- ``separate``: the output layer is a unit of its own (published; 1 − β of its cross-entropy under
predsim);
- ``joined``: the last unit holds the layer before it too, and learns from the network's
cross-entropy;
- ``joined-scaled``: the same with the cross-entropy times 1 − β under predsim;
- ``joined-sim``: β · similarity of that layer's features + (1 − β) · the network's cross-entropy;
- ``joined-local``: the local loss of that layer's features + the network's cross-entropy;
- ``zero``, ``unscaled``: separate, but the output layer starts at zero, or its cross-entropy is not
  scaled;
- ``global``: one unit, for comparison.

Any way may end in a number, such as ``separate*10``: the output layer's learning rate is so many
times that of all other weights.

``network`` is the network's accuracy in percent of the test images, ``last head`` that of the last
unit with a head of its own, ``best head`` that of the head best on these test images. A run that
the CSV file holds is not trained again. To rerun what docs/output.md shows:

    python benchmarks/first_hour.py --tasks convolutions --csv results/first-hour.csv
    python benchmarks/first_hour.py --data-dir DATA --tasks cifar10 --csv results/first-hour.csv
    python benchmarks/first_hour.py --table-only --csv results/first-hour.csv
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor, nn

import layerwise
from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format
from layerwise.core.unit import Activations, Unit
from layerwise.data import Splits
from layerwise.losses import Evaluated, Targets
from layerwise.losses.pred import cross_entropy
from layerwise.models import create_model
from layerwise.ops.pooling import average
from layerwise.rules import RULES
from layerwise.runs.run import Execution, Run
from layerwise.training.evaluate import accuracy, unit_scores
from layerwise.training.prepare import Prepared, prepare
from layerwise.utils.allocator import keep_freed_memory
from layerwise.utils.options import Options

COLUMNS = ("task", "loss", "way", "seed", "epoch", "units", "network", "last head", "best head")
CLASSES = 10
# ways that are others where there is no similarity loss
SIMILARITY_ONLY = ("joined-sim", "joined-scaled", "unscaled")
WITH_SIMILARITY = ("predsim", "predsim-lite")
WAYS = (*SIMILARITY_ONLY, "separate", "joined", "joined-local", "zero", "global")
SHOWN_EARLY = 3  # epochs after which accuracies are taken too


def three_convolutions(norm: bool, pool: bool) -> nn.Module:
    """What a user might write first, for 8-pixel grey images."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 128)):
        layers += [
            nn.Conv2d(inputs, outputs, 3, padding=1),
            *[nn.BatchNorm2d(outputs)] * norm,
            nn.ReLU(),
        ]
        layers += [nn.MaxPool2d(2)] * (outputs == 64)
    end = [nn.AdaptiveAvgPool2d(1)] if pool else []
    return nn.Sequential(*layers, *end, nn.Flatten(), nn.Linear(128 if pool else 128 * 16, CLASSES))


@dataclass(frozen=True)
class Task:
    """A network, its data and its schedule; ``network`` makes one of the user's own instead of the
    run's.
    """

    run: Run
    network: Callable[[], nn.Module] | None = None

    def model(self, data: Splits) -> nn.Module:
        if self.network:
            return self.network()
        run = self.run
        return create_model(
            run.model, run.hierarchy, run.width, CLASSES, data.channels, data.image_size
        )


FIRST = Run(
    data="digits",
    batch_size=64,
    epochs=12,
    lr=5e-4,
    decay_milestones="",
    augment=False,
    val_fraction=0.0,
)
DEMO = Run(data="digits", batch_size=64, epochs=8, lr=1e-3, width=0.25, val_fraction=0.0)
SMALL = Run(
    data="cifar10",
    width=0.25,
    image_size=16,
    train_images=15_000,
    crop_padding=2,
    epochs=8,
    lr=1e-3,
    val_fraction=0.1,
    amp=True,
)
PUBLISHED = Options(decoder_dim=2048)  # of VGG8b
TASKS = {
    "convolutions": Task(FIRST, lambda: three_convolutions(norm=False, pool=True)),
    "convolutions-norm": Task(FIRST, lambda: three_convolutions(norm=True, pool=True)),
    "convolutions-flat": Task(FIRST, lambda: three_convolutions(norm=False, pool=False)),
    "convolutions-sgd": Task(
        replace(FIRST, optimizer="sgd", lr=0.05), lambda: three_convolutions(norm=True, pool=True)
    ),
    "resnet18": Task(replace(DEMO, model="resnet18")),
    "resnet18-accelerated": Task(replace(DEMO, model="resnet18", hierarchy="1,1,2,2")),
    "vgg8b": Task(replace(DEMO, model="vgg8b", loss_options=PUBLISHED)),
    "cifar10": Task(replace(SMALL, model="resnet18")),
    "cifar10-vgg8b": Task(replace(SMALL, model="vgg8b", loss_options=PUBLISHED)),
}


class Together(nn.Module):
    """The last hidden unit's piece and the output layer's as one, which keeps the features between
    them.
    """

    def __init__(self, hidden: nn.Module, output: nn.Module) -> None:
        super().__init__()
        self.hidden, self.output = hidden, output
        self.features: Tensor | None = None

    def forward(self, *activations: Any) -> Activations:
        passed = self.hidden(*activations)
        self.features = passed[0]
        return self.output(*passed)


class WithFeatures(nn.Module):
    """The loss of the network's logits together with one of the features before them."""

    local: Any

    def __init__(self, piece: Together, local: nn.Module, similarity_alone: bool) -> None:
        super().__init__()
        self.read: Callable[[], Any] = lambda: piece.features
        self.local, self.similarity_alone = local, similarity_alone

    def forward(self, logits: Tensor, targets: Targets) -> Evaluated:
        loss, correct = cross_entropy(logits, targets)
        features, local = self.read(), self.local
        if not self.similarity_alone:
            return Evaluated(loss + local(features, targets).loss, correct)
        similarity, _ = local.sim.compare(
            average(features, getattr(local, "kernel", None)), targets
        )
        return Evaluated(local.beta * similarity + (1 - local.beta) * loss, correct)


def build(task: Task, prepared: Prepared, data: Splits, loss: str, way: str, seed: int) -> Learner:
    """A learner whose output is treated in one of the ways."""
    run = prepared.run
    way, _, factor = way.partition("*")
    torch.manual_seed(seed)
    model = task.model(data)
    output: Any = model[-1] if isinstance(model, nn.Sequential) else model.output
    fast = {id(parameter) for parameter in output.parameters()} if factor else set()
    if way == "zero":
        nn.init.zeros_(output.weight)
        nn.init.zeros_(output.bias)

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in parameters if id(p) not in fast], "lr": run.lr},
            {"params": [p for p in parameters if id(p) in fast], "lr": run.lr * float(factor or 1)},
        ]
        groups = [group for group in groups if group["params"]]
        if run.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=run.lr, momentum=run.momentum)
        return torch.optim.Adam(groups, lr=run.lr)

    learner = layerwise.localize(
        model,
        torch.zeros(2, data.channels, data.image_size, data.image_size),
        CLASSES,
        loss=loss,
        at=1 if way == "global" else "layer",
        output_layer="joined" if way in ("joined", "joined-scaled") else "separate",
        optimizer=optimizer,
        amp=prepared.amp,
        seed=seed,
        memory_format=None,
        **run.loss_options,
    )
    last: Any = learner.units[-1]
    if way == "unscaled":
        last.loss.beta = 0.0
    if way == "joined-scaled":
        last.loss.plain = False
    if way in ("joined-sim", "joined-local"):
        hidden = learner.units[-2]
        piece = Together(hidden.piece, last.piece)
        together = WithFeatures(piece, hidden.loss, way == "joined-sim")
        unit = Unit(hidden.index, last.name, piece, together, None, amp=last.amp, seed=seed)
        unit.optimizer = optimizer(unit.parameters())
        learner = Learner(
            model, [*learner.units[:-2], unit], CLASSES, torch.zeros(2, *learner.image_shape)
        )
    set_memory_format(learner, "channels-last")
    return learner


def train(
    name: str, loss: str, way: str, seed: int, execution: Execution
) -> Iterable[dict[str, Any]]:
    """Accuracies after the first few epochs and after the last."""
    task = TASKS[name]
    prepared = prepare(replace(task.run, seed=seed), execution)
    run, data = prepared.run, prepared.load_data()
    learner = build(task, prepared, data, loss, way, seed)
    rule = RULES["simultaneous"]
    for tick in rule.order(learner, data.train, run.epochs, prepared.schedule):
        if tick.ends_epoch and tick.after.epoch in (SHOWN_EARLY, run.epochs):
            *heads, _ = [
                score.accuracy
                for score in unit_scores(learner, data.test, 0, len(learner.units) - 1)
            ]
            scores = (
                accuracy(learner.model, data.test, prepared.amp),
                *((heads[-1], max(heads)) if heads else ("", "")),
            )
            values = (name, loss, way, seed, tick.after.epoch, len(learner.units), *scores)
            yield dict(
                zip(
                    COLUMNS,
                    (f"{v:.2f}" if isinstance(v, float) else str(v) for v in values),
                    strict=True,
                )
            )


def reach(name: str, execution: Execution) -> str:
    """How far a step of Adam of rate 1 moves the logits of two images apart, at the last head and
    at the output layer.

    That is the sum over what a classifier reads of the mean distance from the batch's mean, before
    training.
    """
    task, read = TASKS[name], dict[str, Tensor]()
    prepared = prepare(task.run, execution)
    data = prepared.load_data()
    learner = build(task, prepared, data, "pred", "separate", seed=0)
    last_head: Any = learner.units[-2].loss
    output = next(
        module for module in learner.units[-1].piece.modules() if isinstance(module, nn.Linear)
    )
    for end, layer in (("last head", last_head.classifier), ("output layer", output)):
        layer.register_forward_pre_hook(
            lambda _, inputs, end=end: read.update({end: inputs[0].float()})
        )
    images, labels = next(iter(data.train.batches(0)))
    activations: Activations = (images,)
    with torch.no_grad():
        for unit in learner.units:
            activations, _ = unit.evaluate(activations, Targets(labels, CLASSES))
    sums = {
        end: (values - values.mean(0)).abs().sum(1).mean().item() for end, values in read.items()
    }
    return f"{name}: " + ", ".join(
        f"{end} {read[end].shape[1]} inputs, {total:.2f}" for end, total in sums.items()
    )


def suits(way: str, loss: str) -> bool:
    """Whether a way differs from the others by this loss."""
    return way.partition("*")[0] not in SIMILARITY_ONLY or loss in WITH_SIMILARITY


def known_way(text: str) -> str:
    """A way, which may end in a factor of the output layer's rate."""
    way, times, factor = text.partition("*")
    if way not in WAYS or (times and not float(factor) > 0):
        raise ValueError
    return text


def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def append(path: Path, lines: list[dict[str, Any]]) -> None:
    begun = path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerows(lines)


def summary(values: list[str]) -> str:
    numbers = [float(value) for value in values if value]
    spread = f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):.1f}{spread}" if numbers else "–"


def show(lines: Iterable[dict[str, str]]) -> None:
    """Mean and deviation over seeds, a line per task, loss, epoch and way."""
    groups = defaultdict(list)
    for line in lines:
        groups[line["task"], line["loss"], int(line["epoch"]), line["way"]].append(line)
    print(
        f"{'task':<21}{'loss':<13}{'epoch':<7}{'way':<15}{'units':<7}{'seeds':<7}"
        f"{'network':<14}{'last head':<14}best head"
    )
    for (task, loss, epoch, way), runs in sorted(groups.items()):
        scores = [
            summary([run[column] for run in runs])
            for column in ("network", "last head", "best head")
        ]
        print(
            f"{task:<21}{loss:<13}{epoch:<7}{way:<15}{runs[0]['units']:<7}{len(runs):<7}"
            f"{scores[0]:<14}{scores[1]:<14}{scores[2]}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds CIFAR-10")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["convolutions"])
    parser.add_argument("--losses", nargs="+", default=["predsim", "pred"])
    parser.add_argument("--ways", nargs="+", type=known_way, default=["separate", "joined"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--table-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--reach",
        action="store_true",
        help="how far a step of Adam moves logits apart; train nothing",
    )
    parser.add_argument("--csv", type=Path, default=Path("first-hour.csv"))
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    if arguments.reach:
        for task in arguments.tasks:
            print(reach(task, Execution(data_dir=arguments.data_dir)))
        return
    wanted = [
        (task, loss, way, seed)
        for task in arguments.tasks
        for seed in arguments.seeds
        for loss in arguments.losses
        for way in arguments.ways
    ]
    for task, loss, way, seed in [] if arguments.table_only else wanted:
        done = {
            (line["task"], line["loss"], line["way"], int(line["seed"]))
            for line in read(arguments.csv)
        }
        if (task, loss, way, seed) not in done and suits(way, loss):
            append(
                arguments.csv,
                list(train(task, loss, way, seed, Execution(data_dir=arguments.data_dir))),
            )
    show(
        line
        for line in read(arguments.csv)
        if line["task"] in arguments.tasks or arguments.table_only
    )


if __name__ == "__main__":
    main()
