"""Checks of what a result says, for those of earlier versions, which have no digest. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.runs.digests import resuming
from layerwise.runs.lines import is_number
from layerwise.runs.run import Run

CHOICES = ("model", "data", "rule", "seed")  # as the run has them
NUMBERS = ("epochs", "test_accuracy", "train_seconds", "parameters")
NUMBERS_OR_NONE = ("val_accuracy", "best_epoch", "best_test_accuracy", "peak_memory_bytes")


def refuse_unsound_result(path: Path, result: Mapping[str, Any], run: Run) -> None:
    """Refuse a result of another run, or one whose numbers are none.

    Raises:
        InvalidInput: naming the entry.
    """
    wrong = [name for name in CHOICES if result.get(name) != getattr(run, name)]
    wrong += [name for name in NUMBERS if not is_number(result.get(name))]
    wrong += [
        name
        for name in NUMBERS_OR_NONE
        if result.get(name) is not None and not is_number(result[name])
    ]
    if wrong:
        raise InvalidInput(
            f"Cannot use {path}: its {wrong[0]} is not as the run wrote it. Restore it, or move it "
            f"away and write it again with {resuming(path.parent)}."
        )
