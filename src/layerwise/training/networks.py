"""The network of a run: made for its images with the weights that it begins with, or trained."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from layerwise.data import ImageFormat
from layerwise.data.splits import normalization_by
from layerwise.errors import InvalidInput
from layerwise.models import create_model, imported_name
from layerwise.runs.folder import BEST, RESULT, WEIGHTS, RunFolder
from layerwise.runs.lines import is_number
from layerwise.runs.run import Run
from layerwise.training.origins import refuse_changed_code
from layerwise.training.weights import load_weights
from layerwise.utils.allocator import free_memory
from layerwise.utils.sizes import format_size

LARGEST_SIDE = 65_535  # pixels


def unsaid(line: str) -> None:
    """Leave unsaid what nobody is to be told."""


def build_network(
    run: Run, images: ImageFormat, weights: bool = False, say: Callable[[str], None] = unsaid
) -> nn.Module:
    """The run's network for images of a format.

    Args:
        weights: give it the weights that the run begins with, where it names a file of them.
        say: is given lines about classifier and weights.

    Raises:
        InvalidInput: it cannot be made so, or the weights do not fit.
    """
    if run.num_classes not in (None, images.num_classes):
        raise InvalidInput(
            f"Cannot use --num-classes {run.num_classes}: there are {images.num_classes} classes. "
            f"Give {images.num_classes}."
        )
    return create_model(
        imported_name(run.model),
        run.hierarchy,
        run.width,
        images.num_classes,
        images.channels,
        images.image_size,
        run.dropout,
        run.downsample_after,
        weights=run.weights if weights else None,
        new_classifier=run.num_classes is not None,
        say=say,
        **run.model_options,
    )


def check_size(run: Run, network: nn.Module) -> None:
    """Refuse a network whose weights do not fit into the free memory that it is made in.

    Raises:
        InvalidInput: as said.
    """
    size = sum(weight.nelement() * weight.element_size() for weight in network.parameters())
    free = free_memory()
    if free is not None and size > free:
        raise InvalidInput(
            f"Cannot make {run.model}: its weights alone take {format_size(size)}, and "
            f"{format_size(free)} of memory is free. Lower --width or give a smaller hierarchy."
        )


def load_network(folder: RunFolder, best: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a run, and what the run knows of its data.

    Raises:
        InvalidInput: the run is not finished, or its files are damaged.
    """
    run, data = folder.run(), data_of(folder)
    refuse_changed_code(folder)
    name = BEST if best else WEIGHTS
    result = folder.result()
    folder.verify_facts(result)
    digests = result["sha256"]
    if name not in digests and best:
        lost = result.get("best_epoch") is not None
        raise InvalidInput(
            f"Cannot use --best with {folder.path}: it has no "
            + (
                "weights of its best epoch, which were lost"
                if lost
                else "best epoch, since nothing was held out"
            )
            + ". Leave it out."
        )
    if name not in digests:
        raise InvalidInput(
            f"Cannot use {folder.path}: {RESULT} names no weights. Restore it, or train again."
        )
    network = build_network(run, image_format(data))
    load_weights(folder.file(name), network, digests[name])
    return network.eval(), data


def describes_images(data: Any) -> bool:
    """Whether a record of data says enough of its images to show them to a network."""
    try:
        numbers = [*data["mean"], *data["std"]]
        return bool(
            len(data["mean"]) == len(data["std"]) == data["channels"]
            and all(map(is_number, numbers))
            and min(numbers) >= 0 < min(data["std"])
            and type(data["image_size"]) is int
            and 0 < data["image_size"] <= LARGEST_SIDE
            and isinstance(data["class_names"], list)
            and all(isinstance(name, str) for name in data["class_names"])
        )
    except (KeyError, TypeError, ValueError):
        return False


def data_of(folder: RunFolder) -> dict[str, Any]:
    """What a run knows of its data: classes, size, means and deviations.

    Raises:
        InvalidInput: it was altered so that no image could be shown to the network.
    """
    data: dict[str, Any] = folder.facts()["data"]
    if not describes_images(data):
        raise InvalidInput(
            f"Cannot read {folder.path}: the data section of run.json was altered. Restore it, or "
            "train again."
        )
    return data


def image_format(data: Mapping[str, Any]) -> ImageFormat:
    """The format of the images that a run was trained on, from the facts of its data."""
    return ImageFormat(
        tuple(data["class_names"]),
        data["channels"],
        data["image_size"],
        normalization=normalization_by(data["mean"], data["std"]),
    )
