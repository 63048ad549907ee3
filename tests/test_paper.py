"""The paper's rows as runs, and the sweep over them."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from layerwise.cli import main
from layerwise.errors import Diverged, InvalidInput
from layerwise.experiments import reproduce
from layerwise.experiments.entry import entries
from layerwise.paper import rows as paper
from layerwise.paper.rows import COLUMNS, ROWS, SCALES, Scale, match, plan, row_run, select_rows
from layerwise.profiling.estimate import Pace, time_steps, total
from layerwise.runs.folder import RunFolder
from layerwise.runs.records import read_runs
from layerwise.runs.run import Execution, Run
from layerwise.training.loop import train as train_run
from layerwise.training.prepare import Prepared
from layerwise.utils.options import Options
from layerwise.utils.words import counted
from tests.test_cli import last_json, refusal

TINY = {
    "data": "digits",
    "width": 1 / 16,
    "train_images": 60,
    "epochs": 2,
    "batch_size": 16,
    "val_fraction": 0.0,
    "dropout": 0.0,
    "lr": 1e-3,
}

# a sweep of three short runs in a process of its own
SWEEP = f"""
import sys
from layerwise.paper.rows import SCALES, Scale
from layerwise.cli import main
SCALES["tiny"] = Scale("tiny", "for tests", {TINY!r} | {{"epochs": int(sys.argv[2])}})
main(
    ["reproduce", "5", "--rows", "resnet18_r1", "resnet18_r3", "--scale", "tiny"]
    + ["--rule", "global", "--output", sys.argv[1]]
)
"""


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(SCALES, "tiny", Scale("tiny", "for tests", TINY))
    return "tiny"


def tiny_sweep(folder: Path, *more: str) -> list[str]:
    command = ["reproduce", "3", "5", "--rows", "resnet18_r1", "--scale", "tiny", "--seeds", "2"]
    return [*command, "--output", str(folder), "--json", *more]


def test_the_tables_have_61_rows_and_need_114_runs():
    assert len(ROWS) == 61
    assert [sum(row.table == table for row in ROWS) for table in paper.TABLES] == [
        14,
        14,
        6,
        6,
        10,
        11,
    ]
    planned = plan(ROWS, "paper", COLUMNS, [0])
    assert len(planned) == len({item.run for item in planned}) == 114
    assert sum(len(item.rows) for item in planned) == 2 * 61


def test_a_row_is_trained_as_the_paper_says():
    row = next(row for row in ROWS if row.label == "V resnet18_r4")
    run = row_run(row, "paper", "layerwise")
    assert (run.model, run.hierarchy, run.lr, run.dropout, run.rule, run.loss) == (
        "resnet18",
        "1,1,2,2",
        3e-4,
        0.3,
        "simultaneous",
        "predsim",
    )
    assert (run.epochs, run.batch_size, run.val_fraction, run.width, run.optimizer) == (
        400,
        128,
        0.0,
        1.0,
        "adam",
    )
    assert (run.decay_rate, run.decay_milestones) == (0.25, "0.5,0.75,0.89,0.94")
    assert (row.layerwise_accuracy, row.global_accuracy) == (89.77, 93.01)
    vgg8b = next(row for row in ROWS if row.name == "vgg8b")
    assert row_run(vgg8b, "paper", "layerwise").loss_options == {"decoder_dim": 2048}
    assert row_run(row, "paper", "layerwise").loss_options == {}
    assert run.output_layer == "separate"


def test_rows_shared_by_tables_train_once():
    planned = plan(select_rows([3, 5], ["resnet18"]), "paper", ["layerwise"], [0])
    assert [[row.table for row in item.rows] for item in planned] == [[3, 5]]


@pytest.mark.parametrize("scale", list(SCALES))
def test_a_run_is_matched_with_its_rows(scale):
    for item in plan(ROWS, scale, COLUMNS, [3]):
        found = match(item.run)
        assert found
        assert (found.scale, found.column, found.rows, found.departures) == (
            scale,
            item.column,
            item.rows,
            (),
        )


def test_departures_are_said_and_other_runs_match_nothing():
    row = next(row for row in ROWS if row.label == "V resnet18_r4")
    run = row_run(row, "paper", "layerwise")
    shorter = match(replace(run, epochs=100, loss="predsim-lite", amp=True))
    assert shorter
    assert shorter.departures == (
        "100 epochs instead of 400, decays in proportion",
        "predsim-lite instead of predsim",
        "bfloat16 instead of float32",
    )
    assert not match(replace(run, width=0.5))
    assert not match(replace(run, train_images=15_000))
    assert not match(replace(run, rule="sequential"))
    assert match(replace(run, rule="parallel")) == match(run)
    assert not match(
        replace(run, rule="parallel", rule_options=Options({"bfloat16_features": True}))
    )
    # the local loss is nothing that a global run reads
    beside = row_run(row, "paper", "global", loss="pred")
    plain = row_run(row, "paper", "global")
    assert beside == plain
    # checkpointing gives the same bits, within whatever memory
    within = replace(plain, rule="checkpointed", rule_options=Options({"memory": "1 GB"}))
    assert match(within) == match(plain)


def test_a_sweep_trains_shows_and_skips(tiny, tmp_path, capsys):
    main(tiny_sweep(tmp_path))
    printed = capsys.readouterr().out
    result = json.loads(printed.splitlines()[-1])
    assert len(result["runs"]) == 4  # two columns, two seeds; Table III has no such row
    assert "0 finished, 0 begun, 4 to do; about 0:0" in printed
    assert "run 4 of 4, about 0:0" in printed
    assert {run["state"] for run in result["runs"]} == {"finished"}
    assert all(0 <= run["test_accuracy"] <= 100 for run in result["runs"])
    assert "V resnet18_r1" in printed
    assert "89.26" in printed
    assert "(2)" in printed  # seeds
    results = [Path(run["folder"]) / "result.json" for run in result["runs"]]
    before = [path.stat().st_mtime_ns for path in results]
    main(tiny_sweep(tmp_path))
    assert "4 finished, 0 begun, 0 to do; about 0:00:00" in capsys.readouterr().out
    assert [path.stat().st_mtime_ns for path in results] == before


def test_a_sweep_that_cannot_begin_is_refused_before_its_cost_is_estimated(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for arguments, words in (
        (tiny_sweep(tmp_path / "file"), "it is a file. Give a folder."),
        (
            ["reproduce", "5", "--rows", "resnet18", "--data-dir", str(tmp_path / "none")],
            "Give --data-dir",
        ),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        captured = capsys.readouterr()
        assert words in captured.err
        assert "of training on this machine" not in captured.out


def test_a_dry_run_writes_nothing(tiny, tmp_path, capsys):
    main(tiny_sweep(tmp_path / "none", "--dry-run"))
    assert {run["state"] for run in last_json(capsys)["runs"]} == {"to do"}
    assert not (tmp_path / "none").exists()


def test_a_killed_sweep_goes_on_and_gives_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-c", SWEEP]
    subprocess.run([*command, str(whole), "6"], check=True, capture_output=True)
    process = subprocess.Popen([*command, str(killed), "6"], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while (
        not list(killed.glob("*/last.pt"))
        and process.poll() is None
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it was over before it could be killed"
    subprocess.run([*command, str(killed), "6"], check=True, capture_output=True)
    folders = sorted(path.name for path in whole.iterdir())
    assert folders == sorted(path.name for path in killed.iterdir())
    assert len(folders) == 2
    for name in folders:
        assert (whole / name / "model.safetensors").read_bytes() == (
            killed / name / "model.safetensors"
        ).read_bytes()


@pytest.mark.slow
def test_two_processes_share_a_sweep(tmp_path):
    command = [sys.executable, "-c", SWEEP, str(tmp_path), "20"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    records, broken = read_runs([tmp_path])
    assert broken == []
    # each trained by one of them alone
    assert [len(record.epochs) for record in records] == [20, 20]
    assert sum(text.count("epoch 20/20") for text in printed) == 2


def test_a_run_of_another_process_is_left_to_it(tiny, tmp_path, capsys):
    planned = plan(select_rows([5], ["resnet18_r1"]), tiny, COLUMNS, [0])
    entry, other = entries([item.run for item in planned], tmp_path, Execution())
    with entry.folder.created(entry.run, {"data": {}, "units": []}):
        result = reproduce.reproduce(planned, tiny, tmp_path, Execution(), dry_run=False)
    assert [run["state"] for run in result["runs"]] == ["in another process", "finished"]
    assert other.state == "finished"
    assert f"in another process: {entry.folder.path}" in capsys.readouterr().out


def test_a_run_that_diverges_does_not_stop_the_others(tiny, tmp_path, monkeypatch, capsys):
    def train(prepared: Prepared, *arguments, **options):
        if prepared.run.rule == "global":
            return train_run(prepared, *arguments, **options)
        raise Diverged("unit 3: its loss is nan")

    monkeypatch.setattr("layerwise.experiments.entry.train", train)
    with pytest.raises(SystemExit) as leaving:
        main(tiny_sweep(tmp_path))
    captured = capsys.readouterr()
    result = json.loads(captured.out.splitlines()[-1])
    states = [run["state"] for run in result["runs"]]
    assert sorted(states) == ["diverged", "diverged", "finished", "finished"]
    assert leaving.value.code == 1
    assert captured.err.startswith("layerwise: 2 runs diverged and gave no number: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["7"], "the paper has no table 7"),
        (["5", "--rows", "vgg*"], "no row of these tables matches"),
        (["5", "--rows", "resnet18_r4", "resnet19"], "no row of these tables matches 'resnet19'"),
        (["5", "--rule", "local"], "Accepted: layerwise, global, both"),
        (["5", "--scale", "medium"], "Accepted: paper, middle, small"),
        (["5", "--seeds", "0"], "Cannot use seeds 0: it is out of range. Give 1 or more"),
        (["5", "--loss", "predsym"], "Did you mean 'predsim'"),
        (["five"], "invalid int value"),
        (["5", "--rule", "global", "--loss", "pred"], "Cannot use --loss: it would change nothing"),
    ],
)
def test_bad_input_is_refused(capsys, tmp_path, arguments, words):
    assert words in refusal(
        capsys, "reproduce", *arguments, "--output", str(tmp_path / "runs"), "--dry-run"
    )
    assert not (tmp_path / "runs").exists()


def test_records_of_broken_runs_are_said_and_left_out(tiny, tmp_path, capsys):
    main(["reproduce", "5", "--rows", "resnet18_r1", "--scale", "tiny", "--output", str(tmp_path)])
    capsys.readouterr()
    (good, bad) = sorted(tmp_path.iterdir())
    log = good / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-40])  # cut in the units of the second epoch
    (bad / "run.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("no run")
    records, broken = read_runs([tmp_path])
    assert [(record.path, len(record.epochs)) for record in records] == [(str(good), 0)]
    assert records[0].damaged == ("log.jsonl",)
    assert records[0].test_accuracy == RunFolder(good).result()["test_accuracy"]
    assert [item.path for item in broken] == [str(tmp_path), str(good), str(bad)]
    assert broken[0].reason == "not of a run, and passed over: foreign"
    assert "log.jsonl: it is not the file that the run wrote" in broken[1].reason
    with pytest.raises(InvalidInput, match="there is no folder"):
        read_runs([tmp_path / "nowhere"])


def test_reading_runs_imports_no_torch():
    modules = "layerwise.runs.records, layerwise.paper.verdicts"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )


def test_small_scale_trains_resnet50_at_an_eighth_of_its_width():
    widths = {row.model: row_run(row, "small", "layerwise").width for row in ROWS}
    assert widths.pop("resnet50") == 0.125
    assert set(widths.values()) == {0.25}


def test_an_estimate_counts_the_images_of_every_epoch():
    run = Run(data="cifar10", train_images=15_000, val_fraction=0.1, epochs=2)
    pace, often = Pace(step=0.01, forward=0.001, work=1e6), Execution()
    assert total(run, often, pace, 1e6) == pytest.approx(
        2 * (15_000 * 0.01 + (5_000 + 10_000) * 0.001)
    )
    assert total(replace(run, train_images=None), often, pace, 2e6) == pytest.approx(
        4 * (45_000 * 0.01 + 15_000 * 0.001)
    )
    assert total(run, replace(often, eval_every=2), pace, 1e6) == pytest.approx(2 * (150 + 7.5))


def test_an_estimate_leaves_out_the_first_step_which_loads_and_compiles(monkeypatch):
    seconds = iter([40.0, 6.0])
    now = [0.0]

    def ticks(*_):
        while True:
            now[0] += next(seconds)
            yield

    monkeypatch.setattr("layerwise.profiling.estimate.rule_ticks", ticks)
    monkeypatch.setattr("layerwise.profiling.estimate.time.perf_counter", lambda: now[0])
    run = Run(model="vgg8b", width=0.02, batch_size=8)
    assert time_steps(run, Execution(), 1e6).step == 6.0 / 8


def test_numbers_have_their_nouns():
    assert [counted(1, "run"), counted(2_000, "run"), counted(0, "batch")] == [
        "1 run",
        "2,000 runs",
        "0 batches",
    ]


def test_an_option_that_changes_nothing_is_said(capsys, tmp_path):
    given = ["--rows", "resnet18", "--scale", "small", "--separability-measures", "fisher"]
    main(["reproduce", "5", *given, "--output", str(tmp_path / "runs"), "--dry-run"])
    assert "--separability-measures changes nothing here" in capsys.readouterr().err


def test_a_run_without_a_hierarchy_is_that_of_the_published_row():
    [resnet18] = [each for each in ROWS if (each.table, each.name) == (5, "resnet18")]
    expected = row_run(resnet18, "small", "layerwise", 0)
    found = match(replace(expected, hierarchy=None))
    assert [each.name for each in found.rows] == [each.name for each in match(expected).rows]
    assert found.rows
