"""Where and how much a run keeps of the features that its rule caches."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from layerwise.errors import InvalidInput
from layerwise.rules import Keeping
from layerwise.runs.run import Execution
from layerwise.training.prepare import Prepared
from layerwise.utils.allocator import free_memory
from layerwise.utils.sizes import format_size, parse_size

SPARED = 0.8  # of the memory that is free, which --cache may take; the rest is for data and steps
FEATURES = "features.cache"  # a file of features; it loses its name as soon as it is made


def feature_keeping(prepared: Prepared, run_path: Path) -> Mapping[str, Keeping]:
    """Where and how much a rule that caches features keeps, as its argument; nothing for others.

    Args:
        run_path: of the run's folder, which names its file: several runs may share a cache folder.

    Raises:
        InvalidInput: an option of the cache is given without it, or names no folder to write into.
    """
    execution = prepared.execution
    if not prepared.run.rule_options.get("cache"):
        for name in ("cache_dir", "cache_limit"):
            of_frozen = name == "cache_limit" and prepared.run.train_from is not None
            if getattr(execution, name) != getattr(Execution, name) and not of_frozen:
                raise InvalidInput(
                    f"Cannot use --{name.replace('_', '-')} without --cache: there are no features "
                    "to keep. Give --cache, or leave it out."
                )
        return {}
    if execution.cache_dir is not None:
        limit = parse_size("--cache-limit", execution.cache_limit)
        bound = f"the limit of {format_size(limit)}"
        return {"keeping": Keeping(cache_file(execution.cache_dir, run_path), limit, bound)}
    return {"keeping": keeping_in_memory(prepared)}


def keeping_in_memory(prepared: Prepared) -> Keeping:
    """How much of features may be kept in memory."""
    limit = parse_size("--cache-limit", prepared.execution.cache_limit)
    bound = f"the limit of {format_size(limit)}"
    free = free_memory() if prepared.device.type == "cpu" else None
    spared = limit if free is None else int(SPARED * free)
    if spared < limit:  # more would be promised, and the process killed when it is used
        bound = f"the {format_size(spared)} of free memory that can be spared"
    return Keeping(None, min(limit, spared), bound)


def cache_file(folder: str, run_path: Path) -> Path:
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"Cannot use --cache-dir {folder!r}: it is not a folder that can be written to. Make "
            "it, or give another."
        )
    digest = hashlib.sha256(str(run_path.resolve()).encode()).hexdigest()[:12]
    return Path(folder) / f"{digest}-{FEATURES}"
