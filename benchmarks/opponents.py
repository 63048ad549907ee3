"""Time of a step against its memory: local learning, and ways to save memory in global training.

Global training computes a batch in parts (gradient accumulation, whose batch statistics are of a
part), recomputes all it can (checkpointing), or as little as a limit allows (plans). Memory is
predicted, counted whole; times are of steps on random images, all methods in turn. Units are
layers, and by ``strided`` blocks.

    python benchmarks/opponents.py --csv results/opponents.csv
    python benchmarks/opponents.py --csv results/opponents.csv --time resnet18
    python benchmarks/opponents.py --csv results/opponents.csv --time vgg16
    python benchmarks/opponents.py --csv results/opponents.csv --figure docs/images/opponents.png
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

import layerwise
from layerwise.core.learner import Learner
from layerwise.core.split import split
from layerwise.errors import InvalidInput
from layerwise.profiling.predict import predict_steps
from layerwise.profiling.trial_steps import rule_ticks
from layerwise.rules import RULES
from layerwise.rules.checkpointed import (
    Checkpointed,
    Joined,
    checkpointed_piece,
    piece_within,
    with_piece,
)
from tables import fill_table, read_table

BATCH = 128
MODELS = ("resnet18", "vgg16")
LOSSES = ("pred", "predsim-lite", "predsim", "strided")
CUTS = {"strided": "block"}  # of losses that are not for every layer
PARTS = (2, 4, 8)
SHARES = (0.9, 0.8, 0.7, 0.6)  # of global training's memory, for which a plan is made
ADAM = partial(torch.optim.Adam, fused=True)


def made(model: str, rule: str, loss: str) -> Learner:
    """A learner of 32-pixel images in 10 classes, in the program's memory format."""
    torch.manual_seed(0)
    network = layerwise.create_model(model)
    sample = torch.zeros(2, 3, 32, 32)
    at = RULES[rule].at or CUTS.get(loss, "layer")
    options: dict[str, Any] = {"optimizer": ADAM, "memory_format": None, "check": False}
    learner = layerwise.localize(network, sample, 10, loss=loss or "pred", at=at, **options)
    layerwise.set_memory_format(learner, "auto")
    return learner


def predicted(model: str, rule: str, loss: str, options: dict[str, Any]) -> dict[str, Any]:
    """The cells of a line: bytes and multiply-adds of a step."""
    (step,) = predict_steps(rule, made(model, rule, loss), BATCH, options)
    return {
        "peak_bytes": max(step.peaks().values()),
        "multiply_adds": sum(step.multiply_adds.values()),
    }


def segments_of(model: str, limit: int | None) -> str:
    """The segments of a checkpointed network in words: their pieces, and r if recomputed.

    Finding them takes longer than the steps that are timed.
    """
    learner = made(model, "checkpointed", "")
    piece = (
        piece_within(learner, BATCH, limit) if limit else checkpointed_piece(learner, BATCH, None)
    )
    counts = [len(list(part.get_submodule("pieces").children())) for part in piece.segments]
    pairs = zip(counts, piece.recomputed, strict=True)
    return " ".join(f"{count}{'r' if again else ''}" for count, again in pairs)


def checkpointed_as(learner: Learner, words: str) -> Checkpointed:
    """The network of a learner in the segments that ``segments_of`` named."""
    counts = [int(word.rstrip("r")) for word in words.split()]
    sample = torch.zeros(2, *learner.image_shape)
    chains = (split(learner.model, at, sample) for at in ("block", "layer"))
    pieces = iter(next(chain.pieces for chain in chains if len(chain.pieces) == sum(counts)))
    segments = [Joined(list(islice(pieces, count))) for count in counts]
    return Checkpointed(segments, [word.endswith("r") for word in words.split()])


def lines(model: str) -> Iterator[dict[str, Any]]:
    """A line per method; a plan for every local method's memory, and for shares of global's."""

    def line(method: str, rule: str, loss: str = "", **options: Any) -> dict[str, Any]:
        said = {name: options.get(name, "") for name in ("micro_batches", "limit")}
        cells = {"model": model, "batch_size": BATCH, "method": method, "rule": rule, "loss": loss}
        found = {**cells, **said, **predicted(model, rule, loss, options), "seconds": ""}
        checkpoints = rule == "checkpointed"
        found["segments"] = segments_of(model, options.get("limit")) if checkpoints else ""
        print(*found.values(), flush=True)
        return found

    whole = line("global", "global")
    local = [line(loss, "simultaneous", loss) for loss in LOSSES]
    yield from (whole, *local, line("checkpointed", "checkpointed"))
    for parts in PARTS:
        yield line(f"global, {parts} parts", "global", micro_batches=parts)
    limits = [int(share * whole["peak_bytes"]) for share in SHARES]
    for limit in sorted({*limits, *(found["peak_bytes"] for found in local)}):
        if limit < whole["peak_bytes"]:
            try:
                yield line("plan", "checkpointed", limit=limit)
            except InvalidInput as refusal:  # local learning needs less than any plan
                print(model, refusal, flush=True)


