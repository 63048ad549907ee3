"""Losses and optimizers of units, made by what the user gives ``localize``."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from layerwise.core.arguments import is_whole
from layerwise.errors import InvalidInput, brief, choose, raised
from layerwise.losses import LossFactory
from layerwise.utils.options import required_arguments

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
Given = TypeVar("Given")
# one for all units, one per unit in order, by name, or by the number of the unit it begins at
PerUnit: TypeAlias = Given | Sequence[Given] | Mapping[str, Given] | Mapping[int, Given]


def made_optimizer(maker: OptimizerFactory, weights: list[nn.Parameter], name: str) -> Optimizer:
    """The optimizer made for a unit, if it is one and its step needs no closure.

    Raises:
        InvalidInput: it is not, or it was not made.
    """
    remedy = "Give one that takes the list of the unit's weights."
    optimizer = made(maker, weights, f"Cannot train unit {name!r}: optimizer=", remedy)
    if not isinstance(optimizer, Optimizer):
        raise InvalidInput(
            f"Cannot train unit {name!r}: optimizer= made {type(optimizer).__name__}. Make a "
            "torch.optim.Optimizer from the parameters, one whose step needs no closure."
        )
    refuse_other_steps(optimizer, name)
    return optimizer


def refuse_other_steps(optimizer: Optimizer, name: str) -> None:
    """Refuse an optimizer that computes the loss itself, or whose steps are differentiated.

    Raises:
        InvalidInput: naming it and the unit.
    """
    if required_arguments(optimizer.step):
        raise InvalidInput(
            f"Cannot train unit {name!r}: a step of {type(optimizer).__name__} needs a closure. "
            "Give an optimizer whose step needs none."
        )
    if optimizer.defaults.get("differentiable"):
        raise InvalidInput(
            f"Cannot train unit {name!r}: {type(optimizer).__name__} was made with "
            "differentiable=True, and steps of a unit are not differentiated. Leave it out."
        )


def made(maker: Callable[[Any], Any], given: Any, begins: str, remedy: str) -> Any:
    """What a user's callable makes.

    Args:
        begins: beginning of the message if it raises an error.
        remedy: end of that message.

    Raises:
        InvalidInput: it raised an error.
    """
    try:
        return maker(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{begins} {raised(error)}. {remedy}") from error


def one_per_unit(
    argument: str, given: Any, names: Sequence[str], is_one: Callable[[Any], bool], words: str
) -> list[Any]:
    """An argument of ``localize`` for each unit, from one of the forms in which it is given.

    Args:
        argument: its name.
        given: one for all units, a sequence with one per unit, a dictionary by the names of units,
            or a dictionary by the numbers of the units that each is for, from there on.
        names: names of the units.
        is_one: whether something is one of them; words: such a thing, in words.

    Raises:
        InvalidInput: some unit has none, or there is no unit of such a name or number.
    """
    if is_one(given):
        return [given] * len(names)
    each: list[Any] = []
    if isinstance(given, Mapping) and given and all(map(is_whole, given)):
        each = from_each_on(argument, given, len(names))
    elif isinstance(given, Mapping):
        strange = [key for key in given if not is_whole(key) and not isinstance(key, str)]
        for name in strange or given:
            if not isinstance(name, str):
                raise InvalidInput(
                    f"Cannot use the key {brief(repr(name))} in {argument}=: it is "
                    f"{'neither a number nor a name' if strange else 'a number beside names'}. "
                    "Give numbers of units alone, or their names alone."
                )
            choose(f"unit in {argument}=", name, names)
        each = [given.get(name) for name in names]
    elif isinstance(given, Sequence) and not isinstance(given, str):
        each = list(given)
    if len(each) != len(names) or not all(map(is_one, each)):
        first = next((name for name, one in zip(names, each, strict=False) if not is_one(one)), "")
        without = f": {first!r} has none" if first else ""
        raise InvalidInput(
            f"Cannot use {argument}=: it does not give each of the {len(names)} units {words}"
            f"{without}. Give {words} for all, a list with one per unit, or a dictionary with the "
            f"names {', '.join(names[:3])} …"
        )
    return each


def from_each_on(argument: str, given: Mapping[int, Any], count: int) -> list[Any]:
    """For each of a number of units, what is given for the last unit up to it.

    Raises:
        InvalidInput: there is no unit of such a number.
    """
    for unit in given:
        if not 0 <= unit < count:
            raise InvalidInput(
                f"Cannot begin another {argument} at unit {unit}: the network has {count} units. "
                f"Give 0 to {count - 1}."
            )
    starts = [[unit for unit in given if unit <= index] for index in range(count)]
    return [given[max(units)] if units else None for units in starts]


def optimizer_makers(optimizer: Any, names: Sequence[str]) -> list[OptimizerFactory]:
    """One optimizer factory per unit.

    Args:
        optimizer: see ``localize``.
        names: names of the units.

    Raises:
        InvalidInput: some unit has no callable.
    """
    chosen = default_optimizer if optimizer is None else optimizer
    return one_per_unit("optimizer", chosen, names, callable, "a callable")


def losses_of_units(loss: Any, names: Sequence[str]) -> list[str | LossFactory]:
    """One loss per unit, a name or a callable.

    Args:
        loss: see ``localize``.
        names: names of the units.

    Raises:
        InvalidInput: some unit has none.
    """
    return one_per_unit("loss", loss, names, is_loss, "a name or a callable")


def is_loss(given: Any) -> bool:
    return isinstance(given, str) or callable(given)


def scale_rate(optimizer: Optimizer, weights: Iterable[nn.Parameter], factor: float) -> None:
    """Let some of an optimizer's weights learn at a multiple of its rate, in groups of their own.

    Schedules that multiply the rates that groups begin with keep the factor; for others see
    ``refuse_lost_factor``.
    """
    chosen = set(map(id, weights))
    for group in list(optimizer.param_groups):
        apart = [weight for weight in group["params"] if id(weight) in chosen]
        others = [weight for weight in group["params"] if id(weight) not in chosen]
        if apart and others:
            group["params"] = others
            optimizer.add_param_group({**group, "params": apart, "lr": group["lr"] * factor})
        elif apart:
            group["lr"] *= factor


def refuse_lost_factor(scheduler: Any, optimizer: Optimizer, before: Sequence[float]) -> None:
    """Refuse a schedule that sets rates without regard to those that groups began with.

    Args:
        before: rates of the optimizer's groups before the schedule was made.

    Raises:
        InvalidInput: naming the schedule.
    """
    after = [float(group["lr"]) for group in optimizer.param_groups]
    if any(
        not math.isclose(rate * before[0], first * after[0], rel_tol=1e-6)
        for rate, first in zip(after, before, strict=True)
    ):
        raise InvalidInput(
            f"Cannot use head_lr_factor with {type(scheduler).__name__}: it sets the rates of "
            "heads by itself. Give it one rate for each of the optimizer's groups, the heads' last "
            "and in the ratio of head_lr_factor, or leave head_lr_factor out."
        )


def default_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """Adam, in one fused operation where the device has one."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.Adam(parameters, lr=5e-4, fused=fused)
