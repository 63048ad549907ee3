"""Networks by name: plain modules that know nothing of local learning.

A network of your own is a function ``(num_classes, in_chans, image_size, *, options)`` that returns
a module, and one line in ``MODELS``. The paper's families can have any hierarchy and width.
Networks that are not listed have a colon in their name: ``timm:resnet18``, ``my_file.py:make``.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from functools import partial
from math import inf
from numbers import Integral, Real
from operator import le
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.errors import InvalidInput, brief, check_flags, choose
from layerwise.hierarchy import (
    Hierarchy,
    check_stages,
    format_hierarchy,
    parse_downsampling,
    parse_hierarchy,
)
from layerwise.models.classifier import Say, classifier_weights, fit_classifier
from layerwise.models.functions import function_named
from layerwise.models.libraries import LIBRARIES
from layerwise.models.resnet import RESNETS, ResNet
from layerwise.models.vgg import VGG, VGGS
from layerwise.models.weight_files import load_weights
from layerwise.utils.plugins import (
    import_files,
    imported_as,
    is_module_name,
    refuse_unasked,
)

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


def model_factory(name: str) -> ModelFactory:
    """The factory of a network: a listed one, a library's, or a function of an imported file.

    Raises:
        InvalidInput: there is none of that name, its library is not installed, or its file was not
            imported.
    """
    if name in MODELS:
        return MODELS[name]
    library = name.partition(":")[0]
    if library in LIBRARIES and library != name:
        return LIBRARIES[library](name)
    if code_of(name) is not None:
        return function_named(name)
    if name.endswith(".py"):
        raise InvalidInput(
            f"Cannot use {brief(name)}: it names a file, but none of its functions. Give one that "
            f"makes a network, as in {brief(name)}:make_model."
        )
    return MODELS[choose("model", name, MODELS)]


def code_of(name: str) -> str | None:
    """The Python file or module whose function makes a network; None of all other networks."""
    place, colon, function = name.rpartition(":")
    if name in MODELS or not colon or place.partition(":")[0] in LIBRARIES:
        return None
    return place if place and (function or place.endswith(".py")) else None


def import_code_of(name: str) -> None:
    """Run the Python file or module whose function makes a network, if it is one of those.

    Raises:
        InvalidInput: it cannot be run.
    """
    place = code_of(name)
    if place is None:
        return
    near = get_close_matches(place, LIBRARIES, n=1, cutoff=0.7)
    try:
        import_files([place])
    except InvalidInput as refusal:
        if near and is_module_name(place):
            raise InvalidInput(f"{refusal} Did you mean {near[0]}:…?") from None
        raise


def imported_name(name: str) -> str:
    """The name of a network, with its file as the user has imported it; of others the name itself.

    Raises:
        InvalidInput: its file was not imported, and only the user lets code run.
    """
    place = code_of(name)
    if place is None:
        return name
    imported = imported_as(place)
    if imported is None:
        refuse_unasked(place)
    return f"{imported}:{name.rpartition(':')[2]}"


def published_hierarchy(name: str) -> Hierarchy:
    """The hierarchy that a network was published with.

    Raises:
        InvalidInput: the network is unknown, or has no hierarchy.
    """
    factory = model_factory(name)
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
    weights: str | Path | None = None,
    new_classifier: bool = False,
    say: Say = lambda line: None,
    **options: Any,
) -> nn.Module:
    """Build a network by name.

    Its weights are initialised by PyTorch's defaults, from the global random generator.

    Args:
        name: one of ``list_models()``; or ``timm:NAME``, ``torchvision:NAME`` or ``hf:NAME``, where
            that library is installed; or ``FILE.py:FUNCTION`` or ``package.module:FUNCTION``, whose
            code is then run (docs/networks.md).
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
        weights: file of weights to begin with, safetensors or a ``state_dict``; see
            ``weight_files.load_weights``.
        new_classifier: replace a classifier of another number of classes, and let ``weights`` have
            none, or another.
        say: is given a line about what was done to classifier and weights.
        options: further options that the network declares.

    Returns:
        A module that maps (B, in_chans, image_size, image_size) to logits (B, num_classes).

    Raises:
        InvalidInput: an argument is out of range, or not one of this network's.
    """
    if not isinstance(name, str):
        raise InvalidInput(
            f"Cannot build a network: its name is {type(name).__name__}. Give text, such as "
            "'resnet18'; a module needs no building."
        )
    check_flags(new_classifier=new_classifier)
    import_code_of(name)
    factory = model_factory(name)
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
    network = factory(num_classes, in_chans, image_size, **arguments)
    images = partial(torch.zeros, 2, in_chans, image_size, image_size)
    if name not in MODELS:
        fit_classifier(name, network, images(), num_classes, new_classifier, say)
    if weights is not None:
        classifier = set[str]()
        if new_classifier:
            counted = getattr(factory, "takes_num_classes", True)
            more = num_classes + 1, in_chans, image_size
            other = partial(factory, *more, **arguments) if counted else None
            classifier = classifier_weights(network, images(), other)
        load_weights(name, network, weights, classifier, say)
    return network


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
