"""Time and memory of a training step: this library's rules and losses, a plain PyTorch loop, the
published program.

    python benchmarks/steps.py --models vgg8b,resnet50 --published ADAPTER.py --output results/steps

Every contender is a process of its own, set up as its users have it. They make steps in turn, one
computing while the others wait, so that all suffer alike from other programs. The output has
medians, the spread, ratios within the run and each process's largest size. It also has the time of
the step's convolutions alone, replayed with the same shapes on random numbers in whichever memory
format is faster for each, and the machine's largest matrix product.

The published local-loss program (Nøkland & Eidnes 2019, github.com/anokland/local-loss) is not part
of this repository. ADAPTER.py is a file with a function ``build(model, loss, *, decoder_dim,
batch_size, lr) -> step``, whose ``step(images, labels)`` is one iteration of that program's
training loop.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise.core.cuda_graphs import CapturedSteps
from layerwise.core.memory_format import set_memory_format
from layerwise.memory.streams import MOST_STREAMS
from layerwise.ops import small_conv
from layerwise.profiling.measure import process_peak_bytes
from layerwise.rules.checkpointed import checkpointed_piece
from layerwise.runs.run import Execution
from layerwise.training.device import apply_execution
from layerwise.training.machine import describe_machine
from layerwise.utils.device import synchronise
from layerwise.utils.files import replacing
from tables import fill_table

Step = Callable[[Tensor, Tensor], Any]
LEARNING_RATE = 5e-4
STREAMS = MOST_STREAMS
OURS = {"THP_MEM_ALLOC_ENABLE": "1", "GOMP_SPINCOUNT": "10000"}  # as the program sets them
REFERENCES = ("published predsim", "plain loop", "global", "predsim joined")
# contenders whose users set no environment variables
AS_THEY_COME = ("published predsim", "plain loop", "library", "library unkept")
# steps that are not counted: by then most memory is mapped, and the optimizer has its state
WARM_UP = 5
ENDED = "its process ended, as happens when memory runs out: give fewer --contenders at once"


def learner_for(
    model: str,
    loss: str,
    at: str | int,
    options: argparse.Namespace,
    amp: torch.dtype | None = None,
    memory_format: str = "auto",
    recorded: bool = True,
    streams: int = STREAMS,
    output_layer: str = "separate",
) -> Any:
    apply_execution(torch.device(options.device), Execution())  # as ``layerwise train`` does
    torch.manual_seed(0)
    network = layerwise.create_model(model, image_size=options.image_size).to(options.device)
    sample = torch.zeros(2, 3, options.image_size, options.image_size)
    local: dict[str, Any] = {"decoder_dim": decoder_dim(model)} if at == "layer" else {}
    learner = layerwise.localize(
        network,
        sample,
        10,
        loss=loss,
        at=at,
        optimizer=adam,
        amp=amp,
        output_layer=output_layer,
        memory_format=None,
        **local,
    )
    set_memory_format(learner, memory_format)
    if options.device != "cpu" and recorded:
        learner.captured = CapturedSteps(learner, streams)
    return learner


def checkpointed(model: str, options: argparse.Namespace) -> Any:
    learner = learner_for(model, "pred", 1, options, recorded=False)
    learner.units[0].piece = checkpointed_piece(learner, options.batch_size, None)
    learner.train()
    return learner


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True)


def decoder_dim(model: str) -> int:
    return 2048 if model in ("vgg8b", "vgg11b") else 4096


def plain_loop(model: str, options: argparse.Namespace) -> Step:
    """Global training as everyone writes it."""
    torch.manual_seed(0)
    network = layerwise.create_model(model, image_size=options.image_size).to(options.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()

    return step


def published(model: str, options: argparse.Namespace) -> Step:
    specification = importlib.util.spec_from_file_location("published", options.published)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    made: Step = module.build(
        model,
        "predsim",
        decoder_dim=decoder_dim(model),
        batch_size=options.batch_size,
        lr=LEARNING_RATE,
    )
    return made


def library(model: str, options: argparse.Namespace, kept: bool = True) -> Any:
    """The loop of README's example: ``localize`` with its defaults."""
    if kept and options.device == "cpu":
        layerwise.keep_freed_memory()
    torch.manual_seed(0)
    network = layerwise.create_model(model, image_size=options.image_size).to(options.device)
    sample = torch.zeros(2, 3, options.image_size, options.image_size)
    return layerwise.localize(network, sample, 10, decoder_dim=decoder_dim(model))


