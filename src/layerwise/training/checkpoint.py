"""States of a run on disk: everything to go on from.

Tensors and plain types only.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from layerwise.core.learner import Learner
from layerwise.errors import InvalidInput, first_line_of
from layerwise.rules.base import Position
from layerwise.runs.folder import FACTS_DIGEST, FORMATS, LOGS, RESULT, STATE, RunFolder
from layerwise.runs.formats import run_from
from layerwise.runs.lines import Mark
from layerwise.runs.run import Run, described
from layerwise.training.meter import Meter
from layerwise.training.sound_state import check_learner_state, check_meter_state
from layerwise.training.weights import check_best, settle_best
from layerwise.utils.archives import refuse_damaged_archive
from layerwise.utils.files import open_file, replacing


@dataclass(frozen=True)
class Restored:
    """Where a run goes on from.

    Attributes:
        marks: how far each file of a line per epoch reached; empty of a state of an earlier
            version, which did not note it.
    """

    position: Position = Position()
    marks: dict[str, Mark] = field(default_factory=dict)


def save(folder: RunFolder, run: Run, learner: Learner, meter: Meter, position: Position) -> None:
    """Save the state to go on from at a position, then give the best weights their name.

    A better epoch's weights lie in a file of their own until a state names them by their digest. A
    kill at any moment so leaves the weights of the best epoch that the state knows of.
    """
    state = {
        "format": FORMATS[-1],
        "run": described(run),
        "position": [position.epoch, position.batch],
        "learner": learner.state_dict(),
        "meter": meter.state_dict(),
        "marks": folder.marks(),
        FACTS_DIGEST: folder.facts_digest(),
    }
    with replacing(folder.file(STATE)) as draft:
        try:
            with draft.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:
            # torch hides what the file said, such as that the disk is full, behind its own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
    settle_best(folder, meter)


def restore(folder: RunFolder, learner: Learner, meter: Meter, data: dict[str, Any]) -> Restored:
    """Load the last state, if one was saved yet; nothing is written.

    Args:
        data: the facts of the data set as it is now.

    Raises:
        InvalidInput: the state is damaged, or of another network; or the data are others; or a file
            that belongs to the state has been altered.
    """
    path = folder.file(STATE)
    if not folder.has(STATE):
        refuse_other_data(folder, data)
        refuse_without_state(folder)
        return Restored()
    if folder.has(RESULT):
        folder.verify(STATE)
    state = load_state(path)
    refuse_other_state(folder, state)
    refuse_other_data(folder, data)
    try:
        epoch, batch = state["position"]
        marks = dict(state.get("marks", {}))
        check_meter_state(state["meter"], len(learner.units))
        check_learner_state(state["learner"], learner)
        learner.load_state_dict(state["learner"])
        meter.load_state_dict(state["meter"])
        position = position_of(epoch, batch)
        lost = [name for name in LOGS if name in marks and folder.lines[name].lost(marks[name])]
    except InvalidInput:
        raise
    except Exception as error:
        # a state that was made by something else can be wrong in any way
        reason = first_line_of(error)
        raise InvalidInput(
            f"Cannot go on from {path}: it is not a state of this program ({reason}). Move it away "
            "to begin the run anew."
        ) from error
    check_best(folder, meter, may_be_later="marks" not in state)
    for name in lost:
        print(
            f"{folder.file(name)} has been removed: the run goes on without its first epochs",
            file=sys.stderr,
            flush=True,
        )
    return Restored(position, marks)


def position_of(epoch: Any, batch: Any) -> Position:
    """A position, from numbers of a state.

    Raises:
        ValueError: they are none.
    """
    for number in (epoch, batch):
        if type(number) is not int or not 0 <= number < 2**53:
            raise ValueError("its position is not one")
    return Position(epoch, batch)


def refuse_without_state(folder: RunFolder) -> None:
    """Refuse to train a finished run anew that has lost both its weights and its state.

    Raises:
        InvalidInput: as said.
    """
    if folder.has(RESULT):
        lost = " and ".join([*folder.removed_weights(), STATE])
        raise InvalidInput(
            f"Cannot go on with {folder.path}: it is finished, and {lost} have been removed. "
            f"Restore one of them, or move {RESULT} away to train the run anew."
        )


def refuse_other_state(folder: RunFolder, state: Mapping[str, Any]) -> None:
    """Refuse a state that is not of the folder's run as ``run.json`` describes it.

    Raises:
        InvalidInput: as said.
    """
    if not is_state_of(folder, state):
        raise InvalidInput(
            f"Cannot go on with {folder.path}: run.json was altered since the state was saved, or "
            f"{STATE} is of another run. Restore it, or start another run."
        )
    folder.verify_facts(state)


def is_state_of(folder: RunFolder, state: Mapping[str, Any]) -> bool:
    """Whether a state was saved by the folder's run, as ``run.json`` describes it.

    The state of a run that an earlier version began is written anew in the format of this one.
    """
    run = state.get("run")
    file_format = state.get("format", FORMATS[0])
    if type(file_format) is not int:
        return False
    return (
        isinstance(run, dict)
        and file_format in FORMATS
        and run_from(run, file_format, STATE) == folder.run()
    )


def refuse_other_data(folder: RunFolder, data: dict[str, Any]) -> None:
    """Refuse other images or labels than those that a run began with.

    Runs of earlier versions recorded no digest; they are compared by classes, numbers, means and
    deviations.
    """
    recorded = folder.facts()["data"]
    if recorded != {name: data[name] for name in data if name in recorded or name != "digest"}:
        raise InvalidInput(
            f"Cannot use {folder.path} with these data: it was trained on other images than the "
            "data folder holds now. Give its --data-dir."
        )


def load_state(path: Path) -> dict[str, Any]:
    """The state in a file.

    Raises:
        InvalidInput: it is damaged, cannot be read, or is no state.
    """
    try:
        with open_file(path) as file:
            refuse_damaged_archive(file)
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it is no table")
        return state
    except InvalidInput:
        raise
    except FileNotFoundError:
        raise InvalidInput(
            f"Cannot go on from {path}: it has been removed. Restore it, or train again."
        ) from None
    except Exception as error:
        # a damaged archive can fail in torch, zip or pickle; weights_only refuses code in it
        reason = first_line_of(error)
        raise InvalidInput(
            f"Cannot go on from {path}: it is damaged or not a state of this program ({reason}). "
            "Move it away to begin the run anew."
        ) from error
