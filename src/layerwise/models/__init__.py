"""Networks by name: plain modules that know nothing of local learning.

A network of your own is a function ``(num_classes, in_chans, image_size, *, options)`` that returns
a module, and one line in ``MODELS``. The paper's families can have any hierarchy and width.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from math import inf
from numbers import Integral, Real
from operator import le
from typing import Any

from torch import nn

from layerwise.errors import InvalidInput, choose
from layerwise.hierarchy import (
    Hierarchy,
    check_stages,
    format_hierarchy,
    parse_downsampling,
    parse_hierarchy,
)
from layerwise.models.resnet import RESNETS, ResNet
from layerwise.models.vgg import VGG, VGGS

ModelFactory = Callable[..., nn.Module]


@dataclass(frozen=True)
class Published:
    """A network of one of the paper's families, as a factory.

    Attributes:
        name: name of the network.
        family: ``VGG`` or ``ResNet``.
        hierarchy: hierarchy that it was published with.
    """

    name: str
    family: type[VGG] | type[ResNet]
    hierarchy: Hierarchy

    def __call__(
        self,
        num_classes: int,
        in_chans: int,
        image_size: int,
        *,
        hierarchy: str | Iterable[int] | None = None,
        width: float = 1.0,
        dropout: float = 0.0,
        downsample_after: str | Iterable[int] | None = None,
    ) -> nn.Module:
        stages = self.hierarchy if hierarchy is None else parse_hierarchy(hierarchy)
        check_stages(self.name, stages, self.hierarchy)
        check_number(self.name, "width", width, Real, lambda w: w > 0, "a number above 0")
        rate = "a number from 0 up to but not including 1"
        check_number(self.name, "dropout", dropout, Real, lambda p: 0 <= p < 1, rate)
        halvings = None if downsample_after is None else parse_downsampling(downsample_after)
        sizes = num_classes, in_chans, image_size
        return self.family(self.name, stages, width, *sizes, dropout, halvings)

    @property
    def text(self) -> str:
        """A few words for ``layerwise list models``."""
        return f"published as {format_hierarchy(self.hierarchy)}"


MODELS: dict[str, ModelFactory] = {
    **{name: Published(name, VGG, definition[0]) for name, definition in VGGS.items()},
    **{name: Published(name, ResNet, definition[0]) for name, definition in RESNETS.items()},
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` accepts, filtered by a shell pattern such as ``"resnet*"``."""
    return [name for name in MODELS if fnmatch(name, pattern)]


def published_hierarchy(name: str) -> Hierarchy:
    """The hierarchy that a network was published with.

    Raises:
        InvalidInput: the network is unknown, or has no hierarchy.
    """
    factory = MODELS[choose("model", name, MODELS)]
    if not isinstance(factory, Published):
        raise InvalidInput(
            f"Cannot change the hierarchy of {name}: it has none. Choose one of "
            f"{', '.join(hierarchical())}."
        )
    return factory.hierarchy


def hierarchical() -> list[str]:
    """Names of the networks that can be built with any hierarchy."""
    return [name for name, factory in MODELS.items() if isinstance(factory, Published)]


def create_model(
    name: str,
    hierarchy: str | Iterable[int] | None = None,
    width: float = 1.0,
    num_classes: int = 10,
    in_chans: int = 3,
    image_size: int = 32,
    dropout: float = 0.0,
    downsample_after: str | Iterable[int] | None = None,
    **options: Any,
) -> nn.Module:
    """Build a network by name.

    Its weights are initialised by PyTorch's defaults, from the global random generator.

    Args:
        name: one of ``list_models()``.
        hierarchy: convolutions (VGG) or residual blocks (ResNet) per stage; default: as published.
        width: multiplier of every channel count.
        num_classes: number of classes.
        in_chans: number of channels of the images.
        image_size: height and width of the images in pixels; 64 and up selects the family's stem
            for large images.
        dropout: probability of dropping a channel after every unit.
        downsample_after: numbers of convolutions (VGG) or residual blocks (ResNet) after which maps
            are halved: by a 2×2 maximum pooling, or by a stride of 2 in the next block (0: the
            first). A map of one pixel stays. Default: where stages end, as published.
        options: further options that the network declares.

    Returns:
        A module that maps (B, in_chans, image_size, image_size) to logits (B, num_classes).

    Raises:
        InvalidInput: an argument is out of range, or not one of this network's.
    """
    factory = MODELS[choose("model", name, MODELS)]
    for label, value, least in (
        ("num_classes", num_classes, 2),
        ("in_chans", in_chans, 1),
        ("image_size", image_size, 1),
    ):
        accepted = f"a whole number, {least} or more"
        check_number(name, label, value, Integral, partial(le, least), accepted)
    shared = {
        "hierarchy": (hierarchy, None),
        "width": (width, 1.0),
        "dropout": (dropout, 0.0),
        "downsample_after": (downsample_after, None),
    }
    arguments = {key: value for key, (value, default) in shared.items() if value != default}
    arguments |= options
    parameters = inspect.signature(factory).parameters
    refused = [key for key in arguments if key not in parameters]
    if refused:
        raise InvalidInput(
            f"Cannot use {refused[0]} to build {name}: this network has no such option. Leave it "
            "out."
        )
    return factory(num_classes, in_chans, image_size, **arguments)


def check_number(
    name: str, label: str, value: Any, kind: type, valid: Callable[[Any], bool], accepted: str
) -> None:
    """Refuse a number that a network cannot be built with.

    Args:
        name: name of the network.
        label: name of the number.
        value: the number.
        kind: type that it must have.
        valid: whether a value of that type is in range.
        accepted: the range in words.

    Raises:
        InvalidInput: naming the number.
    """
    if not isinstance(value, kind) or not valid(value) or value == inf:
        raise InvalidInput(
            f"Cannot build {name} with {label} {value}: it is out of range. Give {accepted}."
        )
