"""Units on two ranks against one process, beside PyTorch's own pipelines: seconds and memory.

Every method trains on random images of 32 pixels, with Adam, one thread a rank. Local training is
``simultaneous`` in one process and ``parallel`` on the ranks. Global training is one process, and
GPipe and 1F1B of ``torch.distributed.pipelining`` on the same ranks, whose cut is balanced by the
measured seconds of the pieces. Rounds go through all methods in turn, so that all ratios are of
one run; a method's time is the median of its rounds, each after a step that is not counted. A time
is per batch once the pipeline is filled (local), or per batch with the bubbles that every batch has
(GPipe, 1F1B). Where one process trains, the other rank waits.

Memory is the peak of the rank that needs most, with weights, gradients, optimizer state and
features in transit.

    torchrun --nproc-per-node 2 benchmarks/ranks.py --csv results/ranks.csv
"""

import argparse
import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.nn import functional as F

from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.core.split import split
from layerwise.distributed import distribute, gathered, joined, rank_bytes, world
from layerwise.distributed.placement import balanced_ranks
from layerwise.memory.accounting import bytes_of, measured, persistent_bytes
from layerwise.memory.per_unit import predict_units
from layerwise.models import create_model
from layerwise.utils.csv_text import write_csv
from layerwise.utils.version import version

CUTS = {"vgg16": "layer", "resnet18": "block"}  # between which one tensor passes
SIZE, CLASSES = 32, 10


@dataclass
class Method:
    """A way to train.

    Attributes:
        ranks: number of ranks that compute.
        steps: makes so many steps, and returns seconds per step; a rank without work returns 0.
        peak: peak bytes of this rank.
    """

    ranks: int
    steps: Callable[[int], float]
    peak: int


def main() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(CUTS), choices=CUTS)
    parser.add_argument("--loss", default="predsim")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--micro-batches", nargs="+", type=int, default=[4, 8])
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
    images = torch.randn(options.batch_size, 3, SIZE, SIZE)
    labels = torch.arange(options.batch_size) % CLASSES
    methods = {
        ("local", 1): local_alone(name, options, images, labels),
        ("local", 2): local_on_ranks(name, options, images, labels),
        ("global", 1): global_alone(name, options, images, labels),
    }
    for count in options.micro_batches:
        for kind in (ScheduleGPipe, Schedule1F1B):
            label = f"{kind.__name__.removeprefix('Schedule')}, {count} parts", 2
            methods[label] = pipeline(kind, count, name, options, images, labels)
    seconds: dict[tuple[str, int], list[float]] = {label: [] for label in methods}
    for _ in range(options.rounds):
        for label, method in methods.items():
            gathered(None)
            seconds[label].append(max(gathered(method.steps(options.steps))))
    peaks = {label: max(gathered(method.peak)) for label, method in methods.items()}
    rows = []
    for label, values in seconds.items():
        base = ("local" if label[0] == "local" else "global", 1)
        ratios = [b / own for b, own in zip(seconds[base], values, strict=True)]
        rows.append(
            {
                "network": name,
                "method": label[0],
                "ranks": label[1],
                "batch": options.batch_size,
                "seconds": round(median(values), 4),
                "times_faster_than_one_process": round(median(ratios), 3),
                "peak_mb": round(peaks[label] / 1e6, 1),
                "peak_of_one_process": round(peaks[label] / peaks[base], 3),
                "loss": options.loss if label[0] == "local" else "cross-entropy",
                "width": options.width,
                "threads_per_rank": 1,
                "torch": torch.__version__,
                "layerwise": version(),
            }
        )
        if world().first:
            print(*list(rows[-1].values())[:8], sep="\t", flush=True)
    return rows


def make_learner(name: str, options: argparse.Namespace) -> Learner:
    torch.manual_seed(0)
    return localize(
        create_model(name, width=options.width),
        torch.zeros(2, 3, SIZE, SIZE),
        CLASSES,
        loss=options.loss,
        optimizer=adam,
        check=False,
        seed=0,
    )


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4, fused=True)


def local_alone(name: str, options: argparse.Namespace, images: Tensor, labels: Tensor) -> Method:
    if not world().first:
        return Method(1, lambda steps: 0.0, 0)
    learner = make_learner(name, options)
    step = lambda: learner.step(images, labels)  # noqa: E731
    peak = peak_of_second(step)
    return Method(1, seconds_each(step), peak + persistent_bytes(learner))


