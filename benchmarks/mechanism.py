"""Does separability stall in shallow stages when a network is trained layer-wise, and not when it
is trained globally?

Reads runs that were trained with ``--separability-every`` and prints, for every hierarchy and rule,
the accuracy of a linear probe on held-out images at the stem's and at each stage's end, and what
each stage adds to it, after the last measured epoch: mean and deviation over seeds, in percent and
points. A stage is called stalled where its gain is not above twice the mean's standard error.
Nothing is trained.

    python benchmarks/mechanism.py runs/small --csv results/mechanism.csv
"""

import argparse
from collections import defaultdict
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from layerwise.report.curves import separable
from layerwise.report.tables import hierarchy
from layerwise.runs.records import Record, read_runs
from layerwise.utils.csv_text import csv_text
from layerwise.utils.files import replacing

RULES = {"simultaneous": "layer-wise", "global": "global"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of runs")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    found: dict[tuple[str, ...], list[dict[str, float]]] = defaultdict(list)
    for record in read_runs(arguments.runs)[0]:
        values = stage_ends(record) if record.result and record.run.rule in RULES else {}
        if values:
            loss = record.run.loss if record.run.rule == "simultaneous" else ""
            found[record.run.model, hierarchy(record), RULES[record.run.rule], loss].append(values)
    table = [line for key, seeds in sorted(found.items()) for line in lines(key, seeds)]
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
                    line.values(), (9, 12, 10, 8, 5, 8, 7, 9, 7, 9, 7), strict=True
                )
            )
        )
    if arguments.csv:
        with replacing(arguments.csv) as draft:
            draft.write_text(csv_text(tuple(table[0]), table))


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
    """A line per place in depth."""
    made, before = [], None
    for place in seeds[0]:
        values = [seed[place] for seed in seeds]
        gains: list[float] = (
            [] if before is None else [seed[place] - seed[before] for seed in seeds]
        )
        made.append(
            dict(zip(("model", "hierarchy", "rule", "loss"), key, strict=True))
            | {"seeds": len(seeds), "after": place}
            | {"probe": f"{mean(values):.2f}", "deviation": spread(values)}
            | {"gain": f"{mean(gains):+.2f}" if gains else "", "gain_deviation": spread(gains)}
            | {"stalled": stalled(gains) if place.startswith("stage") else ""}
        )
        before = place
    return made


def spread(values: list[float]) -> str:
    return f"{stdev(values):.2f}" if len(values) > 1 else ""


def stalled(gains: list[float]) -> str:
    """Whether a gain is not above twice its standard error; unknown with a single seed."""
    if len(gains) < 2:
        return ""
    return "no" if mean(gains) > 2 * stdev(gains) / sqrt(len(gains)) else "yes"


if __name__ == "__main__":
    main()
