"""Runs whose files were lost, altered, replaced by what is no file, or forged."""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from layerwise import separability
from layerwise.analysis.separability import separability_over_epochs
from layerwise.errors import InvalidInput
from layerwise.experiments.entry import entries
from layerwise.experiments.states import FINISHED, UNFINISHED
from layerwise.experiments.sweep import sweep
from layerwise.runs.folder import (
    BEST,
    CONFIGURATION,
    LOCK,
    LOG,
    NEXT_BEST,
    RESULT,
    SEPARABILITY,
    STATE,
    WEIGHTS,
    RunFolder,
)
from layerwise.runs.records import read_runs
from layerwise.runs.run import Execution, Run, run_name
from layerwise.training import checkpoint
from layerwise.training import loop as training
from layerwise.training.checkpoint import load_state
from layerwise.training.loop import train
from layerwise.training.predict import predict
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from layerwise.training.saved import evaluate
from layerwise.utils.files import replacing

SMALL = Run(
    model="vgg8b",
    hierarchy="1,1,1,1",
    width=1 / 32,
    at="3",
    train_images=80,
    batch_size=20,
    epochs=4,
    lr=3e-3,
)
CPU = Execution(
    device="cpu", cpu_threads=1, separability_every=1, separability_measures="nearest_class_mean"
)


def go(folder: Path, execution: Execution = CPU, resume: bool = True) -> dict[str, Any]:
    return train(prepare(SMALL, execution), RunFolder(folder), resume, Progress())


