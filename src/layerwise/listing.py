"""What can be chosen from, read from the registries themselves."""

from typing import Any

from layerwise.data import DATASETS
from layerwise.hierarchy import format_hierarchy
from layerwise.losses import LOSSES
from layerwise.measures import MEASURES
from layerwise.models import MODELS
from layerwise.rules import RULES


def first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def listing(what: str) -> dict[str, Any]:
    """Print the names of one kind with a few words each, and return them."""
    rows = {
        "models": {name: f"published as {format_hierarchy(hierarchy)}" for name, (_, hierarchy) in MODELS.items()},
        "losses": {name: first_line(loss) for name, loss in LOSSES.items()},
        "rules": {
            name: first_line(rule.order) if name != "global" else "Global backpropagation: the chain with one unit."
            for name, rule in RULES.items()
        },
        "datasets": {name: data.describe() for name, data in DATASETS.items()},
        "measures": {name: first_line(measure) for name, measure in MEASURES.items()},
    }[what]
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")
    return {what: list(rows)}
