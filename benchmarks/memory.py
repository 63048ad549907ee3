"""Peak memory of training by rule and loss: over networks, depth, batch and hierarchy, as
predicted.

    python benchmarks/memory.py --output results/memory

A table that is there already is filled: lines of other parts stay.

Memory is counted whole: weights, gradients, optimizer state (Adam), heads, activations, temporaries
and the batch. What an operation uses inside itself is not seen by a prediction; a real step's
memory is measured beside it, in both orders of maps, by

    python benchmarks/memory.py --measure resnet18:1024 vgg16:128 --output results/memory-measured

and with ``--device cuda`` on a GPU, by its allocator. Without a GPU, what was measured on one is
compared with what is predicted for it by

    python benchmarks/memory.py --against results/memory-h200.csv --output results/memory-cuda
"""

import argparse
import csv
import itertools
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import layerwise
from layerwise.core.memory_format import FORMATS
from layerwise.hierarchy import format_hierarchy
from layerwise.memory.accounting import persistent_bytes
from layerwise.ops.batch_norm import gradients_asked_for
from layerwise.profiling.measure import measured
from layerwise.profiling.predict import peak_of, predict_steps, rule_options
from layerwise.profiling.trial_steps import rule_ticks
from layerwise.rules import RULES
from tables import fill_table, read_table

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "global": ("global", {"loss": "pred"}),
    "checkpointed": ("checkpointed", {"loss": "pred"}),
    "predsim": ("simultaneous", {"loss": "predsim"}),
    "predsim-lite": ("simultaneous", {"loss": "predsim-lite"}),
    "predsim-lite, sequential": ("sequential", {"loss": "predsim-lite"}),
}
NETWORKS = ("vgg8b", "vgg16", "resnet18", "resnet50", "resnet110")
BATCHES = (32, 64, 128, 256, 512, 1024, 2048)
DEPTHS = (1, 3, 5, 9, 12, 18)  # blocks per stage of the CIFAR ResNets: 8 to 110 layers
ACCELERATED: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("resnet18", (2, 2, 2, 2)),
    ("resnet18", (1, 1, 2, 2)),
    ("resnet18", (4, 4, 4, 4)),
    ("resnet18", (2, 2, 1, 1)),
    ("resnet50", (3, 4, 6, 3)),
    ("resnet50", (1, 2, 8, 5)),
    ("vgg16", (2, 2, 3, 3, 3)),
    ("vgg16", (1, 1, 4, 4, 3)),
)
ADAM = partial(torch.optim.Adam, fused=True)
# columns that tell the lines of a table apart
POINT = ("part", "model", "hierarchy", "batch_size", "way", "memory_format")
PUBLISHED: dict[str, Any] = {"output_layer": "separate", "optimizer": ADAM}


def peak(
    model: str,
    hierarchy: tuple[int, ...] | None,
    way: str,
    batch: int,
    memory_format: str = "channels-last",
    device: str = "cpu",
) -> int:
    """Predicted bytes on 32-pixel images of 10 classes."""
    rule, _ = WAYS[way]
    learner = learner_of(model, hierarchy, way, memory_format, torch.device("cpu"))
    return peak_of(predict_steps(rule, learner, batch, rule_options(rule, {}), device=device))


def learner_of(
    model: str,
    hierarchy: tuple[int, ...] | None,
    way: str,
    memory_format: str,
    device: torch.device,
) -> layerwise.Learner:
    """A learner whose maps and weights are in a memory format, as the program sets them."""
    rule, options = WAYS[way]
    torch.manual_seed(0)
    network = layerwise.create_model(model, hierarchy=hierarchy).to(device)
    learner = layerwise.localize(
        network,
        torch.zeros(2, 3, 32, 32),
        10,
        at=RULES[rule].at or "layer",
        memory_format=None,
        check=False,
        **PUBLISHED,
        **options,
    )
    layerwise.set_memory_format(learner, memory_format)
    return learner


def measured_peak(
    model: str, way: str, batch: int, memory_format: str, device: torch.device
) -> int:
    """Bytes alive at the peak of a real second step (of the units that learn together, the
    largest), with random images.
    """
    rule, _ = WAYS[way]
    learner = learner_of(model, None, way, memory_format, device)
    steps, peaks = rule_ticks(rule, learner, batch, 1, rule_options(rule, {})), list[int]()
    while next(steps, None):
        persistent = persistent_bytes(learner)
        with measured(device) as step:
            next(steps)
        peaks.append(persistent + step.transient_bytes)
    return max(peaks)


def measured_rows(points: list[str], device: torch.device) -> Any:
    """A line per network, batch and way: what is predicted (for a CPU) and measured in each order
    of maps.
    """
    for point, way in itertools.product(points, WAYS):
        model, batch = point.split(":")
        found = {
            memory_format: measured_peak(model, way, int(batch), memory_format, device)
            for memory_format in FORMATS
        }
        line = {"model": model, "batch_size": batch, "way": way}
        for memory_format, value in found.items():
            if device.type == "cpu":
                line[f"{memory_format}, predicted, MB"] = (
                    f"{peak(model, None, way, int(batch), memory_format) / 1e6:.1f}"
                )
            line[f"{memory_format}, MB"] = f"{value / 1e6:.1f}"
        yield line


