"""Checks that a saved state can be gone on from: types, shapes and numbers of what it holds."""

import json
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.learner import Learner
from layerwise.runs.lines import is_number

COUNTS = ("images", "images_trained")
SECONDS = ("seconds", "train_seconds")
OF_BEST = ("epoch", "val_accuracy", "test_accuracy")
OF_LATEST = ("epochs", "val_accuracy", "test_accuracy")


def check_meter_state(state: Mapping[str, Any], units: int) -> None:
    """Refuse measurements that a run cannot go on with.

    Raises:
        ValueError, KeyError, TypeError: naming the entry.
    """
    sums = state["sums"]
    demand(isinstance(sums, Tensor) and sums.shape == (2, units), "sums")
    demand(bool(torch.isfinite(sums).all()), "sums")
    for name in COUNTS:
        demand(type(state[name]) is int and state[name] >= 0, name)
    for name in SECONDS:
        demand(is_number(state[name]) and state[name] >= 0, name)
    demand(state["peak_bytes"] is None or is_number(state["peak_bytes"]), "peak_bytes")
    for name, entries in (("best", OF_BEST), ("latest", OF_LATEST)):
        demand(isinstance(state[name], dict), name)
        numbers = [state[name][entry] for entry in entries] if state[name] else []
        demand(all(number is None or is_number(number) for number in numbers), name)
    demand(not state["best"] or is_number(state["best"]["val_accuracy"]), "best")
    demand(isinstance(state["units"], dict), "units")
    for index, record in state["units"].items():
        demand(type(index) is int and 0 <= index < units and isinstance(record, dict), "units")
    json.dumps([state["best"], state["latest"], state["units"]], allow_nan=False)


def check_learner_state(state: Mapping[str, Any], learner: Learner) -> None:
    """Refuse weights and moments of optimizers that are not of this learner's kinds and shapes.

    What a learner refuses itself is left to it.

    Raises:
        ValueError, KeyError, TypeError: naming the entry.
    """
    demand(type(state["steps"]) is int and state["steps"] >= 0, "steps")
    progress = state.get("progress", 0.0)
    demand(is_number(progress) and 0 <= progress <= 1, "progress")
    check_tensors(state["model"], learner.model, "model")
    for unit, saved in zip(learner.units, state["losses"], strict=True):
        check_tensors(saved, unit.loss, "losses")
    for unit, saved in zip(learner.units, state["optimizers"], strict=True):
        if unit.optimizer is None:
            continue
        check_groups(saved["param_groups"], unit.optimizer.state_dict()["param_groups"])
        parameters = [p for group in unit.optimizer.param_groups for p in group["params"]]
        for index, moments in saved["state"].items():
            for value in moments.values():
                check_moment(value, parameters[index])


def check_tensors(saved: Mapping[str, Any], module: nn.Module, entry: str) -> None:
    for name, own in module.state_dict().items():
        if name in saved and isinstance(own, Tensor):  # a missing one is named by the learner
            value = saved[name]
            demand(isinstance(value, Tensor) and value.dtype == own.dtype, f"{entry}, {name}")


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Groups of parameters whose entries are of the same kinds.

    Older ones may lack some, and schedules add to them.
    """
    for group, reference in zip(saved, own, strict=True):
        demand(isinstance(group, dict), "optimizers")
        for name in group.keys() & reference.keys():
            value = group[name]
            same = type(value) is type(reference[name])
            both_numbers = isinstance(value, Real) and isinstance(reference[name], Real)
            demand(same or both_numbers, f"optimizers, {name}")
            demand(not isinstance(value, float) or is_number(value), f"optimizers, {name}")
        demand(
            is_number(group.get("lr")) and group["params"] == reference["params"],
            "optimizers, params",
        )


def check_moment(value: Any, parameter: Tensor) -> None:
    """A moment of an optimizer: of its parameter's shape, or one number, or none yet."""
    if value is None:
        return
    demand(isinstance(value, Tensor) and value.shape in (parameter.shape, ()), "optimizers, state")
    demand(value.is_floating_point(), "optimizers, state")


def demand(holds: bool, entry: str) -> None:
    """Refuse an entry of a state.

    Raises:
        ValueError: naming it.
    """
    if not holds:
        raise ValueError(f"its {entry} cannot be gone on with")
