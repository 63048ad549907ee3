"""Local losses and orders of updates as they were trained: accuracy beside what each method costs.

    mkdir -p runs/methods && tar -xzf results/methods-runs.tar.gz -C runs/methods
    python benchmarks/methods.py runs/methods/* --csv results/methods-small.csv --table
    results/methods.csv --figure docs/images/methods.svg

Finished runs of `layerwise train` that differ in method, learning rate and seed. `--csv` has a line
per run. `--table` has a line per network and method: rates are the ones that are best on validation
(seed 0), and costs of a step are predicted for a batch of 1,024, relative to global training.
`--figure` draws the methods of one network, but those that `--hide` names. Runs in bfloat16
(`amp`) and in float32 are compared apart. Checkpointed training has the bits of global training, so
that it is not trained apart.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from layerwise.errors import InvalidInput
from layerwise.experiments.methods.figure import draw
from layerwise.experiments.methods.table import mark_fronts
from layerwise.hierarchy import format_hierarchy, parse_hierarchy
from layerwise.profiling.costs import StepCosts, step_costs
from layerwise.report.figures.style import DPI, RULES
from layerwise.runs.command import command
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.utils.csv_text import write_csv
from layerwise.utils.files import figure_metadata, replacing

BATCH = 1024
METHOD = ("rule", "rule_options", "loss", "loss_options", "loss_from", "at", "output_layer")
RATES = ("lr", "head_lr_factor")


@dataclass(frozen=True)
class Trained:
    """A finished run: its record and its result."""

    run: Run
    record: dict[str, Any]
    result: dict[str, Any]
    last: dict[str, Any]  # line of its log

    @property
    def best_exit(self) -> float | None:
        """Test accuracy of the head that is best on validation after the last epoch."""
        held_out = {unit["index"]: unit.get("val_accuracy") for unit in self.last["units"]}
        exits = self.result.get("exits", [])
        if not exits or any(held_out.get(row["index"]) is None for row in exits):
            return None
        best = max(exits, key=lambda row: held_out[row["index"]])
        return float(best["test_accuracy"])

    @property
    def accuracy(self) -> float:
        return float(self.result["test_accuracy"])

    @property
    def ensemble(self) -> float | None:
        found = self.result.get("ensemble")
        return found["test_accuracy"] if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--figure", type=Path)
    parser.add_argument(
        "--model", default="resnet18", help="network of the figure, where most methods were trained"
    )
    parser.add_argument(
        "--hide", action="append", default=[], help="method that the figure leaves out; repeatable"
    )
    arguments = parser.parse_args()
    trained = [item for path in arguments.runs if (item := read(path)) is not None]
    networks = grouped(trained, network_of)
    if not any(network[0].run.model == arguments.model for network in networks):
        parser.error(f"no run of {arguments.model} in these folders is finished")
    try:
        tables = list(map(rows_of, networks))
    except InvalidInput as error:
        parser.error(str(error))
    table = [row for rows in tables for row in rows]
    if not any(row["model"] == arguments.model for row in table):
        parser.error(f"no run of {arguments.model} in these folders has seed 0, which rates are of")
    lines = list(map(line_of, trained))
    write_csv(arguments.csv, tuple(lines[0]), lines)
    for row in table:
        print(*row.values(), sep="  ")
    write_csv(arguments.table, tuple(table[0]), table)
    if arguments.figure:
        drawn = [
            (rows, network[0].run.epochs)
            for rows, network in zip(tables, networks, strict=True)
            if rows and rows[0]["model"] == arguments.model
        ]
        rows, epochs = max(drawn, key=lambda pair: len(pair[0]))
        shown = [row for row in rows if row["method"] not in arguments.hide]
        write_figure(arguments.figure, shown, epochs)


def read(path: Path) -> Trained | None:
    folder = RunFolder(path)
    if not folder.has_ended:
        return None
    return Trained(folder.run(), folder.facts(), folder.result(), folder.log()[-1])


def without(run: Run, *names: str) -> Run:
    """A run with the defaults of some fields."""
    default = Run()
    return replace(run, **{name: getattr(default, name) for name in names})


def network_of(item: Trained) -> Run:
    """What the runs of one comparison have in common: all but the method, rates and the seed."""
    return without(item.run, *METHOD, *RATES, "seed")


def setting_of(item: Trained) -> Run:
    return without(item.run, "seed")


def method_of(item: Trained) -> Run:
    return without(item.run, *RATES, "seed")


def grouped(items: Iterable[Trained], key: Any) -> list[list[Trained]]:
    groups = defaultdict[Any, list[Trained]](list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def line_of(item: Trained) -> dict[str, Any]:
    """A line of a run."""
    run, machine = item.run, item.record["machine"]
    return {
        "model": run.model,
        "hierarchy": hierarchy_of(run),
        "data": run.data,
        "amp": run.amp,
        "method": name_of(run),
        "units": len(item.record["units"]),
        "lr": run.lr,
        "head_lr_factor": run.head_lr_factor,
        "seed": run.seed,
        "test_accuracy": item.accuracy,
        "best_exit_accuracy": "" if item.best_exit is None else item.best_exit,
        "ensemble_accuracy": "" if item.ensemble is None else item.ensemble,
        "val_accuracy": rounded(item.result["val_accuracy"]),
        "train_seconds": round(item.result["train_seconds"]),
        "commit": item.record["commit"],
        "device": machine["device"],
        "threads": machine["cpu_threads"],
        "command": command(run),
    }


def rows_of(network: Sequence[Trained]) -> list[dict[str, Any]]:
    """A row per method of one network, at the rates that are best on validation with seed 0."""
    rows = []
    whole = costs_of(replace(network_of(network[0]), rule="global"))
    for method in grouped(network, method_of):
        rates = [item for item in method if item.run.seed == 0]
        if not rates:
            continue
        chosen = max(rates, key=validation) if len(rates) > 1 else rates[0]  # the first of equals
        best = [item for item in method if setting_of(item) == setting_of(chosen)]
        rows.append(row_of(best, whole, len(rates)))
        if best[0].run.rule == "global":
            rows.append(row_of(best, whole, len(rates), "checkpointed"))
    mark_fronts(rows)
    return sorted(rows, key=lambda row: -row["test_accuracy"])


def validation(item: Trained) -> float:
    """Accuracy in percent on the held-out images, by which rates are chosen.

    Raises:
        InvalidInput: nothing was held out.
    """
    accuracy = item.result["val_accuracy"]
    if accuracy is None:
        raise InvalidInput(
            f"Cannot choose a rate of {name_of(item.run)}: nothing was held out. Give runs of one "
            "rate, or of --val-fraction above 0."
        )
    return float(accuracy)


def row_of(
    items: Sequence[Trained], whole: StepCosts, rates: int, rule: str | None = None
) -> dict[str, Any]:
    """A row: means over seeds, costs relative to global training.

    Args:
        whole: costs of global training.
        rates: number of learning rates that were tried.
        rule: whose costs they are, where another rule has the same bits.
    """
    run = setting_of(items[0])
    cost = costs_of(replace(run, rule=rule) if rule else run)
    accuracies = [item.accuracy for item in items]
    exits = [item.best_exit for item in items if item.best_exit is not None]
    ensembles = [item.ensemble for item in items if item.ensemble is not None]
    local = items[0].record["local"]
    return {
        "model": run.model,
        "hierarchy": hierarchy_of(run),
        "data": run.data,
        "amp": run.amp,
        "method": rule or name_of(run),
        "loss": run.loss if local else None,
        "span": asdict(run)["rule_options"].get("span", 1),
        "units": cost.units,
        "lr": run.lr,
        "head_lr_factor": run.head_lr_factor,
        "rates_tried": rates,
        "seeds": len(items),
        "test_accuracy": round(mean(accuracies), 2),
        "deviation": round(stdev(accuracies), 2) if len(accuracies) > 1 else None,
        "best_exit_accuracy": round(mean(exits), 2) if len(exits) == len(items) else None,
        "best_exit_deviation": round(stdev(exits), 2) if 1 < len(exits) == len(items) else None,
        "ensemble_accuracy": round(mean(ensembles), 2) if len(ensembles) == len(items) else None,
        "multiply_adds_ratio": round(cost.multiply_adds / whole.multiply_adds, 3),
        "training_ratio": round(cost.multiply_adds / whole.multiply_adds, 3),
        "peak_ratio": round(cost.predicted_peak_bytes / whole.predicted_peak_bytes, 3),
        "predicted_peak_bytes": cost.predicted_peak_bytes,
        "peak_memory_bytes": None,
        "head_parameters": cost.head_parameters,
    }


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


@cache
def costs_of(run: Run) -> StepCosts:
    return step_costs(replace(run, batch_size=BATCH), Execution(device="cpu"))


def hierarchy_of(run: Run) -> str:
    return format_hierarchy(parse_hierarchy(run.hierarchy)) if run.hierarchy else "published"


def name_of(run: Run) -> str:
    """A method in words: its losses, options and window, and where units end if not by blocks."""
    if run.rule in ("global", "checkpointed"):
        return run.rule
    losses = [run.loss, *(text for text in (run.loss_from or "").split(",") if text)]
    options = [f"{name} {value}" for name, value in asdict(run)["loss_options"].items()]
    options += [f"{name} {value}" for name, value in asdict(run)["rule_options"].items()]
    rule = [] if run.rule == "simultaneous" else [run.rule]
    places = int(run.at) if run.at.isdigit() else run.at.count(",") + 2
    named = {"block": [], "layer": ["at layer"], "module": ["at module"]}
    cut = named.get(run.at, [f"{places} units"])
    return ", ".join([*losses, *options, *rule, *cut])


def write_figure(path: Path, rows: Sequence[dict[str, Any]], epochs: int) -> None:
    kind = path.suffix[1:]
    table = {"rows": list(rows), "equal": "epochs", "epochs": epochs, "reference": "global"}
    first = rows[0]
    with matplotlib.rc_context(RULES), replacing(path) as draft:
        figure: Figure = draw(table | {"model": first["model"], "data": first["data"]})
        figure.suptitle(
            f"{first['model']} on {first['data']}, small scale; peak at {BATCH:,} images",
            fontsize=9,
            x=0.01,
            ha="left",
        )
        figure.savefig(draft, format=kind, dpi=DPI, metadata=figure_metadata(kind))


if __name__ == "__main__":
    main()
