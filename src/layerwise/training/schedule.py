"""Schedules of the learning rate, as a run says them: milestones, or a cosine."""

from functools import partial
from math import cos, pi

from layerwise.errors import InvalidInput, brief
from layerwise.rules import Schedule
from layerwise.runs.run import Run

COSINE = "cosine"  # in place of milestones
RISES_FROM = 0.0125  # of the rate, as in InfoPro's program: 0.01 of 0.8


def decay(run: Run) -> Schedule:
    """The run's schedule: the rate is multiplied by ``decay_rate`` at every milestone, or a cosine.

    Raises:
        InvalidInput: a milestone, or the share over which the rate rises, is not from 0 to 1.
    """
    begins, _, rise = run.decay_milestones.partition(":")
    if begins.strip() == COSINE:
        (share,) = shares(run, [rise or "0"])
        return partial(cosine, rise=share)
    milestones = shares(run, [text for text in run.decay_milestones.split(",") if text.strip()])
    return lambda done: run.decay_rate ** sum(done >= share for share in milestones)


def shares(run: Run, texts: list[str]) -> list[float]:
    """Shares of training from the run's text.

    Raises:
        InvalidInput: one is not a number from 0 to 1.
    """
    try:
        values = [float(text) for text in texts]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 1 for value in values):
        raise InvalidInput(
            f"Cannot use decay_milestones {brief(repr(run.decay_milestones))}: they are not "
            "shares of training. Give numbers from 0 to 1, such as 0.5,0.75, or cosine, or "
            "cosine:0.1."
        )
    return values


def cosine(done: float, rise: float) -> float:
    """Half a cosine from 1 to 0; over a share of training, the rate rises to it in a line.

    Args:
        done: share of training that is done.
        rise: the share over which it rises; 0: none.
    """
    risen = min(done / rise, 1.0) if rise else 1.0
    return risen * (1 + cos(pi * done)) / 2 + (1 - risen) * RISES_FROM
