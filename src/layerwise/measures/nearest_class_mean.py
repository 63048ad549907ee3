"""The nearest class mean: a classifier that fits nothing but means."""

import torch
from torch import Tensor

from layerwise.measures.base import accuracy, checked, class_means, hits, parts


@accuracy("nearest class mean, %")
def nearest_class_mean(features: Tensor, labels: Tensor) -> Tensor:
    """Accuracy, percent, of choosing the class whose mean is nearest (Euclidean).

    Means are of the parts to fit and to choose by.
    """
    features, labels = checked(features, labels)
    fit, choose, score = parts(labels)
    references = torch.cat([fit, choose])
    means = class_means(features[references].double(), labels[references])[0]
    distances = torch.cdist(
        features[score].double(), means, compute_mode="donot_use_mm_for_euclid_dist"
    )
    return hits(-distances, labels[score])
