"""Result of a step: losses and local accuracies of its units."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated


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

    def __repr__(self) -> str:
        losses = [round(loss, 4) for loss in self.losses]
        return f"StepResult(losses={losses}, accuracies={self.accuracies})"

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
