"""The benchmarks still fit the library: each is imported, and its command line explains itself."""

import importlib
import json
import sys
import tarfile
from pathlib import Path

import pytest

from layerwise.errors import InvalidInput
from layerwise.profiling.costs import StepCosts
from layerwise.runs.digests import sealed
from layerwise.runs.records import read_runs
from layerwise.runs.run import Run
from tests.made_runs import write_run

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("runs", "tables"))


@pytest.mark.parametrize("name", NAMES)
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    module = importlib.import_module(name)
    assert Path(module.__file__ or "").parent == FOLDER
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


def alike(devices, **changes):
    """Units of a network that all cost the same: 1 s forward, 2 s back, 4 s a local step."""
    numbers = {
        "forward": 1.0,
        "backward": 2.0,
        "local": 4.0,
        "update": 0.0,
        "local_update": 0.0,
        "feature": 100,
        "saved": {0: 10},
        "local_saved": 12,
        "weights": 8,
        "head": 4,
    }
    return devices.Cost(**{**numbers, **changes})


def test_devices_are_simulated_as_counted_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    devices = importlib.import_module("devices")
    # each keeps 10 bytes, of which the next one keeps 3 too
    chain = [{unit: 3, unit + 1: 3, -1 - unit: 4} for unit in range(4)]
    fast, costs = devices.Link(1e12, 0.0), [alike(devices, saved=kept) for kept in chain]
    images = {
        way: [outcome(costs, count, 16, fast).images for count in (1, 2, 4)]
        for way, outcome in devices.WAYS.items()
    }
    # four units of 3 s, or 4 s with their heads
    assert images["data parallel"] == pytest.approx([1 / 12, 2 / 12, 4 / 12])
    assert images["replicas"] == pytest.approx([1 / 16, 2 / 16, 4 / 16])
    assert images["units"] == pytest.approx([1 / 16, 2 / 16, 4 / 16])  # no bubble
    bubble = [micro / (micro + stages - 1) for stages, micro in ((2, 8), (4, 16))]
    expected = [1 / 12, *(n * share / 12 for n, share in zip((2, 4), bubble, strict=True))]
    assert images["gpipe"] == pytest.approx(expected)
    assert images["1f1b"] == pytest.approx(expected)  # as fast, with fewer batches under way
    held = {way: outcome(costs, 2, 16, fast).memory for way, outcome in devices.WAYS.items()}
    assert held["gpipe"] == 4 * 2 * 8 + 16 * (2 * 10 - 3)
    assert held["1f1b"] == 4 * 2 * 8 + 16 * 2 / 8 * (2 * 10 - 3)
    assert held["units"] == 4 * 2 * 12 + 16 * 12 + 2 * 16 * 100
    assert held["data parallel"] == 4 * 4 * 8 + 8 * (4 * 10 - 3 * 3)


