"""Measures of pooled features at every depth of a network.

A forward pass gives the pooled features of as many units as fit into ``MEMORY``; for more units,
the images pass again. So memory depends on the number of images (a sample of stated size, not the
set) and on the size that features are pooled to. Measuring leaves everything as it was: weights,
buffers, modes and the global random generators.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor

from layerwise.core.side_effects import modes_kept
from layerwise.core.unit import Activations
from layerwise.errors import InvalidInput, choose, raised
from layerwise.losses import Targets
from layerwise.measures import MEASURES
from layerwise.measures.base import Accuracy, percent
from layerwise.measures.cka import linear_cka
from layerwise.measures.depths import Depths, Place, places_of
from layerwise.measures.gains import add_gains
from layerwise.measures.sample import Sample

Row = dict[str, Any]

POOLED_TO = 1024  # numbers an image
# bytes of pooled features kept at once, enough for all of ResNet50's on 10,000 images; those of a
# single unit are always kept
MEMORY = 24 * 10**8
COLUMNS = (  # of rows, beside the measures
    *("run", "epoch", "split", "images", "headings", "against", "against_epoch", "pooled_to"),
    *("index", "name", "depth", "resolution", "channels", "pooled_resolution", "features"),
    *("gain", "gain_error", "mismatched", "refused", "auxiliary_accuracy", "auxiliary_loss", "cka"),
)


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
        pushing: whether a unit's loss is still active, by index; see ``losses_push``.

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
        index: {
            "auxiliary_loss": loss if isfinite(loss) else None,
            "auxiliary_accuracy": 100.0 * right,
        }
        for index, (loss, right) in shares.items()
    }


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
            raise InvalidInput(
                f"Cannot use measure {name!r}: it {raised(error)}. Correct it."
            ) from error
    return row, right


def similarity(features: Tensor, others: Tensor) -> float | None:
    """``linear_cka``, or None where it cannot be measured."""
    try:
        return linear_cka(features, others)
    except InvalidInput:
        return None