MAKERS: dict[str, Callable[[str, argparse.Namespace], Any]] = {
    "published predsim": published,
    "plain loop": plain_loop,
    "global": lambda model, options: learner_for(model, "pred", 1, options),
    "checkpointed": checkpointed,
    "predsim": lambda model, options: learner_for(model, "predsim", "layer", options),
    "predsim-lite": lambda model, options: learner_for(model, "predsim-lite", "layer", options),
    "predsim joined": lambda model, options: learner_for(
        model, "predsim", "layer", options, output_layer="joined"
    ),
    "library": library,
    "library unkept": lambda model, options: library(model, options, kept=False),
    "global-bfloat16": lambda model, options: learner_for(
        model, "pred", 1, options, torch.bfloat16
    ),
    "predsim-bfloat16": lambda model, options: learner_for(
        model, "predsim", "layer", options, torch.bfloat16
    ),
    "predsim-lite-bfloat16": lambda model, options: learner_for(
        model, "predsim-lite", "layer", options, torch.bfloat16
    ),
}


def predsim_with(
    deterministic: bool = True, searched: bool = False, **options: Any
) -> Callable[[str, argparse.Namespace], Any]:
    """Predsim in bfloat16 with one thing otherwise, on a GPU."""

    def make(model: str, arguments: argparse.Namespace) -> Any:
        learner = learner_for(
            model, "predsim", "layer", arguments, **{"amp": torch.bfloat16, **options}
        )
        # the steps come later
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = searched
        return learner

    return make


ON_A_GPU: dict[str, Callable[[str, argparse.Namespace], Any]] = {
    "predsim-eager": predsim_with(amp=None, recorded=False),
    "predsim-bfloat16-eager": predsim_with(recorded=False),
    "predsim-bfloat16-contiguous": predsim_with(memory_format="contiguous"),
    "predsim-bfloat16-1-stream": predsim_with(streams=1),
    "predsim-bfloat16-8-streams": predsim_with(streams=8),
    "predsim-bfloat16-any-order": predsim_with(deterministic=False),
    "predsim-bfloat16-searched": predsim_with(deterministic=False, searched=True),
}


def work(channel: Connection, name: str, model: str, options: argparse.Namespace) -> None:
    """A contender's process: builds it, then makes a step whenever it is told to."""
    torch.manual_seed(1)
    images = torch.randn(
        options.batch_size, 3, options.image_size, options.image_size, device=options.device
    )
    labels = torch.randint(0, 10, (options.batch_size,), device=options.device)
    device = images.device
    try:
        made = (MAKERS | ON_A_GPU)[name](model, options)
        step = made.step if hasattr(made, "units") else made
        for _ in range(WARM_UP):
            step(images, labels)
        synchronise(device)
        channel.send(None)
    except Exception as error:  # what the published program cannot build is left out, and said
        channel.send(str(error))
        return
    while channel.recv() == "step":
        begin = time.perf_counter()
        for _ in range(options.burst):
            step(images, labels)
        synchronise(device)
        channel.send((time.perf_counter() - begin) / options.burst)
    facts: dict[str, Any] = {"process_peak_mb": process_peak_bytes() / 1e6}
    if step is not made and made.captured is not None:
        print(
            name,
            "recorded:",
            made.captured.refusal or len(made.captured.recordings),
            file=sys.stderr,
        )
        made.captured = None
    if device.type == "cuda":
        facts["allocated_peak_mb"] = torch.cuda.max_memory_allocated(device) / 1e6
    if step is not made and options.bare:
        no_products = patch.object(small_conv, "has_matrix_unit", lambda: False)
        # what is computed as matrix products counts too
        with no_products, Convolutions() as convolutions:
            step(images, labels)
        seconds, operations = convolutions.bare(options.bare, device)
        facts |= {
            "gflop": operations / 1e9,
            "bare_seconds": seconds,
            "bare_gflops": operations / 1e9 / seconds,
        }
    channel.send(facts)


