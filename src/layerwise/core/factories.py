"""Optimizers and schedules of units, made by what the user gives ``localize``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from layerwise.errors import InvalidInput

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]


def made_optimizer(maker: OptimizerFactory, weights: list[nn.Parameter], name: str) -> Optimizer:
    """The optimizer made for a unit, if it is one and its step needs no closure.

    Raises:
        InvalidInput: it is not, or it was not made.
    """
    try:
        optimizer = maker(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInput(
            f"Cannot train unit {name!r}: optimizer= raised {type(error).__name__} ({reason}). "
            "Give one that takes the list of the unit's weights."
        ) from error
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidInput(
            f"Cannot train unit {name!r}: optimizer= made {type(optimizer).__name__}. Make a "
            "torch.optim.Optimizer from the parameters, one whose step needs no closure."
        )
    return optimizer


def optimizer_makers(optimizer: Any, names: Sequence[str]) -> list[OptimizerFactory]:
    """One optimizer factory per unit.

    Args:
        optimizer: see ``localize``.
        names: names of the units.

    Raises:
        InvalidInput: some unit has no callable.
    """
    if optimizer is None:
        optimizer = default_optimizer
    if callable(optimizer):
        return [optimizer] * len(names)
    makers: list[Any] = []
    if isinstance(optimizer, Mapping):
        makers = [optimizer.get(name) for name in names]
    elif isinstance(optimizer, Sequence):
        makers = list(optimizer)
    if len(makers) != len(names) or not all(callable(maker) for maker in makers):
        raise InvalidInput(
            f"Cannot use optimizer=: it does not give each of the {len(names)} units a callable. "
            "Give one callable for all, a list with one per unit, or a dictionary with the names "
            f"{', '.join(names[:3])} …"
        )
    return makers


def default_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """Adam, in one fused operation where the device has one."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.Adam(parameters, lr=5e-4, fused=fused)


def checked_scheduler(scheduler: Any) -> Any:
    """A schedule that can be advanced.

    Raises:
        InvalidInput: it is none.
    """
    if not callable(getattr(scheduler, "step", None)):
        raise InvalidInput(
            f"Cannot use scheduler=: it made {type(scheduler).__name__}, which is no schedule. "
            "Return one, such as torch.optim.lr_scheduler.StepLR(optimizer, 10)."
        )
    return scheduler
