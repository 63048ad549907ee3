"""States of a run on disk: everything to go on from, and the plain weights.

Tensors and plain types only.
"""

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import nn

from layerwise.core.learner import Learner
from layerwise.errors import InvalidInput
from layerwise.rules.base import Position
from layerwise.runs.folder import BEST, FORMATS, STATE, RunFolder
from layerwise.runs.run import Run, described, run_from
from layerwise.training.meter import Meter
from layerwise.utils.files import replacing


def save(folder: RunFolder, run: Run, learner: Learner, meter: Meter, position: Position) -> None:
    """Save the state to go on from at a position."""
    state = {
        "format": FORMATS[-1],
        "run": described(run),
        "position": [position.epoch, position.batch],
        "learner": learner.state_dict(),
        "meter": meter.state_dict(),
    }
    with replacing(folder.file(STATE)) as draft:
        try:
            with draft.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:
            # torch hides what the file said, such as that the disk is full, behind its own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def restore(folder: RunFolder, learner: Learner, meter: Meter, data: dict[str, Any]) -> Position:
    """Load the last state, if one was saved yet, and return its position.

    Args:
        data: the facts of the data set as it is now.

    Raises:
        InvalidInput: the state is damaged, or of another network; or the data are others.
    """
    refuse_other_data(folder, data)
    path = folder.file(STATE)
    if not path.exists():
        return Position()
    state = load_state(path)
    if not is_state_of(folder, state):
        raise InvalidInput(
            f"Cannot go on with {folder.path}: run.json was altered since the state was saved. "
            "Restore it, or start another run."
        )
    try:
        learner.load_state_dict(state["learner"])
        meter.load_state_dict(state["meter"])
        # a later epoch's, written just before a kill, is as good
        if meter.best and not folder.file(BEST).exists():
            raise InvalidInput(
                f"Cannot go on with {folder.path}: {BEST} has been removed. Restore it, or train "
                "again."
            )
        return Position(*state["position"])
    except (KeyError, TypeError) as error:
        raise InvalidInput(
            f"Cannot go on from {path}: it is not a state of this program ({error}). Remove it to "
            "begin the run anew."
        ) from error


def is_state_of(folder: RunFolder, state: Mapping[str, Any]) -> bool:
    """Whether a state was saved by the folder's run, as ``run.json`` describes it.

    The state of a run that an earlier version began is written anew in the format of this one.
    """
    run = state.get("run")
    file_format = state.get("format", FORMATS[0])
    return isinstance(run, dict) and run_from(run, file_format, STATE) == folder.run()


def refuse_other_data(folder: RunFolder, data: dict[str, Any]) -> None:
    """Refuse other images than those that a run began with.

    They differ in classes, numbers, means or deviations.
    """
    if folder.facts()["data"] != data:
        raise InvalidInput(
            f"Cannot use {folder.path} with these data: it was trained on other images than the "
            "data folder holds now. Give its --data-dir."
        )


def verify(path: Path, sha256: str) -> None:
    """Refuse a file that is missing or is not the one that was written."""
    if not path.exists():
        raise InvalidInput(f"Cannot read {path}: it has been removed. Restore it, or train again.")
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise InvalidInput(
            f"Cannot use {path}: it is not the file that the run wrote, since its SHA-256 differs. "
            "Restore it, or train again."
        )


def load_state(path: Path) -> dict[str, Any]:
    try:
        # torch.load does not compare the archive's checksums
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"the checksum of {damaged} differs")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # a damaged archive can fail in torch, zip or pickle; weights_only refuses code in it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise InvalidInput(
            f"Cannot go on from {path}: it is damaged or not a state of this program ({reason}). "
            "Remove it to begin the run anew."
        ) from error


def save_weights(path: Path, model: nn.Module) -> str:
    """Write the plain network's weights under its own keys, and return the file's SHA-256."""
    weights = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    content = serialize(weights)
    with replacing(path) as draft:
        draft.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def load_weights(path: Path, model: nn.Module, sha256: str) -> None:
    """Load weights into the plain network.

    Args:
        sha256: the digest the file must have.

    Raises:
        InvalidInput: the file is missing, damaged, altered, or of another network.
    """
    verify(path, sha256)
    try:
        model.load_state_dict(load_file(path))
    except (
        Exception
    ) as error:  # safetensors has its own error class; a wrong network is a RuntimeError
        reason = " ".join(str(error).split())[:150]
        raise InvalidInput(f"Cannot load {path}: {reason}. Restore it, or train again.") from error
