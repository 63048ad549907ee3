"""Replicas on ranks of a thread each against one process of one thread: seconds per batch.

Every method trains on random images of 32 pixels, with Adam. One process has the whole batch;
replicas share it. Beside local training, global backpropagation is trained by PyTorch's
DistributedDataParallel on the same ranks. Rounds go through all methods in turn, so that all ratios
are of one run; a method's time is the median of its rounds. Where one process trains, the others
wait.

    torchrun --nproc-per-node 2 benchmarks/replicas.py --csv results/replicas.csv
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from layerwise.distributed import gathered, joined, replicate, world
from layerwise.models import create_model
from layerwise.utils.csv_text import write_csv
from layerwise.utils.version import version
from ranks import adam, make_learner

SIZE, CLASSES = 32, 10
WAYS: dict[str, dict[str, bool]] = {
    "whole batch": {},
    "statistics of shares": {"sync_batch_norm": False},
    "all of shares": {"sync_batch_norm": False, "gather_examples": False},
}

Step = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["vgg16", "resnet18"])
    parser.add_argument("--loss", default="predsim")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4, help="steps of a round (default: 4)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with joined("cpu", 600):
        for name in options.models:
            rows += rows_of(name, options)
        if options.csv and world().first:
            write_csv(options.csv, tuple(rows[0]), rows)


def rows_of(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure all methods on a network."""
    count = world().size
    images = torch.randn(options.batch_size, 3, SIZE, SIZE)
    labels = torch.arange(options.batch_size) % CLASSES
    share, own_labels = (each.tensor_split(count)[world().rank] for each in (images, labels))
    methods: dict[tuple[str, int, str], Step] = {
        ("local", 1, "whole batch"): local_alone(name, options, images, labels),
        ("global", 1, "whole batch"): global_step(name, options, images, labels, 1),
        **{
            ("local", count, way): replica(name, options, choices, share, own_labels)
            for way, choices in WAYS.items()
        },
        ("global", count, "statistics of shares"): global_step(
            name, options, share, own_labels, count
        ),
    }
    seconds: dict[tuple[str, int, str], list[float]] = {label: [] for label in methods}
    for _ in range(options.rounds):
        for label, step in methods.items():
            gathered(None)
            seconds[label].append(max(gathered(seconds_each(step, options.steps))))
    return [row_of(name, label, seconds, options) for label in methods]


def row_of(
    name: str,
    label: tuple[str, int, str],
    seconds: dict[tuple[str, int, str], list[float]],
    options: argparse.Namespace,
) -> dict[str, Any]:
    alone = seconds[label[0], 1, "whole batch"]
    ratios = [base / own for base, own in zip(alone, seconds[label], strict=True)]
    row = {
        "network": name,
        "method": label[0],
        "replicas": label[1],
        "statistics_and_similarity": label[2],
        "batch": options.batch_size,
        "seconds": round(median(seconds[label]), 4),
        "times_faster_than_one_process": round(median(ratios), 3),
        "loss": options.loss if label[0] == "local" else "cross-entropy",
        "width": options.width,
        "threads_per_rank": 1,
        "torch": torch.__version__,
        "layerwise": version(),
    }
    if world().first:
        print(*list(row.values())[:7], sep="\t", flush=True)
    return row


def nothing() -> None:
    """The step of a rank that waits."""


def local_alone(name: str, options: argparse.Namespace, images: Tensor, labels: Tensor) -> Step:
    if not world().first:
        return nothing
    learner = make_learner(name, options)
    return lambda: learner.step(images, labels)


def replica(
    name: str,
    options: argparse.Namespace,
    choices: dict[str, bool],
    images: Tensor,
    labels: Tensor,
) -> Step:
    learner = make_learner(name, options)
    replicate(learner, **choices)
    return lambda: learner.step(images, labels)


def global_step(
    name: str, options: argparse.Namespace, images: Tensor, labels: Tensor, replicas: int
) -> Step:
    if replicas == 1 and not world().first:
        return nothing
    torch.manual_seed(0)
    model = create_model(name, width=options.width)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    trained = DistributedDataParallel(model) if replicas > 1 else model
    maps = images.to(memory_format=torch.channels_last)
    optimizer = adam(model.parameters())

    def step() -> None:
        F.cross_entropy(trained(maps), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds_each(step: Step, count: int) -> float:
    """Seconds of a step, after one that is not counted."""
    step()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


if __name__ == "__main__":
    main()
