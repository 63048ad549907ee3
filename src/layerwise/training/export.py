"""Trained networks as files that others load, each compared with the network before it is kept."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.outputs import logits_of
from layerwise.data.loader import Loader
from layerwise.errors import InvalidInput, check_range, raised
from layerwise.runs.folder import STATE, RunFolder
from layerwise.runs.run import Execution
from layerwise.training.checkpoint import refuse_other_data
from layerwise.training.export_formats import (
    EXPORT_FORMATS,
    Compute,
    Format,
    choose_format,
    quiet,
)
from layerwise.training.networks import load_network
from layerwise.training.prepare import prepare
from layerwise.training.saved import trained_learner
from layerwise.utils.files import refuse_unwritable, replacing
from layerwise.utils.printable import decodable
from layerwise.utils.version import version

TOLERANCE = 1e-5  # largest difference of logits, relative to the largest logit where it is above 1
READ = ("mean", "std", "class_names", "image_size", "channels")  # facts of the data, in each file
MOST_IMAGES = 10_000  # that outputs are compared on


def export(
    folder: RunFolder,
    execution: Execution,
    format_name: str,
    output: str | None = None,
    units: int | str | None = None,
    best: bool = False,
    images: int = 64,
    ensemble: bool = False,
) -> dict[str, Any]:
    """Write the network of a finished run to a file, whole or not at all.

    The file is loaded again and compared with the network on test images of the run.

    Args:
        execution: where the data are; all is computed on the CPU.
        format_name: a name in ``EXPORT_FORMATS``.
        output: the file; None: one in the current folder, named like the run.
        units: how many units to write, with the local head of the last; ``"best"``: up to the head
            that is best on validation images; None: the whole network.
        best: the weights of the best epoch instead of the last.
        images: how many to compare on.
        ensemble: the network that ends in the ensemble of all local heads.

    Raises:
        InvalidInput: the run is not finished, the file exists, a package is missing, the units
            cannot be written, or the outputs differ. No file is left.
    """
    chosen = choose_format(format_name)
    check_range("images", images, 2, MOST_IMAGES)
    network, known = load_network(folder, best)
    units = units_of_best(folder) if isinstance(units, str) else units
    path = output_path(folder, chosen, output, part_of_name(units, ensemble))
    with_heads = units is not None or ensemble
    if with_heads:
        refuse_without_heads(folder, best, "--ensemble" if ensemble else "--units")
    prepared = prepare(folder.run(), execution)
    data = prepared.load_data()
    refuse_other_data(folder, data.facts())
    if with_heads:
        learner = trained_learner(folder, prepared, data)
        network = learner.ensemble() if units is None else learner.early_exit(units)
    sample = first_images(data.test, images)
    model = {
        "version": version(),
        "model": prepared.run.model,
        "units": units,
        "ensemble": ensemble,
    }
    difference = write_compared(
        chosen, network, sample, {**model, **{name: known[name] for name in READ}}, path
    )
    say(path, difference, sample, known)
    return {
        "run": str(folder.path),
        "weights": "best" if best else "last",
        "units": units,
        "ensemble": ensemble,
        "format": format_name,
        "file": decodable(str(path)),
        "bytes": path.stat().st_size,
        "largest_difference": difference,
        "images": len(sample),
    }


def units_of_best(folder: RunFolder) -> int:
    """Number of units up to the head that is best on a run's validation images.

    Raises:
        InvalidInput: the run's result does not say.
    """
    chosen = folder.result().get("best_exit")
    if chosen is None:
        raise InvalidInput(
            f"Cannot use --units best: {folder.path} has no accuracies of its local heads on "
            "validation images. Give a number of units, or train with a --val-fraction that holds "
            "images out and a loss whose heads classify."
        )
    return int(chosen["index"]) + 1


def say(path: Path, difference: float, images: Tensor, known: Mapping[str, Any]) -> None:
    """Print what was written, and what the network takes."""
    shape = "×".join(map(str, images.shape[1:]))
    mean, std = ([round(value, 2) for value in known[name]] for name in ("mean", "std"))
    print(
        f"written: {path} ({path.stat().st_size / 1e6:.2f} MB); largest difference from the "
        f"network's outputs on {len(images)} test images: {difference:.1e}"
    )
    print(
        f"it takes batches of any size of images of {shape}, (pixel − mean) / std with pixels from "
        f"0 to 255, mean {mean}, std {std}"
    )


def part_of_name(units: int | None, ensemble: bool) -> str:
    """The part of a file's name that says what is written of the network.

    Raises:
        InvalidInput: both an early exit and the ensemble are asked for.
    """
    if ensemble and units is not None:
        raise InvalidInput(
            "Cannot use --units with --ensemble: a network ends in one head or in all. Leave one "
            "of them out."
        )
    return "-ensemble" if ensemble else "" if units is None else f"-{units}-units"


def output_path(folder: RunFolder, chosen: Format, output: str | None, part: str) -> Path:
    """Where to write.

    Args:
        part: of the file's name, where none is given.

    Raises:
        InvalidInput: something is there already, or no folder is there to write into.
    """
    name = f"{folder.path.resolve().name}{part}.{chosen.ending}"
    path = Path(name if output is None else output)
    if output == "" or path.is_dir():
        raise InvalidInput(
            f"Cannot write --output {path}: it is a folder. Give a file, such as {path / name}."
        )
    if path.is_symlink() or path.exists():
        raise InvalidInput(
            f"Cannot write {path}: it exists, and nothing is overwritten. Give another --output, "
            "or move it away."
        )
    refuse_unwritable("--output", path)
    return path


def refuse_without_heads(folder: RunFolder, best: bool, option: str) -> None:
    """Refuse networks that end in local heads of a run whose heads are not there.

    Args:
        option: what was asked for.

    Raises:
        InvalidInput: saying why not.
    """
    if folder.facts().get("local", not folder.run().is_global) is False:
        raise InvalidInput(
            f"Cannot use {option} with {folder.path}: it was trained as one unit, by the rule "
            f"{folder.run().rule!r}, and has no local heads. Leave it out, or train by local "
            "losses."
        )
    if best:
        raise InvalidInput(
            f"Cannot use {option} with --best: local heads of the best epoch are not saved. Leave "
            "one of them out."
        )
    if not folder.has(STATE):
        raise InvalidInput(
            f"Cannot use {option} with {folder.path}: {STATE}, which holds the local heads, has "
            f"been removed. Restore it, or leave {option} out."
        )


def first_images(loader: Loader, count: int) -> Tensor:
    """The first images of a set, at most so many, on the CPU."""
    batches = (images for images, _ in loader.in_order())
    needed = -(-count // loader.batch_size)
    return torch.cat(list(islice(batches, needed)))[:count].cpu()


def write_compared(
    chosen: Format, network: nn.Module, images: Tensor, facts: dict[str, Any], path: Path
) -> float:
    """Write a file that computes what the network computes.

    Returns:
        The largest difference of the logits.

    Raises:
        InvalidInput: the network cannot be exported so, or the difference is above ``TOLERANCE``.
    """
    with replacing(path) as draft, torch.no_grad(), quiet():
        try:
            chosen.write(network, images[:2], facts, draft)
            compute = chosen.load(draft, network)
        except (OSError, InvalidInput):
            raise
        except Exception as error:  # an exporter can fail in any way
            raise InvalidInput(
                f"Cannot export to {path.name}: the exporter {raised(error)}.{remedy(chosen)}"
            ) from error
        difference, allowed = largest_difference(network, compute, images)
        if not difference <= allowed:
            raise InvalidInput(
                f"Cannot export to {path.name}: its outputs differ from the network's by up to "
                f"{difference:.1e}, and {allowed:.1e} is allowed.{remedy(chosen)}"
            )
    return difference


def remedy(chosen: Format) -> str:
    """What to do where an exporter fails: the format that needs none, if it is not that one."""
    if chosen is EXPORT_FORMATS["safetensors"]:
        return ""
    return " Use --format safetensors, which holds the weights alone."


def largest_difference(network: nn.Module, compute: Compute, images: Tensor) -> tuple[float, float]:
    """The largest difference of two networks' logits, and the largest that rounding explains.

    They are compared on batches of two sizes: all images, and one alone.
    """
    batches = images, images[:1]
    pairs = [(logits_of(network(batch)), logits_of(compute(batch))) for batch in batches]
    # a tensor's max is NaN where one is
    difference = torch.stack([(computed - wanted).abs().max() for wanted, computed in pairs]).max()
    largest = max(float(wanted.abs().max()) for wanted, _ in pairs)
    return float(difference), TOLERANCE * max(largest, 1.0)
