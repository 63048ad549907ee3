"""Linear probes: how well a linear classifier tells the classes apart."""

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.measures.base import FOLDS, accuracy, checked, folds, hits, parts

# strengths of ridge regression, the strongest first
STRENGTHS = [10.0**exponent for exponent in range(2, -6, -1)]
# share of the scatter below which the difference of two sums has lost too much precision
CANCELLED = 1e-6


@accuracy("linear probe, %")
def linear_probe(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a linear classifier, percent: ridge regression onto the one-hot labels.

    Weights are (X'X + λI)⁻¹X'Y of centred features and labels of the part to fit. λ is the one of
    ``STRENGTHS``, in multiples of the mean eigenvalue of X'X, that does best on the part to choose
    by, the strongest of equals (Hoerl & Kennard 1970; the linear probes of Alain & Bengio 2016).
    """
    features, labels = checked(features, labels)
    fit, choose, score = parts(labels)
    inputs, targets = features[fit].double(), F.one_hot(labels[fit]).double()
    mean, share = inputs.mean(0), targets.mean(0)
    inputs -= mean
    gram, moments = inputs.T @ inputs, inputs.T @ (targets - share)  # (F, F), (F, classes)
    weights = best_ridge(gram, moments, share, features[choose].double() - mean, labels[choose])
    return hits((features[score].double() - mean) @ weights + share, labels[score])


@accuracy("cross-fitted probe, %")
def cross_fitted_probe(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a linear classifier on all images, percent, each fold by a probe of the others.

    A probe as in ``linear_probe`` is fitted to two of four folds, its strength is the one that does
    best on the third, and the fourth is scored. So every image is scored once, and the accuracy is
    more precise than that of few held-out images (Stone 1974).
    """
    features, labels = checked(features, labels)
    pieces = folds(labels)
    inputs, targets = features.double() - features.double().mean(0), F.one_hot(labels).double()
    grams = torch.stack([inputs[piece].T @ inputs[piece] for piece in pieces])  # (FOLDS, F, F)
    # (FOLDS, F, classes)
    moments = torch.stack([inputs[piece].T @ targets[piece] for piece in pieces])
    right = []
    for number, score in enumerate(pieces):
        chosen = (number + 1) % FOLDS
        fitted = [fold for fold in range(FOLDS) if fold not in (number, chosen)]
        fit = torch.cat([pieces[fold] for fold in fitted])
        mean, share = inputs[fit].mean(0), targets[fit].mean(0)
        gram = grams[fitted].sum(0) - len(fit) * torch.outer(mean, mean)
        moment = moments[fitted].sum(0) - len(fit) * torch.outer(mean, share)
        # features that hardly vary in these folds: the difference is rounding
        if gram.trace() < CANCELLED * grams[fitted].sum(0).trace():
            centred = inputs[fit] - mean
            gram, moment = centred.T @ centred, centred.T @ (targets[fit] - share)
        held = inputs[pieces[chosen]] - mean, labels[pieces[chosen]]
        weights = best_ridge(gram, moment, share, *held)
        right.append(hits((inputs[score] - mean) @ weights + share, labels[score]))
    return torch.cat(right)


def best_ridge(
    gram: Tensor, moments: Tensor, share: Tensor, held: Tensor, labels: Tensor
) -> Tensor:
    """The weights of the best of ``STRENGTHS`` on held-out images, the strongest of equals."""
    scale, best, weights = gram.trace() / len(gram), -1, moments
    for strength in STRENGTHS:
        tried = ridge(gram, moments, float(strength * scale))
        right = int(hits(held @ tried + share, labels).sum())
        if right > best:
            best, weights = right, tried
    return weights


def ridge(gram: Tensor, moments: Tensor, strength: float) -> Tensor:
    """Weights (G + λI)⁻¹M; shapes (F, F), (F, classes) -> (F, classes)."""
    if strength <= 0:  # all features of the part to fit are the same
        return torch.zeros_like(moments)
    return torch.cholesky_solve(
        moments, torch.linalg.cholesky(gram + strength * torch.eye(len(gram)).to(gram))
    )
