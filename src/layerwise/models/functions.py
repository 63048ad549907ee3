"""Networks that functions of the user's own make: ``FILE.py:FUNCTION``, ``package.module:CLASS``.

A function is given what it takes by name of ``num_classes``, ``in_chans`` and ``image_size``.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import nn

from layerwise.errors import InvalidInput, brief, raised
from layerwise.utils.plugins import MODULES, refuse_unasked

# names by which a function may take what a network is made for
ALSO = {"in_channels": "in_chans", "channels": "in_chans", "img_size": "image_size"}
SIZES = ("num_classes", "in_chans", "image_size")


@dataclass(frozen=True)
class Function:
    """A function of the user's own, as a factory of networks.

    Attributes:
        name: how it is called, ``FILE.py:FUNCTION``.
    """

    name: str
    function: Callable[..., Any]

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.function).parameters
        except (TypeError, ValueError):  # of a function that is not written in Python
            raise InvalidInput(
                f"Cannot use {self.name}: its arguments are not known. Give a Python function that "
                "makes the network."
            ) from None

    @property
    def takes_num_classes(self) -> bool:
        return "num_classes" in self.parameters

    def __call__(self, num_classes: int, in_chans: int, image_size: int) -> nn.Module:
        sizes = dict(zip(SIZES, (num_classes, in_chans, image_size), strict=True))
        given = {
            name: sizes[ALSO.get(name, name)]
            for name in self.parameters
            if ALSO.get(name, name) in sizes
        }
        self.refuse_others(given)
        try:
            network = self.function(**given)
        except InvalidInput:
            raise
        except (Exception, SystemExit) as error:  # the user's code runs here
            raise InvalidInput(
                f"Cannot make {self.name}: it {raised(error)}. Correct it."
            ) from error
        if not isinstance(network, nn.Module):
            raise InvalidInput(
                f"Cannot use {self.name}: it made {type(network).__name__}, not a "
                "torch.nn.Module. Let it return the network."
            )
        return network

    def refuse_others(self, given: Mapping[str, int]) -> None:
        """Refuse a function that needs more than what every network is made for."""
        for parameter in self.parameters.values():
            several = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            needed = parameter.default is parameter.empty and not several
            if needed and parameter.name not in given:
                raise InvalidInput(
                    f"Cannot use {self.name}: it needs {parameter.name!r}, and a network is made "
                    f"from {', '.join(SIZES)} alone. Give it a default."
                )


def function_named(name: str) -> Function:
    """The function of a file or module that was imported.

    Raises:
        InvalidInput: the file was not imported, or has no such function.
    """
    place, _, attribute = name.rpartition(":")
    if place not in MODULES:
        refuse_unasked(place)
    module = MODULES[place]
    function = getattr(module, attribute, None) if attribute.isidentifier() else None
    if function is None:
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", None) == module.__name__
        ]
        near = get_close_matches(attribute, own, n=1, cutoff=0.5)
        hint = f" Did you mean {place}:{near[0]}?" if near else ""
        raise InvalidInput(
            f"Cannot use {brief(name)}: {place} has no function {brief(repr(attribute))}.{hint} "
            "Name one that makes the network."
        )
    if isinstance(function, nn.Module) or not callable(function):
        raise InvalidInput(
            f"Cannot use {name}: it is {type(function).__name__}, not a function. Name one that "
            "makes the network anew."
        )
    return Function(name, function)
