"""What the measures of features are called in tables.

No torch: the report and the command line show them without it.
"""

HEADINGS = {
    "linear_probe": "linear probe, %",
    "cross_fitted_probe": "cross-fitted probe, %",
    "nearest_class_mean": "nearest class mean, %",
    "nearest_neighbours": "nearest neighbours, %",
    "fisher": "Fisher's criterion",
    "effective_rank": "effective rank",
    "auxiliary_accuracy": "auxiliary accuracy, %",
    "cka": "CKA",
}


def parse_measures(text: str) -> list[str]:
    """Names of measures joined by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))