def timed(rows: list[dict[str, Any]], repetitions: int) -> None:
    """Fill in the seconds of a step of each line, medians of steps that take turns."""
    ticks = []
    for row in rows:
        options = {"micro_batches": int(row["micro_batches"])} if row["micro_batches"] else {}
        learner = made(row["model"], row["rule"], row["loss"])
        rule = "global" if row["segments"] else row["rule"]
        steps = rule_ticks(rule, learner, BATCH, repetitions, options)
        if row["segments"]:
            steps = with_piece(learner.units[0], checkpointed_as(learner, row["segments"]), steps)
        ticks.append(steps)
    seconds: list[list[float]] = [[] for _ in rows]
    for _ in range(repetitions + 1):
        for steps, times in zip(ticks, seconds, strict=True):
            began = time.perf_counter()
            next(steps)
            times.append(time.perf_counter() - began)
    for row, times in zip(rows, seconds, strict=True):
        row["seconds"] = f"{median(times[1:]):.3f}"
        print(row["model"], row["method"], row["limit"], *(f"{t:.3f}" for t in times), flush=True)


def keep_seconds(rows: list[dict[str, Any]], before: list[dict[str, str]]) -> None:
    """Take the seconds of the same steps from an earlier table."""

    def of(row: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[name]) for name in ("model", "method", "segments"))

    seconds = {of(row): row["seconds"] for row in before}
    for row in rows:
        row["seconds"] = seconds.get(of(row), "")


def has_loss(loss: str, row: dict[str, Any]) -> bool:
    return bool(row["loss"] == loss)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Seconds against memory, a panel for each network; lines join the ways to save more."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(MODELS), figsize=(9, 4), layout="constrained")
    families: dict[str, tuple[Callable[[dict[str, Any]], bool], str]] = {
        "global training": (lambda row: row["method"] == "global", "k*"),
        "in 2, 4, 8 parts": (lambda row: bool(row["micro_batches"]), "k-o"),
        "checkpointing, most": (lambda row: row["method"] == "checkpointed", "ks"),
        "checkpointing, by a plan": (lambda row: row["method"] == "plan", "k:D"),
        **{
            f"local: {loss}": (partial(has_loss, loss), style)
            for loss, style in zip(LOSSES, ("C0^", "C2P", "C3v", "C1X"), strict=True)
        },
    }
    for panel, model in zip(panels, MODELS, strict=True):
        for label, (belongs, style) in families.items():
            points = sorted(
                (int(row["peak_bytes"]) / 1e6, float(row["seconds"]))
                for row in rows
                if row["model"] == model and belongs(row) and row["seconds"]
            )
            if points:
                panel.plot(*zip(*points, strict=True), style, ms=7, alpha=0.8, label=label)
        panel.set(title=f"{model}, batch of {BATCH}", xlabel="peak memory, MB")
        panel.set(ylabel="seconds of a step", ylim=(0, None), xlim=(0, None))
        panel.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--csv", type=Path, required=True, help="table, written or filled in")
    parser.add_argument(
        "--time", choices=MODELS, help="time the steps of this network in the table"
    )
    parser.add_argument(
        "--repetitions", type=int, default=3, help="timed steps of each, after one that is not"
    )
    parser.add_argument("--figure", type=Path, help="draw the table, whose steps are timed")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parsed = parser.parse_args()
    layerwise.keep_freed_memory()
    if parsed.time or parsed.figure:
        rows = read_table(parsed.csv)
    else:
        rows = [found for model in parsed.models for found in lines(model)]
        keep_seconds(rows, read_table(parsed.csv))
    if parsed.time:
        timed([row for row in rows if row["model"] == parsed.time], parsed.repetitions)
    if parsed.figure:
        draw(rows, parsed.figure)
        return
    fill_table(parsed.csv, rows, ("model",))


if __name__ == "__main__":
    main()
