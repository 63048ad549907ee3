"""Feature of a unit: its shape as the network has it, and the axis that holds its channels.

Local losses and measures read maps (B, C, H, W) and vectors (B, C), whatever the network's layout:
a feature is turned before it reaches them, which is a view and passes gradients on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from layerwise.errors import InvalidInput, choose


@dataclass(frozen=True)
class Feature:
    """Shape and layout of a unit's feature.

    Attributes:
        shape: as the network has it, without the batch, which is its first axis.
        channels: axis that holds the channels, the batch counted as axis 0.
    """

    shape: tuple[int, ...]
    channels: int = 1

    @property
    def read(self) -> tuple[int, ...]:
        """The shape that losses read, without the batch: (C, H, W), (C, N, 1) or (C,)."""
        if not self.shape:
            return self.shape
        positions = [size for axis, size in enumerate(self.shape, 1) if axis != self.channels]
        ones = [1] * (len(positions) == 1)  # tokens are maps of N × 1
        return (self.shape[self.channels - 1], *positions, *ones)

    @property
    def tokens(self) -> bool:
        """Whether the feature is a row of positions: (N, C), or (C, N)."""
        return len(self.shape) == 2

    @property
    def as_it_is(self) -> bool:
        """Whether losses read the feature as the network has it."""
        return self.read == self.shape and self.channels == 1

    def turned(self, feature: Tensor) -> Tensor:
        """The feature as losses read it, channels behind the batch: (B, *shape) -> (B, *read)."""
        if self.channels != 1:
            feature = feature.movedim(self.channels, 1)
        return feature.unsqueeze(-1) if self.tokens else feature

    def restored(self, feature: Tensor) -> Tensor:
        """The feature as the network has it, from ``turned``: (B, *read) -> (B, *shape)."""
        if self.tokens:
            feature = feature.squeeze(-1)
        return feature.movedim(1, self.channels) if self.channels != 1 else feature

    def __str__(self) -> str:
        """The shape, and where its channels are if that is not the first axis behind the batch."""
        sizes = "×".join(map(str, self.shape))
        if self.channels == 1:
            return sizes
        where = "last" if self.channels == len(self.shape) else f"in axis {self.channels}"
        return f"{sizes}, channels {where}"


AS_IT_IS = Feature(())  # of an image, and where nothing is known


def unit_features(
    names: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    axes: Sequence[int],
    channels: Mapping[str, int] | None = None,
) -> list[Feature]:
    """The units' features, from their shapes and the axes of their channels.

    Args:
        names: names of the units.
        shapes: shapes without the batch.
        axes: what the network's graph says.
        channels: what the user says, by the name of a unit; see ``localize``.

    Raises:
        InvalidInput: ``channels`` names no unit, or no axis of its feature.
    """
    if channels is not None and not isinstance(channels, Mapping):
        raise InvalidInput(
            f"Cannot use channels={channels!r}: it is not a dictionary. Give the axis of channels "
            f"by the name of a unit, such as {{{names[0]!r}: -1}}."
        )
    given = {
        choose("unit in channels=", name, names): axis for name, axis in (channels or {}).items()
    }
    return [
        Feature(shape, checked_axis(name, shape, given[name]) if name in given else axis)
        for name, shape, axis in zip(names, shapes, axes, strict=True)
    ]


def checked_axis(name: str, shape: tuple[int, ...], axis: Any) -> int:
    """An axis that may be counted from the end, counted from the batch on as axis 0.

    Raises:
        InvalidInput: the feature has no such axis.
    """
    count = len(shape)
    if not isinstance(axis, int) or isinstance(axis, bool) or not 1 <= abs(axis) <= count:
        raise InvalidInput(
            f"Cannot use channels= of unit {name!r}: its feature has shape (B, "
            f"{', '.join(map(str, shape))}). Give an axis from 1 to {count}, or −1 for the last."
        )
    return axis % (count + 1)
