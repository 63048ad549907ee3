"""Measures of features: how well the classes can be told apart in them, and how many directions they use.

A measure is a function ``(features, labels) -> float`` and a line in ``MEASURES``. Features are (N, F), a row an image; labels
are (N,), integers from 0 on, every class present. A measure draws nothing from the global generators, changes nothing it is
given, and gives the same number for the same arguments. It raises InvalidInput for what it cannot measure (see ``checked``).

Measures that fit something score it on images it was not fitted to: ``parts`` divides the images, alike for all of them, and
``folds`` where each of them is scored in turn. One that is an accuracy is an ``Accuracy``: a function that says which of the
scored images were right.
"""

from collections.abc import Callable
from functools import update_wrapper
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import InvalidInput

Measure = Callable[[Tensor, Tensor], float]

STRENGTHS = [10.0**exponent for exponent in range(2, -6, -1)]  # of ridge regression, the strongest first
CANCELLED = 1e-6  # a share of the scatter; of a smaller one, its difference from two sums has lost what a ridge needs
NEIGHBOURS = 10
SHRINKAGE = 0.1  # of the within-class scatter towards a multiple of the identity
FITTED, CHOSEN = 0.5, 0.6  # of each class: half to fit, a tenth to choose a strength by, the rest to score
LEAST = 4  # images of a class that these parts need
FOLDS = 4  # of a cross-fitted probe; at most LEAST
SPLIT_SEED = 0
ROWS = 1024  # of a matrix of distances that are computed at once


class Parts(NamedTuple):
    """Indices of the images to fit a probe with, to choose its strength by, and to score it on."""

    fit: Tensor
    choose: Tensor
    score: Tensor


