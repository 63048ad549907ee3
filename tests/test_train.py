"""Whole runs: their folder, resuming after any interruption, what they leave behind."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from layerwise.data import DATASETS, Arrays
from layerwise.errors import Diverged, InvalidInput
from layerwise.models import create_model
from layerwise.rules import RULES
from layerwise.runs.folder import (
    BEST,
    FORMATS,
    LOG,
    NEXT_BEST,
    RESULT,
    STATE,
    WEIGHTS,
    RunFolder,
)
from layerwise.runs.run import Execution, Run, run_name
from layerwise.training import loop as train_module
from layerwise.training.checkpoint import load_state, refuse_other_data
from layerwise.training.loop import train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from layerwise.utils.options import Options

SMALL = Run(
    model="resnet18",
    hierarchy="1,1,1,1",
    width=1 / 16,
    train_images=60,
    batch_size=16,
    epochs=2,
    lr=1e-3,
    dropout=0.1,
    views=2,
)
CPU = Execution(device="cpu")
CACHED = Options({"cache": True})
OPTIONS = [
    "--hierarchy",
    "1,1,1,1",
    "--width",
    "0.0625",
    "--train-images",
    "60",
    "--batch-size",
    "16",
    "--lr",
    "1e-3",
    "--dropout",
    "0.1",
    "--views",
    "2",
    "--cpu-threads",
    "1",
]


def carry_out(run: Run, path: Path, resume: bool = False) -> dict[str, Any]:
    return train(prepare(run, CPU), RunFolder(path), resume, Progress())


Finished = Callable[..., tuple[dict[str, Any], Path]]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Result and folder of a run by a rule, which was made once; no test may change it."""

    @cache
    def by_rule(rule: str = SMALL.rule) -> tuple[dict[str, Any], Path]:
        path = tmp_path_factory.mktemp("finished") / "run"
        return carry_out(replace(SMALL, rule=rule), path), path

    return by_rule


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("rule", RULES)
def test_a_run_by_every_rule(rule: str, finished: Finished) -> None:
    result, path = finished(rule)
    folder = RunFolder(path)
    assert folder.result() == json.loads(json.dumps(result))
    assert folder.run() == replace(SMALL, rule=rule)
    units = RULES[rule].at or 9
    epochs = units * 2 if rule == "sequential" else 2
    log = folder.log()
    assert [record["epoch"] for record in log] == list(range(1, epochs + 1))
    assert len(result["units"]) == units
    assert result["epochs"] == epochs
    assert result["hierarchy"] == [1, 1, 1, 1]
    assert result["test_accuracy"] == log[-1]["test_accuracy"]
    best = max(
        (record for record in log if record["val_accuracy"] is not None),
        key=lambda record: record["val_accuracy"],
    )
    assert result["best_epoch"] == best["epoch"]  # the first of equals
    assert result["best_test_accuracy"] == best["test_accuracy"]
    assert result["images_per_second"] > 0
    assert result["peak_memory_bytes"] > 4 * result["parameters"]


def test_the_same_run_gives_the_same_bits(finished: Finished, tmp_path: Path) -> None:
    _, path = finished()
    carry_out(SMALL, tmp_path / "again")
    carry_out(replace(SMALL, seed=1), tmp_path / "other")
    assert digest(path / WEIGHTS) == digest(tmp_path / "again" / WEIGHTS)
    assert digest(path / WEIGHTS) != digest(tmp_path / "other" / WEIGHTS)


def test_weights_load_into_the_plain_network_without_this_library(finished: Finished) -> None:
    result, path = finished()
    model = create_model("resnet18", "1,1,1,1", width=1 / 16, in_chans=1, image_size=8)
    for name in (WEIGHTS, BEST):
        model.load_state_dict(load_file(path / name), strict=True)
    assert result["sha256"] == {name: digest(path / name) for name in (WEIGHTS, BEST)}
    # weights_only
    assert set(load_state(path / STATE)) == {
        "format",
        "run",
        "position",
        "learner",
        "meter",
        "marks",
        "facts_sha256",
    }


