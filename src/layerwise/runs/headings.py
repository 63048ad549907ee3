"""Headings of the measures of features in tables.

No torch: the report and the command line show them without it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

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


def headings_of(lines: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The heading of every measure that a run's lines may hold.

    It is the one that the lines bring, else that of ``HEADINGS``.
    """
    headings = dict(HEADINGS)
    for line in lines:
        brought = line.get("headings")
        for name, text in brought.items() if isinstance(brought, dict) else ():
            if isinstance(text, str):
                headings[name] = text
    return headings


def parse_measures(text: str) -> list[str]:
    """Names of measures joined by commas, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))
