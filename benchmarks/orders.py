"""Do cheap measurements at small scale predict the paper's layer-wise order of hierarchies?
Spearman's rank correlations.

Every part of a table that varies one network's hierarchy on CIFAR-10 is ranked by what ``layerwise
accelerate`` ranks by, and by what needs no measurement at all:

- ``predsim`` and ``pred``: validation accuracy of each hierarchy after a few epochs of layer-wise
  training by that loss, averaged over seeds; the runs are those of ``layerwise reproduce --scale
  small``, which continue the runs made here;
- ``halving``: the order in which successive halving (``halving.py``) would rank them by the same
  accuracies of predsim, with at most that many epochs;
- ``gain``: the gains of the base's units after as many epochs (what ``--rank gain`` ranks by),
averaged likewise;
- ``parameters``, ``convolutions``, ``shallow convolutions`` (what ``--rank count`` ranks by): fewer
  first. A random order has 0 on average; ``chance`` is the share of all orders that do at least as
  well.

The paper's numbers are read at the end, to correlate with. Equal values share their mean rank.

    python benchmarks/orders.py --data-dir DATA --runs runs/small --epochs 9 --seeds 3 --csv
    results/orders.csv
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from itertools import permutations, product
from pathlib import Path
from statistics import mean
from typing import Any

from scipy.stats import spearmanr

from halving import places, rungs, train_until
from layerwise.errors import Busy
from layerwise.experiments.accelerate.costs import Costs
from layerwise.experiments.accelerate.ranking import mean_gains, measured_gains, score
from layerwise.experiments.entry import folder_of
from layerwise.hierarchy import Hierarchy, shallow
from layerwise.paper.rows import ROMAN, Row, row_run, select_rows
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run, run_words
from tables import fill_table

PARTS = (
    (3, "resnet18"),
    (5, "resnet18"),
    (3, "resnet50"),
    (5, "resnet50"),
    (1, "vgg16"),
    (1, "vgg19"),
)
LOSSES = ("predsim", "pred")
RUNGS = (1, 3, 9)  # epochs at which halving compares
WHOLE = 20  # epochs of a training at small scale, after which it compares for the last time
LINE = "gains.jsonl"  # of a base's folder: its stages' gains, a line per rung


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", default="data", help="folder that holds the data set's files")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/small"), help="folder of the runs at small scale"
    )
    parser.add_argument(
        "--gains", type=Path, default=Path("runs/orders"), help="folder of the bases' short runs"
    )
    parser.add_argument("--parts", nargs="+", help="such as 3-resnet18 (default: all six)")
    parser.add_argument(
        "--losses",
        nargs="*",
        choices=LOSSES,
        default=LOSSES,
        help="default: both; none: gains only",
    )
    parser.add_argument(
        "--epochs", type=int, default=RUNGS[-1], help="train as far as this (default: 9)"
    )
    parser.add_argument(
        "--seeds", type=int, default=1, help="seeds of every hierarchy (default: 1)"
    )
    parser.add_argument(
        "--table-only", action="store_true", help="train nothing: correlate what there is"
    )
    parser.add_argument("--cpu-threads", type=int, help="threads of each operation on a CPU")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    execution = Execution(data_dir=arguments.data_dir, cpu_threads=arguments.cpu_threads)
    parts = [
        part
        for part in PARTS
        if arguments.parts is None or "-".join(map(str, part)) in arguments.parts
    ]
    for seed in range(0 if arguments.table_only else arguments.seeds):
        for part in parts:
            train_part(rows_of(part), seed, arguments, execution)
    table = [line for part in parts for line in correlate(part, arguments)]
    for line in table:
        print(
            "  ".join(
                f"{value:<{width}}"
                for value, width in zip(line.values(), (14, 22, 7, 6, 12, 9, 8, 0), strict=True)
            )
        )
    if arguments.csv:
        fill_table(arguments.csv, table, ("part", "predictor", "epochs"))


def rows_of(part: tuple[int, str]) -> list[Row]:
    """The rows of a part, the base first."""
    table, model = part
    return select_rows([table], [model, f"{model}_*"])


def train_part(
    rows: Sequence[Row], seed: int, arguments: argparse.Namespace, execution: Execution
) -> None:
    """Train every hierarchy as far as asked, and measure the base's gains at every rung."""
    for loss in arguments.losses:
        for row in rows:
            folder = row_folder(arguments.runs, row, seed, loss)
            print(f"{row.label} by {loss}, seed {seed}", flush=True)
            train_as_far(
                row_run(row, "small", "layerwise", seed, loss=loss),
                folder,
                arguments.epochs,
                execution,
            )
    run, folder = (
        row_run(rows[0], "small", "layerwise", seed),
        row_folder(arguments.gains, rows[0], seed),
    )
    measured = {line["epoch"] for line in gains_of(arguments.gains, rows[0], seed)}
    for epochs in RUNGS:
        if epochs > arguments.epochs or epochs in measured:
            continue
        if train_as_far(run, folder, epochs, execution):
            folder.append({"epoch": epochs, "gains": measured_gains(folder, execution)}, LINE)