class Accuracy:
    """A measure that is an accuracy in percent, made of a function that says of each scored image whether it was right.

    Attributes:
        right: ``(features, labels)`` -> (scored images,), bool; which images, and in what order, depends on the labels alone,
            so that two networks' can be compared image by image.
    """

    def __init__(self, right: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.right = right
        update_wrapper(self, right)

    def __call__(self, features: Tensor, labels: Tensor) -> float:
        return percent(self.right(features, labels))


@Accuracy
def linear_probe(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a linear classifier, percent: ridge regression onto the one-hot labels, in closed form.

    Weights (X'X + λI)⁻¹X'Y of centred features and labels of the part to fit; λ is that of ``STRENGTHS`` (in multiples of X'X's
    mean eigenvalue) which does best on the part to choose by, the strongest of equals (Hoerl & Kennard 1970; the linear
    probes of Alain & Bengio 2016).
    """
    features, labels = checked(features, labels)
    fit, choose, score = parts(labels)
    inputs, targets = features[fit].double(), F.one_hot(labels[fit]).double()
    mean, share = inputs.mean(0), targets.mean(0)
    inputs -= mean
    gram, moments = inputs.T @ inputs, inputs.T @ (targets - share)  # (F, F), (F, classes)
    weights = best_ridge(gram, moments, share, features[choose].double() - mean, labels[choose])
    return hits((features[score].double() - mean) @ weights + share, labels[score])


@Accuracy
def cross_fitted_probe(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a linear classifier on all images, percent: of each fold by a probe fitted to the other folds.

    A probe as in ``linear_probe``, fitted to two of four folds; its strength is that which does best on the third, and the
    fourth is scored. So each image counts once, and of as few images as are held out the accuracy is told more precisely
    (Stone 1974).
    """
    features, labels = checked(features, labels)
    pieces = folds(labels)
    inputs, targets = features.double() - features.double().mean(0), F.one_hot(labels).double()
    grams = torch.stack([inputs[piece].T @ inputs[piece] for piece in pieces])  # (FOLDS, F, F)
    moments = torch.stack([inputs[piece].T @ targets[piece] for piece in pieces])  # (FOLDS, F, classes)
    right = []
    for number, score in enumerate(pieces):
        chosen = (number + 1) % FOLDS
        fitted = [other for other in range(FOLDS) if other not in (number, chosen)]
        fit = torch.cat([pieces[other] for other in fitted])
        mean, share = inputs[fit].mean(0), targets[fit].mean(0)
        gram = grams[fitted].sum(0) - len(fit) * torch.outer(mean, mean)
        moment = moments[fitted].sum(0) - len(fit) * torch.outer(mean, share)
        if gram.trace() < CANCELLED * grams[fitted].sum(0).trace():  # what varies is elsewhere: the difference is rounding
            centred = inputs[fit] - mean
            gram, moment = centred.T @ centred, centred.T @ (targets[fit] - share)
        held = inputs[pieces[chosen]] - mean, labels[pieces[chosen]]
        weights = best_ridge(gram, moment, share, *held)
        right.append(hits((inputs[score] - mean) @ weights + share, labels[score]))
    return torch.cat(right)


def best_ridge(gram: Tensor, moments: Tensor, share: Tensor, held: Tensor, labels: Tensor) -> Tensor:
    """The weights of the strength in ``STRENGTHS`` that does best on held-out images, the strongest of equals."""
    scale, best, weights = gram.trace() / len(gram), -1, moments
    for strength in STRENGTHS:
        tried = ridge(gram, moments, float(strength * scale))
        right = int(hits(held @ tried + share, labels).sum())
        if right > best:
            best, weights = right, tried
    return weights


def ridge(gram: Tensor, moments: Tensor, strength: float) -> Tensor:
    """Weights (G + λI)⁻¹M; shapes (F, F), (F, classes) -> (F, classes)."""
    if strength <= 0:  # all features of the part to fit are alike
        return torch.zeros_like(moments)
    return torch.cholesky_solve(moments, torch.linalg.cholesky(gram + strength * torch.eye(len(gram)).to(gram)))


@Accuracy
def nearest_class_mean(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of taking the class whose mean is nearest (Euclidean), percent; means of the parts to fit and to choose by."""
    features, labels = checked(features, labels)
    fit, choose, score = parts(labels)
    known = torch.cat([fit, choose])
    means = class_means(features[known].double(), labels[known])[0]
    distances = torch.cdist(features[score].double(), means, compute_mode="donot_use_mm_for_euclid_dist")
    return hits(-distances, labels[score])


@Accuracy
def nearest_neighbours(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a vote of the ``NEIGHBOURS`` nearest images (Euclidean), percent; of equal votes the lowest label wins.

    Neighbours are of the parts to fit and to choose by.
    """
    features, labels = checked(features, labels)
    fit, choose, score = parts(labels)
    known = torch.cat([fit, choose])
    centre = features[known].mean(0)  # distances of centred features round less
    references, classes = features[known] - centre, int(labels.max()) + 1
    votes = []
    for rows in score.split(ROWS):
        nearest = torch.cdist(features[rows] - centre, references).topk(min(NEIGHBOURS, len(known)), largest=False).indices
        votes.append(F.one_hot(labels[known][nearest], classes).sum(1))  # (rows, classes)
    return hits(classes * torch.cat(votes) - torch.arange(classes, device=labels.device), labels[score])


def fisher(features: Tensor, labels: Tensor) -> float:
    """Fisher's criterion tr(W⁻¹B): scatter between the classes over scatter within them; 0 or more, larger is better.

    B = Σ nₖ/N (μₖ − μ)(μₖ − μ)' and W = 1/N Σ (x − μₖ)(x − μₖ)', shrunk to (1 − γ)W + γ tr(W)/F · I with γ = ``SHRINKAGE``
    (Fukunaga 1990, section 10.2; Friedman 1989). Of all images: nothing is held out.

    Raises:
        InvalidInput: also when the images of each class are all alike, where it is infinite.
    """
    features, labels = checked(features, labels)
    values = features.double()
    means, counts = class_means(values, labels)
    within = values - means[labels]
    scatter = within.T @ within / len(values)  # (F, F)
    if float(scatter.trace()) <= 0:
        raise InvalidInput(
            "the features of each class are all alike, so that Fisher's criterion is infinite: leave out fisher, or give more "
            "images"
        )
    shrunk = (1 - SHRINKAGE) * scatter + SHRINKAGE * scatter.trace() / len(scatter) * torch.eye(len(scatter)).to(scatter)
    between = (means - values.mean(0)) * (counts / len(values)).sqrt().unsqueeze(1)  # (classes, F); B = between'between
    return float((between.T * torch.cholesky_solve(between.T, torch.linalg.cholesky(shrunk))).sum())


def effective_rank(features: Tensor, labels: Tensor) -> float:
    """How many directions the centred features use: exp of the entropy of their singular values σ / Σσ; from 1 to F.

    Roy & Vetterli 2007, definition 1. The labels are not read.
    """
    features, _ = checked(features, labels)
    values = features.double() - features.double().mean(0)
    gram = values @ values.T if len(values) < values.shape[1] else values.T @ values
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())


MEASURES: dict[str, Measure] = {
    "linear_probe": linear_probe,
    "cross_fitted_probe": cross_fitted_probe,
    "nearest_class_mean": nearest_class_mean,
    "nearest_neighbours": nearest_neighbours,
    "fisher": fisher,
    "effective_rank": effective_rank,
}


def is_accuracy(name: str) -> bool:
    """Whether a measure is an accuracy in percent."""
    return isinstance(MEASURES[name], Accuracy)


def linear_cka(features: Tensor, others: Tensor) -> float:
    """Similarity of two networks' features of the same images, 0 to 1: ‖Y'X‖² / (‖X'X‖ ‖Y'Y‖) of centred X and Y.

    Linear centred kernel alignment (Kornblith et al. 2019, equation 3 and section 3; Frobenius norms). Rotating or scaling the
    features changes nothing.

    Shapes: (N, F), (N, G).

    Raises:
        InvalidInput: the numbers of images differ, or one of the two is constant or not finite.
    """
    if len(features) != len(others):
        raise InvalidInput(f"features of {len(features)} and of {len(others)} images cannot be compared: give the same images")
    for values in (features, others):
        refuse_degenerate(values)
    one, two = (values.double() - values.double().mean(0) for values in (features, others))
    return min(1.0, float((two.T @ one).square().sum() / ((one.T @ one).norm() * (two.T @ two).norm())))


def checked(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features as they are and labels as long integers on their device, if they can be measured.

    Raises:
        InvalidInput: shapes do not fit, there are fewer images than classes or fewer than two classes, a class is absent, or
            the features are constant or not finite.
    """
    if features.dim() != 2 or not features.is_floating_point() or labels.shape != features.shape[:1]:
        raise InvalidInput(
            f"features of shape {tuple(features.shape)} and labels of shape {tuple(labels.shape)} cannot be measured: give "
            "floating-point features (N, F) and one integer label for each"
        )
    if labels.is_floating_point() or labels.is_complex() or (len(labels) and int(labels.min()) < 0):
        raise InvalidInput("labels that are not whole numbers from 0 on cannot be measured: give the numbers of classes")
    check_labels(labels, int(labels.max()) + 1 if len(labels) else 2)
    refuse_degenerate(features)
    return features, labels.long()


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse too few images for so many classes, or labels of which one is absent.

    Raises:
        InvalidInput: naming the class.
    """
    if classes < 2:
        raise InvalidInput("labels of a single class leave nothing to tell apart: give images of two classes or more")
    if len(labels) < classes:
        raise InvalidInput(f"{len(labels)} images are fewer than the {classes} classes: give several of each class")
    absent = torch.nonzero(labels.long().cpu().bincount(minlength=classes) == 0).flatten().tolist()
    if absent:
        raise InvalidInput(
            f"no image is of class {absent[0]} (labels go up to {classes - 1}), so that nothing can be said of it: give images "
            "of every class, or number those that are there from 0 on"
        )


def refuse_degenerate(features: Tensor) -> None:
    """Refuse features in which no images differ, or that are not finite."""
    if not bool(torch.isfinite(features).all()):
        raise InvalidInput("the features hold NaN or infinite values: the network has diverged, or its images hold such values")
    if bool((features == features[:1]).all()):
        raise InvalidInput(
            f"the features of all {len(features)} images are the same, so that nothing separates them: give images that "
            "differ, or leave out a layer that gives a constant"
        )


def parts(labels: Tensor) -> Parts:
    """Divide images at random, always alike, into half of each class to fit, a tenth to choose by, and the rest to score.

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
            f"class {int(counts.argmin())} has {int(counts.min())} images: give {LEAST} or more of each class, since a probe "
            "is fitted with some and scored on others"
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
    """A random order of the images, how many of its own class come before each in it, (N,); and images per class, (classes,).

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
    members = F.one_hot(labels).to(features)  # (N, classes); a product, since index_add on a GPU gives other bits each time
    counts = members.sum(0)
    return members.T @ features / counts.unsqueeze(1), counts


def percent(right: Tensor) -> float:
    """Share of images that were right, in percent; shape (N,), bool."""
    return 100.0 * int(right.sum()) / len(right)


def hits(scores: Tensor, labels: Tensor) -> Tensor:
    """Whether an image's highest score is its label's; shapes (N, classes), (N,) -> (N,), bool."""
    return scores.argmax(1) == labels
