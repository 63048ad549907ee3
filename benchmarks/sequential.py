"""Time of sequential training with features cached (in memory, in a file) or recomputed for every
batch.

The variants train the same network on the same random images, unit by unit in turn within one
process, so that what else the machine does falls on all alike. Passing features on through a frozen
unit counts as time of the unit after it. A file that fits
into free memory is read from there: to time the disk itself, keep more features than the machine
has memory.

    python benchmarks/sequential.py resnet18 --width 0.25 --images 2000 --epochs 2
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from layerwise import create_model, localize
from layerwise.core.learner import Learner
from layerwise.data.loader import Loader, PixelsInMemory
from layerwise.rules import RULES
from layerwise.rules.base import Tick
from layerwise.rules.feature_cache import Keeping

CLASSES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "model", nargs="?", default="resnet18", help="network, such as resnet18 or resnet110"
    )
    parser.add_argument(
        "--hierarchy", help="layers per stage, such as 1,1,2,2 (default: as published)"
    )
    parser.add_argument(
        "--width", type=float, default=0.25, help="multiplier of channel counts (default: 0.25)"
    )
    parser.add_argument("--images", type=int, default=1000, help="training images (default: 1000)")
    parser.add_argument("--image-size", type=int, default=32, help="in pixels (default: 32)")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="images in a batch (default: 128)"
    )
    parser.add_argument(
        "--epochs", type=int, default=2, help="passes over the images for each unit (default: 2)"
    )
    parser.add_argument(
        "--cache-dir", help="folder for the file of features (default: a temporary one)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument(
        "--json", action="store_true", help="print the result as one JSON object instead of a table"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.cache_dir) as folder:
        result = measure(arguments, Path(folder))
    print(json.dumps(result) if arguments.json else table(result))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of every variant, in all and for each unit."""
    device = torch.device(arguments.device)
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.images, 3, arguments.image_size, arguments.image_size)
    pixels = PixelsInMemory(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    ).to(device)
    labels = torch.randint(0, CLASSES, (arguments.images,), generator=generator).to(device)
    variants: dict[str, dict[str, Any]] = {
        "computed": {},
        "memory": {"cache": True, "keeping": Keeping()},
        "disk": {"cache": True, "keeping": Keeping(folder / "features")},
    }
    learners = {name: build(arguments, device) for name in variants}
    orders: dict[str, Iterator[Tick]] = {}
    for name, options in variants.items():
        loader = Loader(
            pixels, labels, [127.5] * 3, [73.9] * 3, arguments.image_size, arguments.batch_size
        )
        orders[name] = RULES["sequential"].order(
            learners[name], loader, arguments.epochs, lambda done: 1.0, **options
        )
    # what torch sets up at first use falls on no variant
    build(arguments, device).step(*next(loader.batches(0)))
    units = len(learners["computed"].units)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    kept = dict.fromkeys(variants, 0)
    for unit in range(units):
        turn = unit % len(variants)  # nobody is always first
        for name in [*list(variants)[turn:], *list(variants)[:turn]]:
            began = time.perf_counter()
            for tick in orders[name]:
                kept[name] = max(kept[name], tick.kept_bytes)
                if tick.after.epoch == (unit + 1) * arguments.epochs:
                    break
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    weights = {name: learner.model.state_dict().values() for name, learner in learners.items()}
    return {
        **vars(arguments),
        "units": units,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "variants": {
            name: {
                "seconds": sum(seconds[name]),
                "speedup": sum(seconds["computed"]) / sum(seconds[name]),
                "kept_memory_bytes": kept[name],
                "same_weights": all(map(torch.equal, weights[name], weights["computed"])),
                "unit_seconds": seconds[name],
            }
            for name in variants
        },
    }


def build(arguments: argparse.Namespace, device: torch.device) -> Learner:
    torch.manual_seed(0)
    model = create_model(
        arguments.model,
        arguments.hierarchy,
        width=arguments.width,
        num_classes=CLASSES,
        in_chans=3,
        image_size=arguments.image_size,
    ).to(device)
    return localize(
        model,
        torch.zeros(2, 3, arguments.image_size, arguments.image_size),
        CLASSES,
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-4, fused=True),
        seed=0,
        output_layer="separate",
        memory_format=None,
    )


def table(result: dict[str, Any]) -> str:
    """Total time, how many times faster than computing, and time of the first and last tenth of the
    units.
    """
    tenth = max(1, result["units"] // 10)
    lines = [
        f"{result['model']} x {result['width']}, {result['units']} units, {result['images']} "
        f"images of {result['image_size']} pixels, {result['epochs']} epochs each",
        (
            f"{'features':<10} {'seconds':>9} {'speed-up':>9} {'first units':>12} "
            f"{'last units':>11} {'memory kept':>14}  weights"
        ),
    ]
    for name, variant in result["variants"].items():
        first, last = (
            sum(part) / tenth
            for part in (variant["unit_seconds"][:tenth], variant["unit_seconds"][-tenth:])
        )
        lines.append(
            f"{name:<10} {variant['seconds']:>9.2f} {variant['speedup']:>8.2f}x {first:>10.3f} s "
            f"{last:>9.3f} s {variant['kept_memory_bytes'] / 1e6:>11.1f} MB  "
            f"{'the same' if variant['same_weights'] else 'others'}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
