"""A network as the places where it is measured: the image, and the outputs of its units."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.core.feature import Feature, unit_features
from layerwise.core.learner import Learner
from layerwise.core.memory_format import blank_sample
from layerwise.core.outputs import Key
from layerwise.core.shapes import feature_shapes
from layerwise.core.split import split
from layerwise.core.unit import Unit
from layerwise.errors import InvalidInput, check_least
from layerwise.measures.sample import Sample
from layerwise.ops.pooling import average, averaged, pooling_kernel


@dataclass(frozen=True)
class Depths:
    """A network as the units at whose outputs it is measured.

    Attributes:
        model: the network.
        units: its units, in order.
        heads: whether the units have losses of their own.
    """

    model: nn.Module
    units: Sequence[Unit]
    heads: bool


def depths_of(
    learner: Learner, at: str | int | Sequence[str], output_layer: str = "separate"
) -> Depths:
    """A learner's units, or those that ``at`` cuts if it trains the network as one unit."""
    whole = learner.units[0]
    if len(learner.units) > 1:
        return Depths(learner.model, learner.units, heads=True)
    images = blank_sample(learner)
    return network_depths(
        learner.model, at, images, output_layer, whole.amp, learner.leaves, whole.memory_format
    )


def without_heads(depths: Depths) -> Depths:
    """The same units without heads and optimizers, which take memory and would be evaluated."""
    bare = [
        Unit(
            unit.index,
            unit.name,
            unit.piece,
            nn.Identity(),
            None,
            amp=unit.amp,
            memory_format=unit.memory_format,
            feature=unit.feature,
        )
        for unit in depths.units
    ]
    return Depths(depths.model, bare, heads=False)


def network_depths(
    model: nn.Module,
    at: str | int | Sequence[str],
    sample: Tensor,
    output_layer: str = "separate",
    amp: torch.dtype | None = None,
    leaves: Iterable[str] = (),
    memory_format: torch.memory_format | None = None,
    output: Key = None,
) -> Depths:
    """The units that ``split`` cuts a network into, to be passed forward only."""
    chain = split(model, at, sample, leaves, output_layer, output)
    shapes = feature_shapes(chain.pieces, chain.names, sample[:2], amp)
    features = unit_features(chain.names, shapes, chain.channels)
    units = [
        Unit(
            index,
            name,
            piece,
            nn.Identity(),
            None,
            amp=amp,
            memory_format=memory_format,
            feature=feature,
        )
        for index, (name, piece, feature) in enumerate(
            zip(chain.names, chain.pieces, features, strict=True)
        )
    ]
    return Depths(model, units, heads=False)


def refuse_other_depth(depths: Depths, other: tuple[Depths, Sample] | None) -> None:
    if other is not None and len(other[0].units) != len(depths.units):
        raise InvalidInput(
            f"Cannot compare networks of {len(depths.units)} and {len(other[0].units)} units: they "
            "have no depths in common. Give a network with as many units."
        )


@dataclass(frozen=True)
class Place:
    """A depth of the network: a unit's output, or the image, whose index is −1.

    Attributes:
        index: index of the unit.
        name: name of the unit.
        feature: shape and layout of its features, which are measured as losses read them.
        kernel: kernel of the average pooling; None: features stay as they are.
    """

    index: int
    name: str
    feature: Feature
    kernel: tuple[int, int] | None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of its features as they are read, (C, H, W) or (C,)."""
        return self.feature.read

    @property
    def pooled(self) -> tuple[int, ...]:
        return self.shape if self.kernel is None else averaged(self.shape, self.kernel)

    def pool(self, features: Tensor) -> Tensor:
        """Features turned, pooled and flattened: (B, *feature.shape) -> (B, F), float32."""
        return average(self.feature.turned(features).float(), self.kernel).flatten(1)


def places_of(depths: Depths, sample: Sample, pooled_to: int) -> list[Place]:
    """The image and every unit's output, with kernels that pool to at most ``pooled_to`` numbers.

    Raises:
        InvalidInput: ``pooled_to`` is below 1.
    """
    check_least(1, pooled_to=pooled_to)
    image = next(sample.batches())[:2]
    names = ["input", *(unit.name for unit in depths.units)]
    pieces = [unit.piece for unit in depths.units]
    shapes = feature_shapes(pieces, names[1:], image, depths.units[0].amp)
    axes = [unit.feature.channels for unit in depths.units]
    features = unit_features(names, [tuple(image.shape[1:]), *shapes], [1, *axes])
    return [
        Place(index - 1, name, feature, pooling_kernel(feature.read, pooled_to))
        for index, (name, feature) in enumerate(zip(names, features, strict=True))
    ]
