"""Local losses, spans and rules on one network, data, schedule and validation protocol.

Every method's costs stand beside its accuracy: true unit count, span, multiply-adds of a step
relative to that of global training, head parameters, memory predicted and measured, seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from layerwise.errors import InvalidInput, check_range, choose
from layerwise.experiments.compare import TABLE_BEGINS, table_path
from layerwise.experiments.engines import Engine
from layerwise.experiments.entry import entries
from layerwise.experiments.methods.budget import EQUAL, equal_epochs
from layerwise.experiments.methods.plan import (
    Method,
    methods_of,
    reference_of,
    refuse_one_unit,
)
from layerwise.experiments.methods.table import (
    CSV_BEGINS,
    mark_fronts,
    print_table,
    write_rows,
)
from layerwise.experiments.sweep import trained
from layerwise.profiling.budget import plan_run
from layerwise.profiling.costs import StepCosts, step_costs
from layerwise.profiling.plot import check_figure
from layerwise.runs.ranges import MOST_SEEDS
from layerwise.runs.run import Execution, Run
from layerwise.training.declared_options import with_rule
from layerwise.utils.csv_text import check_csv
from layerwise.utils.files import refuse_foreign, write_json


@dataclass(frozen=True)
class Comparison:
    """What is compared, and how.

    Attributes:
        losses: local losses, trained by the rule simultaneous, and by local rules among ``rules``;
            several by unit are one text, such as ``dgl-cnn,4=pred``.
        spans: of the rule simultaneous: how many units a loss reaches, or text such as ``1,4=3``.
        rules: orders of updates beside it.
        equal: what all methods spend alike, in ``EQUAL``.
        seeds: number of runs of each method.
        csv, figure: files that are also written, or None.
    """

    losses: Sequence[str]
    spans: Sequence[int | str]
    rules: Sequence[str]
    equal: str = "epochs"
    seeds: int = 1
    csv: str | None = None
    figure: str | None = None


def compare_methods(
    base: Run,
    comparison: Comparison,
    output: Path,
    execution: Execution,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Train every method over seeds, print the table, and write it.

    Finished runs are not trained again.

    Args:
        engine: whose workers train the runs; None: this process.

    Raises:
        InvalidInput, CannotSplit: a loss, span or rule is unknown or fits not, an option belongs to
            none of them, or a file cannot be written; nothing was trained.
    """
    check_range("seeds", comparison.seeds, 1, MOST_SEEDS)
    choose("equal", comparison.equal, EQUAL)
    check_files(comparison)
    methods = [
        replace(method, run=plan_run(method.run, execution, reference=True)[0])
        for method in methods_of(base, comparison.losses, comparison.spans, comparison.rules)
    ]
    entries([method.run for method in methods], output, execution)
    costs = {method.name: step_costs(method.run, execution) for method in methods}
    refuse_one_unit(methods, costs)
    whole = step_costs(with_rule(methods[0].run, "global"), execution)
    epochs = equal_epochs(comparison.equal, methods, costs, output, execution)
    runs = [
        replace(method.run, epochs=epochs[method.name], seed=base.seed + number)
        for method in methods
        for number in range(comparison.seeds)
    ]
    labels = [
        f"{method.name}, seed {base.seed + number}"
        for method in methods
        for number in range(comparison.seeds)
    ]
    wanted = entries(runs, output, execution, labels)
    path = table_path(base, output, [str(entry.folder.path) for entry in wanted])
    refuse_foreign("--output", path, TABLE_BEGINS, "compare")
    results = trained(wanted, engine)
    rows = [
        summarise(method, base.epochs, costs[method.name], whole, of_seeds)
        for method, of_seeds in zip(methods, groups(results, comparison.seeds), strict=True)
    ]
    mark_fronts(rows)
    table = {
        "model": base.model,
        "data": base.data,
        "equal": comparison.equal,
        "reference": reference_of(methods).name,
        "epochs": base.epochs,
        "batch_size": base.batch_size,
        "rows": rows,
        "runs": [result["run"] for result in results],
    }
    write(path, table, comparison)
    return table


def check_files(comparison: Comparison) -> None:
    """Refuse files that could not be written in the end.

    Raises:
        InvalidInput: as said.
    """
    csv, figure = comparison.csv, comparison.figure
    if csv is not None and figure is not None and Path(csv).absolute() == Path(figure).absolute():
        raise InvalidInput(
            f"Cannot write --csv and --figure into one file, {csv}. Give another path to one."
        )
    if csv is not None:
        check_csv(Path(csv), CSV_BEGINS, "compare")
    if figure is not None:
        check_figure(figure, "compare")


def groups(results: Sequence[dict[str, Any]], size: int) -> list[Sequence[dict[str, Any]]]:
    """Results of each method, over its seeds."""
    return [results[start : start + size] for start in range(0, len(results), size)]


def summarise(
    method: Method,
    epochs: int,
    costs: StepCosts,
    whole: StepCosts,
    results: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """One row of the table: accuracies in percent, of the last epoch; memory in bytes.

    Args:
        epochs: of a run whose epochs are not scaled.
        whole: costs of a step of global training.
    """
    accuracies = [result["test_accuracy"] for result in results]
    validation = [result["val_accuracy"] for result in results]
    peaks = [result["peak_memory_bytes"] for result in results]
    ratio = costs.multiply_adds / whole.multiply_adds
    paces = [result["images_per_second"] for result in results]
    trained_epochs = results[0]["epochs"] // costs.turns  # of each unit, where they take turns
    return {
        "method": method.name,
        "rule": method.run.rule,
        "loss": method.loss,
        "span": method.span,
        **asdict(costs),
        "multiply_adds_ratio": ratio,
        "epochs": trained_epochs,
        "training_ratio": ratio * trained_epochs / epochs,
        "peak_memory_bytes": None if None in peaks else max(peaks),
        "step_seconds": mean(method.run.batch_size * costs.turns / pace for pace in paces)
        if all(paces)
        else None,
        "train_seconds": mean(result["train_seconds"] for result in results),
        "test_accuracy": mean(accuracies),
        "deviation": stdev(accuracies) if len(accuracies) > 1 else None,
        "val_accuracy": None if None in validation else mean(validation),
        "best_exit_accuracy": mean_of("best_exit", results),
        "ensemble_accuracy": mean_of("ensemble", results),
        "seeds": len(results),
    }


def mean_of(part: str, results: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean test accuracy of an early exit or of the ensemble; None where a result lacks it."""
    parts = [result[part]["test_accuracy"] for result in results if part in result]
    return mean(parts) if len(parts) == len(results) else None


def write(path: Path, table: dict[str, Any], comparison: Comparison) -> None:
    """Print the table and write it as JSON, and as CSV and a figure where they are asked for."""
    write_json(path, table)
    print_table(table)
    files = [str(path)]
    if comparison.csv is not None:
        write_rows(Path(comparison.csv), table)
        files.append(comparison.csv)
    if comparison.figure is not None:
        from layerwise.experiments.methods.figure import write_figure

        write_figure(Path(comparison.figure), table)
        files.append(comparison.figure)
    print("written: " + ", ".join([*files, *table["runs"]]), flush=True)
