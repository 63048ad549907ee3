"""Batches that a learner cannot learn from."""

from typing import Any

import torch
from torch import Tensor

from layerwise.errors import Diverged, InvalidInput

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_batch(
    images: Any,
    labels: Any,
    num_classes: int,
    amp: torch.dtype | None,
    device: torch.device | None = None,
) -> None:
    """Refuse a batch that cannot be learned from, and a step where none can be made.

    Values on a GPU are not read, since that would wait for the device.

    Args:
        amp: number type that units compute in, or None.
        device: where the first unit's weights are; None: not known.

    Raises:
        InvalidInput: saying what is wrong.
    """
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise InvalidInput(
            f"Cannot learn from {type(images).__name__} and {type(labels).__name__}: images and "
            "labels must be tensors. Convert arrays and lists with torch.as_tensor."
        )
    if not torch.is_grad_enabled():
        raise InvalidInput(
            "Cannot make a step: gradients are switched off here. Take the step out of "
            "torch.no_grad()."
        )
    for name, given in (("images", images), ("labels", labels)):
        if device is not None and given.device != device:
            raise InvalidInput(
                f"Cannot learn from {name} on {given.device}: the network is on {device}. Move "
                f"them there, {name}.to({str(device)!r})."
            )
    kind = images.device.type
    if torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != amp:
        raise InvalidInput(
            "Cannot make a step: autocast is on around it, and units compute in the precision "
            f"that localize was given. Make the units with amp={torch.get_autocast_dtype(kind)}, "
            "and take the step out of torch.autocast."
        )
    if len(images) < 2:
        raise InvalidInput(
            f"Cannot learn from a batch of {len(images)}: batch normalisation and similarity "
            "compare examples. Give batches of 2 or more, and drop the last one of an epoch if it "
            "is smaller."
        )
    if labels.dim() != 1 or len(labels) != len(images) or labels.dtype not in INTEGERS:
        raise InvalidInput(
            f"Cannot learn from labels of shape {tuple(labels.shape)} and type {labels.dtype}: "
            f"they do not fit {len(images)} images. Give one integer per image."
        )
    if (
        labels.device.type == "cpu"
        and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes
    ):
        raise InvalidInput(
            f"Cannot learn from labels from {int(labels.min())} to {int(labels.max())}: with "
            f"num_classes={num_classes} they go from 0 to {num_classes - 1}. Give such labels, or "
            "another num_classes."
        )


def check_images(images: Tensor) -> None:
    """Refuse images with values that are not finite; on a GPU they are not read.

    Raises:
        InvalidInput: as said.
    """
    if not finite(images):
        raise InvalidInput(
            "Cannot learn from the images: they hold NaN or infinite values. Clean or clip them "
            "before the step."
        )


def check_features(features: Tensor, index: int, name: str) -> None:
    """Refuse features that enter a unit and are not finite; on a GPU they are not read.

    Raises:
        Diverged: naming the unit.
    """
    if not finite(features):
        raise Diverged(
            f"Cannot go on training: the features that enter unit {index} ({name}) are not finite, "
            "because a unit before it has diverged. Lower the learning rate, or clip gradients."
        )


def finite(values: Tensor) -> bool:
    """Whether all values are finite, or on a GPU, where reading them would wait."""
    return values.device.type != "cpu" or bool(torch.isfinite(values).all())
