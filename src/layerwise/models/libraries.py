"""Networks of torchvision, timm and Hugging Face's transformers, by name.

The architecture alone is made, with weights drawn anew. Nothing is downloaded. The libraries are
imported when a network of theirs is asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from layerwise.errors import InvalidInput, brief, raised, reason_of
from layerwise.utils.files import digest_of

CONFIGURATION = "config.json"  # of a network of Hugging Face


@dataclass(frozen=True)
class OfLibrary:
    """A network of a library, as a factory.

    Attributes:
        name: how it is called, such as ``timm:resnet18``.
        make: from number of classes, channels and size of images.
        made_by: the library and its version.
        files: SHA-256 of the files that describe it, by path.
    """

    name: str
    make: Callable[[int, int, int], nn.Module]
    made_by: str
    files: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        try:
            return self.make(num_classes, in_chans, image_size)
        except InvalidInput:
            raise
        except Exception as error:  # each library has errors of its own
            refuse_to_make(self.name, error, in_chans, image_size)


def refuse_to_make(name: str, error: Exception, in_chans: int, image_size: int) -> NoReturn:
    reason = reason_of(error)
    raise InvalidInput(
        f"Cannot make {name} for images of {in_chans} channels and {image_size} pixels: its "
        f"library refuses ({reason}). Give another --image-size."
    ) from error


def torchvision_network(name: str) -> OfLibrary:
    models = imported("torchvision", "torchvision.models", name)
    place = name.partition(":")[2]
    choose_name(name, place, models.list_models(module=models))

    def make(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        def made(**size: int) -> nn.Module:
            network: nn.Module = models.get_model(
                place, weights=None, num_classes=num_classes, **size
            )
            return network

        network = made_for_size(made, image_size=image_size)
        set_input_channels(network, in_chans)
        return network

    return OfLibrary(name, make, version_of("torchvision"))


def timm_network(name: str) -> OfLibrary:
    timm = imported("timm", "timm", name)
    place = name.partition(":")[2]
    if not timm.is_model(place):  # a name may end in a tag of weights, which are not loaded
        choose_name(name, place, timm.list_models())

    def make(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        def made(**size: int) -> nn.Module:
            network: nn.Module = timm.create_model(
                place, pretrained=False, num_classes=num_classes, in_chans=in_chans, **size
            )
            return network

        return made_for_size(made, img_size=image_size)

    return OfLibrary(name, make, version_of("timm"))


def hugging_face_network(name: str) -> OfLibrary:
    hub = imported("hf", "transformers", name)
    place = name.partition(":")[2]
    path = configuration_of(name, place)

    def make(num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        described = hub.AutoConfig.from_pretrained(
            str(path.parent), local_files_only=True, trust_remote_code=False
        )
        described.num_labels = num_classes
        for option, value in (("image_size", image_size), ("num_channels", in_chans)):
            if hasattr(described, option):
                setattr(described, option, value)
        try:
            network: nn.Module = hub.AutoModelForImageClassification.from_config(
                described, trust_remote_code=False
            )
        except ValueError as error:
            raise InvalidInput(
                f"Cannot use {brief(name)}: transformers makes no network of the type "
                f"{described.model_type!r} that classifies images. Give another."
            ) from error
        return network.float()

    return OfLibrary(name, make, version_of("transformers"), {str(path): digest_of(path)})


def configuration_of(name: str, place: str) -> Path:
    """The file that describes a network of Hugging Face: in a folder, else in the library's cache.

    Raises:
        InvalidInput: it is in neither; nothing is downloaded.
    """
    if Path(place).is_dir():
        path = Path(place) / CONFIGURATION
        if path.is_file():
            return path
        raise InvalidInput(
            f"Cannot use {brief(name)}: that folder holds no {CONFIGURATION}. Give the folder of a "
            "network of transformers."
        )
    hub = import_module("transformers.utils")
    try:
        return Path(hub.cached_file(place, CONFIGURATION, local_files_only=True))
    except Exception:  # of whatever kind: the name is none, or nothing of it is cached
        raise InvalidInput(
            f"Cannot use {brief(name)}: there is no such folder, and the library's cache holds no "
            f"{CONFIGURATION} of it. Nothing is downloaded: fetch it with hf download "
            f"{brief(place)} {CONFIGURATION}, or give a folder."
        ) from None


# prefix of a network's name, which is also the extra of this package that installs the library ->
# a factory from the whole name, such as timm:resnet18
LIBRARIES: dict[str, Callable[[str], OfLibrary]] = {
    "timm": timm_network,
    "torchvision": torchvision_network,
    "hf": hugging_face_network,
}


def imported(library: str, module: str, name: str) -> Any:
    """A module of an optional library.

    Raises:
        InvalidInput: it is not installed, or does not fit this version of PyTorch.
    """
    try:
        return import_module(module)
    except Exception as error:  # torchvision raises a RuntimeError where its operators do not load
        package = module.partition(".")[0]
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise InvalidInput(
                f"Cannot use {brief(name)}: {package} is not installed. Install it with: pip "
                f"install 'layerwise[{library}]'"
            ) from None
        raise InvalidInput(
            f"Cannot use {brief(name)}: importing {package} {raised(error)}. "
            f"Install a version of it that fits torch {torch.__version__}."
        ) from error


def version_of(package: str) -> str:
    return f"{package} {import_module(package).__version__}"


def choose_name(name: str, place: str, names: list[str]) -> None:
    """Refuse a name that a library does not have.

    Raises:
        InvalidInput: with the nearest that it has.
    """
    if place not in names:
        near = get_close_matches(place.lower(), names, n=1, cutoff=0.5)
        hint = f" Did you mean {name.partition(':')[0]}:{near[0]}?" if near else ""
        raise InvalidInput(
            f"Cannot use {brief(name)}: the library has no network of that name, but {len(names)} "
            f"others.{hint} Give the name of one."
        )


def made_for_size(make: Callable[..., nn.Module], **size: int) -> nn.Module:
    """A network made for its images' size, if it is one that takes it."""
    try:
        return make(**size)
    except TypeError as error:
        if not any(name in str(error) for name in size):
            raise
        return make()


def set_input_channels(network: nn.Module, channels: int) -> None:
    """Give a network that is made for colour images a first convolution for other channels."""
    path, first = next(
        (path, part) for path, part in network.named_modules() if isinstance(part, nn.Conv2d)
    )
    if first.in_channels != channels and first.groups == 1:
        network.set_submodule(
            path,
            nn.Conv2d(
                channels,
                first.out_channels,
                first.kernel_size,  # type: ignore[arg-type]
                first.stride,  # type: ignore[arg-type]
                first.padding,  # type: ignore[arg-type]
                first.dilation,  # type: ignore[arg-type]
                bias=first.bias is not None,
                padding_mode=first.padding_mode,
            ),
        )
