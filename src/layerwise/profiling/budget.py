"""Units by a budget of memory: the fewest whose training is predicted to fit into it.

Where units may end is what ``at="block"`` gives, and where none of its cuts fits, what
``at="layer"`` gives. For every number of units, those are chosen that keep the least for their
backward passes. The number is then sought by predicting the whole training.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor, nn

from layerwise.core import localize as maker
from layerwise.core.cuts import BUDGET, balances
from layerwise.core.doubts import warn_of_slow_bfloat16
from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format
from layerwise.core.split import cut_paths
from layerwise.core.tracer import TRACING
from layerwise.data import ImageFormat
from layerwise.errors import CannotSplit, InvalidInput, choose, names_in
from layerwise.losses import Evaluated, Site, Targets
from layerwise.profiling.predict import peak_of, predict_steps, predicted_device
from layerwise.profiling.trial_steps import trial_options
from layerwise.rules import RULES
from layerwise.runs.run import Execution, Run
from layerwise.training.networks import build_network
from layerwise.training.prepare import prepare
from layerwise.training.recorded_steps import memory_limit
from layerwise.utils.sizes import format_size, parse_size
from layerwise.utils.words import counted

Arguments = ParamSpec("Arguments")
Cut = int | list[str]  # as ``localize`` takes it
Peak = Callable[[Cut], int]  # predicted bytes of training units that end so

GLOBAL: Cut = 1
OF_SPLIT = ("leaves", "output_layer", "output")  # arguments that ``split`` has too


@dataclass(frozen=True)
class Plan:
    """Units whose training is predicted to fit into a budget of memory.

    Attributes:
        budget_bytes: the budget.
        at: where the units end, as ``localize`` takes it.
        units: their number.
        batch_size: images in a batch.
        predicted_peak_bytes: most memory at once, counted whole; see ``predict_peak``.
    """

    budget_bytes: int
    at: Cut
    units: int
    batch_size: int
    predicted_peak_bytes: int

    def __str__(self) -> str:
        where = f", ending with {', '.join(self.at)}" if isinstance(self.at, list) else ""
        units = f"{self.units} units" if self.units > 1 else "1 unit, trained globally"
        return (
            f"{format_size(self.budget_bytes)} of memory: {units}, predicted peak "
            f"{format_size(self.predicted_peak_bytes)} for batches of {self.batch_size}{where}"
        )


def is_budget(at: Any) -> bool:
    """Whether ``at`` names an amount of memory, such as ``memory:800MB``."""
    return isinstance(at, str) and at.startswith(BUDGET)


def with_budgets(localize: Callable[Arguments, Learner]) -> Callable[Arguments, Learner]:
    """``localize``, whose ``at`` may be a budget of memory too, for batches as large as its sample.

    The plan is then the learner's ``plan``.
    """

    @wraps(localize)
    def planning(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Learner:
        bound = inspect.signature(localize).bind(*args, **kwargs)
        given: dict[str, Any] = {**bound.arguments, **bound.arguments.get("loss_options", {})}
        given.pop("loss_options", None)
        with TRACING:  # it sets seeds, which another thread would take for draws of its network
            if is_budget(given.get("at")):
                given["leaves"] = names_in("leaves", given.get("leaves", ()))  # they are read twice
                plan = plan_localize(**given)
                learner = localize(**{**given, "at": plan.at})  # type: ignore[call-arg]
                learner.plan = plan
            else:
                learner = localize(*args, **kwargs)
        warn_of_slow_bfloat16(learner)
        return learner

    return planning


def plan_localize(
    model: nn.Module, sample: Tensor, num_classes: int, at: str, **options: Any
) -> Plan:
    """The plan of ``localize`` for a budget, by the rule ``simultaneous``."""
    maker.check_arguments(model, sample, num_classes, None, None, None, None, 1.0)
    limit, batch_size = parse_size("at=", at.removeprefix(BUDGET)), len(sample)
    options["leaves"] = tuple(options.get("leaves", ()))
    of_split = {name: options[name] for name in OF_SPLIT if name in options}
    of_split.setdefault("output_layer", "joined")

    def peak(cut: Cut) -> int:
        learner = maker.localize(model, sample, num_classes, at=cut, **{**options, "check": False})
        return predicted_peak(learner, "simultaneous", batch_size, {})

    with torch.random.fork_rng(devices=[]):  # heads are made, and draw their weights
        two = sample[:2].to(next((weight.device for weight in model.parameters()), None)).clone()
        return plan_units(limit, model, two, batch_size, num_classes, peak, **of_split)


def plan_run(
    run: Run,
    execution: Execution,
    images: ImageFormat | None = None,
    reference: bool = False,
) -> tuple[Run, Plan | None]:
    """A run whose units end where they are planned to, and the plan; others are as they were.

    A rule that trains the network as one unit has no plan.

    Args:
        images: format of the images; None: that of the run's data set.
        reference: let such a rule exceed the budget: the others are compared with it.

    Raises:
        InvalidInput: the budget is no size, or the rule or no cut satisfies it.
    """
    if not is_budget(run.at):
        return run, None
    limit = parse_size("--at memory", run.at.removeprefix(BUDGET))
    whole = RULES[choose("rule", run.rule, RULES)].at is not None
    if whole and reference:
        return replace(run, at="1"), None
    refuse_unplanned(run)
    planned = replace(run, at="1" if whole else "block")
    prepared = prepare(planned, replace(execution, device="cpu"))
    images = images or prepared.dataset.expected(run.image_size)
    wanted, device = execution.memory_format, predicted_device(execution).type

    def peak(cut: Cut) -> int:
        learner = replace(prepared, cut=cut).make_learner(images)
        set_memory_format(learner, "auto" if wanted == "trial" else wanted)
        options = {**trial_options(run), **memory_limit(run, execution)}
        return predicted_peak(learner, run.rule, run.batch_size, options, device)

    if whole:
        needed = peak(GLOBAL)
        if needed > limit:
            raise InvalidInput(
                f"Cannot train within {format_size(limit)}: the rule {run.rule} trains the network "
                f"as one unit, whose predicted peak is {format_size(needed, up=True)}. Give as "
                "much memory, the rule checkpointed with --memory, or a rule of several units."
            )
        return planned, None
    sample = torch.zeros(2, images.channels, images.image_size, images.image_size)
    plan = plan_units(
        limit,
        build_network(run, images),
        sample,
        run.batch_size,
        images.num_classes,
        peak,
        output_layer=run.output_layer,
    )
    return replace(run, at=in_words(plan.at)), plan


def refuse_unplanned(run: Run) -> None:
    """Raise ``InvalidInput`` where the memory of the run's rule is not predicted whole."""
    if run.rule_options.get("cache"):
        raise InvalidInput(
            f"Cannot use --at {run.at}: the features that --cache keeps are not counted. Give a "
            "number of units."
        )


