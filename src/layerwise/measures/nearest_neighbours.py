"""Nearest neighbours: a classifier that needs no linear separation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.measures.base import accuracy, checked, hits, parts

NEIGHBOURS = 10
ROWS = 1024  # rows of distances that are computed at once


@accuracy("nearest neighbours, %")
def nearest_neighbours(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy, percent, of a vote of the ``NEIGHBOURS`` nearest images (Euclidean).

    Neighbours are of the parts to fit and to choose by. Of equal votes the lowest label wins.
    """
    features, labels = checked(features, labels)
    fit, choose, score = parts(labels)
    features = features.double()  # squares of float32 may overflow or vanish
    voters = torch.cat([fit, choose])
    # centred, since distances then have smaller rounding errors
    centre = features[voters].mean(0)
    references, classes = features[voters] - centre, int(labels.max()) + 1
    votes = []
    for rows in score.split(ROWS):
        nearest = (
            torch.cdist(features[rows] - centre, references)
            .topk(min(NEIGHBOURS, len(voters)), largest=False)
            .indices
        )
        votes.append(F.one_hot(labels[voters][nearest], classes).sum(1))  # (rows, classes)
    return hits(
        classes * torch.cat(votes) - torch.arange(classes, device=labels.device), labels[score]
    )
