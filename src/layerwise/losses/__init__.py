"""Local losses: modules built for a site in the chain that know nothing of rules.

A new loss is one class with the constructor ``(site, *, options)`` and a ``forward(features,
targets) -> Evaluated``, and one line in ``LOSSES``. A loss that weighs the network's output
differently from plain cross-entropy has a static method ``output``. A loss whose head classifies
has a method ``logits(features)``, so that the network can end behind its unit
(``core.early_exit``); names of parts that the method does not read are in ``training_only``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from torch import nn

from layerwise.errors import CannotSplit, InvalidInput, choose, raised
from layerwise.losses.auglocal import AugLocal
from layerwise.losses.biological import BiologicalPred, BiologicalSim
from layerwise.losses.dgl import DglCnn, DglMlp, DglMlpSr
from layerwise.losses.greedy import Greedy
from layerwise.losses.infopro import InfoPro, InfoProContrast
from layerwise.losses.lls import Lls
from layerwise.losses.look_ahead import LookAhead
from layerwise.losses.match import Match
from layerwise.losses.pred import Output, Pred
from layerwise.losses.predsim import PredSim
from layerwise.losses.predsim_lite import PredSimLite
from layerwise.losses.separable import Separable
from layerwise.losses.sim import Sim
from layerwise.losses.site import Evaluated, Site, Targets
from layerwise.losses.strided import Strided
from layerwise.losses.terms import TERMS, WithTerms, declaring_terms, split_terms
from layerwise.utils.changing import BETWEEN, Change, Changing, linear_change, value_at
from layerwise.utils.options import (
    Option,
    changing_options,
    keyword_only,
    plain_type,
    plain_type_of,
)

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
    "strided": Strided,
    "lls": Lls,
    "auglocal": AugLocal,
    "look-ahead": LookAhead,
    "match": Match,
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
    "Changing",
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
    "options_of_each",
    "terms_of",
    "with_changes",
]


def create_loss(loss: str | LossFactory, site: Site, **options: Any) -> nn.Module:
    """Build the local loss of a site; at the chain's end, the loss of the network's output.

    Args:
        loss: a name in ``LOSSES``, or a callable ``(site, **options) -> module``.
        site: place in the chain that the loss is built for.
        options: keyword arguments of the loss, such as ``beta`` and ``decoder_dim`` of predsim, and
            weights of terms that any loss can carry: ``transport``, ``own_input``.

    Raises:
        InvalidInput: the loss is unknown, has no such option, cannot read features of such a shape,
            or an option is of another type or out of range.
    """
    factory = factory_of(loss)
    options_of_each([loss], options)
    options = of_declared_types(loss, with_changes([loss], options))
    weights, options = split_terms(options, [parameter.name for parameter in arguments(factory)])
    options = {name: value_at(value, 0.0) for name, value in options.items()}
    if site.last:
        output = getattr(factory, "output", Output)
        return output(
            site,
            **{key: value for key, value in options.items() if key in keyword_only(output)},
        )
    head = made_head(loss, factory, site, options)
    if not isinstance(head, nn.Module):
        raise InvalidInput(
            f"Cannot use loss {name_of(loss)!r}: it made {type(head).__name__}. {PROTOCOL}"
        )
    return WithTerms(head, site, weights) if weights else head


def made_head(
    loss: str | LossFactory, factory: LossFactory, site: Site, options: Mapping[str, Any]
) -> Any:
    """What a loss's factory makes for a site.

    Raises:
        InvalidInput: it raised an error, or refused the site or an option.
    """
    try:
        return factory(site, **options)
    except (InvalidInput, CannotSplit):
        raise
    except Exception as error:  # the user's code runs here
        raise InvalidInput(
            f"Cannot use loss {name_of(loss)!r}: making it for unit {site.index} "
            f"{raised(error)}. {PROTOCOL}"
        ) from error


def factory_of(loss: str | LossFactory) -> LossFactory:
    """The callable that a loss is made by.

    Raises:
        InvalidInput: the name is unknown, or it is no callable.
    """
    if isinstance(loss, nn.Module) or not (isinstance(loss, str) or callable(loss)):
        raise InvalidInput(f"Cannot use loss {type(loss).__name__}: it makes no module. {PROTOCOL}")
    return LOSSES[choose("loss", loss, LOSSES)] if isinstance(loss, str) else loss


def arguments(factory: LossFactory) -> list[inspect.Parameter]:
    """Arguments of a loss behind the site."""
    return list(inspect.signature(factory).parameters.values())[1:]


def takes_any(factory: LossFactory) -> bool:
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in arguments(factory))


def with_head(loss: str | LossFactory, options: Mapping[str, Any]) -> list[LossFactory]:
    """The callables that options of a loss may be of: its own, and its head's.

    A loss with a ``head_loss`` hands options that it does not declare on to that one.
    """
    factory = factory_of(loss)
    own = {parameter.name: parameter.default for parameter in arguments(factory)}
    if "head_loss" not in own or not takes_any(factory):
        return [factory]
    return [factory, factory_of(options.get("head_loss", own["head_loss"]))]


def of_declared_types(loss: str | LossFactory, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a loss, of which those that are annotated with a plain type are of that type.

    Those that change over training are checked when they have a value. A callable in place of a
    name, such as of a loss, stays as it is.

    Raises:
        InvalidInput: naming the option and the type.
    """
    checked = dict(options)
    for parameter in arguments(declaring_terms(factory_of(loss))):
        name, plain = parameter.name, plain_type(parameter.annotation)
        if type(parameter.default) is bool:  # also without an annotation: any text would be true
            plain = plain_type_of(parameter)
        if name not in options or plain is None or isinstance(options[name], Change):
            continue
        if plain[0] is not str or not callable(options[name]):
            option = Option(name, *plain, parameter.default, "")
            checked[name] = option.check(options[name], f"option of the loss {name_of(loss)!r}")
    return checked


