"""``layerwise compare``: hierarchies, or local losses and spans, in one table."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layerwise.cli.engines import add_engine, engine_of
from layerwise.cli.options import Parser, add_config, add_fields, folder_name
from layerwise.cli.values import collect_both
from layerwise.errors import InvalidInput, brief
from layerwise.runs.run import ON_RANKS, Execution, Run
from layerwise.utils.options import Options, as_numbers

NUMBER = r"\d{1,6}"
SPANS = rf"{NUMBER}(={NUMBER})?(/{NUMBER}(={NUMBER})?)*"  # of all units, or by unit
HIERARCHY_RULES = ["simultaneous", "global"]
OF_LOSSES = ("equal", "csv", "figure")  # options of a comparison of losses alone


def add_arguments(parser: Parser) -> None:
    add_config(parser)
    parser.add_argument(
        "--output",
        "-o",
        type=folder_name,
        default="runs",
        metavar="FOLDER",
        help="folder for the runs (default: runs)",
    )
    parser.add_argument(
        "--hierarchies", nargs="+", metavar="H", help="hierarchies, such as 2,2,2,2 1,1,2,2"
    )
    parser.add_argument(
        "--losses",
        metavar="A,B",
        help="local losses to compare, joined by commas, with their costs; dgl-cnn/4=pred is "
        "dgl-cnn, and pred from unit 4 on; see docs/compare.md",
    )
    parser.add_argument(
        "--span",
        metavar="N,M",
        help="spans to train each loss with, joined by commas: how many units a loss reaches by "
        "the rule simultaneous (default: 1); 1/4=3 is 1, and from unit 4 on 3; 1/1/2/2 is of each "
        "unit",
    )
    parser.add_argument(
        "--rules",
        nargs="+",
        metavar="RULE",
        help="orders of updates (default: simultaneous global), or with --losses those beside "
        "simultaneous (default: global)",
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="runs of each, with seeds from --seed on (default: 1)"
    )
    parser.add_argument(
        "--equal",
        metavar="WHAT",
        help="with --losses: what is equal for all methods: epochs (default), multiply-adds or "
        "time, by scaling epochs to the cost of global training for --epochs",
    )
    parser.add_argument("--csv", metavar="FILE", help="with --losses: write the table as CSV")
    parser.add_argument(
        "--figure",
        metavar="FILE",
        help="with --losses: draw accuracy against multiply-adds and memory, as .svg or .png",
    )
    add_engine(parser)
    add_fields(parser, Run, skip={"model", "hierarchy", "rule", "span"})
    add_fields(parser, Execution, skip={"separability_against", *ON_RANKS})


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    spans = read_spans(parsed.span)
    rules = [name for text in parsed.rules or () for name in names(text)]
    if parsed.losses is None and (not spans or len(parsed.hierarchies or ()) > 1):
        return run_hierarchies(parsed, rules or HIERARCHY_RULES, spans)
    return run_methods(parsed, rules or ["global"], spans)


def run_hierarchies(
    parsed: argparse.Namespace, rules: Sequence[str], spans: Sequence[int | str]
) -> dict[str, Any]:
    from layerwise.experiments.compare import compare

    for name in OF_LOSSES:
        if getattr(parsed, name) is not None:
            raise InvalidInput(
                f"Cannot use --{name} where hierarchies are compared: it is of a comparison of "
                "local losses. Give --losses, or leave it out."
            )
    if len(spans) > 1:
        refuse_hierarchies()
    base, execution = collect_both(parsed, rules)
    if spans:
        base = replace(base, rule_options=Options({**base.rule_options, "span": spans[0]}))
    output, engine = Path(parsed.output), engine_of(parsed)
    return compare(base, parsed.hierarchies, rules, parsed.seeds, output, execution, engine)


def run_methods(
    parsed: argparse.Namespace, rules: Sequence[str], spans: Sequence[int | str]
) -> dict[str, Any]:
    from layerwise.experiments.compare import stages_of
    from layerwise.experiments.methods import Comparison, compare_methods

    if parsed.losses is not None and getattr(parsed, "loss", None) is not None:
        raise InvalidInput(
            "Cannot use --loss with --losses: both say what is trained. Leave one of them out."
        )
    if len(parsed.hierarchies or ()) > 1:
        refuse_hierarchies()
    base, execution = collect_both(parsed, list(dict.fromkeys(["simultaneous", *rules])))
    if base.loss_from and parsed.losses is not None:
        raise InvalidInput(
            "Cannot use --loss-from with --losses: both say what is trained. Give it with the loss "
            "that it follows, such as --losses dgl-cnn/4=pred."
        )
    if parsed.hierarchies:
        base = replace(base, hierarchy=stages_of(base, parsed.hierarchies)[0])
    comparison = Comparison(
        losses=with_units(names(parsed.losses)) if parsed.losses is not None else own_loss(base),
        spans=spans or [as_numbers(base.rule_options.get("span", 1))],
        rules=rules,
        equal="epochs" if parsed.equal is None else parsed.equal,
        seeds=parsed.seeds,
        csv=parsed.csv,
        figure=parsed.figure,
    )
    output, engine = Path(parsed.output), engine_of(parsed)
    return compare_methods(base, comparison, output, execution, engine)


def refuse_hierarchies() -> None:
    raise InvalidInput(
        "Cannot compare several hierarchies and several losses or spans at once: a table has one "
        "of both. Give one hierarchy, or leave out --losses and give one --span."
    )


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def with_units(words: Sequence[str]) -> list[str]:
    """Losses or spans by unit, between whose parts a slash stands for the comma of one.

    Numbers have one spelling, so that one method is not trained twice.
    """
    # zeros before a number that stands alone between commas and equal signs, not in a name
    return [re.sub(r"(?<![^,=])0+(?=\d+(?![^,=]))", "", word.replace("/", ",")) for word in words]


def own_loss(base: Run) -> list[str]:
    """The run's loss, with those that follow from later units on."""
    return [",".join(filter(None, (base.loss, base.loss_from)))]


def read_spans(text: str | None) -> list[int | str]:
    """Spans joined by commas, each a number or by unit; none where the option is not given.

    Raises:
        InvalidInput: they are no spans.
    """
    words = names(text) if text is not None else []
    if not all(re.fullmatch(SPANS, word, re.ASCII) for word in words):
        raise InvalidInput(
            f"Cannot use --span {brief(repr(text))}: it is not a list of numbers of units. Give 1 "
            "or more, joined by commas, such as 1,2; of several units with slashes, such as 1/4=3."
        )
    return [as_numbers(word) for word in with_units(words)]