def test_without_validation_there_is_no_best_epoch(tmp_path: Path) -> None:
    result = carry_out(replace(SMALL, val_fraction=0.0), tmp_path / "run")
    assert result["best_epoch"] is None
    assert result["val_accuracy"] is None
    assert not (tmp_path / "run" / BEST).exists()


def command(path: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "layerwise",
        "train",
        "resnet18",
        *OPTIONS,
        "--output",
        str(path),
        *more,
    ]


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)


@pytest.mark.parametrize("rule", ["simultaneous"])  # of others see tests/faults
def test_killed_at_any_moment_and_resumed_is_uninterrupted(rule: str, tmp_path: Path) -> None:
    epochs = "5"
    run = replace(SMALL, rule=rule, epochs=int(epochs))
    torch.set_num_threads(1)
    carry_out(run, tmp_path / "whole")
    path = tmp_path / "killed"
    # while the first weights are written, while a state is written, between two
    for moment in (NEXT_BEST + ".draft", STATE + ".draft", STATE):
        process = subprocess.Popen(
            command(path, "--rule", rule, "--epochs", epochs, "--resume"), stdout=subprocess.DEVNULL
        )
        time.sleep(0.5 if moment == STATE else 0)
        wait_for(path / moment, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    carry_out(run, path, resume=True)
    assert digest(path / WEIGHTS) == digest(tmp_path / "whole" / WEIGHTS)
    whole, killed = RunFolder(tmp_path / "whole"), RunFolder(path)
    volatile = {"seconds", "images_per_second"}
    for one, other in zip(whole.log(), killed.log(), strict=True):
        assert {k: v for k, v in one.items() if k not in volatile} == {
            k: v for k, v in other.items() if k not in volatile
        }
    states = [load_state(folder.file(STATE)) for folder in (whole, killed)]
    for one, other in zip(
        states[0]["learner"]["optimizers"], states[1]["learner"]["optimizers"], strict=True
    ):
        for key, moments_of in one["state"].items():
            assert all(
                torch.equal(value, other["state"][key][name]) for name, value in moments_of.items()
            )


def test_ctrl_c_saves_and_says_how_to_resume(tmp_path: Path) -> None:
    path = tmp_path / "run"
    process = subprocess.Popen(
        command(path, "--epochs", "500"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for(path / STATE, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert f"Go on with: layerwise train --resume {path}" in errors.decode()
    epoch, batch = load_state(path / STATE)["position"]
    assert epoch >= 1
    assert len(RunFolder(path).log()) == epoch
    assert batch < 4


class StopAfter(Progress):
    """Sends the process Ctrl-C, or another signal, when so many steps have been made."""

    def __init__(self, steps: int, number: int = signal.SIGINT) -> None:
        self.left, self.number = steps, number

    def tick(self, tick: Any, meter: Any) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("rule", RULES)
def test_stopped_within_an_epoch_and_resumed_is_uninterrupted(
    rule: str, finished: Finished, tmp_path: Path
) -> None:
    run, (_, whole) = replace(SMALL, rule=rule), finished(rule)
    with pytest.raises(train_module.Interrupted):
        train(prepare(run, CPU), RunFolder(tmp_path / "run"), False, StopAfter(6))
    assert load_state(tmp_path / "run" / STATE)["position"] == [1, 2]
    carry_out(run, tmp_path / "run", resume=True)
    assert digest(tmp_path / "run" / WEIGHTS) == digest(whole / WEIGHTS)
    accuracies = [
        [[u["accuracy"] for u in r["units"]] for r in RunFolder(path).log()]
        for path in (whole, tmp_path / "run")
    ]
    assert accuracies[0] == accuracies[1]


class CloseTerminal(StopAfter):
    """Closes the terminal of a run, which the system reports twice where a shell is ended too."""

    def __init__(self, steps: int, terminal: int) -> None:
        super().__init__(steps, signal.SIGHUP)
        self.terminal = terminal

    def tick(self, tick: Any, meter: Any) -> None:
        if self.left == 1:
            os.close(self.terminal)
            super().tick(tick, meter)
            self.left = 1
        super().tick(tick, meter)


def test_a_closed_terminal_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, end = os.openpty()
    with open(end, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(train_module.Interrupted):
            train(
                prepare(SMALL, CPU),
                RunFolder(tmp_path / "run"),
                False,
                CloseTerminal(6, terminal),
            )
        print("more", file=stream, flush=True)  # goes nowhere, and is no error
    assert load_state(tmp_path / "run" / STATE)["position"] == [1, 2]


def test_nohup_goes_on_when_the_terminal_is_closed(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        result = train(
            prepare(SMALL, CPU), RunFolder(tmp_path / "run"), False, StopAfter(1, signal.SIGHUP)
        )
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result["epochs"] == SMALL.epochs


def test_cached_features_survive_a_stop(tmp_path: Path) -> None:
    run = replace(SMALL, rule="sequential", rule_options=CACHED)
    carry_out(run, tmp_path / "whole")
    with pytest.raises(train_module.Interrupted):
        # in the fourth unit
        train(prepare(run, CPU), RunFolder(tmp_path / "run"), False, StopAfter(30))
    carry_out(run, tmp_path / "run", resume=True)
    assert digest(tmp_path / "run" / WEIGHTS) == digest(tmp_path / "whole" / WEIGHTS)


def test_finished_runs_are_never_trained_again(finished: Finished, tmp_path: Path) -> None:
    result, path = finished()
    shutil.copytree(path, tmp_path / "run")
    before = {file.name: digest(file) for file in (tmp_path / "run").iterdir()}
    expected = json.loads(json.dumps(result)) | {"run": str(tmp_path / "run")}
    assert carry_out(SMALL, tmp_path / "run", resume=True) == expected
    with pytest.raises(InvalidInput, match="holds a finished run, which is never overwritten"):
        carry_out(SMALL, tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"holds another run \(--lr 0.5 against 0.001\)"):
        carry_out(replace(SMALL, lr=0.5), tmp_path / "run", resume=True)
    assert before == {file.name: digest(file) for file in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "resnet19"}, "Did you mean 'resnet18'"),
        ({"hierarchy": "1,1,1"}, "has 3 stages, resnet18 has 4"),
        ({"loss": "predsm"}, "Did you mean 'predsim'"),
        ({"rule": "simultanous"}, "Did you mean 'simultaneous'"),
        ({"optimizer": "adm"}, "Did you mean 'adam'"),
        ({"epochs": 0}, "Cannot use epochs 0: it is out of range. Give 1 or more"),
        ({"lr": -1.0}, "Cannot use lr -1.0: it is out of range. Give a number above 0"),
        ({"dropout": 1.0}, "Cannot build resnet18 with dropout 1.0: it is out of range"),
        (
            {"weight_decay": float("inf")},
            "Cannot use weight_decay inf: it is not finite. Give a number",
        ),
        ({"decay_milestones": "50%"}, "are not shares of training"),
        (
            {"rule_options": CACHED},
            "It belongs to sequential",
        ),
        (
            {"rule": "sequential", "rule_options": CACHED, "views": None},
            "Give --views, such as 1",
        ),
        (
            {"loss": "sim", "loss_options": Options({"beta": 0.5})},
            "Cannot use --beta with the loss 'sim', which accepts .* It belongs to predsim",
        ),
        (
            {"rule": "parallel", "rule_options": Options({"micro_batches": 0})},
            "Cannot use micro_batches 0",
        ),
        (
            {"rule": "checkpointed", "rule_options": Options({"segments": 0})},
            "into 0 segments: .* Give 1 to",
        ),
        (
            {"rule": "checkpointed", "rule_options": Options({"segments": 99})},
            "into 99 segments: .* Give 1 to",
        ),
        ({"at": "stage.9"}, "Cannot end a unit at 'stage.9': resnet18 has no such module"),
        ({"at": "99"}, "Cannot split into 99 units"),
    ],
)
def test_what_cannot_be_carried_out_writes_nothing(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        carry_out(replace(SMALL, **change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("damage", ["truncated", "altered", "foreign", "empty"])
def test_a_damaged_state_is_refused_and_left(damage: str, tmp_path: Path) -> None:
    with pytest.raises(train_module.Interrupted):
        train(prepare(SMALL, CPU), RunFolder(tmp_path / "run"), False, StopAfter(6))
    state = tmp_path / "run" / STATE
    content = state.read_bytes()
    middle = len(content) // 2
    altered = {
        "truncated": content[:middle],
        "altered": content[:middle]
        + bytes(255 - byte for byte in content[middle : middle + 64])
        + content[middle + 64 :],
        "foreign": b"not a state at all" * 100,
        "empty": b"",
    }[damage]
    state.write_bytes(altered)
    with pytest.raises(InvalidInput, match="is damaged or not a state"):
        carry_out(SMALL, tmp_path / "run", resume=True)
    assert state.read_bytes() == altered


def test_code_in_a_state_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "exploded",))

    with pytest.raises(train_module.Interrupted):
        train(prepare(SMALL, CPU), RunFolder(tmp_path / "run"), False, StopAfter(6))
    torch.save({"position": Bomb()}, tmp_path / "run" / STATE)
    with pytest.raises(InvalidInput, match="is damaged or not a state"):
        carry_out(SMALL, tmp_path / "run", resume=True)
    assert not (tmp_path / "exploded").exists()


def test_a_full_disk_keeps_the_last_state(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = finished()
    save = torch.save

    def full(state: Any, file: Any) -> None:
        if state["position"][0] == 2:
            file.write(b"half a st")
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            except OSError:
                raise RuntimeError("unexpected pos") from None  # as torch does
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        InvalidInput,
        match=r"Cannot write .*: No space left on device\. What was saved before is untouched",
    ):
        carry_out(SMALL, tmp_path / "run")
    monkeypatch.undo()
    assert load_state(tmp_path / "run" / STATE)["position"] == [1, 0]
    assert not list((tmp_path / "run").glob("*.draft"))
    assert carry_out(SMALL, tmp_path / "run", resume=True)["sha256"] == whole["sha256"]


def test_a_diverging_loss_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerwise.losses.predsim import PredSim

    forward, calls = PredSim.forward, []

    def explode(self: PredSim, features: Any, targets: Any) -> Any:
        result = forward(self, features, targets)
        calls.append(self.training)
        late = sum(calls) > 8 * (2 + 5) + 4  # of eight heads: the audit, an epoch, a part of a step
        return result._replace(loss=result.loss * float("nan")) if late else result

    monkeypatch.setattr(PredSim, "forward", explode)
    with pytest.raises(Diverged, match=r"loss of unit \d+ \(.*\) is nan at step 5"):
        carry_out(SMALL, tmp_path / "run")
    state = load_state(tmp_path / "run" / STATE)
    assert state["position"] == [1, 0]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in state["learner"]["model"].values())


def test_two_processes_cannot_train_one_run(tmp_path: Path) -> None:
    with pytest.raises(train_module.Interrupted):
        train(prepare(SMALL, CPU), RunFolder(tmp_path / "run"), False, StopAfter(3))
    with (
        RunFolder(tmp_path / "run").locked(),
        pytest.raises(InvalidInput, match="by another process"),
    ):
        carry_out(SMALL, tmp_path / "run", resume=True)


def test_output_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for name in ("full", "file"):
        with pytest.raises(InvalidInput, match="exists and is not a run"):
            carry_out(SMALL, tmp_path / name)
    with pytest.raises(InvalidInput, match="file is a file"):
        carry_out(SMALL, tmp_path / "file" / "below")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "precious"


def test_names_tell_runs_apart() -> None:
    assert run_name(SMALL) == run_name(replace(SMALL))
    names = {
        run_name(run)
        for run in (
            SMALL,
            replace(SMALL, lr=0.1),
            replace(SMALL, seed=1),
            replace(SMALL, rule="global"),
        )
    }
    assert len(names) == 4
    assert run_name(SMALL).startswith("resnet18-1-1-1-1-digits-simultaneous-predsim-seed0-")
    halved = run_name(replace(SMALL, downsample_after="0,1,2"))
    assert halved.startswith("resnet18-1-1-1-1-halved-0-1-2-digits-simultaneous-predsim-seed0-")


def test_a_log_cut_short_is_read_up_to_there(finished: Finished, tmp_path: Path) -> None:
    shutil.copytree(finished()[1], tmp_path / "run")
    with (tmp_path / "run" / LOG).open("a") as log:
        log.write('{"epoch": 3, "uni')
    assert len(RunFolder(tmp_path / "run").log()) == 2


def test_a_run_killed_before_it_began_begins_again(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").touch()
    (tmp_path / "run" / "run.json.draft").write_text("{")
    carry_out(SMALL, tmp_path / "run", resume=True)
    assert RunFolder(tmp_path / "run").finished


@pytest.mark.parametrize("change", ["images", "labels"])
def test_other_data_than_a_run_began_with_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Also where classes, numbers, means and deviations are the same."""
    digits = DATASETS["digits"]

    def read(folder: Path) -> Arrays:
        arrays = digits.read(folder)
        images, labels = np.array(arrays.train_images), np.array(arrays.train_labels)
        if change == "images":
            images[0] = np.roll(images[0], 1, axis=-1)
        else:
            labels[:2] = labels[1], labels[0]
        return arrays._replace(train_images=images, train_labels=labels)

    folder = RunFolder(tmp_path / "run")
    with pytest.raises(train_module.Interrupted):
        train(prepare(SMALL, CPU), folder, False, StopAfter(3))
    monkeypatch.setitem(DATASETS, "digits", replace(digits, read=read))
    with pytest.raises(InvalidInput, match="was trained on other images"):
        carry_out(SMALL, folder.path, resume=True)
    facts = prepare(SMALL, CPU).load_data().facts()
    recorded = folder.facts()["data"]
    assert facts["digest"] != recorded["digest"]
    if change == "images":
        assert facts == recorded | {"digest": facts["digest"]}


def test_data_of_a_run_of_an_earlier_version_are_known_without_a_digest(tmp_path: Path) -> None:
    folder, data = RunFolder(tmp_path), prepare(SMALL, CPU).load_data().facts()
    earlier = {name: value for name, value in data.items() if name != "digest"}
    facts = {"format": FORMATS[-1], "run": {}, "data": earlier}
    (tmp_path / "run.json").write_text(json.dumps(facts))
    refuse_other_data(folder, data)
    (tmp_path / "run.json").write_text(json.dumps(facts | {"data": earlier | {"mean": [1.0]}}))
    with pytest.raises(InvalidInput, match="was trained on other images"):
        refuse_other_data(RunFolder(tmp_path), data)


def test_a_run_whose_description_or_best_weights_were_altered_is_not_gone_on_with(
    tmp_path: Path,
) -> None:
    with pytest.raises(train_module.Interrupted):
        train(prepare(SMALL, CPU), RunFolder(tmp_path / "run"), False, StopAfter(6))
    path = tmp_path / "run" / "run.json"
    original = path.read_text()
    path.write_text(original.replace('"lr": 0.001', '"lr": 0.002'))
    with pytest.raises(InvalidInput, match=r"run\.json was altered since the state was saved"):
        carry_out(replace(SMALL, lr=0.002), tmp_path / "run", resume=True)
    path.write_text(original)
    (tmp_path / "run" / BEST).unlink()
    with pytest.raises(InvalidInput, match="has been removed"):
        carry_out(SMALL, tmp_path / "run", resume=True)


def test_how_a_run_is_carried_out_is_remembered(finished: Finished) -> None:
    assert RunFolder(finished()[1]).execution() == Execution(device="cpu")


def test_memory_counts_what_a_sequential_rule_keeps(tmp_path: Path) -> None:
    peaks = []
    for views in (1, 3):
        run = replace(SMALL, rule="sequential", rule_options=CACHED, views=views, epochs=3)
        peaks.append(carry_out(run, tmp_path / str(views))["peak_memory_bytes"])
    # two tensors (feature, shortcut) of the first stage for 60 images: bytes of a view
    features = 2 * 60 * 4 * 8 * 8 * 4
    assert peaks[1] - peaks[0] >= 1.5 * features


def test_a_network_that_explodes_in_its_last_step_has_diverged(tmp_path: Path) -> None:
    with pytest.raises(Diverged, match="loss of unit"):
        carry_out(
            replace(SMALL, optimizer="sgd", lr=1e9, epochs=1, batch_size=60), tmp_path / "run"
        )
    assert not (tmp_path / "run" / RESULT).exists()
