"""The paper's kind of table: hierarchies, each trained layer-wise and globally."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from layerwise.build import check_run
from layerwise.errors import InvalidInput, choose
from layerwise.hierarchy import check_stages, format_hierarchy, parse_hierarchy
from layerwise.models import published_hierarchy
from layerwise.progress import clock, shown
from layerwise.rules import RULES
from layerwise.runs import Execution, Run, RunFolder, run_name, write_json
from layerwise.train import Interrupted, train


def compare(
    base: Run, hierarchies: Sequence[str] | None, rules: Sequence[str], seeds: int, output: Path, execution: Execution
) -> dict[str, Any]:
    """Train every hierarchy by every rule and show the table. What is finished is not trained again.

    Raises:
        InvalidInput: a hierarchy or rule is unknown, or a run cannot be carried out.
    """
    if seeds < 1:
        raise InvalidInput(f"seeds {seeds} is too small: give 1 or more")
    for rule in rules:
        choose("rule", rule, RULES)
    published = published_hierarchy(base.model)
    given = hierarchies or [base.hierarchy or format_hierarchy(published)]
    stages = list(dict.fromkeys(map(parse_hierarchy, given)))  # each once
    rules = list(dict.fromkeys(rules))
    for hierarchy in stages:
        check_stages(base.model, hierarchy, published)
    plan = [
        replace(base, hierarchy=",".join(map(str, hierarchy)), rule=rule, seed=base.seed + number)
        for hierarchy in stages
        for rule in rules
        for number in range(seeds)
    ]
    for run in plan:
        check_run(run)
    results = train_all(plan, output, execution)
    rows = [
        summarise(format_hierarchy(hierarchy), rules, [r for r in results if tuple(r["hierarchy"]) == hierarchy])
        for hierarchy in stages
    ]
    table = {"model": base.model, "data": base.data, "rows": rows, "runs": [result["run"] for result in results]}
    digest = hashlib.sha256("".join(table["runs"]).encode()).hexdigest()[:6]
    path = output / f"compare-{base.model}-{base.data}-{digest}.json"
    write_json(path, table)
    show(base, rules, rows, seeds)
    print("written: " + ", ".join(map(str, [path, *table["runs"]])), flush=True)
    return table


def train_all(plan: Sequence[Run], output: Path, execution: Execution) -> list[dict[str, Any]]:
    """Train every run of a plan that is not finished, and return their results.

    Args:
        output: folder that holds the runs, each under its name.

    Raises:
        InvalidInput, Diverged, Busy: see ``train``.
        KeyboardInterrupt: stopped by a signal; everything is saved.
    """
    results: list[dict[str, Any]] = []
    seconds: list[float] = []  # of those trained here
    for number, run in enumerate(plan, start=1):
        folder = RunFolder(output / run_name(run))
        left = f", about {clock(mean(seconds) * (len(plan) - number + 1))} left" if seconds else ""
        print(f"run {number} of {len(plan)}" + (f": already finished, {folder.path}" if folder.finished else left), flush=True)
        began, fresh = time.monotonic(), not folder.finished
        try:
            with shown(units=False) as progress:
                results.append(train(run, folder, execution, resume=True, progress=progress))
        except Interrupted as interruption:
            raise KeyboardInterrupt(f"{interruption}. Go on with the same command") from None
        seconds += [time.monotonic() - began] if fresh else []
    return results


def summarise(hierarchy: str, rules: Sequence[str], results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row: per rule the mean and deviation of test accuracy over seeds, memory and time; the gap to global training."""
    row: dict[str, Any] = {"hierarchy": hierarchy, "parameters": results[0]["parameters"], "rules": {}}
    for rule in rules:
        runs = [result for result in results if result["rule"] == rule]
        accuracies = [result["test_accuracy"] for result in runs]
        peaks = [result["peak_memory_bytes"] for result in runs if result["peak_memory_bytes"] is not None]
        row["rules"][rule] = {
            "test_accuracy": mean(accuracies),
            "deviation": stdev(accuracies) if len(accuracies) > 1 else None,
            "seeds": len(accuracies),
            "peak_memory_bytes": max(peaks, default=None),
            "train_seconds": mean(result["train_seconds"] for result in runs),
        }
    if "global" in rules:
        local = [rule for rule in rules if RULES[rule].at is None]
        best = row["rules"]["global"]["test_accuracy"]
        row["gap"] = {rule: best - row["rules"][rule]["test_accuracy"] for rule in local}
    return row


def show(base: Run, rules: Sequence[str], rows: Sequence[dict[str, Any]], seeds: int) -> None:
    """Print the table: test accuracy of the last epoch in percent, memory in MB (10^6 bytes), time in seconds."""
    local = [rule for rule in rules if RULES[rule].at is None]
    table = Table(title=f"{base.model} on {base.data}, {base.epochs} epochs, {seeds} seed{'s' * (seeds > 1)}: test accuracy, %")
    for heading in ["hierarchy", *rules, *(f"gap of {rule}" for rule in local if "global" in rules), "parameters"]:
        table.add_column(heading, justify="left" if heading == "hierarchy" else "right")
    for heading in ("peak memory, MB", "training time, s"):
        table.add_column(f"{heading} ({' / '.join(rules)})", justify="right")
    for row in rows:
        cells = [row["rules"][rule] for rule in rules]
        table.add_row(
            row["hierarchy"],
            *(f"{c['test_accuracy']:.2f}" + (f" ± {c['deviation']:.2f}" if c["deviation"] is not None else "") for c in cells),
            *(f"{gap:.2f}" for gap in row.get("gap", {}).values()),
            f"{row['parameters']:,}",
            " / ".join("–" if c["peak_memory_bytes"] is None else f"{c['peak_memory_bytes'] / 1e6:.1f}" for c in cells),
            " / ".join(f"{c['train_seconds']:.0f}" for c in cells),
        )
    Console(width=None if Console().is_terminal else 240).print(table)
