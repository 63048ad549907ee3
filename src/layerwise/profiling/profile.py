"""Cost of a training step by several rules: work, memory and time, predicted and measured."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.core.memory_format import MEMORY_FORMATS
from layerwise.data import ImageFormat
from layerwise.errors import InvalidInput, brief, choose
from layerwise.profiling.measure import measure
from layerwise.profiling.opponents import OPPONENTS, add_opponents, split_names
from layerwise.profiling.predict import (
    DEVICES,
    formats_of,
    largest_batch,
    peak_of,
    predict_steps,
    predicted_device,
    predicted_rule,
    rule_options,
)
from layerwise.profiling.table import print_table
from layerwise.profiling.trial_steps import UNSAID, trial_images, trial_options
from layerwise.rules import RULES
from layerwise.runs.run import Execution, Run
from layerwise.training.declared_options import check_rule_options, with_rule
from layerwise.training.device import find_device
from layerwise.training.prepare import prepare
from layerwise.utils.device import counting_for, device_of
from layerwise.utils.options import Options
from layerwise.utils.sizes import format_size, parse_size
from layerwise.utils.terminal import in_one_line

# rules with options that change what a step costs
VARIANTS: dict[str, dict[str, Any]] = {
    "simultaneous-span-2": {"rule": "simultaneous", "span": 2},
    "sequential-cached": {"rule": "sequential", "cache": True},
}


def profiled() -> dict[str, dict[str, Any]]:
    """The rules that are profiled: options of a run, by name.

    Those that train the network as one unit come first.

    Rules for several ranks are left out: in one process they make the steps of another.
    """
    names = [name for name, rule in RULES.items() if not rule.on_ranks]
    names.sort(key=lambda name: RULES[name].at is None)
    return {name: {"rule": name} for name in names} | VARIANTS


def predict_peak(
    model: nn.Module,
    batch_shape: Sequence[int],
    num_classes: int,
    rule: str = "simultaneous",
    memory_format: str = "auto",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> int:
    """Predict the peak of memory of training, without making a step or changing the model.

    Args:
        model: see ``localize``.
        batch_shape: (B, ...) of the images.
        rule: a name in ``RULES``.
        memory_format: of maps: ``auto``, the default of ``localize`` too, ``channels-last``, or
            ``contiguous``; a CPU's convolutions copy contiguous maps. Weights are counted in the
            format that they have.
        device: ``cpu`` or ``cuda``, which need not be there (``memory.cuda`` says what cannot be
            known of a GPU); None: the model's own.
        dtype: of the images, such as ``torch.int64`` of tokens; None: that of the model's weights.
        options: of ``localize`` (``loss``, ``at``, ``optimizer``, ``amp`` …) and of the rule
            (``cache``, ``segments``).

    Returns:
        Bytes of weights, buffers, heads, gradients, optimizer state, activations, temporaries and
        the batch; not of a cache. Of what operations use inside themselves, only copies that
        convolutions make are counted; of libraries, no workspace that stays between steps.

    Raises:
        InvalidInput, CannotSplit: see ``localize``.
    """
    choose("rule", rule, RULES)
    choose("memory format", memory_format, MEMORY_FORMATS)
    if not isinstance(batch_shape, Sequence) or not all(
        isinstance(side, int) and side is not True and side > 0 for side in batch_shape
    ):
        raise InvalidInput(
            f"Cannot use batch_shape={in_one_line(brief(repr(batch_shape)))}: it is no shape of a "
            "batch. Give numbers above 0, such as (128, 3, 32, 32)."
        )
    if device is not None:
        choose("device", device, DEVICES)
    if not isinstance(dtype, torch.dtype | None):
        raise InvalidInput(
            f"Cannot use dtype={brief(repr(dtype))}: it is no type of torch. Give one, such as "
            "torch.int64."
        )
    for name in ("sample", "check"):
        if name in options:
            raise InvalidInput(
                f"Cannot use {name}= here: the prediction sets it itself. Leave it out."
            )
    if RULES[rule].at is not None and options.get("at", RULES[rule].at) != RULES[rule].at:
        raise InvalidInput(
            f"Cannot use at= with the rule {rule!r}: it trains the network as one unit. Leave at= "
            "out."
        )
    own = rule_options(rule, options)
    if own.get("cache"):
        own.setdefault("keeping", UNSAID)
    for_learner = {"at": RULES[rule].at or "layer"} | {
        name: value for name, value in options.items() if name not in own
    }
    with torch.random.fork_rng(devices=[]):  # heads are made, and draw their weights
        weights = (weight.dtype for weight in model.parameters() if weight.is_floating_point())
        sample = torch.zeros(2, *batch_shape[1:], dtype=dtype or next(weights, None))
        learner = localize(
            model, sample, num_classes, memory_format=None, check=False, **for_learner
        )
    with counting_for(device or device_of(model).type):
        formats = formats_of(learner, memory_format)
    for unit, of_maps in zip(learner.units, formats or (), strict=True):
        unit.memory_format = of_maps  # weights stay as the model has them, as in ``localize``
    return peak_of(predict_steps(rule, learner, batch_shape[0], own, device=device))


def profile(
    base: Run,
    execution: Execution,
    names: Sequence[str] | None = None,
    images: ImageFormat | None = None,
    predict: bool = False,
    memory: str | None = None,
    figure: str | None = None,
    per_unit: bool = False,
) -> dict[str, Any]:
    """Predict and measure what a run would need by each of several rules, and show it as a table.

    Args:
        names: of ``profiled()``, and of ``OPPONENTS``, which are predicted alone; None: all of
            ``profiled()`` whose span the chain has.
        images: format of the images, at random, of a step; None: see ``trial_images``.
        predict: compute nothing; what is measured is then None, and a GPU need not be there.
        memory: such as ``4GB``: the largest batch that fits is looked for.
        figure: file for a picture of memory over a step.

    Raises:
        InvalidInput: an option is out of range, or not even a batch of 2 fits in ``memory`` by any
            of the rules.
    """
    limit = parse_size("--memory", memory) if memory is not None else None
    cache_limit = parse_size("--cache-limit", execution.cache_limit)
    if names is not None and not names:
        raise InvalidInput("Cannot profile no rule: names is empty. Give one, or None for all.")
    for name in names or ():
        choose("rule", name, {**profiled(), **OPPONENTS})
    names, opponents = split_names(names, limit)
    images = images or trial_images(base)
    if figure is not None:
        from layerwise.profiling.plot import check_figure

        if predict:
            raise InvalidInput(
                "Cannot use --figure with --predict: it shows times, which are not measured then. "
                "Leave one of them out."
            )
        check_figure(figure, "profile")
    runs = {name: run_for(base, name) for name in names or profiled()}
    check_rule_options(base, list(dict.fromkeys(run.rule for run in runs.values())))
    planned = {name: prepare(run, replace(execution, device="cpu")) for name, run in runs.items()}
    device = predicted_device(execution) if predict else find_device(execution)
    if figure is not None and device.type != "cpu":
        raise InvalidInput(
            "Cannot draw --figure on a GPU: it shows what a CPU's allocator did over time. Leave "
            "it out, or give --device cpu."
        )
    learners = {name: prepared.make_learner(images) for name, prepared in planned.items()}
    if names is None:
        chosen = profiled()
        runs = {name: run for name, run in runs.items() if has_span(learners[name], chosen[name])}
    rules: dict[str, Any] = {}
    for name, run in runs.items():
        options = execution.memory_format, cache_limit, device.type
        try:
            rules[name] = predicted_rule(run, learners[name], *options)
        except InvalidInput as refusal:
            if names is not None or name not in VARIANTS:  # which nobody asked for
                raise
            print(f"left out: {name}: {refusal}", flush=True)
    runs = {name: run for name, run in runs.items() if name in rules}
    add_opponents(rules, opponents, base, images, execution, device.type)
    if limit is not None:
        layout = execution.memory_format
        add_largest_batches(rules, runs, learners, layout, limit, cache_limit, device.type)
    measurements = (
        {} if predict else {name: measure(run, images, execution) for name, run in runs.items()}
    )
    for name, measurement in measurements.items():
        add_measured(rules[name], measurement, base.batch_size)
    result = {
        "model": base.model,
        "batch_size": base.batch_size,
        "image_size": images.image_size,
        "device": device.type,
        "rules": rules,
    }
    print_table(result, per_unit)
    if figure is not None:
        from layerwise.profiling.plot import draw

        title = f"{base.model}, batch of {base.batch_size}, {images.image_size} pixels"
        draw(
            figure,
            title,
            {name: measurement["steps"] for name, measurement in measurements.items()},
        )
        print(f"written: {figure}", flush=True)
    return result


def has_span(learner: Learner, variant: Mapping[str, Any]) -> bool:
    """Whether the chain has as many units as a variant's span."""
    span: int = variant.get("span", 1)
    return span <= len(learner.units)


