"""Measures of features: how well the classes can be told apart in them, and how many directions
they use.

A measure is a function ``(features, labels) -> float`` and a line in ``MEASURES``. Features are (N,
F), a row an image; labels are (N,), integers from 0 on, every class present. A measure draws
nothing from the global generators, changes nothing it is given, and gives the same number for the
same arguments. It raises InvalidInput for what it cannot measure (see ``checked``).

Measures that fit something score it on images it was not fitted to: ``parts`` divides the images,
alike for all of them, and ``folds`` where each of them is scored in turn. One that is an accuracy
is an ``Accuracy``: a function that says which of the scored images were right.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import InvalidInput

Measure = Callable[[Tensor, Tensor], float]
# of each class: half to fit, a tenth to choose a strength by, the rest to score
FITTED, CHOSEN = 0.5, 0.6
LEAST = 4  # images of a class that these parts need
FOLDS = 4  # of a cross-fitted probe; at most LEAST
SPLIT_SEED = 0


class Parts(NamedTuple):
    """Indices of the images to fit a probe with, to choose its strength by, and to score it on."""

    fit: Tensor
    choose: Tensor
    score: Tensor


class Accuracy:
    """A measure that is an accuracy in percent.

    Attributes:
        right: ``(features, labels)`` -> (scored images,), bool: which of them are right. Which
            images, and in what order, depends on the labels alone, so that two networks' can be
            compared image by image.
        heading: what the measure is called in tables.
    """

    def __init__(self, right: Callable[[Tensor, Tensor], Tensor], heading: str) -> None:
        self.right, self.heading = right, heading
        update_wrapper(self, right)

    def __call__(self, features: Tensor, labels: Tensor) -> float:
        return percent(self.right(features, labels))


def accuracy(heading: str) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Accuracy]:
    """Make an ``Accuracy`` of a function that says which of the scored images are right."""
    return lambda right: Accuracy(right, heading)


def measure(heading: str) -> Callable[[Measure], Measure]:
    """Give a measure the heading that tables show it under."""

    def with_heading(function: Measure) -> Measure:
        function.heading = heading  # type: ignore[attr-defined]
        return function

    return with_heading


def heading_of(function: Measure) -> str:
    """What a measure is called in tables: its heading, else its name in words."""
    name = str(getattr(function, "__name__", "measure")).replace("_", " ")
    return str(getattr(function, "heading", name))


def checked(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features as they are and labels as long integers on their device, if they can be measured.

    Raises:
        InvalidInput: shapes do not fit, there are fewer images than classes or fewer than two
            classes, a class is absent, or the features are constant or not finite.
    """
    if (
        features.dim() != 2
        or not features.is_floating_point()
        or labels.shape != features.shape[:1]
    ):
        raise InvalidInput(
            f"features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)} "
            "cannot be measured: give floating-point features (N, F) and one integer label for "
            "each"
        )
    if labels.is_floating_point() or labels.is_complex() or (len(labels) and int(labels.min()) < 0):
        raise InvalidInput(
            "labels that are not whole numbers from 0 on cannot be measured: give the numbers of "
            "classes"
        )
    check_labels(labels, int(labels.max()) + 1 if len(labels) else 2)
    refuse_degenerate(features)
    return features, labels.long()


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse too few images for so many classes, or labels of which one is absent.

    Raises:
        InvalidInput: naming the class.
    """
    if classes < 2:
        raise InvalidInput(
            "labels of a single class leave nothing to tell apart: give images of two classes or "
            "more"
        )
    if len(labels) < classes:
        raise InvalidInput(
            f"{len(labels)} images are fewer than the {classes} classes: give several of each class"
        )
    absent = torch.nonzero(labels.long().cpu().bincount(minlength=classes) == 0).flatten().tolist()
    if absent:
        raise InvalidInput(
            f"no image is of class {absent[0]} (labels go up to {classes - 1}), so that nothing "
            "can be said of it: give images of every class, or number those that are there from "
            "0 on"
        )


def refuse_degenerate(features: Tensor) -> None:
    """Refuse features in which no images differ, or that are not finite."""
    if not bool(torch.isfinite(features).all()):
        raise InvalidInput(
            "the features hold NaN or infinite values: the network has diverged, or its images "
            "hold such values"
        )
    if bool((features == features[:1]).all()):
        raise InvalidInput(
            f"the features of all {len(features)} images are the same, so that nothing separates "
            "them: give images that differ, or leave out a layer that gives a constant"
        )


def parts(labels: Tensor) -> Parts:
    """Divide images at random, always alike, into half of each class to fit, a tenth to choose by,
    and the rest to score.

    Raises:
        InvalidInput: a class has fewer than ``LEAST`` images.
    """
    order, ranks, counts = shuffled_ranks(labels, SPLIT_SEED)
    refuse_few(counts)
    shares = ranks / counts[labels.cpu()[order]]
    masks = shares < FITTED, (shares >= FITTED) & (shares < CHOSEN), shares >= CHOSEN
    fit, choose, score = (order[mask].to(labels.device) for mask in masks)
    return Parts(fit, choose if len(choose) else fit, score)


def refuse_few(counts: Tensor) -> None:
    if int(counts.min()) < LEAST:
        raise InvalidInput(
            f"class {int(counts.argmin())} has {int(counts.min())} images: give {LEAST} or more "
            "of each class, since a probe is fitted with some and scored on others"
        )


def folds(labels: Tensor) -> list[Tensor]:
    """Divide images at random, always alike, into ``FOLDS`` parts with about as many of each class.

    Raises:
        InvalidInput: a class has fewer than ``LEAST`` images.
    """
    order, ranks, counts = shuffled_ranks(labels, SPLIT_SEED)
    refuse_few(counts)
    return [order[ranks % FOLDS == number].to(labels.device) for number in range(FOLDS)]


def shuffled_ranks(labels: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A random order of the images, how many of its own class come before each in it, (N,); and
    images per class, (classes,).

    The same seed gives the same order; the global generators are not touched.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shuffled = labels.cpu().long()[order]
    counts = shuffled.bincount()
    grouped = shuffled.argsort(stable=True)
    ranks = torch.empty_like(order)
    ranks[grouped] = torch.arange(len(labels)) - (counts.cumsum(0) - counts)[shuffled[grouped]]
    return order, ranks, counts


def class_means(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each class, (classes, F), and its number of images, (classes,)."""
    # (N, classes); a product, since index_add on a GPU gives other bits each time
    members = F.one_hot(labels).to(features)
    counts = members.sum(0)
    return members.T @ features / counts.unsqueeze(1), counts


def percent(right: Tensor) -> float:
    """Share of images that were right, in percent; shape (N,), bool."""
    return 100.0 * int(right.sum()) / len(right)


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether an image's highest score is its label's; shapes (N, classes), (N,) -> (N,), bool."""
    return scores.argmax(1) == labels
