"""Measures of pooled features at every depth of a network.

A forward pass gives the pooled features of as many units as fit into ``MEMORY``; for more units,
the images pass again. So memory depends on the number of images (a sample of stated size, not the
set) and on the size that features are pooled to. Measuring leaves everything as it was: weights,
buffers, modes and the global random generators.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.feature import Feature, unit_features
from layerwise.core.learner import Learner
from layerwise.core.shapes import feature_shapes
from layerwise.core.side_effects import modes_kept
from layerwise.core.split import split
from layerwise.core.unit import Activations, Unit
from layerwise.data.loader import Loader
from layerwise.errors import InvalidInput, choose
from layerwise.losses import Targets
from layerwise.measures import MEASURES
from layerwise.measures.base import Accuracy, check_labels, parts, percent, shuffled_ranks
from layerwise.measures.cka import linear_cka
from layerwise.measures.gains import add_gains
from layerwise.ops.pooling import average, averaged, pooling_kernel

Row = dict[str, Any]

POOLED_TO = 1024  # numbers an image
# bytes of pooled features kept at once, enough for all of ResNet50's on 10,000 images; those of a
# single unit are always kept
MEMORY = 24 * 10**8
SAMPLE_SEED = 1
COLUMNS = (  # of rows, beside the measures
    *("run", "epoch", "split", "images", "headings", "against", "against_epoch", "pooled_to"),
    *("index", "name", "depth", "resolution", "channels", "pooled_resolution", "features"),
    *("gain", "gain_error", "mismatched", "refused", "auxiliary_accuracy", "auxiliary_loss", "cka"),
)


@dataclass(frozen=True)
class Sample:
    """The images that are measured on, with every class among them.

    Attributes:
        labels: labels of the images, (N,), long, on the network's device.
        classes: number of classes.
        batches: function that gives the images in the labels' order, (B, C, H, W), as the network
            reads them; it can be called again.
    """

    labels: Tensor
    classes: int
    batches: Callable[[], Iterator[Tensor]]


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
        return average(self.feature.turned(features), self.kernel).flatten(1).float()


def depths_of(
    learner: Learner, at: str | int | Sequence[str], output_layer: str = "separate"
) -> Depths:
    """A learner's units, or those that ``at`` cuts if it trains the network as one unit."""
    whole = learner.units[0]
    if len(learner.units) > 1:
        return Depths(learner.model, learner.units, heads=True)
    sample = torch.zeros(
        2,
        *learner.image_shape,
        dtype=learner.image_type,
        device=next(learner.model.parameters()).device,
    )
    return network_depths(
        learner.model, at, sample, output_layer, whole.amp, learner.leaves, whole.memory_format
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
) -> Depths:
    """The units that ``split`` cuts a network into, to be passed forward only."""
    chain = split(model, at, sample, leaves, output_layer)
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


