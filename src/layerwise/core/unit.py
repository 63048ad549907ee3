"""A unit learns from its own loss.

Its step: forward, its own loss, backward inside itself, its own update, and detached features
handed on. Nothing of it is kept when the next unit begins.
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

# what passes between two units: tensors, the feature first; rarely a number such as a size
Carried = tuple[Any, ...]


@dataclass
class Unit:
    """A piece of the network with its local loss and its optimizer.

    Attributes:
        index: which unit of the chain, from 0.
        name: the path of its layer or block in the network.
        piece: the network's part; shares the network's modules.
        loss: the local loss, with its auxiliary head.
        optimizer: updates piece and head; None when nothing in them is trainable.
        clip_grad: largest norm of the unit's gradient, or None.
        amp: number type that forward passes are computed in (mixed precision), or None.
        memory_format: the order in which maps lie in memory while the unit computes, or None: as
            they come.
        seed: with a seed, the random draws of a step depend on seed, unit and step alone; None: the
            global generator.
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
        """Keep weights, optimizer state and maps in a memory format; values stay as they are."""
        self.memory_format = memory_format
        for module in (self.piece, self.loss):
            module.to(memory_format=memory_format)  # type: ignore[call-overload]
        self.match_optimizer()

    def match_optimizer(self) -> None:
        """Give the optimizer's state the memory format of its parameters, which fused optimizers
        rely on.
        """
        for parameter, state in self.optimizer.state.items() if self.optimizer else ():
            for name, value in state.items():
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.stride() != parameter.stride()
                ):
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    def forward(self, carried: Carried) -> Carried:
        """Pass features on without learning; to be called under ``torch.no_grad()`` or to be
        detached by the caller.
        """
        with precision(carried, self.amp):
            return self.piece(*laid_out(carried, self.memory_format))

    def evaluate(self, carried: Carried, targets: Targets) -> tuple[Carried, Evaluated]:
        """Forward and loss."""
        with precision(carried, self.amp):
            passed = self.piece(*laid_out(carried, self.memory_format))
            return passed, checked_result(self.loss(passed[0], targets))

    def step(self, carried: Carried, targets: Targets, step: int) -> tuple[Carried, Evaluated]:
        """Learn from one batch.

        Args:
            carried: what the unit before handed on; no gradient is computed for it. If the caller
                keeps no reference, what the unit's backward pass has no use for (a shortcut's
                input, features before dropout) is freed before it.
            step: how many steps the unit has made before, for the random draws and for messages.

        Returns:
            The features to hand on and the loss with the number of correct examples, all detached.

        Raises:
            Diverged: the loss is not finite; no weight was updated. (On a GPU this is not looked at
                here, since it would wait for the device; see ``refuse_divergence``.)
        """
        with seeded(self.seed, self.index, step, targets.labels.device):
            passed, (loss, correct) = self.evaluate(carried, targets)
        del carried
        if loss.device.type == "cpu":
            refuse_divergence(self, step, loss)
        self.learn(loss)
        return detached(passed), Evaluated(loss.detach(), correct)

    def learn(self, loss: Tensor) -> None:
        """Backward pass and update, of this unit alone."""
        if self.optimizer is None:
            return
        loss.backward()
        if self.clip_grad is not None:
            # in this order however the unit computes, since sums of norms round
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
        step: how many steps the units have made before.

    Returns:
        The loss and the number of correct examples of each unit.
    """
    carried: list[Carried] = [(images.detach(),)]
    results = []
    for unit in units:
        # popped: the unit alone keeps it alive
        passed, evaluated = unit.step(carried.pop(), targets, step)
        carried.append(passed)
        del passed
        results.append(evaluated)
    return results


def checked_result(result: Any) -> Evaluated:
    """Refuse what a loss of the user's own returns, unless it is a loss and a number of correct
    examples.
    """
    if (
        not isinstance(result, tuple)
        or len(result) != 2
        or not all(isinstance(value, Tensor) for value in result)
    ):
        raise InvalidInput(
            f"the loss returned {type(result).__name__}: return layerwise.Evaluated(loss, "
            "correct), two tensors"
        )
    return Evaluated(*result)


class StepResult:
    """Losses and local accuracies of one step, one per unit. They stay on the device until they are
    read.

    Attributes:
        size: examples in the batch.
    """

    def __init__(self, evaluated: Sequence[Evaluated], size: int) -> None:
        self.size = size
        self._evaluated = evaluated

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss, _ in self._evaluated]

    @property
    def accuracies(self) -> list[float]:
        """Percent of the batch that each unit alone classifies correctly."""
        return [100.0 * float(correct) / self.size for _, correct in self._evaluated]

    def loss_tensor(self) -> Tensor:
        """All losses, (units,)."""
        return torch.stack([loss.float() for loss, _ in self._evaluated])

    def correct_tensor(self) -> Tensor:
        """Correct examples per unit, (units,)."""
        return torch.stack([correct for _, correct in self._evaluated])


def detached(carried: Carried) -> Carried:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in carried)


def laid_out(carried: Carried, memory_format: torch.memory_format | None) -> Carried:
    """Maps in a memory format; a copy only where they are in another."""
    if memory_format is None:
        return carried
    return tuple(
        value.contiguous(memory_format=memory_format)
        if isinstance(value, Tensor) and value.dim() == 4
        else value
        for value in carried
    )


def precision(carried: Carried, amp: torch.dtype | None) -> torch.autocast:
    return torch.autocast(carried[0].device.type, dtype=amp, enabled=amp is not None)


def refuse_divergence(unit: Unit, step: int, loss: Tensor) -> None:
    value = loss.detach().item()
    if value - value != 0:  # NaN or infinite
        raise Diverged(
            f"the loss of unit {unit.index} ({unit.name}) is {value} at step {step}: lower the "
            "learning rate, or clip gradients"
        )