def local_on_ranks(
    name: str, options: argparse.Namespace, images: Tensor, labels: Tensor
) -> Method:
    learner = make_learner(name, options)
    needs = predict_units(learner, options.batch_size)
    placement = distribute(learner, batch_size=options.batch_size)
    if world().first:
        predicted = [round(size / 1e6, 1) for size in rank_bytes(needs, placement, 2)]
        print(f"{name}: units {[len(units) for units in placement]}, {predicted} MB predicted")
    peak = peak_of_second(lambda: learner.step(images, labels))
    learner.stage.pause()
    total = peak + persistent_bytes(learner) + learner.stage.kept_bytes

    def steps(count: int) -> float:
        learner.step(images, labels)  # fills the pipeline
        begin = time.perf_counter()
        for _ in range(count):
            learner.step(images, labels)
        seconds = (time.perf_counter() - begin) / count
        learner.stage.pause()
        return seconds if learner.stage.behind is None else 0.0  # the last rank's

    return Method(2, steps, total)


def global_alone(name: str, options: argparse.Namespace, images: Tensor, labels: Tensor) -> Method:
    if not world().first:
        return Method(1, lambda steps: 0.0, 0)
    torch.manual_seed(0)
    model, maps = network_and_maps(name, options, images)
    optimizer = adam(model.parameters())

    def step() -> None:
        F.cross_entropy(model(maps), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    peak = peak_of_second(step)
    return Method(1, seconds_each(step), peak + held_by(model, optimizer))


def network_and_maps(
    name: str, options: argparse.Namespace, images: Tensor
) -> tuple[nn.Module, Tensor]:
    """A network and images in channels-last, which local training takes too."""
    model = create_model(name, width=options.width)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, images.to(memory_format=torch.channels_last)


class Contiguous(torch.autograd.Function):
    """Maps, and their gradients, as PyTorch's pipeline can send them by gloo: contiguous."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        return maps.contiguous().view_as(maps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0].contiguous()


class Pieces(nn.Module):
    """Neighbouring pieces of a chain as a module from a tensor to a tensor."""

    def __init__(self, pieces: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    def forward(self, features: Tensor) -> Tensor:
        activations: tuple[Any, ...] = (Contiguous.apply(features),)
        for piece in self.pieces:
            activations = piece(*activations)
        [result] = activations
        passed: Tensor = Contiguous.apply(result)
        return passed


def pipeline(
    kind: Any, count: int, name: str, options: argparse.Namespace, images: Tensor, labels: Tensor
) -> Method:
    torch.manual_seed(0)
    model, maps = network_and_maps(name, options, images)
    chain = split(model, CUTS[name], torch.zeros(2, 3, SIZE, SIZE))
    seconds = gathered(piece_seconds(list(chain.pieces), maps) if world().first else None)[0]
    own = balanced_ranks(seconds, world().size)[world().rank]
    module = Pieces([chain.pieces[index] for index in own]).train()
    optimizer = adam(module.parameters())
    stage = PipelineStage(module, world().rank, world().size, torch.device("cpu"))
    schedule = kind(stage, count, loss_fn=F.cross_entropy)

    def step() -> None:
        if world().first:
            schedule.step(maps)
        else:
            schedule.step(target=labels)
        optimizer.step()
        optimizer.zero_grad()

    peak = peak_of_second(step)
    return Method(2, seconds_each(step), peak + held_by(module, optimizer))


def piece_seconds(pieces: Sequence[nn.Module], images: Tensor) -> list[float]:
    """Seconds of a forward and a backward pass of every piece, each on features of its own."""
    features, seconds = images, []
    for piece in map(copy.deepcopy, pieces):
        features = features.detach().requires_grad_()
        for _ in range(2):  # the second counts
            begin = time.perf_counter()
            [result] = piece(features)
            result.sum().backward()
            spent = time.perf_counter() - begin
        seconds.append(spent)
        features = result
    return seconds


def held_by(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of weights, buffers and optimizer state."""
    state = [value for values in optimizer.state.values() for value in values.values()]
    return bytes_of([*model.parameters(), *model.buffers(), *state])


def peak_of_second(step: Callable[[], Any]) -> int:
    """Bytes that the second step has alive beside what stays between steps."""
    step()
    with measured(torch.device("cpu")) as peak:
        step()
    return peak.transient_bytes


def seconds_each(step: Callable[[], Any]) -> Callable[[int], float]:
    def steps(count: int) -> float:
        step()  # finds the caches filled by another method; `local_on_ranks` fills its pipeline
        begin = time.perf_counter()
        for _ in range(count):
            step()
        return (time.perf_counter() - begin) / count

    return steps


if __name__ == "__main__":
    main()
