"""Fisher's criterion: scatter between the classes over scatter within them."""

import torch
from torch import Tensor

from layerwise.errors import InvalidInput
from layerwise.measures.base import checked, class_means, measure

SHRINKAGE = 0.1  # of the within-class scatter towards a multiple of the identity


@measure("Fisher's criterion")
def fisher(features: Tensor, labels: Tensor) -> float:
    """Fisher's criterion tr(W⁻¹B), 0 or more: scatter between the classes over scatter within them.

    B = Σ nₖ/N (μₖ − μ)(μₖ − μ)' and W = 1/N Σ (x − μₖ)(x − μₖ)', shrunk to (1 − γ)W + γ tr(W)/F · I
    with γ = ``SHRINKAGE`` (Fukunaga 1990, section 10.2; Friedman 1989). All images are used, none
    is held out. Larger is better.

    Raises:
        InvalidInput: also when the images of each class are all alike, where it is infinite.
    """
    features, labels = checked(features, labels)
    values = features.double()
    means, counts = class_means(values, labels)
    within = values - means[labels]
    scatter = within.T @ within / len(values)  # (F, F)
    rounding = torch.finfo(values.dtype).eps ** 2 * values.square().sum(1).mean()
    if float(scatter.trace()) <= 64 * float(rounding):
        raise InvalidInput(
            "Cannot compute Fisher's criterion: it is infinite, since all features of each class "
            "are the same. Leave out fisher, or give more images."
        )
    shrunk = (1 - SHRINKAGE) * scatter + SHRINKAGE * scatter.trace() / len(scatter) * torch.eye(
        len(scatter)
    ).to(scatter)
    # (classes, F); B = between'between
    between = (means - values.mean(0)) * (counts / len(values)).sqrt().unsqueeze(1)
    return float((between.T * torch.cholesky_solve(between.T, torch.linalg.cholesky(shrunk))).sum())
