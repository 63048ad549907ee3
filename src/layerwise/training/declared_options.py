"""Options that the network, the rule and the losses of a run declare, and their values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from layerwise.errors import choose
from layerwise.losses import LOSSES
from layerwise.losses.terms import declaring_terms
from layerwise.models import MODELS, imported_name, model_factory
from layerwise.rules import RULES
from layerwise.runs.run import Run
from layerwise.utils.options import Options, checked_options, options_of


def registries(run: Run | None = None) -> dict[str, Mapping[str, Callable[..., Any]]]:
    """Networks, rules and losses by name: the choices of a run that declare options.

    Args:
        run: a run whose network is among them, which need not be a listed one.

    Raises:
        InvalidInput: there is no such network, or its file was not imported.
    """
    own = {} if run is None else {run.model: model_factory(imported_name(run.model))}
    orders = {name: rule.order for name, rule in RULES.items()}
    losses = {name: declaring_terms(factory) for name, factory in LOSSES.items()}
    return {"model": {**MODELS, **own}, "rule": orders, "loss": losses}


def choices(run: Run) -> dict[str, list[str]]:
    """The entries of ``registries`` that a run names, of each kind."""
    losses = list(dict.fromkeys(run.losses.values()))
    return {"model": [run.model], "rule": [run.rule], "loss": losses}


def with_rule(run: Run, rule: str) -> Run:
    """The run by another rule, with those options that it has a use for.

    Raises:
        InvalidInput: the rule is unknown.
    """
    declared = options_of(RULES[choose("rule", rule, RULES)].order)
    shared = {name: value for name, value in run.rule_options.items() if name in declared}
    run = replace(run, rule=rule, rule_options=Options(shared))
    return replace(run, train_from=None, teacher=None) if RULES[rule].at == 1 else run


def check_rule_options(run: Run, rules: Sequence[str]) -> None:
    """Refuse an option of a run that none of some rules declares, by which it is carried out.

    Those that do not declare an option leave it out of their runs.

    Raises:
        InvalidInput: naming it.
    """
    orders = registries()["rule"]
    declared = {name for rule in rules for name in options_of(orders[rule])}
    strange = {name: value for name, value in run.rule_options.items() if name not in declared}
    checked_options("rule", list(rules[:1]), orders, strange)


def options_in_full(run: Run) -> dict[str, dict[str, Any]]:
    """The value of every option of the run's network, rule and loss, defaults among them.

    Those of several losses are tables by the name of the loss.
    """
    full: dict[str, dict[str, Any]] = {}
    for kind, names in choices(run).items():
        tables = {name: all_values(run, kind, name) for name in names}
        full[kind] = tables if len(names) > 1 else tables[names[0]]
    return full


def all_values(run: Run, kind: str, name: str) -> dict[str, Any]:
    """The value of every option that an entry of a registry declares."""
    given = getattr(run, f"{kind}_options")
    declared = options_of(registries(run)[kind][name])
    return {option: given.get(option, declared[option].default) for option in declared}
