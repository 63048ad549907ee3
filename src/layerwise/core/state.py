"""State of a learner, to go on from: written, checked against a learner, restored."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.core.unit import Unit
from layerwise.errors import InvalidInput

STATE_VERSION = 1
ENTRIES = ("model", "losses", "optimizers", "schedulers", "steps")
PER_UNIT = ("losses", "optimizers", "schedulers", "optimizer_kinds", "scheduler_kinds", "scalers")


def state_of(model: nn.Module, units: Sequence[Unit], steps: int) -> dict[str, Any]:
    """State of a network and its units, in tensors and plain types.

    Raises:
        InvalidInput: gradients of parts of a batch wait for their update, which no state keeps.
    """
    if any(unit.parts for unit in units):
        raise InvalidInput(
            "Cannot save the state: gradients of parts of a batch wait for their update. Make the "
            "step that updates, or forget them with learner.zero_grad()."
        )
    state = {
        "version": STATE_VERSION,
        "units": [unit.name for unit in units],
        "steps": steps,
        "model": model.state_dict(),
        "losses": [unit.loss.state_dict() for unit in units],
        "optimizers": [unit.optimizer.state_dict() if unit.optimizer else None for unit in units],
        "optimizer_kinds": [type(unit.optimizer).__name__ for unit in units],
        "schedulers": [unit.scheduler.state_dict() if unit.scheduler else None for unit in units],
        "scheduler_kinds": [type(unit.scheduler).__name__ for unit in units],
    }
    if any(unit.scaler is not None for unit in units):
        state["scalers"] = [unit.scaler.state_dict() if unit.scaler else None for unit in units]
    return state


def load_state(model: nn.Module, units: Sequence[Unit], state: Mapping[str, Any]) -> None:
    """Restore a state of ``state_of``.

    Raises:
        InvalidInput: the state belongs to another network, cut, loss, optimizer or schedule, or is
            none; nothing was loaded.
    """
    if not isinstance(state, Mapping):
        raise InvalidInput(
            f"Cannot load the state: it is {type(state).__name__}. Give what learner.state_dict() "
            "returned."
        )
    names, saved = [unit.name for unit in units], state.get("units") or []
    if state.get("version") != STATE_VERSION or saved != names:
        other = next(
            (
                f", the first that differs {a!r}"
                for a, b in zip(saved, names, strict=False)
                if a != b
            ),
            "",
        )
        raise InvalidInput(
            f"Cannot load the state: it is of {len(saved)} units{other} (version "
            f"{state.get('version')}), this learner has {len(names)} (version {STATE_VERSION}). "
            "Build the learner with the same model and the same at= as when the state was saved."
        )
    try:
        reason = damage(state, len(units)) or misfit(model, units, state)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"what it holds is no state ({type(error).__name__}: {error})"
    if reason:
        raise InvalidInput(
            f"Cannot load the state: it does not fit this learner, since {reason}. Build the "
            "learner as when the state was saved."
        )
    model.load_state_dict(state["model"])
    scalers = state.get("scalers") or [None] * len(units)
    for unit, loss, optimizer, scheduler, scaler in zip(
        units, state["losses"], state["optimizers"], state["schedulers"], scalers, strict=True
    ):
        unit.zero_grad()
        unit.loss.load_state_dict(loss)
        if unit.optimizer is not None and optimizer is not None:
            unit.optimizer.load_state_dict(with_frozen(unit.optimizer, optimizer))
            unit.match_optimizer()
        if unit.scheduler is not None and scheduler is not None:
            unit.scheduler.load_state_dict(scheduler)
        if unit.scaler is not None and scaler is not None:
            unit.scaler.load_state_dict(scaler)


def damage(state: Mapping[str, Any], count: int) -> str | None:
    """The first entry that a state of a learner of ``count`` units cannot have; None: all fit."""
    for entry in ENTRIES:
        if entry not in state:
            return f"it has no {entry}"
    for entry in PER_UNIT:
        if entry in state and (not isinstance(state[entry], list) or len(state[entry]) != count):
            return f"its {entry} are not those of {count} units"
    steps, progress = state["steps"], state.get("progress", 0.0)
    if not isinstance(steps, int) or steps < 0:
        return f"its number of steps is {steps!r}"
    if not isinstance(progress, int | float) or not 0 <= progress <= 1:
        return f"its progress is {progress!r}"
    return None


def misfit(model: nn.Module, units: Sequence[Unit], state: Mapping[str, Any]) -> str | None:
    """The first reason why a state does not fit a learner of as many units; None: it fits."""
    pairs = [(model, state["model"])]
    pairs += zip((unit.loss for unit in units), state["losses"], strict=False)
    for module, saved in pairs:
        if reason := difference(module, saved):
            return reason
    kinds = state.get("optimizer_kinds") or [""] * len(units)
    for unit, kind, saved in zip(units, kinds, state["optimizers"], strict=True):
        if saved is None and not unit.parameters():
            continue  # units without trainable weights had no optimizer once
        if kind != type(unit.optimizer).__name__:
            return "its optimizers are of other kinds"
        if unit.optimizer is not None and group_sizes(with_frozen(unit.optimizer, saved)) != (
            group_sizes(unit.optimizer.state_dict())
        ):
            return f"its optimizer of unit {unit.index} ({unit.name}) holds other weights"
    return other_schedule(units, state)


def other_schedule(units: Sequence[Unit], state: Mapping[str, Any]) -> str | None:
    """The first unit whose schedule is of another kind than the state's; None: all are alike.

    A schedule counts on numbers that it has written into its optimizer, which are in the state.
    """
    kinds = state.get("scheduler_kinds") or [None] * len(units)  # states of earlier versions
    for unit, kind, saved in zip(units, kinds, state["schedulers"], strict=True):
        own = type(unit.scheduler).__name__
        if (saved is None) != (unit.scheduler is None) or kind not in (None, own):
            said = "no schedule" if saved is None else kind or "a schedule"
            here = "none" if unit.scheduler is None else own
            return f"unit {unit.index} ({unit.name}) has {said} in the state and {here} here"
    return None


def difference(module: nn.Module, saved: Mapping[str, Tensor]) -> str | None:
    """The first difference between a module and a saved state, in words; None: it fits."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in sorted(own.keys() ^ saved.keys()):
        return f"{name!r} is only in the {'learner' if name in own else 'state'}"
    for name, shape in own.items():
        if saved[name].shape != shape:
            return (
                f"{name!r} has shape {tuple(saved[name].shape)} in the state and {tuple(shape)} in "
                "the learner"
            )
    return None


def group_sizes(state: Mapping[str, Any]) -> list[int]:
    return [len(group["params"]) for group in state["param_groups"]]


def with_frozen(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with places for frozen weights, which were once not held.

    Such a state numbers the trainable weights alone.
    """
    trainable = [
        [weight.requires_grad for weight in group["params"]] for group in optimizer.param_groups
    ]
    if group_sizes(state) == [len(group) for group in trainable] or group_sizes(state) != [
        sum(group) for group in trainable
    ]:
        return state
    flags = [flag for group in trainable for flag in group]
    places = [place for place, flag in enumerate(flags) if flag]
    own = optimizer.state_dict()["param_groups"]
    return {
        "state": {places[number]: value for number, value in state["state"].items()},
        "param_groups": [
            {**group, "params": mine["params"]}
            for group, mine in zip(state["param_groups"], own, strict=True)
        ],
    }