def options_of_each(
    losses: Sequence[str | LossFactory], options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The options that each of several losses takes: those that it declares, and terms' weights.

    Raises:
        InvalidInput: a loss is unknown, or none of them has such an option.
    """
    taken = []
    for loss in losses:
        factories = with_head(loss, options)
        names = {*TERMS, *(item.name for factory in factories for item in arguments(factory))}
        if takes_any(factories[-1]):
            names.update(options)
        taken.append({name: value for name, value in options.items() if name in names})
    for name in sorted(options):
        if not any(name in given for given in taken):
            parameters = [
                item
                for loss in losses
                for factory in with_head(loss, options)
                for item in arguments(factory)
                if item.kind is not item.VAR_KEYWORD
            ]
            names_in_order = dict.fromkeys([*(item.name for item in parameters), *TERMS])
            accepted = ", ".join(names_in_order)
            words = ", ".join(dict.fromkeys(repr(name_of(loss)) for loss in losses))
            raise InvalidInput(
                f"Cannot use option {name!r} with loss {words}: it is unknown. "
                f"Accepted: {accepted}."
            )
    return taken


def terms_of(losses: Sequence[str | LossFactory], options: Mapping[str, Any]) -> list[str]:
    """Names of the terms that options give a weight: not those that a loss itself declares."""
    own = [item.name for loss in losses for item in arguments(factory_of(loss))]
    return list(split_terms(dict(options), own)[0])


def with_changes(losses: Sequence[str | LossFactory], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options, of which those given as functions of progress or as text are a ``Change``.

    Raises:
        InvalidInput: an option cannot change over training, or its text is no linear change.
    """
    factories = [
        declaring_terms(factory) for loss in losses for factory in with_head(loss, options)
    ]
    changing = list(dict.fromkeys(chain(*map(changing_options, factories))))
    changed = dict(options)
    for name, value in options.items():
        is_text = isinstance(value, str) and BETWEEN in value
        if name in changing and (is_text or callable(value)):
            changed[name] = Change(name, linear_change(name, value) if is_text else value)
        elif (is_text or callable(value)) and any(is_number(item, name) for item in factories):
            raise InvalidInput(
                f"Cannot change {name} over training: it is read when the loss is made. Give a "
                f"number; {', '.join(changing)} may change."
            )
    return changed


def is_number(factory: LossFactory, name: str) -> bool:
    """Whether a loss declares an option that is a number."""
    types = {parameter.name: plain_type_of(parameter) for parameter in arguments(factory)}
    return (types.get(name) or (str,))[0] in (int, float)


def name_of(loss: str | LossFactory) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
