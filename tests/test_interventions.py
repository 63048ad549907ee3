"""benchmarks/interventions.py: differences from the base, and tables that are never emptied."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from layerwise.runs.run import run_name
from tests.made_runs import write_run

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def interventions(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("interventions")


def named(interventions: Any, name: str) -> Any:
    return next(item for item in interventions.INTERVENTIONS if item.name == name)


def write(interventions: Any, folder: Path, name: str, accuracy: float, seed: int) -> None:
    run = interventions.run_of(named(interventions, name), seed)
    write_run(folder / run_name(run), run, accuracy, run.epochs)


def test_differences_are_from_the_base_whatever_is_chosen(
    tmp_path: Path, interventions: Any
) -> None:
    for seed in range(2):
        write(interventions, tmp_path, "base", 50.0, seed)
    write(interventions, tmp_path, "pred-below", 60.0, 1)
    every = list(interventions.lines(interventions.INTERVENTIONS, tmp_path, 3))
    [line] = interventions.lines([named(interventions, "pred-below")], tmp_path, 3)
    assert line in every
    assert (line["seeds"], line["standard_error"]) == (1, "")
    assert float(line["difference"]) == pytest.approx(10, abs=3)
    base = every[0]
    assert (base["seeds"], base["difference"], base["standard_error"]) == (2, "", "")


def test_a_table_of_no_runs_is_not_written(
    tmp_path: Path, interventions: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "interventions.csv"
    table.write_text("of earlier runs")
    options = ["--table-only", "--runs", str(tmp_path / "runs"), "--csv", str(table)]
    monkeypatch.setattr(sys, "argv", ["interventions.py", *options])
    monkeypatch.setattr(interventions, "LOSSES", {})
    with pytest.raises(SystemExit, match="no finished run"):
        interventions.main()
    assert table.read_text() == "of earlier runs"
