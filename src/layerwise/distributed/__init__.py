"""Training on several processes: ranks that know of each other, agree, and end together.

``world`` says who is who, ``agreement`` lets all ranks refuse what one refuses. A process that was
not started by ``torchrun`` is a world of one, in which everything here does nothing.
"""

from layerwise.distributed.agreement import agree, decided_by_first, together
from layerwise.distributed.state import share
from layerwise.distributed.world import World, gathered, joined, print_once, world

__all__ = [
    "World",
    "agree",
    "decided_by_first",
    "gathered",
    "joined",
    "print_once",
    "share",
    "together",
    "world",
]
