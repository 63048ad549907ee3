"""Shapes of the units' features, and what may pass from a unit to the next."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.side_effects import modes_kept
from layerwise.core.unit import precision
from layerwise.errors import InvalidInput

# what may pass from a unit to the next: tensors, and facts about them
PASSED = (Tensor, int, float, type(None), torch.Size, torch.dtype, torch.device)


def can_pass(value: Any) -> bool:
    """Whether a value may pass from a unit to the next; of lists those of numbers, such as sizes.

    A tensor in a list would keep its history.
    """
    if isinstance(value, list | tuple):
        return all(isinstance(item, int | float) for item in value)
    return isinstance(value, PASSED)


@torch.no_grad()
def feature_shapes(
    pieces: Iterable[nn.Module], names: Sequence[str], sample: Tensor, amp: torch.dtype | None
) -> list[tuple[int, ...]]:
    """The shape of every unit's feature without the batch, read in evaluation mode.

    Raises:
        InvalidInput: something other than tensors and numbers passes from a unit to the next.
    """
    shapes, activations = [], (sample,)
    for piece, name in zip(pieces, names, strict=True):
        with modes_kept(piece), precision(activations, amp):
            piece.eval()
            activations = piece(*activations)
        if not isinstance(activations[0], Tensor) or not all(map(can_pass, activations)):
            kinds = ", ".join(type(value).__name__ for value in activations)
            raise InvalidInput(
                f"Cannot cut behind unit {name!r}: {kinds} would pass from it to the next, and "
                "only tensors and numbers can. Cut elsewhere, or keep the module whole with "
                "leaves=."
            )
        shapes.append(tuple(activations[0].shape[1:]))
    return shapes
