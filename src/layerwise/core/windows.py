"""Overlapping windows: a unit also learns through the losses of the units behind it.

With a span of w, the loss of unit k reaches back over units k, k − 1, …, k − w + 1, and a unit's
weights follow the sum of the losses that reach it. A span of 1 is plain local learning; one of all
units is global backpropagation with local losses beside it (deep supervision).

Every unit computes one forward pass. Its head is differentiated once, its weights once, by the
summed gradient of all losses; only the gradient that goes on to the unit before it is computed
apart for each loss that reaches further. So a step of span 2 costs little more than a third above
one of global backpropagation, beside the heads. The graphs of w units are alive at once.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from layerwise.core.order import changes_input
from layerwise.core.unit import Activations, Unit, depends_on_weights, detached, refuse_divergence
from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated, Targets
from layerwise.ops.batch_norm import several_gradients
from layerwise.ops.windowed_gradient import made_whole
from layerwise.utils.seeds import seeded

Gradients = list[Tensor | None]


@dataclass
class Pass:
    """A forward pass of a unit, whose graph waits for the losses of the units behind it.

    Attributes:
        unit: the unit.
        entered: activations that entered it, as leaves that receive a gradient.
        passed: activations that left it, with their history.
        gradients: sum of the gradients of the losses so far, one per activation in ``passed``.
        head: gradient of each of the head's weights.
    """

    unit: Unit
    entered: Activations
    passed: Activations
    gradients: Gradients = field(default_factory=list)
    head: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def begin(self, loss: Tensor) -> Gradients:
        """Differentiate the unit's own loss: its head, and what leaves the unit."""
        feature = self.passed[0]
        weights = [weight for weight in self.unit.loss.parameters() if weight.requires_grad]
        wanted = [*weights, feature] if feature.requires_grad else weights
        gradients = (
            torch.autograd.grad(loss, wanted, allow_unused=True) if loss.requires_grad else ()
        )
        self.head = [
            (weight, gradient)
            for weight, gradient in zip(weights, gradients, strict=False)
            if gradient is not None
        ]
        own = gradients[-1] if gradients and feature.requires_grad else None
        self.gradients = [None] * len(self.passed)
        return [None if own is None else made_whole(own), *self.gradients[1:]]

    def add(self, gradients: Gradients) -> None:
        """Add a loss's gradient of what leaves the unit."""
        pairs = zip(self.gradients, gradients, strict=True)
        self.gradients = [add(*pair) for pair in pairs]

    def reach_back(self, gradients: Gradients) -> Gradients:
        """A loss's gradient of what entered the unit, from that of what leaves it."""
        outputs, given = with_history(self.passed, gradients)
        leaves = [value for value in self.entered if takes_gradient(value)]
        found = iter(
            torch.autograd.grad(outputs, leaves, given, retain_graph=True, allow_unused=True)
            if outputs and leaves
            else [None] * len(leaves)
        )
        return [next(found) if takes_gradient(value) else None for value in self.entered]

    def finish(self, examples: int, update: bool) -> None:
        """Differentiate the unit's weights by the sum of the losses, and update them."""

        def backward(factor: float) -> None:
            outputs, given = with_history(self.passed, self.gradients)
            weights = [weight for weight in self.unit.piece.parameters() if weight.requires_grad]
            if outputs and weights:
                given = [gradient * factor if factor != 1.0 else gradient for gradient in given]
                torch.autograd.backward(outputs, given, inputs=weights)
            for weight, gradient in self.head:
                weight.grad = add(weight.grad, gradient * factor if factor != 1.0 else gradient)

        self.unit.accumulate(backward, examples, update)


def step_windows(
    units: Sequence[Unit],
    images: Tensor,
    targets: Targets,
    step: int,
    update: bool = True,
    *,
    span: int,
) -> list[Evaluated]:
    """Let every unit learn from a batch, each by its own loss and those of span − 1 units behind.

    Args:
        images: (B, ...).
        step: number of steps that the units have made before.
        update: False: the gradients wait for those of the batch's other parts.
        span: number of units that a loss reaches, 1 or more.

    Returns:
        The loss and the number of correct examples of each unit.

    Raises:
        Diverged: a loss is not finite; its unit, those behind it and those that it reaches were not
            updated.
    """
    activations: Activations = (images.detach(),)
    waiting: deque[Pass] = deque()
    results = []
    for unit in units:
        entered = activations if unit.index == 0 else tuple(map(as_leaf, activations))
        given = tuple(map(copied, entered)) if changes_input(unit.piece) else entered
        with (
            seeded(unit.seed, unit.index, step, targets.labels.device),
            several_gradients(),
        ):
            passed, (loss, correct) = unit.evaluate(given, targets)
        if loss.device.type == "cpu":
            refuse_divergence(unit, step, loss)
        depends_on_weights(unit, loss)
        waiting.append(Pass(unit, entered, passed))
        reach(waiting, waiting[-1].begin(loss))
        results.append(Evaluated(loss.detach(), correct))
        activations = detached(passed)
        del entered, given, passed, loss, correct
        if len(waiting) == span:
            waiting.popleft().finish(len(targets.labels), update)
    for last in waiting:
        last.finish(len(targets.labels), update)
    return results


def reach(waiting: Sequence[Pass], gradients: Gradients) -> None:
    """Add the gradient of the last unit's loss to that unit and to those that it reaches."""
    waiting[-1].add(gradients)
    for later, earlier in pairwise(reversed(waiting)):
        gradients = later.reach_back(gradients)
        earlier.add(gradients)


def with_history(
    activations: Activations, gradients: Gradients
) -> tuple[list[Tensor], list[Tensor]]:
    """The activations that a gradient goes through, and their gradients."""
    pairs = [
        (value, gradient)
        for value, gradient in zip(activations, gradients, strict=True)
        if gradient is not None and value.requires_grad
    ]
    return [value for value, _ in pairs], [gradient for _, gradient in pairs]


def as_leaf(value: object) -> object:
    """An activation that receives a gradient, if it can have one."""
    if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
        return value.detach().requires_grad_()
    return value


def copied(value: object) -> object:
    """A copy of a tensor, since PyTorch changes no leaf in place."""
    return value.clone() if isinstance(value, Tensor) else value


def takes_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def check_span(span: int, units: Sequence[Unit]) -> None:
    """Refuse a span that the chain does not have, or that a unit cannot be part of.

    Raises:
        InvalidInput: as said.
    """
    if not 1 <= span <= len(units):
        raise InvalidInput(
            f"Cannot use span {span}: the chain has {len(units)} units. Give 1 to {len(units)}."
        )
    if span > 1 and any(unit.scaler is not None for unit in units):
        raise InvalidInput(
            f"Cannot use span {span} with amp=torch.float16: each unit scales its own loss. Give "
            "amp=torch.bfloat16."
        )
