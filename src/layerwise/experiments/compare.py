"""The paper's kind of table: hierarchies, each trained layer-wise and globally."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.table import Table

from layerwise.errors import check_range, choose
from layerwise.experiments.engines import Engine
from layerwise.experiments.entry import entries
from layerwise.experiments.sweep import trained
from layerwise.hierarchy import check_stages, format_hierarchy, parse_hierarchy
from layerwise.models import hierarchical, published_hierarchy
from layerwise.rules import RULES
from layerwise.runs.ranges import MOST_SEEDS
from layerwise.runs.run import Execution, Run, file_words
from layerwise.training.declared_options import check_rule_options, with_rule
from layerwise.utils import terminal
from layerwise.utils.files import refuse_foreign, write_json
from layerwise.utils.words import counted, plus_minus

TABLE_BEGINS = '{\n "model"'  # as the file of a table does


def compare(
    base: Run,
    hierarchies: Sequence[str] | None,
    rules: Sequence[str],
    seeds: int,
    output: Path,
    execution: Execution,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Train every hierarchy by every rule and print the table.

    Finished runs are not trained again.

    Args:
        engine: whose workers train the runs; None: this process.

    Raises:
        InvalidInput: a hierarchy or rule is unknown, or a run cannot be carried out.
    """
    check_range("seeds", seeds, 1, MOST_SEEDS)
    for rule in rules:
        choose("rule", rule, RULES)
    rules = list(dict.fromkeys(rules))
    check_rule_options(base, rules)
    stages = stages_of(base, hierarchies)
    runs = [
        replace(with_rule(base, rule), hierarchy=hierarchy, seed=base.seed + number)
        for hierarchy in stages
        for rule in rules
        for number in range(seeds)
    ]
    wanted = entries(runs, output, execution)
    path = table_path(base, output, [str(entry.folder.path) for entry in wanted])
    refuse_foreign("--output", path, TABLE_BEGINS, "compare")
    results = trained(wanted, engine)
    groups = [
        results[start : start + len(runs) // len(stages)] for start in group_starts(runs, stages)
    ]
    rows = [
        summarise(hierarchy_text(base, hierarchy), rules, group)
        for hierarchy, group in zip(stages, groups, strict=True)
    ]
    table = {
        "model": base.model,
        "data": base.data,
        "rows": rows,
        "runs": [result["run"] for result in results],
    }
    write_json(path, table)
    print_table(base, rules, rows, seeds)
    print("written: " + ", ".join(map(str, [path, *table["runs"]])), flush=True)
    return table


def table_path(base: Run, output: Path, folders: Sequence[str]) -> Path:
    """The file of a table of such runs."""
    digest = hashlib.sha256("".join(folders).encode(errors="surrogateescape")).hexdigest()[:6]
    return output / f"compare-{file_words(base.model)}-{base.data}-{digest}.json"


def stages_of(base: Run, hierarchies: Sequence[str] | None) -> list[str | None]:
    """The hierarchies to compare, each once, in one spelling; None for a network without any.

    Raises:
        InvalidInput: the network has none, or not of so many stages.
    """
    if base.model not in hierarchical() and not hierarchies:
        return [None]
    published = published_hierarchy(base.model)
    texts = hierarchies or [base.hierarchy or format_hierarchy(published)]
    stages = list(dict.fromkeys(map(parse_hierarchy, texts)))
    for hierarchy in stages:
        check_stages(base.model, hierarchy, published)
    return [",".join(map(str, hierarchy)) for hierarchy in stages]


def hierarchy_text(base: Run, hierarchy: str | None) -> str:
    return format_hierarchy(parse_hierarchy(hierarchy)) if hierarchy else base.model


def group_starts(runs: Sequence[Run], stages: Sequence[str | None]) -> range:
    """Where each hierarchy's runs begin: the plan has as many of each."""
    return range(0, len(runs), len(runs) // len(stages))


def is_local(rule: str) -> bool:
    """Whether a rule leaves it to the run where units end."""
    return RULES[rule].at is None


def summarise(
    hierarchy: str, rules: Sequence[str], results: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """One row of the table.

    Per rule it has the mean and deviation of test accuracy over seeds, memory and time, and the gap
    to global training.
    """
    row: dict[str, Any] = {
        "hierarchy": hierarchy,
        "parameters": results[0]["parameters"],
        "rules": {},
    }
    for rule in rules:
        runs = [result for result in results if result["rule"] == rule]
        accuracies = [result["test_accuracy"] for result in runs]
        peaks = [
            result["peak_memory_bytes"]
            for result in runs
            if result["peak_memory_bytes"] is not None
        ]
        row["rules"][rule] = {
            "test_accuracy": mean(accuracies),
            "deviation": stdev(accuracies) if len(accuracies) > 1 else None,
            "seeds": len(accuracies),
            "peak_memory_bytes": max(peaks, default=None),
            "train_seconds": mean(result["train_seconds"] for result in runs),
        }
    if "global" in rules:
        local = [rule for rule in rules if is_local(rule)]
        best = row["rules"]["global"]["test_accuracy"]
        row["gap"] = {rule: best - row["rules"][rule]["test_accuracy"] for rule in local}
    return row


def print_table(
    base: Run, rules: Sequence[str], rows: Sequence[dict[str, Any]], seeds: int
) -> None:
    """Print the table of test accuracy after the last epoch, in percent.

    Memory is in MB (10^6 bytes), time in seconds.
    """
    local = [rule for rule in rules if is_local(rule)]
    length = f"{counted(base.epochs, 'epoch')}, {counted(seeds, 'seed')}"
    table = Table(title=f"{base.model} on {base.data}, {length}: test accuracy, %")
    for heading in [
        "hierarchy",
        *rules,
        *(f"gap of {rule}" for rule in local if "global" in rules),
        "parameters",
    ]:
        table.add_column(heading, justify="left" if heading == "hierarchy" else "right")
    for heading in ("peak memory, MB", "training time, s"):
        table.add_column(f"{heading} ({' / '.join(rules)})", justify="right")
    for row in rows:
        cells = [row["rules"][rule] for rule in rules]
        table.add_row(
            row["hierarchy"],
            *(f"{c['test_accuracy']:.2f}{plus_minus(c['deviation'])}" for c in cells),
            *(f"{gap:.2f}" for gap in row.get("gap", {}).values()),
            f"{row['parameters']:,}",
            " / ".join(
                "–" if c["peak_memory_bytes"] is None else f"{c['peak_memory_bytes'] / 1e6:.1f}"
                for c in cells
            ),
            " / ".join(f"{c['train_seconds']:.0f}" for c in cells),
        )
    terminal.print_table(table)
