"""The networks of the paper, of any hierarchy and width: plain modules that know nothing of local learning.

A new network is one class with the constructor of ``VGG`` and ``ResNet`` and one line in ``MODELS``.
"""

from collections.abc import Iterable
from fnmatch import fnmatch
from math import inf
from numbers import Integral, Real

from torch import nn

from layerwise.errors import InvalidInput, choose
from layerwise.hierarchy import Hierarchy, check_stages, parse_downsampling, parse_hierarchy
from layerwise.models.resnet import RESNETS, ResNet
from layerwise.models.vgg import VGG, VGGS

# name -> (class, published hierarchy)
MODELS: dict[str, tuple[type[VGG] | type[ResNet], Hierarchy]] = {
    **{name: (VGG, definition[0]) for name, definition in VGGS.items()},
    **{name: (ResNet, definition[0]) for name, definition in RESNETS.items()},
}


def list_models(pattern: str = "*") -> list[str]:
    """Names that ``create_model`` accepts, filtered by a shell pattern such as ``"resnet*"``."""
    return [name for name in MODELS if fnmatch(name, pattern)]


def published_hierarchy(name: str) -> Hierarchy:
    """The hierarchy that a network was published with."""
    return MODELS[choose("model", name, MODELS)][1]


def create_model(
    name: str,
    hierarchy: str | Iterable[int] | None = None,
    width: float = 1.0,
    num_classes: int = 10,
    in_chans: int = 3,
    image_size: int = 32,
    dropout: float = 0.0,
    downsample_after: str | Iterable[int] | None = None,
) -> nn.Module:
    """Build a network by name, its weights initialised by PyTorch's defaults from the global random generator.

    Args:
        name: one of ``list_models()``.
        hierarchy: convolutions (VGG) or residual blocks (ResNet) per stage; default: as published.
        width: multiplier of every channel count.
        image_size: height and width of the images in pixels; 64 and up selects the family's stem for large images.
        dropout: probability of dropping a channel after every unit.
        downsample_after: after how many convolutions (VGG, by 2×2 maximum pooling) or residual blocks (ResNet, by a stride of 2
            in the next one; 0: the first) maps are halved; a map of one pixel stays. Default: where stages end, as published.

    Returns:
        A module that maps (B, in_chans, image_size, image_size) to logits (B, num_classes).

    Raises:
        InvalidInput: an argument is out of range; the message names it and what is accepted.
    """
    network, published = MODELS[choose("model", name, MODELS)]
    stages = published if hierarchy is None else parse_hierarchy(hierarchy)
    check_stages(name, stages, published)
    for label, value, kind, accepted, valid in (
        ("width", width, Real, "a number above 0", lambda x: 0 < x < inf),
        ("num_classes", num_classes, Integral, "a whole number, 2 or more", lambda x: x >= 2),
        ("in_chans", in_chans, Integral, "a whole number, 1 or more", lambda x: x >= 1),
        ("image_size", image_size, Integral, "a whole number of pixels, 1 or more", lambda x: x >= 1),
        ("dropout", dropout, Real, "a number from 0 up to but not including 1", lambda x: 0 <= x < 1),
    ):
        if not isinstance(value, kind) or not valid(value):
            raise InvalidInput(f"{label} {value} cannot be used to build {name}: give {accepted}")
    halvings = None if downsample_after is None else parse_downsampling(downsample_after)
    return network(name, stages, width, num_classes, in_chans, image_size, dropout, halvings)
