"""Digests that tie the files of a run to its state and its result. No torch."""

import hashlib
import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.utils.files import digest_of
from layerwise.utils.words import as_word

SEAL = "result_sha256"  # entry of a result: the digest of all its others
STATE = "last.pt"  # the state to go on from, beside the files that are verified
BEST = "best.safetensors"  # the best epoch's weights, without which a state is not gone on with
SECTIONS = ("data", "units", "layouts")  # of run.json, beside the run, that numbers rest on


def digest_of_value(value: Any) -> str:
    """The SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_of_facts(run: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The digest of what ``run.json`` says that numbers rest on, in whatever format it says so.

    Args:
        run: as ``described`` gives it.
        facts: all of ``run.json``.
    """
    return digest_of_value([run, *(facts.get(name) for name in SECTIONS)])


def sealed(result: Mapping[str, Any]) -> dict[str, Any]:
    """A result with a digest of itself."""
    return {**result, SEAL: digest_of_value(result)}


def refuse_broken_seal(path: Path, result: Mapping[str, Any]) -> None:
    """Refuse a result that is not as it was written; an earlier version's has no digest.

    Raises:
        InvalidInput: as said.
    """
    rest = {name: value for name, value in result.items() if name != SEAL}
    if SEAL in result and result[SEAL] != digest_of_value(rest):
        raise InvalidInput(
            f"Cannot use {path}: it was altered since the run wrote it. Restore it, or move it "
            f"away and write it again with {resuming(path.parent)}."
        )


def verify(path: Path, sha256: str) -> None:
    """Refuse a file that is missing or is not the one that was written.

    Raises:
        InvalidInput: as said.
    """
    try:
        digest = digest_of(path)
    except FileNotFoundError:
        raise InvalidInput(
            f"Cannot read {path}: it has been removed. Restore it, or {way_on(path, ())}."
        ) from None
    if digest != sha256:
        raise InvalidInput(
            f"Cannot use {path}: it is not the file that the run wrote, since its SHA-256 differs. "
            f"Restore it, or {way_on(path, ('it',))}."
        )


def way_on(path: Path, moved: Iterable[str]) -> str:
    """How to go on without a file of a finished run, in words.

    Without its state the run would begin anew, and its log with it. So it does without the best
    epoch's weights.
    """
    has_state = (path.parent / STATE).exists()
    goes_on = has_state and path.name not in (STATE, BEST)
    words = "go on without it" if goes_on else "train the run anew"
    away = [*moved, *([STATE] if has_state and path.name == BEST else []), "result.json"]
    return f"{words}: move {' and '.join(away)} away and use {resuming(path.parent)}"


def resuming(folder: Path) -> str:
    """The command that goes on with a run."""
    return shlex.join(["layerwise", "train", "--resume", as_word(folder)])
