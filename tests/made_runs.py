"""Folders of runs with made-up numbers, for tests of what reads runs.

Not results: nothing here was trained.
"""

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from layerwise.paper.rows import ROWS, Planned, plan
from layerwise.runs.folder import FORMATS
from layerwise.runs.run import Run, described, run_name

MACHINE = {
    "layerwise": "0.1.0",
    "python": "3.11",
    "torch": "2.13",
    "system": "Linux",
    "device": "a made-up machine",
    "cpu_threads": 1,
}


def write_runs(
    folder: Path,
    plans: Iterable[Planned],
    epochs: int | None = None,
    units: int = 10,
    probes: bool = False,
) -> None:
    """A folder per planned run, finished; accuracies near the paper's, scaled down, that rise over
    the epochs.
    """
    for planned in plans:
        place = folder / run_name(planned.run)
        printed = planned.rows[0].accuracy(planned.column)
        write_run(place, planned.run, printed * 0.6, epochs or planned.run.epochs, units)
        if probes:
            write_probes(
                place, planned.run.rule == "global", printed * 0.6, epochs or planned.run.epochs
            )


def paper_plan(
    tables: Sequence[int], seeds: int = 2, scale: str = "small", **changes: Any
) -> list[Planned]:
    """Runs of all rows of some tables, both columns."""
    return plan(
        [row for row in ROWS if row.table in tables],
        scale,
        ("layerwise", "global"),
        range(seeds),
        **changes,
    )


def write_run(folder: Path, run: Run, final: float, done: int, units: int = 10) -> None:
    """A run with so many epochs in its log; it has a result if these are all."""
    folder.mkdir(parents=True)
    dice = random.Random(f"{run_name(run)}")
    final += dice.gauss(0, 0.4)
    count = 1 if run.rule == "global" else units
    names = ["network"] if count == 1 else [f"stages.{index}.conv" for index in range(count)]
    facts = {
        "data": {"class_names": ["a", "b"]},
        "units": names,
        "machine": MACHINE,
        "commit": "0123456789ab",
    }
    (folder / "run.json").write_text(
        json.dumps({"format": FORMATS[-1], "run": described(run), **facts})
    )
    records = [epoch_record(epoch, run, final, names, dice) for epoch in range(1, done + 1)]
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done == run.epochs:
        (folder / "result.json").write_text(json.dumps(result(run, records[-1], names)))


def epoch_record(
    epoch: int, run: Run, final: float, names: Sequence[str], dice: random.Random
) -> dict[str, Any]:
    learned = 1 - 0.8 * math.exp(-5 * epoch / run.epochs)
    test = final * learned + dice.gauss(0, 0.3)
    units = [
        unit_record(index, name, test * (1 - 0.4 * 0.8**index), dice)
        for index, name in enumerate(names)
    ]
    numbers = {
        "val_accuracy": test + 0.5,
        "test_accuracy": test,
        "best": True,
        "images_per_second": 700.0,
        "seconds": 3.0 * epoch,
    }
    return {"epoch": epoch, "epochs": run.epochs, **numbers, "units": units}


def unit_record(index: int, name: str, accuracy: float, dice: random.Random) -> dict[str, Any]:
    numbers = {
        "loss": 1 / accuracy,
        "accuracy": accuracy + 1,
        "val_loss": 1 / accuracy,
        "val_accuracy": accuracy + dice.gauss(0, 0.3),
    }
    return {"index": index, "name": name, **numbers}


def result(run: Run, last: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    hierarchy = [int(depth) for depth in (run.hierarchy or "1").split(",")]
    chosen = {key: getattr(run, key) for key in ("model", "data", "rule", "loss", "seed", "epochs")}
    best = {
        "best_epoch": last["epoch"],
        "best_val_accuracy": last["val_accuracy"],
        "best_test_accuracy": last["test_accuracy"],
    }
    size = {
        "parameters": 1000,
        "seconds": last["seconds"],
        "train_seconds": last["seconds"],
        "peak_memory_bytes": 10**8,
    }
    scores = {
        key: last[key] for key in ("val_accuracy", "test_accuracy", "images_per_second", "units")
    }
    return {
        "run": "elsewhere",
        "hierarchy": hierarchy,
        **chosen,
        **scores,
        **best,
        **size,
        **(early_exits(last["units"]) if len(names) > 1 else {}),
        "sha256": {},
    }


def early_exits(units: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy and cost of every prefix, and of the ensemble of its heads."""
    exits = [
        {
            "index": unit["index"],
            "name": unit["name"],
            "test_accuracy": unit["accuracy"],
            "multiply_adds": 10**6 * (unit["index"] + 1),
        }
        for unit in units
    ]
    ensemble = {"test_accuracy": exits[-1]["test_accuracy"] + 1, "multiply_adds": 12 * 10**6}
    return {"exits": exits, "ensemble": ensemble}


def write_probes(folder: Path, globally: bool, final: float, epochs: int, units: int = 10) -> None:
    """What a linear probe of every unit's features would give, at a few epochs."""
    lines = []
    for epoch in sorted({1, epochs // 2, epochs}):
        learned = final * (1 - 0.5 * math.exp(-3 * epoch / epochs))
        shares = [
            0.5 + 0.5 * (index / units) ** (1 if globally else 0.4) for index in range(units + 1)
        ]
        names = ["input", *(f"stages.{index}.conv" for index in range(units))]
        measured = [
            {
                "index": i - 1,
                "name": n,
                "linear_probe": learned * s,
                "effective_rank": 2.5 + i,
                "resolution": [8, 8],
            }
            | {"gain": 1.25 if i else -2.0, "mismatched": i == 3}
            for i, (n, s) in enumerate(zip(names, shares, strict=True))
        ]
        lines.append(json.dumps({"epoch": epoch, "units": measured}))
    (folder / "separability.jsonl").write_text("\n".join(lines) + "\n")
