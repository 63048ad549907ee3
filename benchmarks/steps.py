"""Time of a training step: this library's rules and losses, a plain PyTorch loop, checkpointing, the published program.

    python benchmarks/steps.py --models vgg8b,resnet50 --published ADAPTER.py --output results/steps

All contenders of a model are built in one process and make a step in turn, again and again, so that whatever else the machine
does falls on all of them. Written are medians, the spread, and ratios within the run; beside them the time that the step's
convolutions alone take, replayed with the same shapes on random numbers, and the machine's largest matrix product.

The published local-loss program (Nøkland & Eidnes 2019, github.com/anokland/local-loss) is not part of this repository.
ADAPTER.py is a file with a function ``build(model, loss, *, decoder_dim, batch_size, lr) -> step``, whose
``step(images, labels)`` is one iteration of that program's training loop.
"""

import argparse
import contextlib
import csv
import ctypes
import gc
import importlib.util
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the program does
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise.build import describe_machine
from layerwise.layouts import lay_out

Step = Callable[[Tensor, Tensor], Any]
LEARNING_RATE = 5e-4
SET_LARGE_PAGES_OFF = 41  # prctl's PR_SET_THP_DISABLE


@dataclass
class Contender:
    """Something that makes training steps.

    Attributes:
        step: makes one, of images and labels.
        large_pages: whether large tensors may lie in large pages, as the program ``layerwise`` asks for.
    """

    name: str
    step: Step
    large_pages: bool
    learner: Any = None
    seconds: list[float] = field(default_factory=list)


def ours(model: str, loss: str, at: str | int, options: argparse.Namespace, amp: torch.dtype | None = None) -> Any:
    torch.manual_seed(0)
    network = layerwise.create_model(model, image_size=options.image_size)
    sample = torch.zeros(2, 3, options.image_size, options.image_size)
    local: dict[str, Any] = {"decoder_dim": decoder_dim(model)} if at == "layer" else {}
    learner = layerwise.localize(network, sample, 10, loss=loss, at=at, optimizer=adam, amp=amp, **local)
    lay_out(learner, "auto")
    return learner


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)


def decoder_dim(model: str) -> int:
    return 2048 if model in ("vgg8b", "vgg11b") else 4096


def plain_loop(model: str, options: argparse.Namespace) -> Step:
    """Global training as everyone writes it."""
    torch.manual_seed(0)
    network = layerwise.create_model(model, image_size=options.image_size)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def contenders(model: str, options: argparse.Namespace) -> Iterator[Contender]:
    wanted = options.contenders.split(",") if options.contenders else None
    makers: dict[str, Callable[[], Any]] = {
        "plain loop": lambda: plain_loop(model, options),
        "global": lambda: ours(model, "pred", 1, options),
        "predsim": lambda: ours(model, "predsim", "layer", options),
        "predsim-lite": lambda: ours(model, "predsim-lite", "layer", options),
        "global, bfloat16": lambda: ours(model, "pred", 1, options, torch.bfloat16),
        "predsim, bfloat16": lambda: ours(model, "predsim", "layer", options, torch.bfloat16),
        "predsim-lite, bfloat16": lambda: ours(model, "predsim-lite", "layer", options, torch.bfloat16),
    }
    if options.published:
        adapter = load(options.published)
        makers["published predsim"] = lambda: adapter.build(
            model, "predsim", decoder_dim=decoder_dim(model), batch_size=options.batch_size, lr=LEARNING_RATE
        )
    for name, make in makers.items():
        if wanted is not None and name not in wanted:
            continue
        try:
            made = make()
        except Exception as error:  # what the published program cannot build is left out, and said
            print(f"{model}: {name} left out: {error}", file=sys.stderr)
            continue
        learner = made if hasattr(made, "units") else None
        yield Contender(name, made.step if learner else made, large_pages=learner is not None, learner=learner)


