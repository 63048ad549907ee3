"""Overlapping windows: a unit also learns through the losses of units behind it.

The loss of unit k reaches back to unit ``reach[k]`` (``core.reach``), and a unit's weights follow
the sum of the losses that reach it. Where each reaches its own unit alone, that is plain local
learning; where the last reaches all and the others none, global backpropagation with heads that
read along.

Every unit computes one forward pass. Its head is differentiated once, its weights once, by the
summed gradient of all losses; only the gradient that goes on to the unit before it is computed
apart for each loss that reaches further. So a step of span 2 costs little more than a third above
one of global backpropagation, beside the heads. A unit that a single loss reaches is differentiated
once, as in global backpropagation. A unit's graph is freed as soon as no later loss reaches it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from layerwise.core.frozen import trainable
from layerwise.core.order import changes_input
from layerwise.core.reach import Reach, last_losses
from layerwise.core.unit import (
    Activations,
    Unit,
    depends_on_weights,
    detached,
    refuse_divergence,
    relative_size,
)
from layerwise.losses import Evaluated, Targets
from layerwise.ops.batch_norm import gradients_asked_for
from layerwise.ops.windowed_gradient import made_whole
from layerwise.utils.seeds import seeded

Gradients = list[Tensor | None]


@dataclass
class Pass:
    """A forward pass of a unit, whose graph waits for the losses of units behind it.

    Attributes:
        unit: the unit.
        entered: activations that entered it; leaves that receive a gradient, where a loss reaches
            further.
        passed: activations that left it, with their history.
        loss: its own loss, until that is differentiated.
        gradients: sum of the gradients of the losses so far, one per activation in ``passed``.
        head: gradient of each of the head's weights.
    """

    unit: Unit
    entered: Activations
    passed: Activations
    loss: Tensor | None
    gradients: Gradients = field(default_factory=list)
    head: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def begin(self, alone: bool, factor: float) -> Gradients:
        """Differentiate the unit's own loss: its head and, unless alone, what leaves the unit.

        Args:
            factor: of the loss; see ``relative_size``.
        """
        loss, self.loss = self.loss, None
        if loss is not None and factor != 1.0:
            loss = loss * factor
        feature = self.passed[0]
        reaches = not alone and feature.requires_grad
        weights = trainable(self.unit.loss)
        wanted = [*weights, feature] if reaches else weights
        gradients: Sequence[Tensor | None] = (
            torch.autograd.grad(loss, wanted, allow_unused=True)
            if loss is not None and loss.requires_grad and wanted
            else [None] * len(wanted)
        )
        self.head = list(zip(weights, gradients, strict=False))
        self.gradients = [None] * len(self.passed)
        return [made_whole(gradients[-1]) if reaches else None, *self.gradients[1:]]

    @property
    def reached(self) -> bool:
        """Whether a loss has reached the unit."""
        return any(gradient is not None for gradient in self.gradients)

    def add(self, gradients: Gradients) -> None:
        """Add a loss's gradient of what leaves the unit."""
        pairs = zip(self.gradients, gradients, strict=True)
        self.gradients = [add(*pair) for pair in pairs]

    def reach_back(self, gradients: Gradients) -> Gradients:
        """A loss's gradient of what entered the unit, from that of what leaves it."""
        outputs, given = with_history(self.passed, gradients)
        return self.per_entered(differentiate(outputs, given, self.leaves(), retain_graph=True))

    def finish(self, examples: int, update: bool, further: bool = False) -> Gradients:
        """Differentiate the unit's weights by the sum of the losses, and update them.

        Args:
            further: also return the gradient of what entered the unit.
        """
        leaves = self.leaves() if further else []
        entered: Gradients = []

        def backward() -> None:
            weights = trainable(self.unit.piece)
            outputs, given = with_history(self.passed, self.gradients)
            self.passed, self.gradients = (), []
            gradients = differentiate(outputs, given, [*weights, *leaves])
            entered.extend(gradients[len(weights) :])
            taken = set[int]()
            for weight, gradient in [*zip(weights, gradients, strict=False), *self.head]:
                if gradient is not None:
                    accumulate(weight, gradient, taken)

        self.unit.accumulate(backward, examples, update)
        return self.per_entered(entered) if further else []

    def leaves(self) -> list[Tensor]:
        return [value for value in self.entered if takes_gradient(value)]

    def per_entered(self, gradients: Gradients) -> Gradients:
        """Gradients of the leaves, with None for what takes none."""
        each = iter(gradients)
        return [next(each) if takes_gradient(value) else None for value in self.entered]


