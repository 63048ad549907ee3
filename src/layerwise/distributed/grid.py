"""Grids of ranks: replicas, each of which is a chain of ranks with consecutive units.

The ranks of a replica follow each other, so that features travel between neighbours.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from layerwise.distributed.world import world
from layerwise.errors import InvalidInput
from layerwise.utils.words import counted


@dataclass(frozen=True)
class Place:
    """A rank's place in a grid.

    Attributes:
        replicas: number of replicas.
        length: number of ranks of each.
        rank: number of this rank among all.
    """

    replicas: int
    length: int
    rank: int

    @property
    def replica(self) -> int:
        """Number of this rank's replica."""
        return self.rank // self.length

    @property
    def position(self) -> int:
        """Number of this rank in its replica."""
        return self.rank % self.length


def place_in_grid(replicas: int = 1) -> Place:
    """This rank's place in a grid of so many replicas.

    Raises:
        InvalidInput: the ranks cannot be divided so.
    """
    here = world()
    if replicas < 1 or here.size % replicas:
        raise InvalidInput(
            f"Cannot have {replicas} replicas on {counted(here.size, 'rank')}: each "
            "takes an equal number of ranks. Give a divisor of their number, or start others."
        )
    return Place(replicas, here.size // replicas, here.rank)


def group_of_position(place: Place) -> Any:
    """The process group of the ranks that have this one's units; None: all ranks.

    All ranks must call this.
    """
    if place.length == 1:
        return None
    timeout = timedelta(seconds=world().timeout) if world().timeout else None
    groups = [
        dist.new_group(
            [replica * place.length + position for replica in range(place.replicas)],
            timeout=timeout,
        )
        for position in range(place.length)
    ]
    return groups[place.position]
