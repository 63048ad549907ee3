"""Runs read from files, also from those of earlier versions. No torch."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.runs.fields import check_value
from layerwise.runs.run import ADDED, Execution, Run

# Format 2 had the options of all losses and rules as fields of the run, with these defaults.
OPTIONS_OF_FORMAT_2: dict[str, dict[str, Any]] = {
    "loss_options": {
        "beta": 0.99,
        "decoder_dim": 4096,
        "head_size": None,
        "similarity_size": None,
        "similarity_channels": None,
    },
    "rule_options": {"cache": False, "segments": None, "threads": 2},
}


def run_from(values: Mapping[str, Any], file_format: int, source: str | Path) -> Run:
    """A run from what ``described`` gave, also by the format of version 0.1.

    Raises:
        InvalidInput: an entry is unknown, missing, or of another type.
    """
    values = {str(name): value for name, value in values.items()}
    if file_format == 2:
        values = from_format_2(values, source)
    accepted = {item.name: item for item in fields(Run)}
    values = {**{name: getattr(Run, name) for name in ADDED}, **values}
    for name in sorted(values.keys() ^ accepted.keys()):
        entry = f"unknown entry {name!r}" if name in values else f"no entry {name!r}"
        raise InvalidInput(
            f"Cannot read {source}: it has {entry}. It was altered, or written by another version "
            "of layerwise. Restore it."
        )
    return Run(**{name: check_value(source, accepted[name], values[name]) for name in accepted})


def from_format_2(values: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """The entries of a run of format 2 as they are named now."""
    if values.pop("cache_type", "float32") != "float32":
        raise InvalidInput(
            f"Cannot go on with {source}: its features were kept rounded (--cache-type), which "
            "only version 0.1 can do. Use that version, or train anew."
        )
    for kind, defaults in OPTIONS_OF_FORMAT_2.items():
        options = {name: values.pop(name) for name in defaults if name in values}
        values[kind] = {name: value for name, value in options.items() if value != defaults[name]}
    return {"downsample_after": None, "model_options": {}, "output_layer": "separate", **values}


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names of today, where a file has another that the command line accepts."""
    names = {
        also.lstrip("-").replace("-", "_"): item.name
        for kind in (Run, Execution)
        for item in fields(kind)
        for also in item.metadata.get("also", ())
    }
    return {names.get(name, name): value for name, value in values.items()}