def test_links_of_devices_carry_one_message_at_a_time(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    devices = importlib.import_module("devices")
    slow = devices.Link(bandwidth=10.0, latency=0.0)  # a batch's feature of 1,600 bytes takes 160 s
    costs = [alike(devices)] * 2
    assert devices.units_on_devices(costs, 2, 16, slow).images == pytest.approx(16 / 160)
    parts = devices.partition([1, 1, 1, 5, 1, 1], 3)
    assert [list(part) for part in parts] == [[0, 1, 2], [3], [4, 5]]
    assert devices.Link(100.0, 1.0).average(800, 4) == pytest.approx(6 * (1 + 2))


def test_rates_of_methods_are_chosen_on_held_out_images_alone(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    methods = importlib.import_module("methods")
    monkeypatch.setattr(methods, "costs_of", lambda run: StepCosts(2, 1, 10, 5, 3, 100))

    def trained(lr, validation, seed=0):
        exits = [{"index": unit, "test_accuracy": 10.0 * unit} for unit in range(3)]
        result = {"test_accuracy": 100 * lr, "val_accuracy": validation, "exits": exits}
        held_out = (None,) * 3 if validation is None else (40.0, 60.0, 50.0)
        last = {
            "units": [{"index": unit, "val_accuracy": value} for unit, value in enumerate(held_out)]
        }
        return methods.Trained(Run(lr=lr, seed=seed), {"local": True}, result, last)

    [row] = methods.rows_of([trained(0.1, 50.0), trained(0.2, 50.0), trained(0.3, 40.0)])
    assert (row["lr"], row["rates_tried"]) == (0.1, 3)  # the first of equals
    assert (row["best_exit_accuracy"], row["best_exit_deviation"]) == (10.0, None)
    [row] = methods.rows_of([trained(0.2, None), trained(0.2, None, seed=1)])
    assert (row["rates_tried"], row["seeds"]) == (1, 2)
    assert row["best_exit_accuracy"] is None
    with pytest.raises(InvalidInput, match="nothing was held out"):
        methods.rows_of([trained(0.1, None), trained(0.2, None)])
    assert methods.rows_of([trained(0.1, 50.0, seed=1)]) == []


def test_archived_runs_are_read_and_name_no_folder_of_the_machine(
    monkeypatch, tmp_path: Path, capsys
):
    monkeypatch.syspath_prepend(str(FOLDER))
    archive = importlib.import_module("archive")
    packed = tmp_path / "runs.tar.gz"
    for seed in (0, 1):
        folder = tmp_path / "made" / f"run{seed}"
        write_run(folder, Run(seed=seed, epochs=2), 50.0, done=2)
        facts = json.loads((folder / "run.json").read_text())
        facts["execution"] = {"data_dir": f"{tmp_path}/images"}
        facts["command"] = f"layerwise train --data-dir {tmp_path}/images --output {folder}"
        (folder / "run.json").write_text(json.dumps(facts))
        result = {**json.loads((folder / "result.json").read_text()), "run": str(folder)}
        (folder / "result.json").write_text(json.dumps(sealed(result)))
        (folder / "last.pt").write_bytes(b"weights")
        monkeypatch.setattr(sys, "argv", ["archive.py", str(folder), "--output", str(packed)])
        archive.main()
    assert capsys.readouterr().out.endswith(f"2 runs in {packed}\n")
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    records, broken = read_runs([tmp_path / "unpacked"])
    assert (len(records), broken) == (2, [])
    text = (tmp_path / "unpacked/run1/run.json").read_text()
    assert "layerwise train --data-dir images --output runs/run1" in text
    assert not list((tmp_path / "unpacked").rglob("last.pt"))
    assert not any(str(tmp_path) in file.read_text() for file in tmp_path.glob("unpacked/*/*"))


def test_a_table_keeps_the_lines_that_are_not_made_anew(monkeypatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(FOLDER))
    tables = importlib.import_module("tables")
    path = tmp_path / "table.csv"
    rows = [{"model": model, "part": part, "MB": 1} for model in "ab" for part in (1, 2)]
    tables.fill_table(path, rows, ("model", "part"))
    tables.fill_table(path, [{"model": "a", "part": 2, "MB": 7}], ("model", "part"))
    tables.fill_table(path, [{"model": "c", "part": 1, "MB": 8}], ("model", "part"))
    assert [line["MB"] for line in tables.read_table(path)] == ["1", "7", "1", "1", "8"]
    # all lines of a model at once, of which there are fewer now
    tables.fill_table(path, [{"model": "a", "part": 3, "MB": 9}], ("model",))
    assert [line["part"] for line in tables.read_table(path)] == ["3", "1", "2", "1"]
    before = path.read_text()
    with pytest.raises(SystemExit, match="it is another table"):
        tables.fill_table(path, [{"model": "a", "seconds": 9}], ("model",))
    assert path.read_text() == before


def test_results_of_other_settings_are_not_taken_for_these(monkeypatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(FOLDER))
    fine_tuning = importlib.import_module("fine_tuning")
    path = tmp_path / "results.jsonl"
    first = fine_tuning.Results(path, {"images": 10}, compute=True)
    assert first.get("pred 0.1 0", lambda: {"value": 1})["value"] == 1
    again = fine_tuning.Results(path, {"images": 10}, compute=False)
    assert again.get("pred 0.1 0", dict)["value"] == 1
    with pytest.raises(SystemExit, match="its results are of"):
        fine_tuning.Results(path, {"images": 20}, compute=True)


def test_a_damaged_result_is_not_sealed_anew(monkeypatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(FOLDER))
    archive = importlib.import_module("archive")
    folder = tmp_path / "run"
    write_run(folder, Run(epochs=2), 50.0, done=2)
    facts = json.loads((folder / "run.json").read_text())
    facts["execution"] = {"data_dir": "images"}
    (folder / "run.json").write_text(json.dumps(facts))
    result = sealed(json.loads((folder / "result.json").read_text()))
    (folder / "result.json").write_text(json.dumps({**result, "test_accuracy": 99.9}))
    with pytest.raises(InvalidInput):
        list(archive.archived(folder))


def test_ways_of_the_output_differ_by_the_scale_of_its_loss(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    first_hour = importlib.import_module("first_hour")
    task = first_hour.TASKS["convolutions"]
    prepared = first_hour.prepare(task.run, first_hour.Execution(device="cpu"))
    data = prepared.load_data()
    images, labels = next(iter(data.train.batches(0)))
    losses = {
        way: first_hour.build(task, prepared, data, "predsim", way, 0).step(images, labels)
        for way in ("joined", "joined-scaled")
    }
    plain, scaled = (float(losses[way].loss_tensor()[-1]) for way in losses)
    assert scaled == pytest.approx(0.01 * plain, rel=1e-5)
    assert not first_hour.suits("joined-scaled*10", "pred")
    assert first_hour.suits("joined", "pred")
