"""The memory of local losses' heads, reckoned before they are made."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, LossFactory, Site, create_loss
from layerwise.utils.sizes import format_size

COPIES = 4  # weights, gradients and Adam's two means
OVERFLOWING = 2**61  # numbers, the fewest of float32 whose bytes PyTorch cannot count
CHEAPER = ("predsim-lite", "pred")


def refuse_large_heads(
    shapes: Sequence[tuple[int, ...]],
    image_shape: tuple[int, ...],
    num_classes: int,
    losses: Sequence[str | LossFactory],
    options: Sequence[dict[str, Any]],
    weight: Tensor,
) -> None:
    """Refuse heads that would outgrow the device's memory, before they are made.

    Args:
        shapes: shape of every unit's feature without the batch; image_shape: of an image.
        losses, options: of every unit.
        weight: one of the network's, for its number type and device.

    Raises:
        InvalidInput: naming the memory that they would take, and a cheaper loss whose heads fit.
    """
    losses = [library_name(loss) or loss for loss in losses]
    size = weight.element_size() if weight.is_floating_point() else 4
    limit = device_memory(weight.device)

    def reckoned(names: Sequence[str | LossFactory], given: Sequence[dict[str, Any]]) -> int | None:
        numbers = head_parameters(names, shapes, image_shape, num_classes, given)
        return None if numbers is None else numbers * size * COPIES

    def reckoned_of(name: str) -> int:
        return reckoned([name] * len(shapes), [{}] * len(shapes)) or limit + 1

    needed = reckoned(losses, options)
    if needed is None or needed <= limit:
        return
    fitting = [name for name in CHEAPER if name not in losses and reckoned_of(name) <= limit]
    remedy = (
        f"Give loss={fitting[0]!r}, whose heads take {format_size(reckoned_of(fitting[0]))}"
        if fitting
        else "Cut fewer units, such as by at=4"
    )
    raise InvalidInput(
        f"Cannot make the heads of loss {in_words(losses)}: with their gradients and Adam's state "
        f"they would take {format_size(needed)}, and {weight.device} has {format_size(limit)}. "
        f"{remedy}."
    )


def library_name(loss: str | LossFactory) -> str | None:
    """The name of one of this library's losses; None: of another's, which may have side effects."""
    return next(
        (
            name
            for name, factory in LOSSES.items()
            if loss in (name, factory)
            and getattr(factory, "__module__", "").startswith("layerwise.")
        ),
        None,
    )


def in_words(losses: Sequence[str | LossFactory]) -> str:
    return ", ".join(dict.fromkeys(repr(loss) for loss in losses))


def head_parameters(
    losses: Sequence[str | LossFactory],
    shapes: Sequence[tuple[int, ...]],
    image_shape: tuple[int, ...],
    num_classes: int,
    options: Sequence[dict[str, Any]],
) -> int | None:
    """Number of the parameters of all units' heads; None: it cannot be known without making them.

    They are made on the meta device, which has no memory. Heads that not even it can make, since
    their bytes overflow, count as ``OVERFLOWING``.
    """
    count = 0
    entering = [image_shape, *shapes]
    for index, shape in enumerate(shapes[:-1]):
        loss, given = losses[index], options[index]
        if library_name(loss) is None:
            return None
        site = Site(
            index,
            len(shapes),
            shape,
            num_classes,
            image_shape=image_shape,
            entering=entering[index],
        )
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                head = create_loss(loss, site, **given)
        except Exception as error:  # a refusal is raised where the heads are made
            return OVERFLOWING if "calculation overflowed" in str(error) else None
        count += sum(parameter.numel() for parameter in head.parameters())
    return count


def device_memory(device: torch.device) -> int:
    """Bytes of a device's memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