def in_words(cut: Cut) -> str:
    """A cut as the command line takes it."""
    return ",".join(cut) if isinstance(cut, list) else str(cut)


def predicted_peak(
    learner: Learner,
    rule: str,
    batch_size: int,
    options: dict[str, Any],
    device: str | None = None,
) -> int:
    """Predicted bytes at the peak of a rule's steps, in the learner's memory formats."""
    return peak_of(predict_steps(rule, learner, batch_size, options, device=device))


def plan_units(
    limit: int,
    model: nn.Module,
    sample: Tensor,
    batch_size: int,
    num_classes: int,
    peak: Peak,
    **of_split: Any,
) -> Plan:
    """The fewest units whose predicted peak is within a limit.

    Args:
        sample: two images.
        batch_size: number of images in a batch.
        of_split: arguments of ``split`` beside ``at``.

    Raises:
        InvalidInput: no cut satisfies the limit; the smallest predicted peak is named.
        CannotSplit: the network cannot be cut so.
    """
    lowest_peaks = list[tuple[int, int]]()
    for at in ("block", "layer"):
        cuts = cuts_by_count(model, at, sample, batch_size, num_classes, **of_split)
        try:
            peaks = search(cuts, peak, limit)
        except (CannotSplit, InvalidInput):  # the loss may need whole blocks
            if not lowest_peaks:
                raise
            break
        fitting = [count for count, needed in peaks.items() if needed <= limit]
        if fitting:
            count = min(fitting)
            return Plan(limit, cuts[count - 1], count, batch_size, peaks[count])
        lowest_peaks.append(min((needed, count) for count, needed in peaks.items()))
    needed, count = min(lowest_peaks)
    raise InvalidInput(
        f"Cannot train within {format_size(limit)}: the lowest peak that is predicted is "
        f"{format_size(needed, up=True)}, of {counted(count, 'unit')} and batches of {batch_size}. "
        "Give as much memory, a smaller batch, or a loss with smaller heads, such as pred."
    )


