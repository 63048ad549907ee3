"""The network of a run, made for its images, with the weights that the run begins with."""

from collections.abc import Callable

from torch import nn

from layerwise.data import ImageFormat
from layerwise.errors import InvalidInput
from layerwise.models import create_model, imported_name
from layerwise.runs.run import Run
from layerwise.utils.allocator import free_memory
from layerwise.utils.sizes import format_size


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
