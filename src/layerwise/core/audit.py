"""Audit of a learner: which weights the loss of each unit really reaches.

The steps that training makes are repeated on a batch, with optimizers that note what they are given
and update nothing. In each repetition the losses count with other factors, which act in the
backward pass alone. A weight that follows a single loss then has its gradients scaled by that
loss's factor, which is exact for powers of two; one that follows none of those that count has
gradients of 0. So a few steps show whether every weight follows the losses that it should. Where
one does not, each loss is let count alone, which shows what it reaches.

A head or a normalisation that starts at 0 passes no gradient back until its first update, so small
random numbers stand in the place of zeros while steps are repeated.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.core.locality import Audit, may_reach
from layerwise.core.probe import Probe, Sizes, Steps
from layerwise.core.reach import Reach

# exponents of losses' factors: gradients of up to 1e14 stay finite in float32
EXPONENTS = [*range(1, 81), *range(-1, -41, -1)]
ROUNDING = 1e-4  # relative, of two equal computations on a GPU; on a CPU they are equal to the bit


def audit_steps(
    learner: Learner, images: Tensor, labels: Tensor, make_steps: Steps | None = None
) -> Audit:
    """Find what each loss reaches; the learner stays as it is.

    It takes two or three steps per unit of span where all is as declared, and one per unit where it
    is not. Weights, buffers, attributes of modules, optimizers, modes and generators of random
    numbers get their values back. Steps are made in training mode, without clipping, and those in
    float16 in the weights' own type.

    Args:
        images, labels: see ``Learner.step``.
        make_steps: function that makes an iterator, which makes the steps of training on this batch
            as it is iterated; None: one of ``Learner.step``.

    Raises:
        InvalidInput: the batch cannot be used.
        Diverged: a loss is not finite.
    """

    def one_step() -> Iterator[Any]:
        if not learner.model.training:
            learner.train()
        yield learner.step(images, labels)

    with Probe(learner, make_steps or one_step).entered() as probe:
        reached = as_declared(probe) or of_each_loss(probe)
    return Audit(
        tuple(unit.name for unit in learner.units),
        probe.reach,
        tuple(probe.weights),
        tuple(map(frozenset, reached)),
        frozenset(range(len(probe.weights))) - probe.updated,
        frozenset(probe.stray),
        probe.statistics_updates,
    )


def labels_in_pairs(count: int, num_classes: int) -> Tensor:
    """Labels of which two in turn are equal: some losses need examples of one and of two classes.

    Returns:
        (count,) integers.
    """
    return torch.arange(count) // 2 % num_classes


def as_declared(probe: Probe) -> list[set[int]] | None:
    """What each loss reaches, if each weight follows the losses that it should and no other."""
    reach, reached = probe.reach, [set[int]() for _ in probe.reach]
    for counting in apart(reach):
        plain = probe.sizes(dict.fromkeys(counting, 1.0))
        if probe.reach != reach:
            return as_declared(probe)  # the rule has set another
        followed = [
            next((loss for loss in counting if may_reach(loss, weight, reach)), None)
            for weight in probe.weights
        ]
        for exponents in distinct_exponents(counting):
            scaled = probe.sizes({loss: 2.0**power for loss, power in exponents.items()})
            factors = [0.0 if loss is None else 2.0 ** exponents[loss] for loss in followed]
            if probe.stray or not follow(plain, scaled, factors, probe.exact):
                return None
        for (number, _), sizes in plain.items():
            if (loss := followed[number]) is not None and any(sizes):
                reached[loss].add(number)
    return reached


def apart(reach: Reach) -> list[list[int]]:
    """Losses in as few groups as keep those apart that should reach a common weight.

    With a span of w everywhere, every w-th loss is in one group.
    """
    groups: list[list[int]] = []
    for loss, first in enumerate(reach):
        group = next((group for group in groups if group[-1] < first), None)
        if group is None:
            groups.append(group := [])
        group.append(loss)
    return groups


def distinct_exponents(losses: Sequence[int]) -> list[dict[int, int]]:
    """Exponents of losses, none of them 0, in as many rounds as tell all losses apart."""
    rounds, scale = list[dict[int, int]](), 1
    while not rounds or scale < len(losses):
        rounds.append({k: EXPONENTS[n // scale % len(EXPONENTS)] for n, k in enumerate(losses)})
        scale *= len(EXPONENTS)
    return rounds


def follow(plain: Sizes, scaled: Sizes, factors: Sequence[float], exact: bool) -> bool:
    """Whether every gradient is scaled by the factor of its weight."""
    tolerance = 0.0 if exact else ROUNDING
    return plain.keys() == scaled.keys() and all(
        len(sizes) == len(scaled[key])
        and all(
            math.isfinite(after)
            and (factors[key[0]] or not before)  # a loss that does not count reaches it
            and math.isclose(after, factors[key[0]] * before, rel_tol=tolerance)
            for before, after in zip(sizes, scaled[key], strict=True)
        )
        for key, sizes in plain.items()
    )


def of_each_loss(probe: Probe) -> list[set[int]]:
    """What each loss reaches when it counts alone; the slow way, which supposes nothing."""
    silent = probe.sizes({})
    probe.stray |= {number for (number, _), sizes in silent.items() if any(sizes)}
    return [
        changed(silent, probe.sizes({unit.index: 1.0}), probe.exact) for unit in probe.learner.units
    ]


def changed(silent: Sizes, sounding: Sizes, exact: bool) -> set[int]:
    """Numbers of the weights whose gradients differ."""
    tolerance = 0.0 if exact else ROUNDING
    return {
        key[0]
        for key, sizes in sounding.items()
        for before, after in zip_longest(silent.get(key, ()), sizes, fillvalue=0.0)
        if not math.isclose(before, after, rel_tol=tolerance)
    }
