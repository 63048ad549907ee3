"""Measures of features, and what they share: checks, parts of the images, accuracies.

A measure is a function ``(features, labels) -> float`` and a line in ``MEASURES``. Features are (N,
F), a row an image. Labels are (N,), integers from 0 on, every class present. A measure draws
nothing from the global generators, changes none of its arguments, and gives the same number for the
same arguments. It raises InvalidInput where it cannot measure (see ``checked``).

A measure that fits something scores it on images it was not fitted to: ``parts`` divides the
images, alike for all measures, and ``folds`` divides them so that each is scored in turn. A measure
that is an accuracy is an ``Accuracy``: a function that says which of the scored images were right.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import InvalidInput

Measure = Callable[[Tensor, Tensor], float]
# ends of the parts of each class: half to fit, a tenth to choose a strength by, the rest to score
FITTED, CHOSEN = 0.5, 0.6
LEAST = 4  # fewest images of a class
FOLDS = 4  # number of folds of a cross-fitted probe; at most LEAST
SPLIT_SEED = 0


class Parts(NamedTuple):
    """Indices of the images to fit a probe with, to choose its strength by, and to score it on."""

    fit: Tensor
    choose: Tensor
    score: Tensor


class Accuracy:
    """A measure that is an accuracy in percent.

    Attributes:
        right: function ``(features, labels)`` -> (scored images,), bool: which of them are right.
            The choice and the order of the images depend on the labels alone, so that two networks
            can be compared image by image.
        heading: name of the measure in tables.
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
    """The name of a measure in tables: its heading, else its own name in words."""
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
            f"Cannot measure features of shape {tuple(features.shape)} and type {features.dtype} "
            f"with labels of shape {tuple(labels.shape)}: they do not fit a measure. Give "
            "floating-point features (N, F) and one integer label for each."
        )
    if labels.is_floating_point() or labels.is_complex() or (len(labels) and int(labels.min()) < 0):
        raise InvalidInput(
            "Cannot measure the features: their labels are not whole numbers from 0 on. Give the "
            "numbers of the classes."
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
            "Cannot measure the features: all images are of a single class. Give images of two "
            "classes or more."
        )
    if len(labels) < classes:
        raise InvalidInput(
            f"Cannot measure the features: {len(labels)} images are fewer than the {classes} "
            "classes. Give several of each class."
        )
    absent = torch.nonzero(labels.long().cpu().bincount(minlength=classes) == 0).flatten().tolist()
    if absent:
        raise InvalidInput(
            f"Cannot measure the features: no image is of class {absent[0]}, and labels go up to "
            f"{classes - 1}. Give images of every class, or number the present classes from 0 on."
        )


def refuse_degenerate(features: Tensor) -> None:
    """Refuse features in which no images differ, or that are not finite.

    Raises:
        InvalidInput: saying which.
    """
    if not bool(torch.isfinite(features).all()):
        raise InvalidInput(
            "Cannot measure the features: they hold NaN or infinite values. Look for them in the "
            "images, or train the network again at a lower learning rate."
        )
    if bool((features == features[:1]).all()):
        raise InvalidInput(
            f"Cannot measure the features: the features of all {len(features)} images are the "
            "same. Give images that differ, or leave out a layer whose output is constant."
        )


def parts(labels: Tensor) -> Parts:
    """Divide images at random, always alike, into parts to fit, to choose by and to score.

    Half of each class is to fit, a tenth to choose by, the rest to score.

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
            f"Cannot fit a probe: class {int(counts.argmin())} has {int(counts.min())} images, and "
            f"some are fitted and others scored. Give {LEAST} or more of each class."
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
    """A random order of the images, their ranks within their classes, and images per class.

    A rank is the number of images of the same class that come before in the order. The same seed
    gives the same order; the global generators are not touched.

    Shapes: (N,) -> (N,), (N,), (classes,).
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
    # (N, classes); a product of matrices, since index_add is not deterministic on a GPU
    members = F.one_hot(labels).to(features)
    counts = members.sum(0)
    return members.T @ features / counts.unsqueeze(1), counts


def percent(right: Tensor) -> float:
    """Share of images that were right, in percent; shape (N,), bool."""
    return 100.0 * int(right.sum()) / len(right)


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether each image's highest score is its label's; (N, classes), (N,) -> (N,), bool."""
    return scores.argmax(1) == labels
