"""Rules of training by name: orders in which units take steps.

A rule of your own is a generator ``(learner, batches, epochs, schedule, start, *, options)`` that
yields a ``Tick`` after every batch, and one line in ``RULES``. Rules know nothing of losses.
"""

from layerwise.rules.base import START, Position, Rule, Schedule, Tick, set_rates, tick_after
from layerwise.rules.checkpointed import checkpointed
from layerwise.rules.feature_cache import Batches, Keeping
from layerwise.rules.growing import growing
from layerwise.rules.parallel import parallel
from layerwise.rules.sequential import sequential
from layerwise.rules.simultaneous import backpropagation, simultaneous

RULES: dict[str, Rule] = {
    "simultaneous": Rule(simultaneous, replicated=True),
    "growing": Rule(growing, trial={"global_share": 1.0, "growth": 0.0}),
    "sequential": Rule(sequential, trial={"laps": 1}),
    "parallel": Rule(parallel, on_ranks=True, replicated=True),
    "global": Rule(backpropagation, at=1, replicated=True),
    "checkpointed": Rule(checkpointed, at=1),
}

__all__ = [
    "RULES",
    "START",
    "Batches",
    "Keeping",
    "Position",
    "Rule",
    "Schedule",
    "Tick",
    "set_rates",
    "tick_after",
]