class Contender:
    """A process that makes training steps when it is told to."""

    def __init__(self, name: str, model: str, options: argparse.Namespace) -> None:
        self.name, self.seconds, self.ready = name, list[float](), False
        context = multiprocessing.get_context("spawn")
        self.channel, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, name, model, options), daemon=True)
        for variable in OURS:
            os.environ.pop(variable, None)
        os.environ.update({} if name in AS_THEY_COME else OURS)  # inherited
        self.process.start()
        other.close()
        self.refusal: str | None = None
        if options.device == "cpu":  # on a GPU they start at the same time
            self.wait()

    def wait(self) -> None:
        """Until the process is ready."""
        if self.ready or self.refusal:
            return
        try:
            self.refusal = self.channel.recv()
            self.ready = True
        except EOFError:
            self.refusal = ENDED

    def step(self) -> None:
        if self.refusal is not None:
            return
        try:
            self.channel.send("step")
            self.seconds.append(self.channel.recv())
        except (EOFError, BrokenPipeError):
            self.refusal = ENDED

    def finish(self) -> dict[str, Any]:
        try:
            self.channel.send("finish")
            facts: dict[str, Any] = self.channel.recv()
        except (EOFError, BrokenPipeError):  # its seconds stand
            print(f"{self.name}: {ENDED}", file=sys.stderr)
            facts = {}
        self.process.join()
        return facts


class Convolutions(TorchDispatchMode):
    """Notes the convolutions that a step makes: shapes, strides and number types, and how often
    each occurs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forward: Counter[Any] = Counter()
        self.backward: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.convolution.default:
            images, weight, _, stride, padding, *_, groups = args
            self.forward[
                (
                    tuple(images.shape),
                    tuple(weight.shape),
                    images.dtype,
                    tuple(stride),
                    tuple(padding),
                    groups,
                )
            ] += 1
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

    def bare(self, repetitions: int, device: torch.device) -> tuple[float, float]:
        """Seconds and floating-point operations of these convolutions alone.

        Each is in the memory format that is faster for it.
        """
        seconds = operations = 0.0
        for backward, counts in ((False, self.forward), (True, self.backward)):
            for (images, weight, dtype, stride, padding, groups, *mask), count in counts.items():
                x, w = (
                    torch.randn(images, device=device).to(dtype),
                    torch.randn(weight, device=device).to(dtype),
                )
                fastest = float("inf")
                for memory_format in (torch.contiguous_format, torch.channels_last):
                    x, w = (
                        x.contiguous(memory_format=memory_format),
                        w.contiguous(memory_format=memory_format),
                    )
                    out = torch.nn.functional.conv2d(x, w, None, stride, padding, 1, groups)
                    for number in range(repetitions + 1):
                        begin = time.perf_counter()
                        if backward:
                            torch.ops.aten.convolution_backward(
                                out,
                                x,
                                w,
                                None,
                                stride,
                                padding,
                                [1, 1],
                                False,
                                [0, 0],
                                groups,
                                [*mask[0], False],
                            )
                        else:
                            torch.nn.functional.conv2d(x, w, None, stride, padding, 1, groups)
                        synchronise(device)
                        if number:  # the first is slower: memory is fetched, a kernel is made
                            fastest = min(fastest, time.perf_counter() - begin)
                seconds += count * fastest
                passes = sum(mask[0]) if backward else 1
                operations += count * passes * 2.0 * out.numel() * w[0].numel()
        return seconds, operations


def matrix_product(dtype: torch.dtype, device: torch.device, size: int = 4096) -> float:
    """Floating-point operations per second of a large square matrix product."""
    one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        one @ other
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return 2.0 * size**3 / min(times)


def measure(model: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender."""
    names = [
        name
        for name in options.contenders.split(",")
        if name != "published predsim" or options.published is not None
    ]
    contenders = [Contender(name, model, options) for name in names]
    for contender in contenders:
        contender.wait()
    for _ in range(options.repetitions):
        for contender in contenders:
            contender.step()
    for contender in contenders:
        if contender.refusal is not None:
            print(f"{model}: {contender.name} left out: {contender.refusal}", file=sys.stderr)
    taking_part = [contender for contender in contenders if contender.refusal is None]
    rows = []
    for contender in taking_part:
        row = {
            "model": model,
            "batch_size": options.batch_size,
            "contender": contender.name,
            "seconds": statistics.median(contender.seconds),
            "least": min(contender.seconds),
            "most": max(contender.seconds),
            **contender.finish(),
        }
        if "bare_seconds" in row:
            row["over_bare"] = row["seconds"] / row["bare_seconds"]
        for reference in taking_part:
            if reference.name in REFERENCES:
                pairs = zip(reference.seconds, contender.seconds, strict=True)
                row[f"times {reference.name}"] = statistics.median(
                    one / other for one, other in pairs
                )
        rows.append(row)
    return rows