def cuts_by_count(
    model: nn.Module,
    at: str,
    sample: Tensor,
    batch_size: int,
    num_classes: int,
    **of_split: Any,
) -> list[Cut]:
    """Cuts into one unit, two, and so on up to as many as ``at`` gives.

    The most that a unit keeps for its backward pass, heads left out, is as little as it can be.
    """
    paths = cut_paths(model, at, sample, **of_split)
    if not paths:
        return [GLOBAL]
    learner = maker.localize(
        model, sample, num_classes, Nothing, paths, memory_format=None, check=False, **of_split
    )
    (step,) = predict_steps("simultaneous", learner, batch_size, {})
    kept = [step.saved_bytes[index] for index in range(len(learner.units))]
    cuts: list[Cut] = [[paths[last] for last in lasts] for lasts in balances(kept)]
    return [GLOBAL, *cuts[1:]]


class Nothing(nn.Module):
    """A loss without a head, which keeps nothing for its backward pass but the feature."""

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        return Evaluated(features.sum(), targets.labels.sum())


def search(cuts: Sequence[Cut], peak: Peak, limit: int) -> dict[int, int]:
    """Peaks of some numbers of units, the fewest that fit among them if any do.

    More units are tried until some fit, then those in between are halved. Peaks fall as units
    are added until their heads outweigh that, so where none fits the lowest one's neighbours are
    tried too.

    Raises:
        InvalidInput, CannotSplit: no number of units can be trained at all.
    """
    peaks, refusals = dict[int, int](), list[Exception]()

    @cache
    def fits(count: int) -> bool:
        try:
            peaks[count] = peak(cuts[count - 1])
        except (InvalidInput, CannotSplit) as refusal:  # such as a span beyond the chain
            refusals.append(refusal)
            return False
        return peaks[count] <= limit

    failing, count = 0, 1
    while not fits(count) and count < len(cuts):
        failing, count = count, min(max(count + 1, count * 3 // 2), len(cuts))
    if not peaks:
        raise refusals[-1]
    if not fits(count):
        count = lowest(peaks, fits, len(cuts))
        failing = max((tried for tried in peaks if tried < count and not fits(tried)), default=0)
    while fits(count) and count - failing > 1:
        middle = (failing + count) // 2
        failing, count = (failing, middle) if fits(middle) else (middle, count)
    return peaks


def lowest(peaks: dict[int, int], fits: Callable[[int], bool], most: int) -> int:
    """The number of units with the lowest peak, whose neighbours have been tried."""
    while True:
        count = min(peaks, key=lambda count: (peaks[count], count))
        untried = [n for n in (count - 1, count + 1) if 1 <= n <= most and n not in peaks]
        if not untried:
            return count
        for neighbour in untried:
            fits(neighbour)
            peaks.setdefault(neighbour, 2**63)  # refused


localize = with_budgets(maker.localize)
