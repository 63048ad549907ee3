"""State of a learner that all ranks begin from: the first rank's."""

from typing import Any

import torch.distributed as dist

from layerwise.core.learner import Learner
from layerwise.distributed.world import naming_lost_ranks, world


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
