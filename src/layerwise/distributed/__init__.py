"""Training on several processes: ranks that know of each other, agree, and end together.

``world`` says who is who, ``agreement`` lets all ranks refuse what one refuses, ``stage`` has the
units that live here, ``replicas`` lets ranks share every batch. A process that was not started by
``torchrun`` is a world of one, in which everything here does nothing.
"""

from layerwise.distributed.agreement import agree, decided_by_first, together
from layerwise.distributed.grid import Place, place_in_grid
from layerwise.distributed.placement import rank_bytes
from layerwise.distributed.replicas import replicate
from layerwise.distributed.stage import check_placeable, distribute, whole
from layerwise.distributed.state import share
from layerwise.distributed.world import World, gathered, joined, print_once, world

__all__ = [
    "Place",
    "World",
    "agree",
    "check_placeable",
    "decided_by_first",
    "distribute",
    "gathered",
    "joined",
    "place_in_grid",
    "print_once",
    "rank_bytes",
    "replicate",
    "share",
    "together",
    "whole",
    "world",
]