def sample_images(loader: Loader, images: int, classes: int) -> Sample:
    """A shuffled sample of at most so many images, drawn evenly over the classes, always alike.

    Raises:
        InvalidInput: too few images to measure on, or a class is absent.
    """
    if images < classes:
        raise InvalidInput(
            f"Cannot measure the features: {images} images are fewer than the {classes} classes. "
            "Give several of each class."
        )
    check_labels(loader.labels, classes)
    order, ranks, _ = shuffled_ranks(loader.labels, SAMPLE_SEED)
    chosen = order[ranks.argsort(stable=True)[:images].sort().values].to(loader.labels.device)
    labels = loader.labels[chosen].long()
    parts(labels)  # refuses too few of a class
    # of nearly equal size, so that none is of a single image
    batches = list(chosen.tensor_split(-(-len(chosen) // loader.batch_size)))
    return Sample(
        labels,
        classes,
        lambda: (loader.normalise(pixels) for pixels in loader.pixels.stream(batches)),
    )


def places_of(depths: Depths, sample: Sample, pooled_to: int) -> list[Place]:
    """The image and every unit's output, with kernels that pool to at most ``pooled_to`` numbers.

    Raises:
        InvalidInput: ``pooled_to`` is below 1.
    """
    if pooled_to < 1:
        raise InvalidInput(
            f"Cannot use pooled_to {pooled_to}: it is too small. Give 1 or more numbers an image."
        )
    image = next(sample.batches())[:2]
    names = ["input", *(unit.name for unit in depths.units)]
    pieces = [unit.piece for unit in depths.units]
    shapes = feature_shapes(pieces, names[1:], image, depths.units[0].amp)
    axes = [unit.feature.channels for unit in depths.units]
    features = unit_features(names, [tuple(image.shape[1:]), *shapes], [1, *axes])
    return [
        Place(index - 1, name, feature, kernel_of(feature.read, pooled_to))
        for index, (name, feature) in enumerate(zip(names, features, strict=True))
    ]


def kernel_of(shape: tuple[int, ...], pooled_to: int) -> tuple[int, int] | None:
    """The kernel that pools maps (C, H, W) to at most so many numbers; None: they stay."""
    kernel = pooling_kernel(shape, pooled_to) if len(shape) == 3 else (1, 1)
    return None if kernel == (1, 1) else kernel


def measure_depths(
    depths: Depths,
    sample: Sample,
    measures: Sequence[str],
    pooled_to: int = POOLED_TO,
    last: int | None = None,
    other: tuple[Depths, Sample] | None = None,
    pushing: Mapping[int, bool] | None = None,
) -> list[Row]:
    """Measure the image and every unit's output; see ``layerwise.separability`` for the columns.

    Args:
        depths: the network.
        sample: the images.
        measures: names in ``MEASURES``; gains are of the first.
        pooled_to: most numbers an image that features are pooled to.
        last: index of the last unit to measure; None: all are.
        other: a network of as many units and the same images as it reads them, to compare features
            with.
        pushing: whether a unit's loss still pushes, by index; see ``losses_push``.

    Returns:
        A row for each depth, from the image on.

    Raises:
        InvalidInput: a measure is unknown, there are none, or all images are the same.
    """
    for name in measures:
        check_measure(name)
    if not measures:
        raise InvalidInput(
            "Cannot measure the features: no measure is given. Give one or more of "
            f"{', '.join(MEASURES)}."
        )
    places = places_of(depths, sample, pooled_to)[: None if last is None else last + 2]
    compared_places = places_of(*other, pooled_to) if other else []
    counterparts = {place.index: place for place in compared_places}
    rows: list[Row] = []
    # which images the first measure had right, to compare each depth with the one before
    right: list[Tensor | None] = []
    for group in groups(places, len(sample.labels) * (2 if other else 1)):
        tables, scores = features_of(depths, sample, group)
        pairs = [counterparts[place.index] for place in group] if other else []
        compared = features_of(*other, pairs)[0] if other else {}
        for place in group:
            values, hits = measured(
                tables[place.index], sample.labels, measures, lenient=place.index >= 0
            )
            row = describe(place) | values
            right.append(hits)
            if place.index in compared:
                row["cka"] = similarity(tables[place.index], compared.pop(place.index))
            rows.append(row | scores.get(place.index, {}))
            del tables[place.index]
    add_gains(rows, measures[0], right, pushing or {})
    return rows


def check_measure(name: str) -> None:
    """Refuse a measure that is unknown, or has the name of another column.

    Raises:
        InvalidInput: naming the measure.
    """
    choose("measure", name, MEASURES)
    if name in COLUMNS:
        raise InvalidInput(
            f"Cannot measure {name!r}: another column has that name. Rename the measure."
        )


def groups(places: Sequence[Place], images: int) -> Iterator[list[Place]]:
    """Neighbouring depths whose pooled features are kept together."""
    group: list[Place] = []
    for place in places:
        if group and 4 * images * sum(prod(member.pooled) for member in (*group, place)) > MEMORY:
            yield group
            group = []
        group.append(place)
    yield group


@torch.no_grad()
def features_of(
    depths: Depths, sample: Sample, places: Sequence[Place]
) -> tuple[dict[int, Tensor], dict[int, dict[str, float]]]:
    """Pooled features of some depths, (N, F) each, and losses and accuracies of the units' heads.

    All come from one forward pass.
    """
    count, device = len(sample.labels), sample.labels.device
    wanted = {place.index: place for place in places}
    tables = {
        place.index: torch.empty(count, prod(place.pooled), device=device) for place in places
    }
    units = depths.units[: places[-1].index + 1]
    sums = {
        unit.index: torch.zeros(2, device=device)
        for unit in units
        if depths.heads and unit.index in wanted
    }
    start = 0
    with modes_kept(
        depths.model, *(module for unit in units for module in (unit.piece, unit.loss))
    ):
        depths.model.eval()
        for unit in units:
            unit.train(False)
        for images in sample.batches():
            rows = slice(start, start + len(images))
            start = rows.stop
            targets = Targets(sample.labels[rows], sample.classes, images)
            activations: Activations = (images,)
            if -1 in wanted:
                tables[-1][rows] = wanted[-1].pool(images)
            for unit in units:
                if unit.index in sums:
                    activations, (loss, correct) = unit.evaluate(activations, targets)
                    sums[unit.index] += torch.stack([loss.float() * len(images), correct.float()])
                else:
                    activations = unit.forward(activations)
                if unit.index in wanted:
                    tables[unit.index][rows] = wanted[unit.index].pool(activations[0])
    shares = {index: (total.double() / count).tolist() for index, total in sums.items()}
    return tables, {
        index: {"auxiliary_loss": finite(loss), "auxiliary_accuracy": 100.0 * right}
        for index, (loss, right) in shares.items()
    }


def finite(value: float) -> float | None:
    return value if value - value == 0 else None


def describe(place: Place) -> Row:
    """The entries of a row that need no measuring."""
    maps = len(place.shape) == 3
    return {
        "index": place.index,
        "name": place.name,
        "depth": place.index + 1,
        "resolution": list(place.shape[1:]) if maps else None,
        "channels": place.shape[0],
        "pooled_resolution": list(place.pooled[1:]) if maps else None,
        "features": prod(place.pooled),
    }


def measured(
    features: Tensor, labels: Tensor, measures: Sequence[str], lenient: bool
) -> tuple[Row, Tensor | None]:
    """The measures by name, and which images the first had right if it is an accuracy.

    With ``lenient``, a measure that is refused is None, and ``refused`` has the reason.
    """
    row: Row = {}
    right = None
    for number, name in enumerate(measures):
        measure = MEASURES[name]
        try:
            if number == 0 and isinstance(measure, Accuracy):
                right = measure.right(features, labels)
                row[name] = percent(right)
            else:
                row[name] = float(measure(features, labels))
                if not isfinite(row[name]):
                    raise InvalidInput(
                        f"Cannot use measure {name!r}: it gave {row[name]}, which is not a finite "
                        "number. Raise InvalidInput in it for such features."
                    )
        except InvalidInput as refusal:
            if not lenient:
                raise
            # the features of a dead unit, say: those of other units can still be measured
            row |= {name: None, "refused": str(refusal)}
        except Exception as error:  # a measure of the user's own: anything can be raised
            reason = " ".join(str(error).split())[:200]
            raise InvalidInput(
                f"Cannot use measure {name!r}: it raised {type(error).__name__} ({reason}). "
                "Correct it."
            ) from error
    return row, right


def similarity(features: Tensor, others: Tensor) -> float | None:
    """``linear_cka``, or None where it cannot be measured."""
    try:
        return linear_cka(features, others)
    except InvalidInput:
        return None


def refuse_other_depth(depths: Depths, other: tuple[Depths, Sample] | None) -> None:
    if other is not None and len(other[0].units) != len(depths.units):
        raise InvalidInput(
            f"Cannot compare networks of {len(depths.units)} and {len(other[0].units)} units: they "
            "have no depths in common. Give a network with as many units."
        )
