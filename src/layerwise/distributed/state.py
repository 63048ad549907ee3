"""State of a learner on its way between ranks: all of it from the first, units' parts to it."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map

from layerwise.core.learner import Learner
from layerwise.core.unit import Unit
from layerwise.distributed.world import naming_lost_ranks, world

CPU = torch.device("cpu")


def share(learner: Learner) -> None:
    """Give the learners of all ranks the weights, heads and optimizers of the first rank's.

    All ranks must call this, each with a learner of the same units.

    Raises:
        LostRank: a rank does not answer.
    """
    here = world()
    if here.size == 1:
        return
    state: list[Any] = [learner.state_dict() if here.first else None]
    with naming_lost_ranks():
        dist.broadcast_object_list(state, src=0)
    if not here.first:
        learner.load_state_dict(state[0])


def send_parts(parts: list[dict[str, Any]]) -> None:
    """Send what this rank's units hold to the first rank.

    Raises:
        LostRank: it takes nothing.
    """
    with naming_lost_ranks():
        dist.send_object_list([parts], 0, device=CPU)


def received(rank: int) -> list[dict[str, Any]]:
    """What another rank's units hold."""
    parts: list[Any] = [None]
    with naming_lost_ranks():
        dist.recv_object_list(parts, rank, device=CPU)
    return list(parts[0])


def tensors_of(unit: Unit) -> list[Tensor]:
    """The weights and buffers of a unit and its head that a state holds."""
    return [
        value
        for module in (unit.piece, unit.loss)
        for value in module.state_dict(keep_vars=True).values()
        if isinstance(value, Tensor)
    ]


def part_of(unit: Unit) -> dict[str, Any]:
    """What a unit holds, on the CPU."""
    part = {
        "tensors": [tensor.detach() for tensor in tensors_of(unit)],
        "optimizer": unit.optimizer and unit.optimizer.state_dict(),
        "scheduler": unit.scheduler and unit.scheduler.state_dict(),
        "scaler": unit.scaler and unit.scaler.state_dict(),
    }
    moved: dict[str, Any] = tree_map(
        lambda value: value.cpu() if isinstance(value, Tensor) else value, part
    )
    return moved


def put(unit: Unit, part: dict[str, Any]) -> None:
    """Give a unit what one of another rank holds."""
    for tensor, value in zip(tensors_of(unit), part["tensors"], strict=True):
        tensor.data = value.to(tensor.device)
    for name in ("optimizer", "scheduler", "scaler"):
        if part[name] is not None:
            getattr(unit, name).load_state_dict(part[name])
    if unit.optimizer is not None:
        unit.match_optimizer()
