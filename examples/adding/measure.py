"""A measure of your own: --import measure.py, then layerwise separability RUN --measures mine."""

import layerwise
from layerwise.measures import checked, measure


@measure("spread of class means, %")
def mine(features, labels):
    """Variance of the class means as a share of the features' variance."""
    features, labels = checked(features, labels)
    features = features.double()
    means = [features[labels == label].mean(0) for label in labels.unique()]
    between = sum((mean - features.mean(0)).square().sum() for mean in means) / len(means)
    return float(100 * between / features.var(0).sum())


layerwise.MEASURES["mine"] = mine