class StopAt(Progress):
    """Stops the run with an error when an epoch has been logged and its state saved."""

    def __init__(self, epoch: int) -> None:
        self.at = epoch

    def epoch(self, record: dict[str, Any]) -> None:
        if record["epoch"] == self.at:
            raise OverflowError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, another that is finished too, and one that has done two epochs of four."""
    place = tmp_path_factory.mktemp("bases")
    go(place / "finished")
    train(prepare(replace(SMALL, seed=1), CPU), RunFolder(place / "other"), False, Progress())
    with pytest.raises(OverflowError):
        train(prepare(SMALL, CPU), RunFolder(place / "begun"), False, StopAt(2))
    return place


@pytest.fixture
def finished(bases: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases / "finished", tmp_path / "runs" / "run"))


@pytest.fixture
def begun(bases: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bases / "begun", tmp_path / "runs" / "run"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def change_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def an_image(folder: Path) -> str:
    path = folder / "image.png"
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(path)
    return str(path)


@pytest.mark.parametrize("execution", [{}, {"eval_every": 3}, {"save_every": 2}, {"eval_every": 4}])
@pytest.mark.parametrize("earlier", [False, True])
def test_killed_between_the_best_weights_and_the_state_it_can_always_be_finished(
    execution: dict[str, int],
    earlier: bool,
    bases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uninterrupted = RunFolder(bases / "finished")
    whole, log = uninterrupted.result(), uninterrupted.log()
    last_best = max(record["epoch"] for record in log if record["best"])
    assert last_best > 1
    save = training.save

    def killed(folder: RunFolder, run: Any, learner: Any, meter: Any, position: Any) -> None:
        if position.epoch == last_best:
            raise MemoryError
        save(folder, run, learner, meter, position)

    monkeypatch.setattr(training, "save", killed)
    with pytest.raises(MemoryError):
        go(tmp_path / "run")
    monkeypatch.undo()
    if earlier:  # an earlier version wrote over the best weights, and no marks
        (tmp_path / "run" / NEXT_BEST).replace(tmp_path / "run" / BEST)
        state = load_state(tmp_path / "run" / STATE)
        kept = ("format", "run", "position", "learner", "meter")
        torch.save({key: state[key] for key in kept}, tmp_path / "run" / STATE)
    changed = replace(CPU, **execution)
    result = go(tmp_path / "run", changed)
    assert result["sha256"][WEIGHTS] == whole["sha256"][WEIGHTS]
    assert not (tmp_path / "run" / NEXT_BEST).exists()
    if not execution:
        assert result["sha256"] == whole["sha256"]
    if BEST in result["sha256"]:
        assert evaluate(RunFolder(tmp_path / "run"), CPU, True)["val_accuracy"] == pytest.approx(
            result["best_val_accuracy"]
        )
    else:
        assert earlier
        with pytest.raises(InvalidInput, match="weights of its best epoch, which were lost"):
            evaluate(RunFolder(tmp_path / "run"), CPU, True)


def test_killed_after_the_state_the_better_weights_get_their_name(
    bases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunFolder(bases / "finished").result()

    def killed(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(checkpoint, "settle_best", killed)
    with pytest.raises(MemoryError):
        go(tmp_path / "run")
    monkeypatch.undo()
    assert (tmp_path / "run" / NEXT_BEST).exists()
    assert go(tmp_path / "run")["sha256"] == whole["sha256"]


@pytest.mark.parametrize("name", [WEIGHTS, BEST, LOG, SEPARABILITY])
def test_a_finished_run_with_an_altered_file_is_not_finished(name: str, finished: Path) -> None:
    content = (finished / name).read_bytes()
    (finished / name).write_bytes(content[:-3] + b"\n\n\n")
    with pytest.raises(InvalidInput, match=f"{name}: it is not the file that the run wrote"):
        go(finished)
    named = finished.rename(finished.with_name(run_name(SMALL)))
    with pytest.raises(InvalidInput, match="SHA-256 differs"):
        assert entries([SMALL], named.parent, CPU)[0].state
    [_], broken = read_runs([named])
    assert [item.reason for item in broken if name in item.reason]


def test_removed_weights_are_written_again_from_the_state(finished: Path) -> None:
    before = RunFolder(finished).result()
    (finished / WEIGHTS).unlink()
    assert not RunFolder(finished).finished
    named = finished.rename(finished.with_name(run_name(SMALL)))
    [entry] = entries([SMALL], named.parent, CPU)
    assert entry.state == UNFINISHED
    assert go(named)["sha256"] == before["sha256"]
    assert entry.state == FINISHED


def test_a_run_without_weights_and_state_is_not_trained_over(finished: Path) -> None:
    log = (finished / LOG).read_bytes()
    for name in (WEIGHTS, STATE):
        (finished / name).unlink()
    with pytest.raises(InvalidInput, match=r"move result\.json away to train the run anew"):
        go(finished)
    assert (finished / LOG).read_bytes() == log
    digests = RunFolder(finished).result()["sha256"]
    (finished / RESULT).unlink()
    assert go(finished)["sha256"] == digests


def test_a_sweep_counts_an_archived_run_as_finished(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (*RunFolder(finished).result()["sha256"], STATE):
        (finished / name).unlink()
    named = finished.rename(finished.with_name(run_name(SMALL)))
    wanted = entries([SMALL], named.parent, CPU)
    assert [entry.state for entry in wanted] == [FINISHED]
    assert sweep(wanted) == {}
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(InvalidInput, match=r"it holds a finished run.*Choose another --output"):
        go(named, resume=False)
    assert read_runs([named])[1] == []  # a report does not miss its weights
    with pytest.raises(
        InvalidInput, match=r"has been removed\. Restore it, or train the run anew:"
    ):
        evaluate(RunFolder(named), CPU, False)
    (named / LOG).write_text("")
    with pytest.raises(InvalidInput, match="SHA-256 differs"):
        assert wanted[0].state


@pytest.mark.parametrize("kind", ["finished", "earlier"])
def test_the_state_of_another_run_gives_no_numbers(kind: str, bases: Path, finished: Path) -> None:
    folder = RunFolder(finished)
    if kind == "earlier":  # without digests of a state, it is known by its run and its weights
        old = {k: v for k, v in folder.result().items() if "sha256" not in k or k == "sha256"}
        (finished / RESULT).write_text(json.dumps(old))
    shutil.copy(bases / "other" / STATE, finished / STATE)
    for use in (
        lambda: evaluate(folder, CPU, False),
        lambda: separability(finished, measures=["fisher"]),
    ):
        with pytest.raises(InvalidInput, match=STATE):
            use()


@pytest.mark.parametrize("key", ["class_names", "mean"])
def test_other_facts_of_the_data_are_noticed(key: str, finished: Path, tmp_path: Path) -> None:
    image = an_image(tmp_path)
    named = predict(RunFolder(finished), [image], False)
    moved = finished.rename(tmp_path / "moved")  # a folder may be renamed
    assert predict(RunFolder(moved), [image], False)["predictions"] == named["predictions"]
    data = json.loads((moved / CONFIGURATION).read_text())["data"]
    data[key] = data[key][::-1] if key == "class_names" else [data[key][0] + 1]
    change_json(moved / CONFIGURATION, data=data)
    with pytest.raises(InvalidInput, match=r"run.json was altered"):
        predict(RunFolder(moved), [image], False)
    [], [broken] = read_runs([moved])
    assert "run.json was altered" in broken.reason


def test_an_altered_result_is_noticed(finished: Path) -> None:
    change_json(finished / RESULT, test_accuracy=99.0)
    with pytest.raises(InvalidInput, match="it was altered since the run wrote it"):
        go(finished)
    [record], [broken] = read_runs([finished])
    assert record.result is None
    assert "it was altered" in broken.reason


def test_separability_over_epochs_rests_on_what_was_written(finished: Path) -> None:
    assert len({row["epoch"] for row in separability_over_epochs(finished)}) == SMALL.epochs
    lines = (finished / SEPARABILITY).read_text().splitlines(keepends=True)
    (finished / SEPARABILITY).write_text("".join(lines[1:]))
    with pytest.raises(InvalidInput, match="SHA-256 differs"):
        separability_over_epochs(finished)


def test_a_lost_log_is_said_and_a_cut_one_refused(
    begun: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = (begun / LOG).read_text().splitlines(keepends=True)
    for content in (log[:1], log[1:], [log[0], log[1].replace("loss", "LOSS")]):
        (begun / LOG).write_text("".join(content))
        with pytest.raises(InvalidInput, match=r"log.jsonl was cut or altered .* move it away"):
            go(begun)
    (begun / LOG).unlink()
    go(begun)
    assert f"{begun / LOG} has been removed" in capsys.readouterr().err
    assert [record["epoch"] for record in RunFolder(begun).log()] == [3, 4]
    assert go(begun)["epochs"] == 4


def test_an_altered_log_of_an_unfinished_run_is_not_measured(begun: Path) -> None:
    separability(begun, measures=["fisher"])
    (begun / LOG).write_text((begun / LOG).read_text().replace('"epoch": 1', '"epoch": 9'))
    with pytest.raises(InvalidInput, match="was cut or altered since the state was saved"):
        separability(begun, measures=["fisher"])


def test_a_run_goes_on_only_with_its_best_weights(bases: Path, begun: Path) -> None:
    (begun / BEST).write_bytes(b"other")
    with pytest.raises(InvalidInput, match=r"is not the file that the run wrote.*train the run"):
        go(begun)
    (begun / STATE).unlink()
    assert go(begun)["sha256"] == RunFolder(bases / "finished").result()["sha256"]


def test_what_a_refusal_of_the_best_weights_advises_goes_on(finished: Path) -> None:
    (finished / BEST).write_bytes(b"other")
    with pytest.raises(InvalidInput, match=f"move it and {STATE} and {RESULT} away") as refusal:
        RunFolder(finished).verify(BEST)
    assert shlex.quote(str(finished)) in str(refusal.value)
    for name in (BEST, STATE, RESULT):
        (finished / name).unlink()
    assert BEST in go(finished)["sha256"]


NAMES = (CONFIGURATION, LOG, STATE, BEST, NEXT_BEST, WEIGHTS, RESULT, SEPARABILITY, LOCK)
KINDS: dict[str, Callable[[Path, Path], object]] = {
    "link": lambda path, target: path.symlink_to(target),
    "dangling link": lambda path, target: path.symlink_to(target.with_name("nothing")),
    "fifo": lambda path, target: os.mkfifo(path),
    "folder": lambda path, target: path.mkdir(),
    "device": lambda path, target: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_file_is_refused_and_nothing_is_written_elsewhere(
    name: str, kind: str, begun: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes((begun / name).read_bytes() if (begun / name).exists() else b"precious")
    content = target.read_bytes()
    (begun / name).unlink(missing_ok=True)
    KINDS[kind](begun / name, target)
    with pytest.raises(InvalidInput):
        go(begun)
    assert target.read_bytes() == content
    assert not target.with_name("nothing").exists()
    read_runs([begun.parent])


def test_links_in_the_place_of_drafts_and_hard_links_are_not_written_through(
    bases: Path, begun: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    for name in (LOG, STATE, NEXT_BEST, WEIGHTS, RESULT):
        (begun / f"{name}.draft").symlink_to(target)
    (tmp_path / "log").hardlink_to(begun / LOG)
    log = (begun / LOG).read_bytes()
    assert go(begun)["sha256"] == RunFolder(bases / "finished").result()["sha256"]
    assert target.read_bytes() == b"precious"
    assert (tmp_path / "log").read_bytes() == log


def test_a_lock_that_holds_something_is_not_emptied(begun: Path) -> None:
    (begun / LOCK).write_bytes(b"precious")
    with pytest.raises(InvalidInput, match="holds something"):
        go(begun)
    assert (begun / LOCK).read_bytes() == b"precious"


def test_a_rename_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    fsync = os.fsync

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with replacing(tmp_path / "file") as draft:
        draft.write_text("x")
    assert synced == [str(tmp_path / "file.draft"), str(tmp_path)]


FORGED: dict[str, Callable[[dict[str, Any]], object]] = {
    "position of text": lambda s: s.update(position=["1", 0]),
    "position too large": lambda s: s.update(position=[10**320, 0]),
    "position of one": lambda s: s.update(position=[1]),
    "negative position": lambda s: s.update(position=[-1, 0]),
    "no meter": lambda s: s.pop("meter"),
    "meter of another kind": lambda s: s.update(meter=[1, 2]),
    "best of another kind": lambda s: s["meter"].update(best=5),
    "best of text": lambda s: s["meter"]["best"].update(val_accuracy="high"),
    "seconds that are none": lambda s: s["meter"].update(seconds=float("nan")),
    "huge seconds": lambda s: s["meter"].update(train_seconds=10**320),
    "units that are none": lambda s: s["meter"].update(units={0: {"loss": float("inf")}}),
    "sums of another shape": lambda s: s["meter"].update(sums=torch.zeros(2, 99)),
    "latest of another kind": lambda s: s["meter"].update(latest={"epochs": {}}),
    "steps of text": lambda s: s["learner"].update(steps="many"),
    "no learner": lambda s: s.update(learner=None),
    "weights of another type": lambda s: s["learner"].update(
        model={name: tensor.int() for name, tensor in s["learner"]["model"].items()}
    ),
    "moments of another shape": lambda s: s["learner"]["optimizers"][0]["state"][0].update(
        exp_avg=torch.zeros(7)
    ),
    "moments of another kind": lambda s: s["learner"]["optimizers"][0]["state"][0].update(
        exp_avg="x"
    ),
    "a rate of text": lambda s: s["learner"]["optimizers"][0]["param_groups"][0].update(lr="x"),
    "no optimizers": lambda s: s["learner"].update(optimizers=3),
    "marks of another kind": lambda s: s.update(marks=[1]),
    "marks of text": lambda s: s.update(marks={LOG: {"bytes": "x", "sha256": 1}}),
    "a run of another kind": lambda s: s.update(run=5),
    "a run of other names": lambda s: s["run"].update({1: 2}),
    "a format of another kind": lambda s: s.update(format="3"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_states_are_refused(name: str, begun: Path) -> None:
    state = load_state(begun / STATE)
    FORGED[name](state)
    torch.save(state, begun / STATE)
    before = {path.name: digest(path) for path in begun.iterdir()}
    with pytest.raises(InvalidInput):
        go(begun)
    assert {path.name: digest(path) for path in begun.iterdir()} == before


@pytest.mark.parametrize("value", [None, True, -1, 10**320, float("nan"), "x", [], {}, [[]]])
@pytest.mark.parametrize("key", ["format", "run", "data", "execution", "units", "layouts"])
def test_run_json_of_other_types(
    key: str, value: Any, begun: Path, bases: Path, tmp_path: Path
) -> None:
    image = an_image(tmp_path)
    finished = Path(shutil.copytree(bases / "finished", tmp_path / "finished"))
    for folder in (begun, finished):
        change_json(folder / CONFIGURATION, **{key: value or 0 if key == "execution" else value})
    with pytest.raises(InvalidInput):
        go(begun)
    with pytest.raises(InvalidInput, match=CONFIGURATION):
        predict(RunFolder(finished), [image], False)
    read_runs([begun.parent])


@pytest.mark.parametrize("content", ["[" * 200_000, '{"a":' * 100_000, "1" * 5000, "\xff", "nan"])
@pytest.mark.parametrize("name", [CONFIGURATION, RESULT, LOG, SEPARABILITY])
def test_json_that_is_none(name: str, content: str, finished: Path) -> None:
    (finished / name).write_text(content, encoding="latin-1")
    with pytest.raises(InvalidInput):
        go(finished)
    _, broken = read_runs([finished.parent])
    assert broken


def test_numbers_of_320_digits_in_a_run(begun: Path) -> None:
    facts = json.loads((begun / CONFIGURATION).read_text())
    for name in ("width", "epochs", "lr", "seed"):
        run = facts["run"] | {name: 10**320}
        (begun / CONFIGURATION).write_text(json.dumps(facts | {"run": run}))
        with pytest.raises(InvalidInput, match=f"Cannot use {name}"):
            RunFolder(begun).run()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_not_to_be_removed(begun: Path) -> None:
    (begun / STATE).chmod(0)
    with pytest.raises(InvalidInput, match="Change its permissions"):
        go(begun)
