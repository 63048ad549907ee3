"""Global training within the memory of local training, which is to be compared with it.

Its gradients are accumulated over the fewest parts of a batch, or as little of it is recomputed, as
keeps to the predicted peak of the rule ``simultaneous``.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from layerwise.core.learner import Learner
from layerwise.data import ImageFormat
from layerwise.errors import InvalidInput, TooLittleMemory
from layerwise.profiling.predict import predicted_rule
from layerwise.runs.run import Execution, Run
from layerwise.training.declared_options import with_rule
from layerwise.training.prepare import prepare
from layerwise.utils.options import Options
from layerwise.utils.sizes import Bytes, format_size

# a rule and options of it -> what is predicted of its step
Predict = Callable[[str, dict[str, Any]], dict[str, Any]]
# such a function, images of a batch, bytes -> what is predicted within them; None: nothing is
Opponent = Callable[[Predict, int, int], dict[str, Any] | None]

LOCAL = "simultaneous"  # the rule whose peak they keep to


def accumulated(predict: Predict, batch_size: int, limit: int) -> dict[str, Any] | None:
    """Global training in the fewest parts of a batch, of 2 images or more, that keep to a limit.

    From two parts on, the peak falls with their number. A batch in one part is apart: no gradients
    of earlier parts wait while it passes, so it may need less than two.
    """

    def in_parts(count: int) -> dict[str, Any]:
        return predict("global", {"micro_batches": count}) | {"micro_batches": count}

    def fits(count: int) -> bool:
        return bool(in_parts(count)["predicted_peak_bytes"] <= limit)

    if fits(1):
        return in_parts(1)
    counts = range(2, batch_size // 2 + 1)
    fitting = bisect_left(counts, True, key=fits)
    return in_parts(counts[fitting]) if fitting < len(counts) else None


def planned(predict: Predict, batch_size: int, limit: int) -> dict[str, Any] | None:
    """Global training that recomputes as little as keeps to a limit."""
    try:
        return predict("checkpointed", {"limit": Bytes(limit), "segments": None})
    except TooLittleMemory:
        return None


OPPONENTS: dict[str, Opponent] = {
    "global-accumulated": accumulated,
    "checkpointed-planned": planned,
}


def split_names(
    names: Sequence[str] | None, limit: int | None
) -> tuple[list[str] | None, list[str]]:
    """The names of rules to profile, and those of ``OPPONENTS`` among them.

    Where there are opponents, the rule whose peak they keep to is profiled too.

    Args:
        limit: bytes that the largest batch is looked for in, if it is.

    Raises:
        InvalidInput: it is looked for, and there are opponents.
    """
    if names is None:
        return None, []
    rules = [name for name in names if name not in OPPONENTS]
    opponents = [name for name in names if name in OPPONENTS]
    if opponents and limit is not None:
        raise InvalidInput(
            f"Cannot use --memory with {opponents[0]}: its memory is that of {LOCAL}. Give one of "
            "them."
        )
    if opponents and LOCAL not in rules:
        rules.append(LOCAL)
    return rules, opponents


def add_opponents(
    rules: dict[str, Any],
    names: Sequence[str],
    base: Run,
    images: ImageFormat,
    execution: Execution,
    device: str,
) -> None:
    """Add what is predicted of global training within the peak of local training, by rule.

    A line says where nothing keeps to that peak.

    Args:
        rules: what is predicted of ``LOCAL``, by its name, and of others.
        names: of ``OPPONENTS``.
        device: ``cpu`` or ``cuda``.
    """
    predict = predictor(base, images, execution, device)
    for name in names:
        limit = rules[LOCAL]["predicted_peak_bytes"]
        rule = OPPONENTS[name](predict, base.batch_size, limit)
        if rule is None:
            print(f"{name}: nothing keeps to the {format_size(limit)} of {LOCAL}", flush=True)
        else:
            rules[name] = rule


def predictor(base: Run, images: ImageFormat, execution: Execution, device: str) -> Predict:
    """A function that predicts the run by another rule with more options."""
    planning = replace(execution, device="cpu")

    @cache
    def made(rule: str) -> Learner:
        return prepare(with_rule(base, rule), planning).make_learner(images)

    def predict(rule: str, options: dict[str, Any]) -> dict[str, Any]:
        run = with_rule(base, rule)
        run = replace(run, rule_options=Options({**run.rule_options, **options}))
        return predicted_rule(run, made(rule), execution.memory_format, 0, device)

    return predict