def load(path: Path) -> Any:
    specification = importlib.util.spec_from_file_location("published", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@contextlib.contextmanager
def pages(large: bool) -> Iterator[None]:
    """Let new memory lie in large pages, or forbid it (Linux only)."""
    control = getattr(ctypes.CDLL(None), "prctl", None)
    if control is not None:
        control(SET_LARGE_PAGES_OFF, 0 if large else 1, 0, 0, 0)
    yield
    if control is not None:
        control(SET_LARGE_PAGES_OFF, 0, 0, 0, 0)


def timed_step(contender: Contender, images: Tensor, labels: Tensor) -> float:
    with pages(contender.large_pages):
        begin = time.perf_counter()
        contender.step(images, labels)
        return time.perf_counter() - begin


class Convolutions(TorchDispatchMode):
    """Notes the convolutions that a step makes: shapes, strides and number types, and how often each occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[Any] = Counter()
        self.backward: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            images, weight, _, stride, padding, *_, groups = args
            self.forward[(tuple(images.shape), tuple(weight.shape), images.dtype, tuple(stride), tuple(padding), groups)] += 1
        if func is torch.ops.aten.convolution_backward.default:
            _, images, weight, _, stride, padding, _, _, _, groups, mask = args
            key = (
                tuple(images.shape),
                tuple(weight.shape),
                images.dtype,
                *map(tuple, (stride, padding)),
                groups,
                tuple(mask[:2]),
            )
            self.backward[key] += 1
        return func(*args, **(kwargs or {}))

    def bare(self, repetitions: int) -> tuple[float, float]:
        """Seconds and floating-point operations of these convolutions alone, each in the layout that is faster for it."""
        seconds = operations = 0.0
        for backward, counts in ((False, self.forward), (True, self.backward)):
            for (images, weight, dtype, stride, padding, groups, *mask), count in counts.items():
                x, w = torch.randn(images).to(dtype), torch.randn(weight).to(dtype)
                fastest = float("inf")
                for layout in (torch.contiguous_format, torch.channels_last):
                    x, w = x.contiguous(memory_format=layout), w.contiguous(memory_format=layout)
                    out = torch.nn.functional.conv2d(x, w, None, stride, padding, 1, groups)
                    for _ in range(repetitions):
                        begin = time.perf_counter()
                        if backward:
                            torch.ops.aten.convolution_backward(
                                out, x, w, None, stride, padding, [1, 1], False, [0, 0], groups, [*mask[0], False]
                            )
                        else:
                            torch.nn.functional.conv2d(x, w, None, stride, padding, 1, groups)
                        fastest = min(fastest, time.perf_counter() - begin)
                seconds += count * fastest
                passes = sum(mask[0]) if backward else 1
                operations += count * passes * 2.0 * out.numel() * w[0].numel()
        return seconds, operations


def matrix_product(dtype: torch.dtype, size: int = 4096) -> float:
    """Floating-point operations per second of a large square matrix product."""
    one, other = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        one @ other
        times.append(time.perf_counter() - begin)
    return 2.0 * size**3 / min(times)


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender."""
    torch.manual_seed(1)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    labels = torch.randint(0, 10, (options.batch_size,))
    taking_part = []
    for contender in contenders(model, options):
        try:
            timed_step(contender, images, labels)  # not counted: first use of memory, optimizer state
        except Exception as error:
            print(f"{model}: {contender.name} left out: {error}", file=sys.stderr)
            continue
        taking_part.append(contender)
    for _ in range(options.repetitions):
        for contender in taking_part:
            contender.seconds.append(timed_step(contender, images, labels))
    rows = []
    for contender in taking_part:
        rows.append(
            {"model": model, "batch_size": options.batch_size, "contender": contender.name, **spread(contender.seconds)}
        )
        if contender.learner is not None and options.bare:
            with Convolutions() as convolutions:
                contender.learner.step(images, labels)
            with pages(True):
                seconds, operations = convolutions.bare(options.bare)
            rows[-1] |= {"bare_seconds": seconds, "over_bare": rows[-1]["seconds"] / seconds, "gflop": operations / 1e9}
            rows[-1]["bare_gflops"] = operations / 1e9 / seconds
    for row in rows:
        for reference in ("published predsim", "plain loop"):
            pairs = zip(times(taking_part, reference), times(taking_part, row["contender"]), strict=False)
            ratios = [one / other for one, other in pairs]
            row[f"times {reference}"] = statistics.median(ratios) if ratios else None
    del taking_part
    gc.collect()
    return rows


def times(taking_part: list[Contender], name: str) -> list[float]:
    return next((contender.seconds for contender in taking_part if contender.name == name), [])


def spread(seconds: list[float]) -> dict[str, float]:
    return {"seconds": statistics.median(seconds), "least": min(seconds), "most": max(seconds)}


COLUMNS = (
    "model", "batch_size", "contender", "seconds", "least", "most", "times published predsim", "times plain loop",
    "gflop", "bare_seconds", "bare_gflops", "over_bare",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="vgg8b,vgg16,resnet18,resnet50,resnet110")
    parser.add_argument("--contenders", default="", help="names joined by commas; default: all")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=5, help="counted steps of each contender")
    parser.add_argument("--bare", type=int, default=2, help="repetitions of each bare convolution; 0: leave them out")
    parser.add_argument("--published", type=Path, help="adapter of the published program")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.json")
    options = parser.parse_args()
    facts = {"command": " ".join(sys.argv), **describe_machine(torch.device("cpu"))}
    facts["matrix_product_gflops"] = {str(dtype): matrix_product(dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16)}
    print(json.dumps(facts), flush=True)
    rows: list[dict[str, Any]] = []
    for model in options.models.split(","):
        for row in measure(model, options):
            rows.append(row)
            print("  ".join(f"{key} {shown(row[key])}" for key in COLUMNS if row.get(key) is not None), flush=True)
        if options.output:
            write(options.output, rows, facts)


def shown(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write(path: Path, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    path.with_suffix(".json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    with path.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({key: shown(value) for key, value in row.items()} for row in rows)


if __name__ == "__main__":
    main()
