"""Terms that any local loss can carry: they compare what leaves a unit with what entered it."""

import inspect
from collections.abc import Callable, Collection, Sequence
from functools import wraps
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses.site import (
    Evaluated,
    Site,
    Targets,
    at_least_float32,
    classifies,
    end_update,
)
from layerwise.utils.changing import Change, Changing, value_at
from layerwise.utils.options import changing_options

NARROW = 4  # the hidden layer of a decoder has so many times fewer channels


class Transport(nn.Module):
    """Mean squared displacement of features: mean (T(x) − x)² over all elements of a batch.

    The transport regulariser of Karkar et al. 2023, arXiv:2309.17357, who sum such means over the
    residual branches of a module, before its last ReLU. Here x is what enters the unit, a constant,
    and T(x) its feature. Units whose features have another shape than that carry no such term.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.fits = site.shape == site.entering

    def forward(self, features: Tensor, entered: Tensor) -> Tensor:
        return mean_square(features, entered) if self.fits else features.new_zeros(())


class OwnInput(nn.Module):
    """Reconstruction of what entered the unit from what leaves it: a mean squared error.

    As in LoPT (2026, arXiv:2605.04913): normalisation, a linear layer to a quarter of the channels,
    GELU, a linear layer. On maps, linear layers are 1×1 convolutions, what they give is scaled to
    the input's size, and normalisation is of an example over channels and pixels: over the channels
    of each pixel, it would take too much from a few of them.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()
        channels, *size = site.shape
        hidden = max(channels // NARROW, 1)
        if size and len(site.entering) == 3:
            self.decoder = nn.Sequential(
                nn.GroupNorm(1, channels),
                nn.Conv2d(channels, hidden, 1),
                nn.GELU(),
                nn.Conv2d(hidden, site.entering[0], 1),
                nn.Upsample(tuple(site.entering[1:])),
            )
        else:
            inputs = prod(site.shape)
            self.decoder = nn.Sequential(
                nn.Flatten(),
                nn.LayerNorm(inputs),
                nn.Linear(inputs, hidden),
                nn.GELU(),
                nn.Linear(hidden, prod(site.entering)),
                nn.Unflatten(1, site.entering),
            )

    def forward(self, features: Tensor, entered: Tensor) -> Tensor:
        return mean_square(self.decoder(features), entered)


def mean_square(one: Tensor, other: Tensor) -> Tensor:
    """Mean squared difference of two tensors of one shape, in float32 or better."""
    return F.mse_loss(at_least_float32(one), at_least_float32(other))


TERMS: dict[str, Callable[[Site], nn.Module]] = {"transport": Transport, "own_input": OwnInput}
DESCRIPTIONS = """\
    transport: weight of the mean squared difference between a unit's output and input.
    own_input: weight of the mean squared error of the unit's reconstructed input.
"""


def term_weight(optional: bool = False) -> Changing:
    """The weight of a term, which may change over training; None too where it is optional."""
    return Changing(
        lambda value: (optional and value is None) or 0 <= value < float("inf"),
        "a number, 0 or more",
    )


class WithTerms(nn.Module):
    """A local loss and weighted terms: the sum of both.

    Attributes:
        loss: the local loss.
        terms: by name; the weight of each is the attribute of its name.
    """

    reads_input = True
    training_only = ("terms",)
    transport, own_input = term_weight(), term_weight()

    def __init__(self, loss: nn.Module, site: Site, weights: dict[str, Any]) -> None:
        super().__init__()
        self.loss = loss
        for name, value in weights.items():
            setattr(self, name, value_at(value, 0.0))
        self.terms = nn.ModuleDict({name: TERMS[name](site) for name in weights})
        self.reads_images = getattr(loss, "reads_images", False)
        self.reads_later_weights = getattr(loss, "reads_later_weights", False)

    def applied(self) -> list[str]:
        """Names of the terms that compare something at this unit."""
        return [name for name, term in self.terms.items() if getattr(term, "fits", True)]

    def end_update(self) -> None:
        end_update(self.loss)

    @property
    def classifies(self) -> bool:
        return classifies(self.loss)

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        result: Tensor = self.loss.logits(features)  # type: ignore[operator]
        return result

    def forward(self, features: Tensor, targets: Targets, entered: Tensor) -> Evaluated:
        """Shapes: features and entered (B, C, H, W) or (B, C)."""
        read = (entered,) if getattr(self.loss, "reads_input", False) else ()
        value, correct = self.loss(features, targets, *read)
        for name, term in self.terms.items():
            value = value + getattr(self, name) * term(features, entered)
        return Evaluated(value, correct)


def refuse_idle_terms(asked: Sequence[str], losses: Sequence[nn.Module]) -> None:
    """Refuse a term that compares nothing at any unit of a chain, so that it would change nothing.

    Args:
        asked: names of terms that were given a weight.
        losses: of the chain's units.

    Raises:
        InvalidInput: naming the term.
    """
    carriers = [loss for loss in losses if isinstance(loss, WithTerms)]
    applied = {name for loss in carriers for name in loss.applied()}
    for name in asked:
        if name not in applied:
            reason = (
                "no unit's features have the shape of what enters it. Leave it out, or cut the "
                "network elsewhere."
                if carriers
                else "the chain is one unit, and the last one carries no term. Leave it out."
            )
            raise InvalidInput(
                f"Cannot use {name.replace('_', '-')}: it would change nothing, because {reason}"
            )


def split_terms(
    options: dict[str, Any], own: Collection[str] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights of terms among options of a loss, and the other options.

    A term whose weight is 0 is left out, unless its weight changes over training.

    Args:
        own: names of options that the loss itself declares; they are its own, whatever they are.

    Raises:
        InvalidInput: a weight is below 0.
    """
    names = [name for name in TERMS if name in options and name not in own]
    weights = {
        name: options[name] for name in names if options[name] or isinstance(options[name], Change)
    }
    for name, value in weights.items():
        getattr(WithTerms, name).check(value_at(value, 0.0))
    return weights, {name: value for name, value in options.items() if name not in names}


def declaring_terms(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A factory of losses whose signature and docstring declare the terms' weights as options."""

    @wraps(factory, updated=())
    def declared(site: Site, **options: Any) -> nn.Module:
        return factory(site, **options)

    own = list(inspect.signature(factory).parameters.values())
    others = [parameter for parameter in own if parameter.kind is parameter.VAR_KEYWORD]
    weights = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=0.0, annotation=float)
        for name in TERMS
        if name not in inspect.signature(factory).parameters
    ]
    declared.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [*(parameter for parameter in own if parameter not in others), *weights, *others]
    )
    before, found, after = (inspect.getdoc(factory) or "").partition("Args:\n")
    before = before if found else f"{before}\n\n"
    declared.__doc__ = f"{before}Args:\n{DESCRIPTIONS}{after}"
    for name in changing_options(factory):
        setattr(declared, name, getattr(factory, name))
    for parameter in weights:
        setattr(declared, parameter.name, getattr(WithTerms, parameter.name))
    return declared
