"""From runs to the paper's rows, claims and tables. The runs are made up: their accuracies are what a test needs."""

import pytest

from layerwise.errors import InvalidInput
from layerwise.measured import Setting, measured, settings
from layerwise.paper import DEPARTURES, ROWS, Row, row_run
from layerwise.records import Record

PAPER = Setting("paper", "predsim", 400, False)
SMALL = Setting("small", "predsim", 20, True)


def row(table: int, name: str) -> Row:
    return next(row for row in ROWS if (row.table, row.name) == (table, name))


def record(row: Row, column: str, accuracy: float | None, seed: int = 0, scale: str = "paper", curve=(), **changes) -> Record:
    """A run that gives a row's number; without an accuracy one that is not finished."""
    run = row_run(row, scale, column, seed, **changes)
    epochs = tuple({"epoch": epoch, "epochs": run.epochs, "test_accuracy": value} for epoch, value in curve)
    result = None if accuracy is None else {"test_accuracy": accuracy}
    return Record(f"runs/{row.name}-{column}-{seed}", run, {"data": {}}, epochs, result, ())


def test_a_setting_says_all_that_may_differ_between_runs_of_a_scale():
    assert set(DEPARTURES) == {"loss", "epochs", "amp"}  # a new one must become a field of Setting


def test_mean_and_deviation_are_over_seeds():
    base = row(5, "resnet18")
    runs = [record(base, "layerwise", accuracy, seed) for seed, accuracy in ((2, 80.0), (0, 84.0), (1, 82.0))]
    found = measured(runs, base, "layerwise", PAPER)
    assert (found.mean, found.deviation, found.seeds) == (82.0, 2.0, (0, 1, 2))
    assert found.accuracies == (84.0, 82.0, 80.0)
    assert measured(runs, base, "global", PAPER) is None
    assert measured(runs[:1], base, "layerwise", PAPER).deviation is None


def test_numbers_of_different_scales_losses_and_schedules_never_mix():
    base = row(5, "resnet18")
    runs = [
        record(base, "layerwise", 80.0),
        record(base, "layerwise", 70.0, seed=1, epochs=100),
        record(base, "layerwise", 60.0, seed=2, loss="pred"),
        record(base, "layerwise", 50.0, seed=3, amp=True),
        record(base, "layerwise", 40.0, seed=4, scale="small"),
        record(base, "layerwise", None, seed=5),
    ]
    found = {setting: measured(runs, base, "layerwise", setting) for setting in settings(runs)}
    assert [(setting.key, number.mean, number.seeds) for setting, number in found.items()] == [
        ("paper", 80.0, (0,)),
        ("paper-bfloat16", 50.0, (3,)),
        ("paper-100-epochs", 70.0, (1,)),
        ("paper-pred", 60.0, (2,)),
        ("small", 40.0, (4,)),
    ]
    assert [setting.title for setting in found] == [
        "paper scale",
        "paper scale: bfloat16 instead of float32",
        "paper scale: 100 epochs instead of 400, decays in proportion",
        "paper scale: pred instead of predsim",
        "small scale",
    ]
    assert all(setting.departures == number.departures for setting, number in found.items())


def test_global_runs_belong_to_the_setting_of_every_loss_with_their_schedule():
    base = row(5, "resnet18")
    runs = [
        record(base, "global", 90.0, scale="small"),
        record(base, "layerwise", 50.0, scale="small", loss="pred"),
        record(base, "global", 95.0, epochs=100),
    ]
    alone, beside = settings(runs)
    assert (alone.key, beside.key) == ("paper-100-epochs", "small-pred")
    assert measured(runs, base, "global", beside).mean == 90.0
    assert measured(runs, base, "global", alone).mean == 95.0
    assert measured(runs, base, "layerwise", alone) is None


def test_rows_shared_by_tables_share_their_runs_and_a_seed_trained_twice_counts_once():
    runs = [record(row(3, "resnet18"), "layerwise", 80.0), record(row(5, "resnet18"), "layerwise", 10.0)]
    for table in (3, 5):
        found = measured(runs, row(table, "resnet18"), "layerwise", PAPER)
        assert (found.mean, found.seeds) == (80.0, (0,))


def test_an_unknown_column_is_refused():
    with pytest.raises(InvalidInput, match="accepted: layerwise, global"):
        measured([], ROWS[0], "local", PAPER)
