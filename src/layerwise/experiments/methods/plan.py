"""The methods of a comparison: local losses with their spans, and rules."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from layerwise.errors import InvalidInput, brief, check_range, choose
from layerwise.experiments.compare import is_local
from layerwise.losses import LOSSES
from layerwise.profiling.costs import StepCosts
from layerwise.rules import RULES
from layerwise.runs.fields import NO_OPTIONS
from layerwise.runs.run import Run
from layerwise.training.declared_options import check_rule_options, registries, with_rule
from layerwise.training.prepare import with_own_options
from layerwise.utils.options import Options, checked_options, options_of

LOCAL = "simultaneous"  # the rule that has spans
LONGEST_SPAN = 10_000  # of any chain


@dataclass(frozen=True)
class Method:
    """A local loss and how far it reaches, or a rule that trains the network as one unit.

    Attributes:
        name: in tables.
        loss: the local loss, or several with the units that they begin at; or None.
        span: number of units that a loss reaches, or text such as ``1,4=3``; see ``core.reach``.
        run: with the base's seed and epochs.
    """

    name: str
    loss: str | None
    span: int | str
    run: Run


def methods_of(
    base: Run, losses: Sequence[str], spans: Sequence[int | str], rules: Sequence[str]
) -> list[Method]:
    """Every method of a comparison, each once: the rules first, then every loss and span.

    Args:
        losses: a loss each, or several by unit: ``dgl-cnn,4=pred``.
        spans: a number each, or text; see ``core.reach``.

    Raises:
        InvalidInput: a loss or rule is unknown, or an option belongs to none of them.
    """
    for loss in losses:
        for name in with_loss(base, loss).losses.values():
            choose("loss", name, LOSSES)
    for rule in rules:
        choose("rule", rule, RULES)
    for span in spans:
        if isinstance(span, int):
            check_range("span", span, 1, LONGEST_SPAN)
    losses, rules = list(dict.fromkeys(losses)), list(dict.fromkeys(rules))
    spans = list(dict.fromkeys(spans))
    check_rule_options(base, [LOCAL, *rules])
    refuse_strange_options(base, losses)
    refuse_idle_teacher(base, losses)
    whole = [whole_method(base, rule) for rule in rules if not is_local(rule)]
    others = [rule for rule in rules if is_local(rule) and rule != LOCAL]
    return [
        *whole,
        *(local_method(base, loss, LOCAL, span) for loss in losses for span in spans),
        *(local_method(base, loss, rule, 1) for rule in others for loss in losses),
    ]


def reference_of(methods: Sequence[Method]) -> Method:
    """The method by whose costs the others' epochs are scaled: global, else the first."""
    return next((method for method in methods if method.name == "global"), methods[0])


def whole_method(base: Run, rule: str) -> Method:
    """A rule that trains the network as one unit, without a local loss."""
    run = replace(with_rule(base, rule), loss=Run.loss, loss_from="", loss_options=NO_OPTIONS)
    return Method(rule, None, 1, with_own_options(run))


def with_loss(base: Run, loss: str) -> Run:
    """A run with a loss, or with several by unit, such as ``dgl-cnn,4=pred``."""
    first, _, later = loss.partition(",")
    run = replace(base, loss=first, loss_from=later)
    try:
        run.losses  # noqa: B018  # it parses them
    except InvalidInput as error:
        raise InvalidInput(
            f"Cannot use --losses {brief(repr(loss))}: its later losses are not a unit and a loss "
            "each, with units that increase from 1 on. Give them like dgl-cnn/4=pred/8=sim."
        ) from error
    return run


def local_method(base: Run, loss: str, rule: str, span: int | str) -> Method:
    run = with_loss(with_rule(base, rule), loss)
    declared = declared_by(run.losses.values())
    options = {name: value for name, value in base.loss_options.items() if name in declared}
    order = {name: value for name, value in run.rule_options.items() if name != "span"}
    guided = reads_teacher(run.losses.values())
    run = replace(
        run,
        teacher=run.teacher if guided else None,
        loss_options=Options(options),
        rule_options=Options({**order, **({"span": span} if rule == LOCAL else {})}),
    )
    words = [
        run.loss_in_words,
        *([f"span {span}"] if span != 1 else []),
        *([rule] if rule != LOCAL else []),
    ]
    return Method(", ".join(words), loss, span, with_own_options(run))


def reads_teacher(losses: Iterable[str]) -> bool:
    """Whether one of some losses compares features with a teacher's, and says so."""
    return any(getattr(LOSSES[name], "reads_teacher", False) for name in losses)


def declared_by(losses: Iterable[str]) -> set[str]:
    """Names of the options that some losses declare."""
    registry: Mapping[str, Callable[..., Any]] = registries()["loss"]
    return {name for loss in losses for name in options_of(registry[loss])}


def refuse_idle_teacher(base: Run, losses: Sequence[str]) -> None:
    """Refuse a teacher that none of the losses compares anything with.

    Raises:
        InvalidInput: as said.
    """
    names = [name for loss in losses for name in with_loss(base, loss).losses.values()]
    if base.teacher is not None and not reads_teacher(names):
        raise InvalidInput(
            "Cannot use --teacher: none of the losses compares features with a teacher's. Leave it "
            "out, or give match among --losses."
        )


def refuse_strange_options(base: Run, losses: Sequence[str]) -> None:
    """Refuse an option that none of the losses declares; the others leave it out of their runs.

    Raises:
        InvalidInput: naming it.
    """
    names = [name for loss in losses for name in with_loss(base, loss).losses.values()]
    declared = declared_by(names)
    strange = {name: value for name, value in base.loss_options.items() if name not in declared}
    checked_options("loss", names[:1], registries()["loss"], strange)


def refuse_one_unit(methods: Sequence[Method], costs: Mapping[str, StepCosts]) -> None:
    """Refuse local losses of a network that is cut nowhere, where none of them would be used.

    Raises:
        InvalidInput: as said.
    """
    for method in methods:
        if method.loss is not None and costs[method.name].units == 1:
            raise InvalidInput(
                f"Cannot compare local losses with --at {method.run.at}: the network is then one "
                "unit, which has none. Give layer, block or a number of units above 1."
            )