def compared_rows(path: Path, models: list[str] | None) -> Any:
    """Lines of measured peaks of a GPU beside predictions that know nothing of them.

    They were measured while normalisation on a GPU did not work in place, so it is predicted both
    ways. A measurement begins when the batch before is alive, which therefore does not count.
    """
    with path.open() as file:
        lines = [line for line in csv.DictReader(file) if not models or line["model"] in models]
    for line, memory_format in itertools.product(lines, FORMATS):
        model, way, batch = line["model"], line["way"], int(line["batch_size"])
        with gradients_asked_for(several=True):  # normalisation then keeps its maps
            before = peak(model, None, way, batch, memory_format, "cuda")
        predicted = before - batch * (3 * 32 * 32 * 4 + 8)
        measured_bytes = 1e6 * float(line[f"{memory_format}, MB"])
        yield {
            "model": model,
            "batch_size": batch,
            "way": way,
            "memory_format": memory_format,
            "measured, MB": f"{measured_bytes / 1e6:.1f}",
            "predicted, MB": f"{predicted / 1e6:.1f}",
            "error, %": f"{100 * (predicted / measured_bytes - 1):.1f}",
            "predicted whole, in place, MB": (
                f"{peak(model, None, way, batch, memory_format, 'cuda') / 1e6:.1f}"
            ),
        }


def rows() -> Any:
    """Every point once: what it belongs to, the network, and its peak by each way."""
    for model, batch in itertools.product(NETWORKS, (128, 1024)):
        yield "networks", model, None, batch
    for blocks in DEPTHS:
        yield "depth", "resnet110", (blocks,) * 3, 128
    for batch in BATCHES:
        yield "batch", "resnet18", None, batch
    for (model, hierarchy), batch in itertools.product(ACCELERATED, (128, 1024)):
        yield "hierarchies", model, hierarchy, batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, help="write OUTPUT.csv, OUTPUT-depth.svg and OUTPUT-batch.svg"
    )
    parser.add_argument("--parts", default="networks,depth,batch,hierarchies")
    parser.add_argument(
        "--measure",
        nargs="+",
        metavar="MODEL:BATCH",
        help="measure steps of these instead; writes OUTPUT.csv",
    )
    parser.add_argument("--device", default="cpu", help="of --measure (default: cpu)")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FILE",
        help="predict a GPU's peaks beside those measured in this file instead; writes OUTPUT.csv",
    )
    parser.add_argument("--models", nargs="+", help="of --against (default: all in the file)")
    options = parser.parse_args()
    if options.measure or options.against:
        for row in (
            measured_rows(options.measure, torch.device(options.device))
            if options.measure
            else compared_rows(options.against, options.models)
        ):
            print(*row.values(), flush=True)
            if options.output:
                key = [name for name in POINT if name in row]
                fill_table(options.output.with_suffix(".csv"), [row], key)
        return
    for part, model, hierarchy, batch in rows():
        if part not in options.parts.split(","):
            continue
        began = time.perf_counter()
        peaks = {way: peak(model, hierarchy, way, batch) for way in WAYS}
        row = {
            "part": part,
            "model": model,
            "hierarchy": format_hierarchy(hierarchy) if hierarchy else "",
            "batch_size": batch,
        }
        row |= {f"{way}, MB": f"{value / 1e6:.1f}" for way, value in peaks.items()}
        row |= {
            f"{way} / global": f"{value / peaks['global']:.3f}"
            for way, value in peaks.items()
            if way != "global"
        }
        print(*row.values(), f"({time.perf_counter() - began:.0f} s)", flush=True)
        if options.output:
            key = [name for name in POINT if name in row]
            fill_table(options.output.with_suffix(".csv"), [row], key)
    if options.output:
        draw(options.output, read_table(options.output.with_suffix(".csv")))


def draw(output: Path, found: list[dict[str, str]]) -> None:
    """Curves over depth and over batch, readable in black and white."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    styles = dict(zip(WAYS, ("k-o", "k--s", "k:^", "k-.D", "k-x"), strict=True))
    for part, label, position in (
        (
            "depth",
            "layers of a CIFAR ResNet, batch 128",
            lambda row: 6 * int(row["hierarchy"].strip("[]").split(",")[0]) + 2,
        ),
        ("batch", "images in a batch, ResNet18", lambda row: int(row["batch_size"])),
    ):
        points = [row for row in found if row["part"] == part]
        if not points:
            continue
        figure, axes = pyplot.subplots(figsize=(5.8, 3.8), layout="constrained")
        for way, style in styles.items():
            axes.plot(
                [position(row) for row in points],
                [float(row[f"{way}, MB"]) for row in points],
                style,
                label=way,
                ms=4,
            )
        axes.set(
            xlabel=label,
            ylabel="peak memory, MB",
            yscale="log",
            xscale="log" if part == "batch" else "linear",
        )
        axes.grid(alpha=0.3)
        figure.legend(loc="outside upper center", ncols=3, frameon=False)
        for ending in ("svg", "png"):
            figure.savefig(output.with_name(f"{output.name}-{part}.{ending}"), dpi=150)
        pyplot.close(figure)


if __name__ == "__main__":
    main()
