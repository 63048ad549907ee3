"""Local losses: modules built for a site in the chain that know nothing of rules.

A new loss is one class with the constructor ``(site, *, options)`` and a ``forward(features,
targets) -> Evaluated``, and one line in ``LOSSES``. A loss that weighs the network's output
differently from plain cross-entropy has a static method ``output``.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from layerwise.errors import InvalidInput, choose
from layerwise.losses.auglocal import AugLocal
from layerwise.losses.biological import BiologicalPred, BiologicalSim
from layerwise.losses.dgl import DglCnn, DglMlp, DglMlpSr
from layerwise.losses.greedy import Greedy
from layerwise.losses.infopro import InfoPro, InfoProContrast
from layerwise.losses.lls import Lls
from layerwise.losses.look_ahead import LookAhead
from layerwise.losses.pred import Output, Pred
from layerwise.losses.predsim import PredSim
from layerwise.losses.predsim_lite import PredSimLite
from layerwise.losses.separable import Separable
from layerwise.losses.sim import Sim
from layerwise.losses.site import Evaluated, Site, Targets
from layerwise.losses.terms import WithTerms, split_terms
from layerwise.utils.options import keyword_only

LossFactory = Callable[..., nn.Module]

LOSSES: dict[str, LossFactory] = {
    "pred": Pred,
    "sim": Sim,
    "predsim": PredSim,
    "predsim-lite": PredSimLite,
    "greedy": Greedy,
    "dgl-cnn": DglCnn,
    "dgl-mlp": DglMlp,
    "dgl-mlp-sr": DglMlpSr,
    "separable": Separable,
    "lls": Lls,
    "auglocal": AugLocal,
    "look-ahead": LookAhead,
    "infopro": InfoPro,
    "infopro-contrast": InfoProContrast,
    "biological-pred": BiologicalPred,
    "biological-sim": BiologicalSim,
}

PROTOCOL = (
    f"Give a name ({', '.join(LOSSES)}) or a callable (site, **options) that makes a module whose "
    "forward(features, targets) returns Evaluated(loss, correct)."
)

__all__ = [
    "LOSSES",
    "Evaluated",
    "LossFactory",
    "Output",
    "Pred",
    "PredSim",
    "PredSimLite",
    "Sim",
    "Site",
    "Targets",
    "create_loss",
]


def create_loss(loss: str | LossFactory, site: Site, **options: Any) -> nn.Module:
    """Build the local loss of a site; at the chain's end, the loss of the network's output.

    Args:
        loss: a name in ``LOSSES``, or a callable ``(site, **options) -> module``.
        site: place in the chain that the loss is built for.
        options: keyword arguments of the loss, such as ``beta`` and ``decoder_dim`` of predsim, and
            weights of terms that any loss can carry: ``transport``, ``own_input``.

    Raises:
        InvalidInput: the loss is unknown, has no such option, or cannot read features of such a
            shape.
    """
    if isinstance(loss, nn.Module) or not (isinstance(loss, str) or callable(loss)):
        raise InvalidInput(f"Cannot use loss {type(loss).__name__}: it makes no module. {PROTOCOL}")
    factory = LOSSES[choose("loss", loss, LOSSES)] if isinstance(loss, str) else loss
    parameters = list(inspect.signature(factory).parameters.values())[1:]  # behind the site
    weights, options = split_terms(options, [parameter.name for parameter in parameters])
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    unknown = sorted(set(options) - {parameter.name for parameter in parameters})
    if unknown and not takes_any:
        accepted = ", ".join(parameter.name for parameter in parameters) or "none"
        raise InvalidInput(
            f"Cannot use option {unknown[0]!r} with loss {name_of(loss)!r}: it is unknown. "
            f"Accepted: {accepted}."
        )
    if site.last:
        output = getattr(factory, "output", Output)
        return output(
            site,
            **{key: value for key, value in options.items() if key in keyword_only(output)},
        )
    head = factory(site, **options)
    if not isinstance(head, nn.Module):
        raise InvalidInput(
            f"Cannot use loss {name_of(loss)!r}: it made {type(head).__name__}. {PROTOCOL}"
        )
    return WithTerms(head, site, weights) if weights else head


def name_of(loss: str | LossFactory) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
