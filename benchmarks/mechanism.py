"""Does separability stall in shallow stages when a network is trained layer-wise, and not when it
is trained globally?

Reads runs that were trained with ``--separability-every`` and prints the accuracy of a linear probe
on held-out images at the stem's and at each stage's end, and what each stage adds to it, after the
last measured epoch: mean and deviation over seeds, in percent and points. Runs that differ in more
than the seed are never averaged. A stage adds where its gain exceeds its standard error times
Student's t for 95 %; where it does not, so few seeds may not tell. Nothing is trained.

    python benchmarks/mechanism.py runs/small --csv results/mechanism.csv
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.special import stdtrit

from layerwise.errors import InvalidInput
from layerwise.paper.rows import match
from layerwise.paper.statistics import UNLIKELY
from layerwise.report.curves import separable
from layerwise.report.tables import hierarchy
from layerwise.runs.records import Record, read_runs
from layerwise.runs.run import Run
from layerwise.utils.csv_text import write_csv

KEYS = ("model", "data", "scale", "hierarchy", "epochs", "rule", "loss")
RULES = {"simultaneous": "layer-wise", "global": "global"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    try:
        table = table_of(read_runs(arguments.runs)[0])
    except InvalidInput as error:
        raise SystemExit(str(error)) from None
    if not table:
        raise SystemExit(
            "no finished run there was measured: train one with --separability-every, and name "
            "its folder"
        )
    for line in table:
        print(
            "  ".join(
                f"{value!s:<{width}}"
                for value, width in zip(
                    line.values(), (9, 7, 9, 12, 6, 10, 8, 5, 8, 7, 9, 7, 9, 7), strict=True
                )
            )
        )
    if arguments.csv:
        write_csv(arguments.csv, tuple(table[0]), table)


def table_of(records: Iterable[Record]) -> list[dict[str, Any]]:
    """The lines of every kind of run, of which each seed counts once: the first."""
    kinds: dict[Run, dict[int, dict[str, float]]] = defaultdict(dict)
    words: dict[Run, tuple[str, ...]] = {}
    for record in records:
        values = stage_ends(record) if record.result and record.run.rule in RULES else {}
        if values:
            kind = replace(record.run, seed=0)
            words[kind] = words_of(record)
            kinds[kind].setdefault(record.run.seed, values)
    in_order = sorted(kinds, key=lambda kind: words[kind])
    return [line for kind in in_order for line in lines(words[kind], list(kinds[kind].values()))]


def words_of(record: Record) -> tuple[str, ...]:
    """A run by the first columns of the table."""
    run = record.run
    loss = run.loss_in_words if run.rule == "simultaneous" else ""
    place = run.model, run.data, match(run).scale, hierarchy(record)
    return *place, str(run.epochs), RULES[run.rule], loss


def stage_ends(record: Record) -> dict[str, float]:
    """The linear probe's accuracy behind the stem (where there is one) and behind every stage,
    shallow to deep.
    """
    rows = separable(record)
    ends = {}
    for row in (row for row in rows if row.epoch == rows[-1].epoch):
        parts = row.name.split(".")
        where = f"stage {int(parts[1]) + 1}" if parts[0] == "stages" else parts[0]
        if "linear_probe" in row.values:
            ends[where] = row.values["linear_probe"]  # the last of a stage stays
    return ends


def lines(key: tuple[str, ...], seeds: list[dict[str, float]]) -> list[dict[str, Any]]:
    """A line per place in depth that was measured with every seed."""
    made, before = [], None
    for place in (place for place in seeds[0] if all(place in seed for seed in seeds)):
        values = [seed[place] for seed in seeds]
        gains: list[float] = (
            [] if before is None else [seed[place] - seed[before] for seed in seeds]
        )
        made.append(
            dict(zip(KEYS, key, strict=True))
            | {"seeds": len(seeds), "after": place}
            | {"probe": f"{mean(values):.2f}", "deviation": spread(values)}
            | {"gain": f"{mean(gains):+.2f}" if gains else "", "gain_deviation": spread(gains)}
            | {"adds": adds(gains) if place.startswith("stage") else ""}
        )
        before = place
    return made


def spread(values: list[float]) -> str:
    return f"{stdev(values):.2f}" if len(values) > 1 else ""


def adds(gains: list[float]) -> str:
    """Whether a gain is told from none; unknown with a single seed."""
    if len(gains) < 2:
        return ""
    error = stdev(gains) / sqrt(len(gains))
    return "yes" if mean(gains) > stdtrit(len(gains) - 1, 1 - UNLIKELY / 2) * error else "not told"


if __name__ == "__main__":
    main()
