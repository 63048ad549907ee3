"""Runs of version 0.1, whose run.json has format 2: read, found, gone on with, evaluated, shown."""

import hashlib
import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from layerwise.cli import main
from layerwise.errors import InvalidInput
from layerwise.experiments.entry import entries, folder_of
from layerwise.paper.rows import ROWS, match, row_run
from layerwise.runs.digests import SEAL
from layerwise.runs.folder import (
    CONFIGURATION,
    FACTS_DIGEST,
    FORMATS,
    RECORDS_DIGESTS,
    RESULT,
    STATE,
    WEIGHTS,
    RunFolder,
)
from layerwise.runs.records import read_runs
from layerwise.runs.run import Execution, Run, described, run_name, run_words
from layerwise.training.checkpoint import load_state
from layerwise.training.loop import Interrupted, train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from layerwise.utils.options import Options
from tests.test_cli import last_json

CPU = Execution(device="cpu", memory_format="contiguous")

# Written by version 0.1 for
# layerwise reproduce 5 --rows resnet18_r4 --scale small --epochs 1 --layout contiguous
WRITTEN = """{
 "format": 2,
 "run": {
  "model": "resnet18", "hierarchy": "1,1,2,2", "width": 0.25, "data": "cifar10",
  "image_size": 16, "train_images": 15000, "val_fraction": 0.1, "rule": "simultaneous",
  "loss": "predsim", "at": "layer", "beta": 0.99, "decoder_dim": 4096, "head_size": null,
  "similarity_size": null, "similarity_channels": null, "cache": false,
  "cache_type": "float32", "segments": null, "threads": 2, "epochs": 1, "batch_size": 128,
  "optimizer": "adam", "lr": 0.001, "momentum": 0.9, "weight_decay": 0.0, "decay_rate": 0.25,
  "decay_milestones": "0.5,0.75,0.89,0.94", "clip_grad": null, "dropout": 0.0,
  "augment": true, "crop_padding": 2, "flip": null, "cutout": 0, "views": null, "seed": 0,
  "amp": true
 },
 "data": {
  "class_names": ["a", "b"], "mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0],
  "image_size": 16, "channels": 3, "images": [15000, 5000, 10000]
 },
 "units": ["stem.conv", "output"],
 "layouts": ["contiguous", "contiguous"],
 "execution": {
  "data_dir": "data", "device": "auto", "workers": 2, "cpu_threads": null,
  "keep_memory": true, "layout": "contiguous", "graphs": true, "streams": 4,
  "cache_place": null, "cache_dir": null, "cache_limit": "4GB", "download": false,
  "eval_every": 1, "save_every": 1, "log": null, "separability_every": 0,
  "separability_measures": "linear_probe,nearest_class_mean", "separability_against": null
 }
}"""
NAME = "resnet18-1-1-2-2-cifar10-simultaneous-predsim-seed0-6e1bfe"  # that it gave this run
R4 = next(row for row in ROWS if row.name == "resnet18_r4" and row.table == 5)

# small runs as version 0.1 trained them
SMALL = Run(
    hierarchy="1,1,1,1",
    width=1 / 16,
    train_images=60,
    batch_size=16,
    epochs=3,
    lr=1e-3,
    views=2,
    output_layer="separate",
)
RUNS = {
    "plain": SMALL,
    "loss options": replace(SMALL, loss_options=Options({"beta": 0.5})),
    "rule options": replace(SMALL, rule="sequential", rule_options=Options({"cache": True})),
    "global": replace(SMALL, rule="global"),
}


def write(path: Path, facts: dict[str, Any]) -> RunFolder:
    path.mkdir(parents=True)
    (path / CONFIGURATION).write_text(json.dumps(facts))
    return RunFolder(path)


def facts(**changes: Any) -> dict[str, Any]:
    """What version 0.1 wrote, with other entries of its run."""
    written = json.loads(WRITTEN)
    return written | {"run": written["run"] | changes}


def in_format_2(run: Run) -> dict[str, Any]:
    """A run as version 0.1 described it: the options of all losses and rules beside its fields."""
    values = described(run)
    given = {**values.pop("loss_options"), **values.pop("rule_options")}
    for name in ("model_options", "output_layer", "downsample_after"):
        values.pop(name)
    old = json.loads(WRITTEN)["run"]
    options = {name: old[name] for name in old.keys() - values.keys()}
    return {**values, **options, **given}


def age(folder: RunFolder) -> None:
    """Let a folder's run and state be as version 0.1 wrote them."""
    written, old = folder.facts(), in_format_2(folder.run())
    execution = dict(written["execution"])
    execution["layout"] = execution.pop("memory_format")
    kept = {key: written[key] for key in ("data", "units", "layouts")}
    aged = {"format": 2, "run": old, **kept, "execution": execution}
    folder.file(CONFIGURATION).write_text(json.dumps(aged))
    state = load_state(folder.file(STATE))
    kept = {key: state[key] for key in ("position", "learner", "meter")}
    torch.save({**kept, "run": old}, folder.file(STATE))


