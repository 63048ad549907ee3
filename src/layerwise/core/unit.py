"""A unit: a piece of the network that learns from its own loss.

Its step is a forward pass, its own loss, a backward pass inside itself and its own update. The next
unit receives detached activations, and nothing else of the step is kept.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.core.feature import AS_IT_IS, Feature
from layerwise.core.frozen import entrance, frozen_weights
from layerwise.core.order import changes_input
from layerwise.core.result import checked_result
from layerwise.errors import Diverged, InvalidInput
from layerwise.losses import Evaluated, Targets
from layerwise.losses.site import end_update
from layerwise.utils.seeds import seeded

# the values that pass between two units: tensors, the feature first; rarely a number such as a size
Activations = tuple[Any, ...]


class Sharing(Protocol):
    """Replicas of a unit that each learn from a share of every batch."""

    def examples_at_hand(self, unit: "Unit") -> int:
        """Number of examples of the batch, or the part of one, of all replicas."""

    def average(self, unit: "Unit", divisor: float) -> None:
        """Update the unit, now or later, by the sum of all replicas' gradients over a number."""


@dataclass
class Unit:
    """A piece of the network with its local loss and its optimizer.

    Attributes:
        index: position in the chain, from 0.
        name: path of its layer or block in the network.
        piece: part of the network; it shares the network's modules.
        loss: local loss, with its auxiliary head.
        optimizer: optimizer of piece and head, of frozen weights too, since they may be unfrozen
            later; None when they have no weights.
        scheduler: learning-rate schedule of the optimizer, or None.
        clip_grad: largest norm of the unit's gradient, or None.
        amp: number type that forward passes are computed in (mixed precision), or None.
        memory_format: memory format of maps while the unit computes, or None: as they come.
        seed: seed from which, with unit and step, the random draws of a step are made; None: they
            come from the global generator.
        feature: shape and layout of its feature, which its loss reads turned; see ``Feature``.
        entering: shape and layout of the feature that enters it.
        scaler: scaling of the loss, so that gradients of float16 do not underflow, or None.
        parts: numbers of examples of the parts of a batch whose gradients wait for an update, of
            all replicas.
        sums: sum of these gradients, each times its part's size relative to the first part's.
        sharing: replicas that share every batch with this process; None: it has the whole batch.
        changes_images: whether its piece would change the images in place, which a loss may read.
    """

    index: int
    name: str
    piece: nn.Module
    loss: nn.Module
    optimizer: Optimizer | None
    scheduler: Any = None
    clip_grad: float | None = None
    amp: torch.dtype | None = None
    seed: int | None = None
    memory_format: torch.memory_format | None = None
    feature: Feature = AS_IT_IS
    entering: Feature = AS_IT_IS
    scaler: torch.amp.GradScaler | None = None
    parts: list[int] = field(default_factory=list)
    sums: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    sharing: Sharing | None = None

    def __post_init__(self) -> None:
        self.changes_images = self.index == 0 and changes_input(entrance(self.piece))

    def __getstate__(self) -> dict[str, Any]:
        """Attributes with the memory format by name, since ``torch.save`` cannot write it."""
        return {**vars(self), "memory_format": self.memory_format and str(self.memory_format)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.memory_format is not None:
            self.memory_format = getattr(torch, str(self.memory_format).removeprefix("torch."))

    def train(self, mode: bool = True) -> None:
        self.piece.train(mode)
        self.loss.train(mode)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of piece and head."""
        return [weight for weight in self.weights() if weight.requires_grad]

    def weights(self) -> list[nn.Parameter]:
        """The parameters of piece and head that are trainable or can be unfrozen."""
        frozen = frozen_weights(self.piece)
        return [
            parameter
            for module in (self.piece, self.loss)
            for parameter in module.parameters()
            if (parameter.is_floating_point() or parameter.is_complex())
            and id(parameter) not in frozen
        ]

    @property
    def reads_images(self) -> bool:
        """Whether its loss compares something with the images."""
        return getattr(self.loss, "reads_images", False)

    @property
    def reads_input(self) -> bool:
        """Whether the loss compares something with the feature that enters the unit."""
        return getattr(self.loss, "reads_input", False)

    @property
    def reads_later_weights(self) -> bool:
        """Whether its loss reads weights of later units when this one has updated its own."""
        return getattr(self.loss, "reads_later_weights", False)

    def held(self) -> list[nn.Parameter]:
        """The parameters that the optimizer holds, in its order."""
        groups = self.optimizer.param_groups if self.optimizer else ()
        return [parameter for group in groups for parameter in group["params"]]

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Keep weights, optimizer state and maps in a memory format; their values stay."""
        self.memory_format = memory_format
        for module in (self.piece, self.loss):
            module.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.match_optimizer()

    def match_optimizer(self) -> None:
        """Give the optimizer's state the memory format of its parameters.

        Fused optimizers rely on it.
        """
        for parameter, state in self.optimizer.state.items() if self.optimizer else ():
            for name, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def forward(self, activations: Activations) -> Activations:
        """Pass activations on without learning.

        The caller uses ``torch.no_grad()`` or detaches the result.
        """
        with precision(activations, self.amp):
            return self.piece(*self.entered(activations))

    def entered(self, activations: Activations) -> Activations:
        """Activations as the piece is given them; images that it would change are copied."""
        if self.changes_images:
            activations = (activations[0].clone(), *activations[1:])
        return in_memory_format(activations, self.memory_format)

    def evaluate(
        self, activations: Activations, targets: Targets, alone: bool = False
    ) -> tuple[Activations, Evaluated]:
        """Forward pass and loss.

        Args:
            alone: the head learns alone: no gradient of the loss goes into the unit.
        """
        with precision(activations, self.amp):
            entered = self.entered(activations)
            read = entered_feature(self, entered)
            passed = self.piece(*entered)
            del entered
            feature = self.feature.turned(passed[0])
            feature = feature.detach() if alone else feature
            return passed, checked_result(self.loss(feature, targets, *read))

    def step(
        self, activations: Activations, targets: Targets, step: int, update: bool = True
    ) -> tuple[Activations, Evaluated]:
        """Learn from one batch, or from a part of one.

        Args:
            activations: output of the unit before; no gradient is computed for it. If the caller
                keeps no reference, what the unit's backward pass has no use for (a shortcut's
                input, features before dropout) is freed before that pass.
            step: number of steps that the unit has made before, for the random draws and for
                messages.
            update: False: the gradient waits for that of the batch's other parts.

        Returns:
            The activations to pass on, and the loss with the number of correct examples, all
            detached.

        Raises:
            Diverged: the loss is not finite; no weight was updated. On a GPU the loss is not read
                here, since that would wait for the device; see ``refuse_divergence``.
            InvalidInput: the loss depends on no trainable weight, and there are some.
        """
        with seeded(self.seed, self.index, step, targets.labels.device):
            passed, (loss, correct) = self.evaluate(activations, targets)
        del activations
        if loss.device.type == "cpu":
            refuse_divergence(self, step, loss)
        self.learn(loss, len(targets.labels), update)
        return detached(passed), Evaluated(loss.detach(), correct)

    def learn(self, loss: Tensor, examples: int = 1, update: bool = True) -> None:
        """Backward pass and update of this unit alone.

        Args:
            loss: mean over a batch, or over a part of one.
            examples: number of examples in it. The update is by the mean over all examples since
                the last one.
            update: False: the gradient waits for that of the batch's other parts.
        """
        if not depends_on_weights(self, loss):
            return

        factor = relative_size(self, examples)

        def backward() -> None:
            scaled = loss * factor if factor != 1.0 else loss
            (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()

        self.accumulate(backward, examples, update)

    def accumulate(
        self, backward: Callable[[], None], examples: int = 1, update: bool = True
    ) -> None:
        """Add a gradient to those that wait, and update.

        Args:
            backward: function that adds the gradient, of a loss times its ``relative_size``, to
                those of the weights.
            examples, update: see ``learn``.
        """
        if self.optimizer is None:
            return
        # gradients of others: a saliency map between two steps, a step that was interrupted
        self.optimizer.zero_grad(set_to_none=True)
        parts = [*self.parts, all_examples(self, examples)]
        for weight, gradient in self.sums.items():
            weight.grad = gradient if weight.requires_grad else None
        backward()
        if not update:
            self.sums = {weight: weight.grad for weight in self.held() if weight.grad is not None}
            self.parts = parts
            self.optimizer.zero_grad(set_to_none=True)
        elif self.sharing is None:
            self.update(self.optimizer, sum(parts) / parts[0])
        else:
            self.sharing.average(self, sum(parts) / parts[0])

    def update(self, optimizer: Optimizer, divisor: float) -> None:
        """Let the optimizer update the weights by their gradients, divided by a number."""
        self.zero_grad()
        held = self.held()  # norms are always summed in the optimizer's order, since they round
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        for weight in held if divisor > 1 else ():
            if weight.grad is not None:
                weight.grad /= divisor
        if self.clip_grad is not None:
            nn.utils.clip_grad_norm_(held, self.clip_grad)
        begin_momentum(optimizer)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()
        optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # else copies of the old weights, in an autocast around steps
        end_update(self.loss)

    def zero_grad(self) -> None:
        """Forget the gradients of parts that wait for an update."""
        self.parts, self.sums = [], {}


def all_examples(unit: Unit, examples: int) -> int:
    """Number of examples of a batch, or of a part of one, of all replicas, from this process's."""
    return examples if unit.sharing is None else unit.sharing.examples_at_hand(unit)


def relative_size(unit: Unit, examples: int) -> float:
    """Number of examples relative to those of the batch's first part, counted over all replicas.

    A loss is taken times it, so that gradients of parts, and of replicas, are only added up.

    Args:
        examples: number of this process's examples of the batch, or of a part of one.
    """
    first = unit.parts[0] if unit.parts else all_examples(unit, examples)
    return examples / first


def depends_on_weights(unit: Unit, loss: Tensor) -> bool:
    """Whether a loss has a gradient; it has none where all of the unit is frozen.

    Raises:
        InvalidInput: it has none, though the unit has trainable weights.
    """
    if not loss.requires_grad and unit.parameters():
        raise InvalidInput(
            f"Cannot learn in unit {unit.index} ({unit.name}): its loss depends on none of its "
            "trainable weights. Take detach(), item() and torch.no_grad() out of the loss and the "
            "network's forward."
        )
    return loss.requires_grad


def begin_momentum(optimizer: Optimizer) -> None:
    """Give weights that were thawed a momentum of 0, which is what it would begin from.

    PyTorch's fused SGD takes momentum of all weights or of none.
    """
    for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
        if not group["momentum"] or not group["fused"]:
            continue
        learning = [weight for weight in group["params"] if weight.grad is not None]
        states = [optimizer.state[weight] for weight in learning]
        if any(state.get("momentum_buffer") is not None for state in states):
            for weight, state in zip(learning, states, strict=True):
                if state.get("momentum_buffer") is None:
                    state["momentum_buffer"] = torch.zeros_like(weight)


def step_units(
    units: Sequence[Unit], images: Tensor, targets: Targets, step: int, update: bool = True
) -> list[Evaluated]:
    """Let every unit learn from a batch, one after the other.

    Args:
        images: (B, ...).
        step: number of steps that the units have made before.
        update: False: the gradients wait for those of the batch's other parts.

    Returns:
        The loss and the number of correct examples of each unit.
    """
    # a list to pop from, so that the unit alone keeps its activations alive
    waiting: list[Activations] = [(images.detach(),)]
    results = []
    for unit in units:
        passed, evaluated = unit.step(waiting.pop(), targets, step, update)
        waiting.append(passed)
        del passed
        results.append(evaluated)
    return results


def entered_feature(unit: Unit, entered: Activations) -> tuple[Tensor] | tuple[()]:
    """The feature that enters a unit, for a loss that says ``reads_input``; else nothing."""
    if not unit.reads_input:
        return ()
    feature = unit.entering.turned(entered[0].detach())
    return (feature.clone() if changes_input(unit.piece) else feature,)


def detached(activations: Activations) -> Activations:
    """The same activations without their history."""
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in activations)


def in_memory_format(
    activations: Activations, memory_format: torch.memory_format | None
) -> Activations:
    """Activations whose maps (B, C, H, W) are in a memory format; copied only if they are not."""
    if memory_format is None:
        return activations
    return tuple(
        value.contiguous(memory_format=memory_format)
        if isinstance(value, Tensor) and value.dim() == 4
        else value
        for value in activations
    )


def precision(activations: Activations, amp: torch.dtype | None) -> torch.autocast:
    return torch.autocast(activations[0].device.type, dtype=amp, enabled=amp is not None)


def refuse_divergence(unit: Unit, step: int, loss: Tensor) -> None:
    """Refuse a loss that is not finite, which waits for the device.

    Raises:
        Diverged: naming unit and step.
    """
    value = loss.detach().item()
    if value - value != 0:  # NaN or infinite
        raise Diverged(
            f"Cannot go on training: the loss of unit {unit.index} ({unit.name}) is {value} at "
            f"step {step}. Lower the learning rate, or clip gradients."
        )