def train_as_far(run: Run, folder: RunFolder, epochs: int, execution: Execution) -> bool:
    """Train a run as far as an epoch, and say whether it is there.

    One that came further, or that another process trains, is left alone.
    """
    try:
        train_until(run, folder, epochs, execution)
    except Busy:
        print("  left to the process that trains it", flush=True)
        return False
    return len(log_of(folder)) == epochs


def gains_of(place: Path, row: Row, seed: int) -> list[dict[str, Any]]:
    """The measured gains of a base, a line per rung.

    Archived ones lie without their run, in a folder whose name ends as in an earlier version.
    """
    run = row_run(row, "small", "layerwise", seed)
    paths = sorted(place.glob(f"{run_words(run)}-??????/{LINE}"))
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return list({line["epoch"]: line for line in lines}.values())


def correlate(part: tuple[int, str], arguments: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """A line per predictor of a part: its order, and that order's correlation with the paper's."""
    rows = rows_of(part)
    published = [row.layerwise_accuracy for row in rows]
    costs = Costs(row_run(rows[0], "paper", "layerwise"))
    seeds = range(arguments.seeds)
    for loss, epochs in product(LOSSES, (*RUNGS, WHOLE)):
        logs = [
            [log_of(row_folder(arguments.runs, row, seed, loss)) for seed in seeds] for row in rows
        ]
        whole = [seed for seed in seeds if all(len(log[seed]) >= epochs for log in logs)]
        if whole:
            values = [mean(log[seed][epochs - 1]["val_accuracy"] for seed in whole) for log in logs]
            yield line(part, loss, epochs, len(whole), values, published, rows)
            if loss == LOSSES[0] and epochs > 1:
                yield line(
                    part,
                    "halving",
                    epochs,
                    len(whole),
                    halved(logs, whole, epochs),
                    published,
                    rows,
                )
    for epochs in RUNGS:
        gains = [
            found["gains"]
            for seed in seeds
            for found in gains_of(arguments.gains, rows[0], seed)
            if found["epoch"] == epochs
        ]
        if gains:
            values = [score(row.hierarchy, mean_gains(gains)) for row in rows]
            yield line(part, "gain", epochs, len(gains), values, published, rows)
    trivial: dict[str, Callable[[Hierarchy], int]] = {
        "parameters": lambda hierarchy: costs.amount("parameters", hierarchy),
        "convolutions": sum,
        "shallow convolutions": lambda hierarchy: sum(shallow(hierarchy)),
    }
    for name, amount in trivial.items():
        yield line(part, name, "", "", [-amount(row.hierarchy) for row in rows], published, rows)


def halved(logs: Sequence[Sequence[Any]], seeds: Sequence[int], last: int) -> list[float]:
    """What ranks rows as halving does: a number each, the largest for the best.

    Args:
        logs: of each row, by seed.
    """
    values = {
        str(index): {
            epochs: mean(log[seed][epochs - 1]["val_accuracy"] for seed in seeds)
            for epochs in rungs(last)
        }
        for index, log in enumerate(logs)
    }
    order = [name for name, _ in places(list(values), last, values)]
    return [-float(order.index(name)) for name in values]


def row_folder(place: Path, row: Row, seed: int, loss: str = "predsim") -> RunFolder:
    return folder_of(row_run(row, "small", "layerwise", seed, loss=loss), place)


def log_of(folder: RunFolder) -> list[dict[str, Any]]:
    return folder.log() if folder.begun else []


def line(
    part: tuple[int, str],
    predictor: str,
    epochs: int | str,
    seeds: int | str,
    values: Sequence[float],
    published: Sequence[float],
    rows: Sequence[Row],
) -> dict[str, Any]:
    """What a predictor says: a correlation, how often chance does as well, and the order, the best
    first.
    """
    order = sorted(range(len(rows)), key=lambda index: -values[index])
    found = spearman(values, published)
    return {
        "part": f"{ROMAN[part[0] - 1]} {part[1]}",
        "predictor": predictor,
        "epochs": epochs,
        "seeds": seeds,
        "hierarchies": len(rows),
        "spearman": "none" if found is None else f"{found:.2f}",
        "chance": "" if found is None else f"{chance(found, published):.3f}",
        "order": " > ".join(rows[index].name for index in order),
    }


def spearman(values: Sequence[float], published: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None where all values are equal."""
    return float(spearmanr(values, published).statistic) if len(set(values)) > 1 else None


def chance(found: float, published: Sequence[float]) -> float:
    """The share of all orders whose correlation is at least as high."""
    places = range(len(published))
    drawn = [float(spearmanr(order, published).statistic) for order in permutations(places)]
    return mean(value >= found - 1e-9 for value in drawn)


if __name__ == "__main__":
    main()
