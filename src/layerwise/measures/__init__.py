"""Measures of features by name: how well they separate classes, how many directions they use.

A measure of your own is a function ``(features, labels) -> float``, made by ``measure(heading)`` or
``accuracy(heading)``, and one line in ``MEASURES``.
"""

from layerwise.measures.base import Accuracy, Measure, accuracy, checked, heading_of, measure
from layerwise.measures.cka import linear_cka
from layerwise.measures.effective_rank import effective_rank
from layerwise.measures.fisher import fisher
from layerwise.measures.linear_probe import cross_fitted_probe, linear_probe
from layerwise.measures.nearest_class_mean import nearest_class_mean
from layerwise.measures.nearest_neighbours import nearest_neighbours

MEASURES: dict[str, Measure] = {
    "linear_probe": linear_probe,
    "cross_fitted_probe": cross_fitted_probe,
    "nearest_class_mean": nearest_class_mean,
    "nearest_neighbours": nearest_neighbours,
    "fisher": fisher,
    "effective_rank": effective_rank,
}

__all__ = [
    "MEASURES",
    "Accuracy",
    "Measure",
    "accuracy",
    "checked",
    "heading_of",
    "linear_cka",
    "measure",
]