def run_for(base: Run, name: str) -> Run:
    """The run by a profiled rule, with those options of the base that the rule declares."""
    options = dict(profiled()[name])
    run = with_rule(base, options.pop("rule"))
    return replace(run, rule_options=Options({**run.rule_options, **options}))


def add_measured(rule: dict[str, Any], measurement: dict[str, Any], batch_size: int) -> None:
    for step in measurement["steps"]:
        for unit in rule["units"]:
            if unit["index"] in step["units"]:
                unit["peak_bytes"] = step["unit_peaks"].get(str(unit["index"]))
                unit["seconds"] = step["unit_seconds"].get(str(unit["index"]))
    rule["seconds"] = sum(step["seconds"] for step in measurement["steps"])
    rule["images_per_second"] = batch_size / rule["seconds"]
    rule["peak_bytes"] = max(step["peak_bytes"] for step in measurement["steps"])
    rule["process_peak_bytes"] = measurement["process_peak_bytes"]
    if all(unit["peak_bytes"] is not None for unit in rule["units"]):
        rule["peak_unit"] = max(rule["units"], key=lambda unit: unit["peak_bytes"])["name"]


def add_largest_batches(
    rules: dict[str, Any],
    runs: Mapping[str, Run],
    learners: Mapping[str, Learner],
    layout: str,
    limit: int,
    cache_limit: int,
    device: str,
) -> None:
    needs = {}
    for name, run in runs.items():

        def peak(batch_size: int, name: str = name, run: Run = run) -> int:
            options = trial_options(run)
            steps = predict_steps(run.rule, learners[name], batch_size, options, layout, device)
            needed: int = peak_of(steps) + rules[name]["cache_bytes"]
            return needed

        rules[name]["largest_batch"] = largest_batch(peak, limit)
        if rules[name]["largest_batch"] is None:
            smallest = replace(run, batch_size=2)
            least = predicted_rule(smallest, learners[name], layout, cache_limit, device)
            needs[name] = (
                least["predicted_peak_bytes"] + least["cache_bytes"],
                need_text(name, least),
            )
    if len(needs) == len(runs):
        raise InvalidInput(
            f"Cannot use --memory {format_size(limit)}: even {min(needs.values())[1]}. Give as "
            "much, or lower --width or --image-size."
        )
    for _, need in needs.values():
        print(f"--memory {format_size(limit)} is too small: {need}", flush=True)


def need_text(name: str, least: dict[str, Any]) -> str:
    """A sentence on the memory that a rule needs with a batch of 2."""
    cache = least["cache_bytes"]
    of_which = f", of which {format_size(cache)} are a cache (see --cache-limit)" if cache else ""
    need = format_size(least["predicted_peak_bytes"] + cache, up=True)
    unit = least["peak_unit"]
    return f"the rule {name!r} needs {need} for a batch of 2, in unit {unit}{of_which}"
