"""``layerwise list``: what can be chosen from."""

import argparse
from collections.abc import Mapping
from typing import Any

from layerwise.cli.options import Parser
from layerwise.errors import choose
from layerwise.utils.options import as_flag, first_line, options_of

LISTS = ("models", "losses", "rules", "datasets", "measures", "presets")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("what", metavar="{" + ",".join(LISTS) + "}", help="what to list")


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    """Print the names of one kind with a few words each, and return them."""
    rows = entries(choose("list", parsed.what, LISTS))
    width = max(map(len, rows))
    for name, text in rows.items():
        print(f"{name:<{width}}  {text}")
    if parsed.what == "models":
        print("Also: timm:NAME, torchvision:NAME, hf:NAME, FILE.py:FUNCTION (docs/networks.md)")
    if parsed.what == "losses":
        print(f"Any loss also carries terms: {' '.join(map(as_flag, terms()))}")
    return {parsed.what: list(rows)}


def entries(what: str) -> dict[str, str]:
    """The registered names of a kind, each in a few words, read from the registry itself."""
    if what == "datasets":
        from layerwise.data import DATASETS

        return {name: dataset.describe() for name, dataset in DATASETS.items()}
    if what == "measures":
        from layerwise.measures import MEASURES

        return {name: with_options(measure) for name, measure in MEASURES.items()}
    if what == "presets":
        from layerwise.experiments.presets import presets

        return {name: preset.text for name, preset in presets().items()}
    if what == "losses":
        from layerwise.losses import LOSSES

        return {name: with_options(loss) for name, loss in LOSSES.items()}
    from layerwise.training.declared_options import registries

    registry: Mapping[str, Any] = registries()[{"models": "model", "rules": "rule"}[what]]
    return {name: with_options(factory) for name, factory in registry.items()}


def terms() -> list[str]:
    """Names of the terms that any loss can carry, which are options too."""
    from layerwise.losses.terms import TERMS

    return list(TERMS)


def with_options(factory: Any) -> str:
    """A factory's first line, and the options that it declares."""
    names = [as_flag(name) for name in options_of(factory)]
    return first_line(factory) + (f" [{' '.join(names)}]" if names else "")