def step_windows(
    units: Sequence[Unit],
    images: Tensor,
    targets: Targets,
    step: int,
    update: bool = True,
    *,
    reach: Reach,
) -> list[Evaluated]:
    """Let every unit learn from a batch, by all losses that reach it.

    Args:
        images: (B, ...).
        step: number of steps that the units have made before.
        update: False: the gradients wait for those of the batch's other parts.
        reach: index of the first unit that each unit's loss reaches.

    Returns:
        The loss and the number of correct examples of each unit.

    Raises:
        Diverged: a loss is not finite; its unit, those behind it and those that it reaches were not
            updated.
    """
    # a list to pop from, so that a unit alone keeps its activations alive
    entering: list[Activations] = [(images.detach(),)]
    last = last_losses(reach)
    # a unit that is frozen has no parts, though losses pass it
    begun = next((unit for unit in units if unit.parts), units[0])
    factor = relative_size(begun, len(targets.labels))
    waiting: list[Pass] = []
    results = []
    for unit in units:
        if reach[unit.index] == unit.index == last[unit.index]:
            passed, evaluated = unit.step(entering.pop(), targets, step, update)
            entering.append(passed)
            results.append(evaluated)
            del passed
            continue
        current, evaluated = forward(unit, entering.pop(), targets, step, reach)
        entering.append(detached(current.passed))
        waiting.append(current)
        results.append(evaluated)
        del current
        # its gradient is handed over, so that it is freed on the way
        reach_back(
            waiting,
            waiting[-1].begin(reach[unit.index] > unit.index, factor),
            reach[unit.index],
            last,
            len(targets.labels),
            update,
        )
    return results


def forward(
    unit: Unit, activations: Activations, targets: Targets, step: int, reach: Reach
) -> tuple[Pass, Evaluated]:
    """The forward pass of a unit in a window, with its loss; and the result, detached."""
    index = unit.index
    reaching = [behind for behind in range(index, len(reach)) if reach[behind] <= index]
    further = any(reach[behind] < index for behind in reaching)
    entered = tuple(map(as_leaf, activations)) if further else activations
    given = tuple(map(copied, entered)) if changes_input(unit.piece) else entered
    alone = reach[index] > index
    with (
        seeded(unit.seed, index, step, targets.labels.device),
        gradients_asked_for(several=further and len(reaching) > 1),
    ):
        passed, (loss, correct) = unit.evaluate(given, targets, alone)
    if loss.device.type == "cpu":
        refuse_divergence(unit, step, loss)
    if not alone:
        depends_on_weights(unit, loss)
    return Pass(unit, entered, passed, loss), Evaluated(loss.detach(), correct)


def reach_back(
    waiting: list[Pass],
    gradients: Gradients,
    first: int,
    last: Sequence[int],
    examples: int,
    update: bool,
) -> None:
    """Pass a loss's gradient back, and finish the units that no later loss reaches.

    Args:
        waiting: passes of units, in order, the loss's own at the end; those that are finished are
            taken out.
        gradients: of what leaves the loss's unit.
        first: index of the first unit that it reaches.
        last: for each unit, the index of the last loss that reaches it.
    """
    own = waiting[-1].unit.index
    staying: list[Pass] = []
    while waiting and waiting[-1].unit.index >= min(first, own):
        current = waiting.pop()
        index = current.unit.index
        further, once = index > first, not current.reached and current.unit.optimizer is not None
        current.add(gradients)
        if last[index] == own and once:
            gradients = []  # the pass alone keeps them
            gradients = current.finish(examples, update, further)
            continue
        gradients = current.reach_back(gradients) if further else []
        if last[index] == own:
            current.finish(examples, update)
        else:
            staying.append(current)
    waiting += reversed(staying)


def differentiate(
    outputs: list[Tensor],
    given: list[Tensor],
    wanted: list[Tensor],
    retain_graph: bool = False,
) -> Gradients:
    """The gradient of each wanted tensor, from those of some outputs; None where there is none."""
    if not outputs or not wanted:
        return [None] * len(wanted)
    return list(
        torch.autograd.grad(outputs, wanted, given, retain_graph=retain_graph, allow_unused=True)
    )


def accumulate(weight: Tensor, gradient: Tensor, taken: set[int]) -> None:
    """Add a gradient to a weight's, in the weight's memory format, as fused optimizers read it.

    Args:
        taken: storages of the gradients that weights have taken as theirs. Weights that are added
            up, as in ``a + b``, are given one tensor, which must not be clipped once for each.
    """
    storage = gradient.untyped_storage()._cdata
    if weight.grad is not None:
        weight.grad.add_(gradient)
    elif lie_alike(gradient, weight) and storage not in taken:
        weight.grad = gradient
        taken.add(storage)
    else:
        weight.grad = torch.empty_like(weight).copy_(gradient)


def lie_alike(one: Tensor, other: Tensor) -> bool:
    """Whether the numbers of two tensors of one shape have the same order in memory."""
    strides = zip(one.shape, one.stride(), other.stride(), strict=True)
    return all(stride == its for size, stride, its in strides if size > 1)


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