class StopAfter(Progress):
    """Sends the process Ctrl-C when so many steps have been made."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def tick(self, tick: Any, meter: Any) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


def weights(folder: RunFolder) -> str:
    return hashlib.sha256(folder.file(WEIGHTS).read_bytes()).hexdigest()


def test_a_written_run_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / NAME, facts())
    run = folder.run()
    assert run == row_run(R4, "small", "layerwise", epochs=1)
    assert (run.output_layer, run.loss_options, run.rule_options) == ("separate", {}, {})
    assert folder.execution() == Execution(memory_format="contiguous", streams=4)
    found = match(run)
    assert found is not None
    assert found.rows == (R4,)


def test_options_belong_to_their_owners_now(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", facts(beta=0.5, cache=True, views=1, downsample_after="1,2"))
    run = folder.run()
    assert run.loss_options == {"beta": 0.5}
    assert run.rule_options == {"cache": True}
    assert run.downsample_after == "1,2"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cache_type": "uint8"}, "which only version 0.1 can do"),
        ({"amp": "yes"}, "'yes' is not of type bool"),
        ({"strange": 1}, "it has unknown entry 'strange'"),
    ],
)
def test_what_cannot_be_read_is_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=words):
        write(tmp_path / "run", facts(**changes)).run()


def test_a_missing_entry_is_named(tmp_path: Path) -> None:
    written = facts()
    del written["run"]["amp"]
    with pytest.raises(InvalidInput, match="it has no entry 'amp'"):
        write(tmp_path / "run", written).run()


def test_a_sweep_finds_the_folder_of_before(tmp_path: Path) -> None:
    run = row_run(R4, "small", "layerwise", epochs=1)
    assert run_name(run) != NAME
    assert NAME.startswith(run_words(run))
    assert folder_of(run, tmp_path).path == tmp_path / run_name(run)
    write(tmp_path / f"{run_words(run)}-aaaaaa", facts(lr=0.5))  # the same words, another run
    write(tmp_path / NAME, facts())
    assert folder_of(run, tmp_path).path == tmp_path / NAME
    [entry] = entries([run], tmp_path, CPU)
    assert (entry.state, entry.folder.path) == ("unfinished", tmp_path / NAME)
    (tmp_path / f"{run_words(run)}-000000").mkdir()
    (tmp_path / f"{run_words(run)}-000000" / CONFIGURATION).write_text("{")  # broken: passed over
    assert folder_of(run, tmp_path).path == tmp_path / NAME


@pytest.mark.parametrize("kind", RUNS)
def test_a_stopped_run_goes_on_however_often_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    run, whole, folder = RUNS[kind], RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "run")
    prepared = prepare(run, CPU)
    train(prepared, whole, False, Progress())
    with pytest.raises(Interrupted):
        train(prepared, folder, False, StopAfter(6))
    age(folder)
    assert folder.facts()["format"] == 2
    assert folder.run() == run
    with pytest.raises(Interrupted):
        train(prepare(folder.run(), folder.execution()), folder, True, StopAfter(3))
    assert load_state(folder.file(STATE))["format"] == FORMATS[-1]
    train(prepare(folder.run(), folder.execution()), folder, True, Progress())
    assert weights(folder) == weights(whole)
    assert [record["epoch"] for record in folder.log()] == [
        record["epoch"] for record in whole.log()
    ]


def test_the_same_command_goes_on_with_a_run_of_before(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "train resnet18 --hierarchy 1,1,1,1 --width 0.0625 --train-images 60 --views 2"
    options += f" --batch-size 16 --epochs 3 --lr 1e-3 --device cpu --output {tmp_path / 'run'}"
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(Interrupted):
        train(prepare(SMALL, CPU), folder, False, StopAfter(6))
    age(folder)
    with pytest.raises(SystemExit):  # the output layer is joined to the last unit by default now
        main([*options.split(), "--resume"])
    assert "--output-layer joined against separate" in capsys.readouterr().err
    main([*options.split(), "--resume", "--output-layer", "separate"])
    assert folder.finished


def test_a_finished_run_is_evaluated_measured_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path / "runs" / "run")
    result = train(prepare(replace(SMALL, epochs=1), CPU), folder, False, Progress())
    age(folder)
    added = "local", SEAL, FACTS_DIGEST, RECORDS_DIGESTS
    old = {key: value for key, value in result.items() if key not in added}
    folder.file(RESULT).write_text(json.dumps(old))
    main(["evaluate", str(folder.path), "--json"])
    evaluated = last_json(capsys)
    assert evaluated["test_accuracy"] == result["test_accuracy"]
    assert len(evaluated["units"]) == len(result["units"]) == 10
    main(["separability", str(folder.path), "--measures", "fisher", "--json"])
    assert len(last_json(capsys)["units"]) == 11
    records, broken = read_runs([tmp_path / "runs"])
    assert broken == []
    assert records[0].run == replace(SMALL, epochs=1)
    page = tmp_path / "report.html"
    main(["report", str(tmp_path / "runs"), "--output", str(page)])
    assert f"{result['test_accuracy']:.2f}" in page.read_text()
    train(prepare(folder.run(), folder.execution()), folder, True, Progress())  # nothing to do
    assert json.loads(folder.file(RESULT).read_text()) == old


def test_a_configuration_of_before_gives_the_options_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = in_format_2(replace(SMALL, epochs=1, loss_options=Options({"beta": 0.5})))
    write(tmp_path / "old", {**facts(), "run": small})
    config, output = tmp_path / "old" / CONFIGURATION, tmp_path / "new"
    main(["train", "--config", str(config), "--output", str(output), "--device", "cpu"])
    run = RunFolder(output).run()
    assert RunFolder(output).facts()["format"] == FORMATS[-1]
    assert run == RunFolder(tmp_path / "old").run()
