"""benchmarks/mechanism.py: what each stage adds to a probe; kinds of runs are never mixed."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from layerwise.runs.records import read_runs
from tests.made_runs import paper_plan, write_runs

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def mechanism(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("mechanism")


def test_scales_data_sets_and_copies_are_not_averaged(tmp_path: Path, mechanism: Any) -> None:
    for scale, seeds in (("small", 3), ("middle", 1)):
        planned = paper_plan((5, 6), seeds, scale)
        base = [item for item in planned if item.run.hierarchy == "2,2,2,2"]
        write_runs(tmp_path / scale, base, probes=True)
    write_runs(tmp_path / "copy", base, probes=True)  # of the same rows and seeds
    lines = mechanism.table_of(read_runs([tmp_path])[0])
    kinds = {(line["data"], line["scale"], line["rule"]): line["seeds"] for line in lines}
    assert kinds == {
        (data, scale, rule): seeds
        for data in ("cifar10", "cifar100")
        for scale, seeds in (("small", 3), ("middle", 1))
        for rule in ("layer-wise", "global")
    }


def test_a_gain_is_told_by_student_t(mechanism: Any) -> None:
    gains = [0.3, 1.3, 2.3]  # 2.25 standard errors above zero, where 4.30 are 95 %
    assert mechanism.adds(gains) == "not told"
    assert mechanism.adds([gain + 1.3 for gain in gains]) == "yes"  # 4.5
    assert mechanism.adds(gains[:1]) == ""


def test_a_place_that_a_seed_lacks_is_passed_over(mechanism: Any) -> None:
    key = ("",) * len(mechanism.KEYS)
    seeds = [{"stem": 40.0, "stage 1": 42.0, "stage 2": 45.0}, {"stem": 41.0, "stage 2": 47.0}]
    stem, stage = mechanism.lines(key, seeds)
    assert (stem["after"], stem["probe"]) == ("stem", "40.50")
    assert (stage["after"], stage["gain"]) == ("stage 2", "+5.50")


def test_what_cannot_be_read_is_one_sentence(
    tmp_path: Path, mechanism: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mechanism.py", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="there is no folder"):
        mechanism.main()
