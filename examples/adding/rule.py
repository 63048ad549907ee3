"""A training rule of your own: --import rule.py --rule mine --repeats 3."""

import layerwise
from layerwise.rules import START, set_rates, tick_after


def mine(learner, batches, epochs, schedule, start=START, *, repeats: int = 2):
    """Every unit learns from every batch several times in a row.

    Args:
        repeats: steps on each batch.
    """
    for epoch in range(start.epoch, epochs):
        learner.train()
        set_rates(learner.units, schedule(epoch / epochs))
        learner.set_progress(epoch / epochs)
        first = start.batch if epoch == start.epoch else 0
        for number, (images, labels) in enumerate(batches.batches(epoch, first), start=first + 1):
            for _ in range(repeats):
                result = learner.step(images, labels)
            yield tick_after(epoch, number, len(batches), 0, result, epochs)


layerwise.RULES["mine"] = layerwise.Rule(mine)