COLUMNS = (
    "run", "model", "batch_size", "contender", "seconds", "least", "most",
    *(f"times {name}" for name in REFERENCES),
    "process_peak_mb", "allocated_peak_mb", "gflop", "bare_seconds", "bare_gflops", "over_bare",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="vgg8b,vgg16,resnet18,resnet50,resnet110")
    parser.add_argument("--contenders", help="names joined by commas (default: all)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="counted turns of each contender"
    )
    parser.add_argument("--burst", type=int, help="steps of a turn (default: 1, on a GPU 20)")
    parser.add_argument(
        "--bare",
        type=int,
        default=2,
        help="repetitions of each bare convolution; 0: leave them out",
    )
    parser.add_argument("--published", type=Path, help="adapter of the published program")
    parser.add_argument(
        "--output", type=Path, help="fill OUTPUT.csv and OUTPUT-machine.json, lines of --run anew"
    )
    parser.add_argument("--run", type=int, default=1, help="number of this run in them")
    options = parser.parse_args()
    known = MAKERS if options.device == "cpu" else MAKERS | ON_A_GPU
    options.contenders = options.contenders or ",".join(known)
    options.burst = options.burst or (1 if options.device == "cpu" else 20)
    unknown = sorted(set(options.contenders.split(",")) - known.keys())
    if unknown:
        parser.error(f"unknown contender {unknown[0]!r}: accepted: {', '.join(known)}")
    facts = {**describe_machine(torch.device(options.device))}
    half = "bfloat16" in options.contenders  # which some processors take minutes for
    kinds = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    products = {str(dtype): matrix_product(dtype, torch.device(options.device)) for dtype in kinds}
    facts["matrix_product_gflops"] = {dtype: product / 1e9 for dtype, product in products.items()}
    print(json.dumps(facts), flush=True)
    rows: list[dict[str, Any]] = []
    for model in options.models.split(","):
        for row in measure(model, options):
            rows.append(row)
            print(
                "  ".join(
                    f"{key} {shown(row[key])}" for key in COLUMNS if row.get(key) is not None
                ),
                flush=True,
            )
        if options.output:
            write(options.output, options.run, rows, facts)


def shown(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3f}" if value >= 0.1 else f"{value:.3g}"


def write(path: Path, run: int, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Fill a table, and the file of the machine and the command of each run in it."""
    table = [{name: shown({"run": run, **row}.get(name, "")) for name in COLUMNS} for row in rows]
    fill_table(path.with_suffix(".csv"), table, ("run", "model"), COLUMNS)
    machine = path.with_name(f"{path.name}-machine.json")
    before = json.loads(machine.read_text()) if machine.exists() else []
    runs = {fact["run"]: fact for fact in [*before, {"run": run, **facts}]}
    with replacing(machine) as draft:
        draft.write_text(json.dumps(list(runs.values()), indent=1) + "\n")


if __name__ == "__main__":
    main()
