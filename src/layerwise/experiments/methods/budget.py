"""Budgets: numbers of epochs by which all methods of a comparison spend alike."""

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from layerwise.errors import InvalidInput
from layerwise.experiments.methods.plan import Method, reference_of
from layerwise.profiling.costs import StepCosts, seconds_of_step
from layerwise.runs.run import Execution, run_name
from layerwise.training.device import find_device
from layerwise.utils.device import device_name
from layerwise.utils.files import read_json, write_json

EQUAL = ("epochs", "multiply-adds", "time")
WHAT = "seconds of a step, by which epochs are scaled to equal time"


def equal_epochs(
    equal: str,
    methods: Sequence[Method],
    costs: Mapping[str, StepCosts],
    output: Path,
    execution: Execution,
) -> dict[str, int]:
    """Epochs of each method, by its name.

    With multiply-adds or time, training spends about what that of the reference does: its epochs
    times the ratio of a step's costs, rounded, 1 or more.

    Args:
        equal: in ``EQUAL``.
        output: folder that keeps times, so that the same command plans the same runs again.
    """
    if equal == "epochs":
        spent: Mapping[str, float] = {method.name: 1 for method in methods}
    elif equal == "multiply-adds":
        spent = {method.name: costs[method.name].multiply_adds for method in methods}
    else:
        spent = times(methods, output, execution)
    reference = reference_of(methods)
    return {
        name: max(1, round(reference.run.epochs * spent[reference.name] / cost))
        for name, cost in spent.items()
    }


def times(methods: Sequence[Method], output: Path, execution: Execution) -> Mapping[str, float]:
    """Seconds of a step of each method: as they are kept in a file, else measured and kept there.

    Raises:
        InvalidInput: the file holds something else.
    """
    path = output / f"compare-times-{digest(methods, execution)}.json"
    names = [method.name for method in methods]
    if path.exists():
        return kept_times(path, names)
    print(f"timing a step of {len(methods)} methods", flush=True)
    measured = {method.name: seconds_of_step(method.run, execution) for method in methods}
    output.mkdir(parents=True, exist_ok=True)
    write_json(path, {"what": WHAT, "seconds": measured})
    return measured


def digest(methods: Sequence[Method], execution: Execution) -> str:
    """A digest of what is timed and where."""
    names = ("device", "cpu_threads", "memory_format", "graphs", "streams", "keep_memory", "memory")
    where = [getattr(execution, name) for name in names]
    machine = device_name(find_device(execution)), torch.backends.cpu.get_cpu_capability()
    words = [*(run_name(method.run) for method in methods), repr(where), repr(machine)]
    return hashlib.sha256("".join(words).encode(errors="surrogateescape")).hexdigest()[:6]


def kept_times(path: Path, names: Sequence[str]) -> Mapping[str, float]:
    with suppress(ValueError, TypeError, LookupError, OverflowError):
        value = read_json(path)
        seconds = {name: float(value["seconds"][name]) for name in names}
        if value["what"] == WHAT and all(0 < number < float("inf") for number in seconds.values()):
            return seconds
    raise InvalidInput(
        f"Cannot use {path}: it does not hold the times of these methods. Move it away, and they "
        "are measured again."
    )
