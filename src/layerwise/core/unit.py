"""A unit: a piece of the network that learns from its own loss.

Its step is a forward pass, its own loss, a backward pass inside itself and its own update. The next
unit receives detached activations, and nothing else of the step is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.errors import Diverged, InvalidInput
from layerwise.losses import Evaluated, Targets
from layerwise.utils.seeds import seeded

# the values that pass between two units: tensors, the feature first; rarely a number such as a size
Activations = tuple[Any, ...]


@dataclass
class Unit:
    """A piece of the network with its local loss and its optimizer.

    Attributes:
        index: position in the chain, from 0.
        name: path of its layer or block in the network.
        piece: part of the network; it shares the network's modules.
        loss: local loss, with its auxiliary head.
        optimizer: optimizer of piece and head; None when nothing in them is trainable.
        scheduler: learning-rate schedule of the optimizer, or None.
        clip_grad: largest norm of the unit's gradient, or None.
        amp: number type that forward passes are computed in (mixed precision), or None.
        memory_format: memory format of maps while the unit computes, or None: as they come.
        seed: seed from which, with unit and step, the random draws of a step are made; None: they
            come from the global generator.
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

    def train(self, mode: bool = True) -> None:
        self.piece.train(mode)
        self.loss.train(mode)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of piece and head."""
        return [
            p for module in (self.piece, self.loss) for p in module.parameters() if p.requires_grad
        ]

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
            return self.piece(*in_memory_format(activations, self.memory_format))

    def evaluate(self, activations: Activations, targets: Targets) -> tuple[Activations, Evaluated]:
        """Forward pass and loss."""
        with precision(activations, self.amp):
            passed = self.piece(*in_memory_format(activations, self.memory_format))
            return passed, checked_result(self.loss(passed[0], targets))

    def step(
        self, activations: Activations, targets: Targets, step: int
    ) -> tuple[Activations, Evaluated]:
        """Learn from one batch.

        Args:
            activations: output of the unit before; no gradient is computed for it. If the caller
                keeps no reference, what the unit's backward pass has no use for (a shortcut's
                input, features before dropout) is freed before that pass.
            step: number of steps that the unit has made before, for the random draws and for
                messages.

        Returns:
            The activations to pass on, and the loss with the number of correct examples, all
            detached.

        Raises:
            Diverged: the loss is not finite; no weight was updated. On a GPU the loss is not read
                here, since that would wait for the device; see ``refuse_divergence``.
        """
        with seeded(self.seed, self.index, step, targets.labels.device):
            passed, (loss, correct) = self.evaluate(activations, targets)
        del activations
        if loss.device.type == "cpu":
            refuse_divergence(self, step, loss)
        self.learn(loss)
        return detached(passed), Evaluated(loss.detach(), correct)

    def learn(self, loss: Tensor) -> None:
        """Backward pass and update of this unit alone."""
        if self.optimizer is None:
            return
        # gradients of others: a saliency map between two steps, a step that was interrupted
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.clip_grad is not None:
            # always in the optimizer's order, since a sum of norms is rounded
            groups = self.optimizer.param_groups
            nn.utils.clip_grad_norm_(
                [parameter for group in groups for parameter in group["params"]], self.clip_grad
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def step_units(
    units: Sequence[Unit], images: Tensor, targets: Targets, step: int
) -> list[Evaluated]:
    """Let every unit learn from a batch, one after the other.

    Args:
        images: (B, ...).
        step: number of steps that the units have made before.

    Returns:
        The loss and the number of correct examples of each unit.
    """
    # a list to pop from, so that the unit alone keeps its activations alive
    waiting: list[Activations] = [(images.detach(),)]
    results = []
    for unit in units:
        passed, evaluated = unit.step(waiting.pop(), targets, step)
        waiting.append(passed)
        del passed
        results.append(evaluated)
    return results


def checked_result(result: Any) -> Evaluated:
    """The result of a loss of the user's own, if it is a loss and a number of correct examples.

    Raises:
        InvalidInput: it is something else.
    """
    if (
        not isinstance(result, tuple)
        or len(result) != 2
        or not all(isinstance(value, Tensor) and value.dim() == 0 for value in result)
    ):
        values = result if isinstance(result, tuple) else (result,)
        found = ", ".join(
            f"a tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else type(value).__name__
            for value in values
        )
        raise InvalidInput(
            f"Cannot use the local loss: its forward returned {found}. Return "
            "layerwise.Evaluated(loss, correct), two tensors of one number each."
        )
    return Evaluated(*result)


class StepResult:
    """Losses and local accuracies of one step, one per unit.

    They stay on the device until they are read.

    Attributes:
        size: number of examples in the batch.
    """

    def __init__(self, evaluated: Sequence[Evaluated], size: int) -> None:
        self.size = size
        self._evaluated = evaluated

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss, _ in self._evaluated]

    @property
    def accuracies(self) -> list[float]:
        """Local accuracy of each unit: percent of the batch that it classifies correctly."""
        return [100.0 * float(correct) / self.size for _, correct in self._evaluated]

    def loss_tensor(self) -> Tensor:
        """Losses of all units, (units,)."""
        return torch.stack([loss.float() for loss, _ in self._evaluated])

    def correct_tensor(self) -> Tensor:
        """Correct examples per unit, (units,)."""
        return torch.stack([correct for _, correct in self._evaluated])


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
