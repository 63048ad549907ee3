"""``layerwise compare --losses``: what is trained, what stands beside it, what is refused."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from layerwise.cli import main
from layerwise.experiments.methods import budget, summarise
from layerwise.experiments.methods.plan import Method
from layerwise.experiments.methods.table import mark_fronts
from layerwise.memory.accounting import BACKWARD, phases
from layerwise.profiling.costs import StepCosts, step_costs
from layerwise.profiling.predict import predict_steps
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.utils.options import Options
from tests.helpers import learner
from tests.test_cli import last_json, refusal

TINY = "vgg8 --hierarchies 1,1,1,1,1 --width 0.0625 --train-images 40 --batch-size 16 --device cpu"
BASE = ["compare", *TINY.split(), "--epochs", "2"]


def compared(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main([*BASE, "--output", str(folder / "runs"), "--json", *words])
    return last_json(capsys)


def test_methods_stand_beside_their_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table_file, figure = tmp_path / "table.csv", tmp_path / "figure.svg"
    words = ["--losses", "pred", "--span", "1,2", "--rules", "global,checkpointed"]
    words += ["--seeds", "2", "--csv", str(table_file), "--figure", str(figure)]
    table = compared(tmp_path, capsys, *words)
    rows = {row["method"]: row for row in table["rows"]}
    assert list(rows) == ["global", "checkpointed", "pred", "pred, span 2"]
    whole, plain, windows = rows["global"], rows["pred"], rows["pred, span 2"]
    assert whole["multiply_adds_ratio"] == 1.0
    assert whole["units"] == 1
    assert plain["units"] == windows["units"] > 2
    assert windows["span"] == 2
    assert plain["multiply_adds"] < windows["multiply_adds"]
    assert rows["checkpointed"]["multiply_adds_ratio"] > 1.0
    assert whole["head_parameters"] == 0 < plain["head_parameters"]
    assert all(row["epochs"] == row["seeds"] * 1 == 2 for row in rows.values())
    assert all(row["peak_memory_bytes"] > 0 < row["predicted_peak_bytes"] for row in rows.values())
    assert whole["test_accuracy"] == rows["checkpointed"]["test_accuracy"]
    assert len(table["runs"]) == 8
    results = [RunFolder(path).result() for path in table["runs"]]
    assert {(result["loss"], result["span"]) for result in results} >= {("pred", 2), ("pred", 1)}
    assert all(result["head_parameters"] > 0 for result in results if result["local"])
    of_pred = [result for result in results if (result["loss"], result["span"]) == ("pred", 1)]
    for part in ("best_exit", "ensemble"):
        expected = mean(result[part]["test_accuracy"] for result in of_pred)
        assert plain[f"{part}_accuracy"] == pytest.approx(expected)
        assert whole[f"{part}_accuracy"] is None
    with table_file.open() as lines:
        cells = {line["method"]: line for line in csv.DictReader(lines)}
    assert float(cells["pred"]["test_accuracy"]) == plain["test_accuracy"]
    assert cells["pred"]["equal"] == "epochs"
    assert "<svg" in figure.read_text()
    main([*BASE, "--output", str(tmp_path / "runs"), *words])  # writes its own files again
    assert capsys.readouterr().out.count("already finished") == 8


def test_units_that_take_turns_have_their_epochs_once() -> None:
    """A sequential run counts an epoch for every unit, and its step is one of every unit."""
    results = [{
        "epochs": 12, "test_accuracy": 50.0, "val_accuracy": None, "peak_memory_bytes": 1,
        "images_per_second": 20.0, "train_seconds": 3.0,
    }]  # fmt: skip
    whole, turns = (StepCosts(units, units, work, 1, 0, 1) for units, work in ((1, 100), (6, 150)))
    method = Method("pred, sequential", "pred", 1, Run(rule="sequential", batch_size=10))
    row = summarise(method, 2, turns, whole, results)
    assert (row["epochs"], row["training_ratio"]) == (2, 1.5)
    assert row["step_seconds"] == 10 * 6 / 20.0


def test_equal_multiply_adds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = compared(tmp_path, capsys, "--losses", "pred", "--span", "2", "--equal",
                     "multiply-adds", "--epochs", "5")  # fmt: skip
    whole, windows = table["rows"]
    assert whole["epochs"] == 5
    assert windows["epochs"] == max(1, round(5 / windows["multiply_adds_ratio"]))
    assert windows["training_ratio"] == pytest.approx(1.0, abs=0.2)
    assert (table["equal"], table["reference"]) == ("multiply-adds", "global")


def test_equal_time_is_measured_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.1, 0.2])
    monkeypatch.setattr(budget, "seconds_of_step", lambda run, execution: next(seconds))
    words = ["--losses", "pred", "--equal", "time"]
    table = compared(tmp_path, capsys, *words)
    assert [row["epochs"] for row in table["rows"]] == [2, 1]
    assert compared(tmp_path, capsys, *words) == table
    [times] = (tmp_path / "runs").glob("compare-times-*.json")
    times.write_text(json.dumps({"seconds": {"global": -1}}))
    output = ["--output", str(tmp_path / "runs")]
    assert "does not hold the times" in refusal(capsys, *BASE, *output, *words)


def test_a_step_is_timed() -> None:
    run = Run(model="vgg8", hierarchy="1,1,1,1,1", width=0.0625, batch_size=16, rule="sequential")
    assert budget.seconds_of_step(run, Execution(device="cpu")) > 0


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--losses pred,predsin", "Cannot use loss 'predsin': it is unknown"),
        ("--losses pred --span 99", "Cannot use span 99: the chain has"),
        ("--losses pred --span 0", "Cannot use span 0: it is out of range"),
        ("--losses pred --span one", "it is not a list of numbers of units"),
        ("--losses pred --equal money", "Cannot use equal 'money': it is unknown"),
        ("--losses pred,sim --head-depth 2", "Cannot use --head-depth with the loss 'pred'"),
        ("--losses auglocal --head-depth 99", "Cannot use --head-depth 99: the network has"),
        ("--losses pred --segments 2", "It belongs to checkpointed"),
        ("--losses pred/4=sim/2=pred", "Cannot use --losses 'pred,4=sim,2=pred'"),
        ("--losses pred --loss sim", "Cannot use --loss with --losses"),
        ("--losses pred --at 1", "Cannot compare local losses with --at 1"),
        ("--losses pred --csv nowhere/a.csv", "it lies in a folder that does not exist"),
        ("--losses pred --figure a.gif", "it is of no known type"),
        ("--losses pred --csv a.svg --figure a.svg", "into one file"),
        ("--losses pred --hierarchies 1,1,1,1,1 2,1,1,1,1", "Cannot compare several hierarchies"),
        ("--csv a.csv", "Cannot use --csv where hierarchies are compared"),
    ],
)
def test_refusals_before_anything_is_trained(
    words: str,
    reason: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in refusal(capsys, *BASE, *words.split())
    assert list(tmp_path.iterdir()) == []


def test_a_csv_of_others_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("a,b\n")
    refused = refusal(capsys, *BASE, "--losses", "pred", "--csv", str(path))
    assert "was not written by layerwise compare" in refused
    assert path.read_text() == "a,b\n"


def test_hierarchies_with_one_span(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--hierarchies", "1,1,1,1,1", "2,1,1,1,1", "--span", "2", "--rules", "simultaneous"]
    table = compared(tmp_path, capsys, *words)
    assert [row["hierarchy"] for row in table["rows"]] == ["[1,1,1,1,1]", "[2,1,1,1,1]"]
    assert all(RunFolder(path).run().rule_options == {"span": 2} for path in table["runs"])


def test_fronts() -> None:
    values = [(50.0, 1.0, 3), (60.0, 2.0, 2), (55.0, 3.0, 1), (60.0, 2.0, 4)]
    rows: list[dict[str, Any]] = [
        {"test_accuracy": accuracy, "training_ratio": work, "peak_memory_bytes": memory}
        for accuracy, work, memory in values
    ]
    mark_fronts(rows)
    assert [row["front_multiply_adds"] for row in rows] == [True, True, False, True]
    assert [row["front_memory"] for row in rows] == [False, True, True, False]


def test_windows_by_hand() -> None:
    """What a window costs above local learning: input gradients of all units but the first."""
    costs = {}
    for span in (1, 2):
        options = Options({"span": span} if span > 1 else {})
        run = Run(model="vgg8", hierarchy="1,1,1,1,1", width=0.125, batch_size=16, loss="pred")
        run = Run(**{**vars(run), "rule_options": options})
        costs[span] = step_costs(run, Execution(device="cpu"))
    assert costs[1].head_parameters == costs[2].head_parameters
    local = learner("plain", "pred")
    [plain], [windows] = (predict_steps("simultaneous", local, 16, {"span": s}) for s in (1, 2))
    assert windows.multiply_adds[0] == plain.multiply_adds[0]  # nothing is before the first
    more = {u: windows.multiply_adds[u] - plain.multiply_adds[u] for u in plain.units}
    assert all(more[unit] > 0 for unit in plain.units[1:])
    assert windows.saved_bytes[1] > plain.saved_bytes[1]


def test_marks_end_with_their_context() -> None:
    local = learner("plain", "pred")
    local.span = 2
    marks: list[tuple[int, str]] = []
    with (
        phases(local, lambda unit, phase: marks.append((unit, phase))),
        phases(local, lambda unit, phase: None),
    ):
        assert all("accumulate" in vars(unit) for unit in local.units)
        local.units[0].accumulate(lambda: None)
    assert marks[0] == (0, BACKWARD)
    assert not any("accumulate" in vars(unit) for unit in local.units)


def test_losses_and_spans_by_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses, spans = "pred,dgl-mlp/2=pred,dgl-mlp/02=pred", "1,1/2=2,01/02=2"  # spelled twice
    words = ["--losses", losses, "--span", spans, "--head-layers", "1"]
    rows = compared(tmp_path, capsys, *words, "--epochs", "1")["rows"]
    mixed = "dgl-mlp, from unit 2 pred"
    names = ["pred", "pred, span 1,2=2", mixed, f"{mixed}, span 1,2=2"]
    assert [row["method"] for row in rows] == ["global", *names]
    assert rows[4]["span"] == "1,2=2"
    assert rows[1]["head_parameters"] != rows[3]["head_parameters"]
    assert rows[3]["multiply_adds"] < rows[4]["multiply_adds"]


def test_later_losses_of_the_run_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--loss", "dgl-mlp", "--loss-from", "2=pred", "--span", "1,2", "--epochs", "1"]
    rows = compared(tmp_path, capsys, *words)["rows"]
    assert {row["loss"] for row in rows[1:]} == {"dgl-mlp,2=pred"}
    text = refusal(capsys, *BASE, "--losses", "pred", "--loss-from", "2=sim")
    assert "--losses dgl-cnn/4=pred" in text


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--losses pred --span 1/2=x", "not a list of numbers of units"),
        ("--losses pred/x=sim", "later losses are not a unit and a loss"),
        ("--losses pred/2=nothing", "Accepted"),
        ("--losses pred/99=sim", "99"),
        ("--losses pred --span 1/99=2", "99"),
    ],
)
def test_what_is_no_loss_or_span_by_unit(
    words: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "runs"
    assert reason in refusal(capsys, *BASE, *words.split(), "--output", str(output))
    assert not output.exists()


def test_a_limit_of_memory_is_that_of_the_training() -> None:
    run = Run(model="resnet18", hierarchy="1,1,1,1", width=0.0625, batch_size=16, at="block")
    run = replace(run, rule="checkpointed")
    ample, whole = (
        step_costs(each, Execution(device="cpu", memory=limit))
        for each, limit in ((run, "1GB"), (replace(run, rule="global"), None))
    )
    assert ample.multiply_adds == whole.multiply_adds
    assert step_costs(run, Execution(device="cpu")).multiply_adds > whole.multiply_adds


def test_frozen_units_and_teachers_are_of_the_methods_that_have_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher = str(tmp_path / "teacher")
    plain = "vgg8 --hierarchy 1,1,1,1,1 --width 0.0625 --train-images 40 --batch-size 16 --epochs 1"
    main(["train", *plain.split(), "--loss", "pred", "--device", "cpu", "--output", teacher])
    words = ["--losses", "match,pred", "--teacher", teacher, "--train-from", "1"]
    rows = {row["method"]: row for row in compared(tmp_path, capsys, *words)["rows"]}
    assert list(rows) == ["global", "match", "pred"]
    assert rows["pred"]["units"] == rows["match"]["units"] < 7
    refused = refusal(capsys, *BASE, "--losses", "pred", "--teacher", teacher)
    assert "none of the losses compares features with a teacher" in refused


def test_kept_times_are_of_their_execution() -> None:
    methods = [Method("pred", "pred", 1, Run())]
    execution = Execution(device="cpu")
    others = [{"keep_memory": False}, {"streams": 2}, {"memory": "1GB"}, {"cpu_threads": 7}]
    digests = {budget.digest(methods, replace(execution, **other)) for other in [{}, *others]}
    assert len(digests) == 5
