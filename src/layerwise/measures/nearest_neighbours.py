"""Nearest neighbours: a classifier that needs no linear separation."""

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.measures.base import accuracy, checked, hits, parts

NEIGHBOURS = 10
ROWS = 1024  # of a matrix of distances that are computed at once


@accuracy("nearest neighbours, %")
def nearest_neighbours(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a vote of the ``NEIGHBOURS`` nearest images (Euclidean), percent; of equal votes
    the lowest label wins.

    Neighbours are of the parts to fit and to choose by.
    """
    features, labels = checked(features, labels)
    fit, choose, score = parts(labels)
    known = torch.cat([fit, choose])
    centre = features[known].mean(0)  # distances of centred features round less
    references, classes = features[known] - centre, int(labels.max()) + 1
    votes = []
    for rows in score.split(ROWS):
        nearest = (
            torch.cdist(features[rows] - centre, references)
            .topk(min(NEIGHBOURS, len(known)), largest=False)
            .indices
        )
        votes.append(F.one_hot(labels[known][nearest], classes).sum(1))  # (rows, classes)
    return hits(
        classes * torch.cat(votes) - torch.arange(classes, device=labels.device), labels[score]
    )
