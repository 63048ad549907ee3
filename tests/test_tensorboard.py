"""TensorBoard as a log beside the run's own: what it holds, after a kill too, and that training
does not change.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from layerwise.errors import InvalidInput
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.loop import train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from layerwise.training.tensorboard import FOLDER, OF_EPOCHS, OF_UNITS, check_log

SMALL = Run(hierarchy="1,1,1,1", width=0.0625, train_images=60, batch_size=16, epochs=3)
LOGGED = Execution(device="cpu", log="tensorboard")


class Killed(Exception):
    pass


class KillAt(Progress):
    """Dies as an epoch ends that is logged, but of which no state is saved."""

    def __init__(self, epoch: int) -> None:
        self.last = epoch

    def epoch(self, record: dict[str, Any]) -> None:
        if record["epoch"] == self.last:
            raise Killed


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard shows them."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0})
    events.Reload()
    return {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_it_holds_what_the_log_holds_and_changes_nothing(tmp_path: Path) -> None:
    result = train(prepare(SMALL, LOGGED), RunFolder(tmp_path / "logged"), False, Progress())
    unlogged = prepare(SMALL, replace(LOGGED, log=None))
    plain = train(unlogged, RunFolder(tmp_path / "plain"), False, Progress())
    assert result["sha256"] == plain["sha256"]
    assert not (tmp_path / "plain" / FOLDER).exists()
    found = logged(tmp_path / "logged" / FOLDER)
    records = [
        json.loads(line) for line in (tmp_path / "logged" / "log.jsonl").read_text().splitlines()
    ]
    for key, tag in OF_EPOCHS.items():
        assert found[tag] == [(r["epoch"], pytest.approx(r[key])) for r in records]
    for key, group in OF_UNITS.items():
        values = [(r["epoch"], pytest.approx(r["units"][1][key])) for r in records]
        assert found[f"{group}/001 {records[0]['units'][1]['name']}"] == values
    assert len(found) == len(OF_EPOCHS) + len(OF_UNITS) * len(records[0]["units"])


def test_after_a_kill_no_epoch_is_shown_twice(tmp_path: Path) -> None:
    again = RunFolder(tmp_path / "again")
    execution = replace(LOGGED, save_every=2)
    four = prepare(replace(SMALL, epochs=4), execution)
    with pytest.raises(Killed):
        train(four, again, False, KillAt(3))
    assert [step for step, _ in logged(tmp_path / "again" / FOLDER)["accuracy/test"]] == [1, 2, 3]
    train(four, again, True, Progress())
    for tag, values in logged(tmp_path / "again" / FOLDER).items():
        assert [step for step, _ in values] == [1, 2, 3, 4], tag


def test_it_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        InvalidInput, match=r"Cannot use log 'tensorbord': it is unknown. Did you mean 'tensorb"
    ):
        prepare(SMALL, replace(LOGGED, log="tensorbord"))
    monkeypatch.setattr("layerwise.training.tensorboard.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'layerwise\[tensorboard\]'"):
        check_log("tensorboard")
