"""Files that a run began with: recorded by their digests, and compared when the run is used again.

They are the user's code, what describes a network of a library, and weights.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from layerwise.errors import InvalidInput
from layerwise.models.libraries import OfLibrary
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Run
from layerwise.training.declared_options import registries
from layerwise.utils.files import digest_of
from layerwise.utils.plugins import IMPORTED, imported_as


def origins(run: Run) -> dict[str, Any]:
    """The record of what a run begins with: files by their SHA-256, and the network's library."""
    record: dict[str, Any] = {"imported": dict(IMPORTED)}
    factory = registries(run)["model"][run.model]
    if isinstance(factory, OfLibrary):
        record["library"] = {"made_by": factory.made_by, "files": dict(factory.files)}
    if run.weights is not None:
        record["weights"] = {run.weights: digest_of(Path(run.weights))}
    return record


def refuse_changed_code(folder: RunFolder) -> None:
    """Refuse a run whose network, losses or rules are made by other files now than when it began.

    Raises:
        InvalidInput: naming the first file that has changed.
    """
    facts = folder.facts()
    for path, digest in facts.get("imported", {}).items():
        now = imported_as(path)
        if now is not None and IMPORTED[now] != digest:
            refuse_changed(folder, now)
    library = facts.get("library")
    files = library.get("files") if isinstance(library, dict) else None
    refuse_other_digests(folder, files)


def refuse_changed_weights(folder: RunFolder) -> None:
    """Refuse to go on with a run whose file of first weights is another one now.

    It may have been removed: a run that goes on does not read it again.

    Raises:
        InvalidInput: as said.
    """
    refuse_other_digests(folder, folder.facts().get("weights"))


def refuse_other_digests(folder: RunFolder, files: Any) -> None:
    for path, digest in files.items() if isinstance(files, Mapping) else ():
        with contextlib.suppress(FileNotFoundError):
            if digest_of(Path(path)) != digest:
                refuse_changed(folder, path)


def refuse_changed(folder: RunFolder, path: str) -> NoReturn:
    raise InvalidInput(
        f"Cannot use {folder.path}: {path} was changed since the run began, as its SHA-256 shows. "
        "Restore it, or start another run."
    )
