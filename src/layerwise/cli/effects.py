"""Options that change nothing beside others, in one table.

An option of what is trained that is given on the command line and would change nothing is refused:
its user expects another result. One of where and how it is trained, or one in a configuration file,
which may serve several commands, is said on stderr.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

from layerwise.errors import InvalidInput
from layerwise.runs.run import GLOBAL_RULES, Execution, Run
from layerwise.utils.launch import is_first, launched_size
from layerwise.utils.options import as_flag, options_of


@dataclass(frozen=True)
class Condition:
    """What options need in order to have an effect.

    Attributes:
        options: by the names of their fields; ``loss_options`` stands for all that losses declare.
        holds: whether a run and its execution fulfil it.
        reason: why they have no effect where it does not hold, in words; ``{}`` are fields of both.
    """

    options: tuple[str, ...]
    holds: Callable[[Run, Execution], bool]
    reason: str


def reads_files(run: Run, _: Execution) -> bool:
    from layerwise.data import DATASETS

    return run.data not in DATASETS or not DATASETS[run.data].bundled


def can_be_downloaded(run: Run, _: Execution) -> bool:
    from layerwise.data import DATASETS

    return run.data not in DATASETS or bool(DATASETS[run.data].files)


def may_have_image_files(run: Run, execution: Execution) -> bool:
    return reads_files(run, execution) and not can_be_downloaded(run, execution)


def is_cut(run: Run, _: Execution) -> bool:
    """Whether the run reads where units end, or how much memory one may take."""
    from layerwise.core.cuts import BUDGET

    return run.rule not in GLOBAL_RULES or run.at.startswith(BUDGET)


def takes_limit(run: Run) -> bool:
    from layerwise.rules import RULES

    return run.rule in RULES and RULES[run.rule].takes_limit


def is_on_gpu(_: Run, execution: Execution) -> bool:
    import torch

    return execution.device != "cpu" and torch.cuda.is_available()


def on_several_ranks(*_: object) -> bool:
    return launched_size() > 1


def has_milestones(run: Run) -> bool:
    from layerwise.training.schedule import COSINE

    return run.decay_milestones.strip(", ").partition(":")[0] not in ("", COSINE)


def groups_grow(run: Run) -> bool:
    first, last = (run.rule_options.get(name, 1) for name in ("groups_first", "groups_last"))
    return "groups_last" not in run.rule_options or bool(first != last)


CONDITIONS = (
    Condition(
        ("num_classes",),
        lambda run, _: run.weights is not None or ":" in run.model,
        "the network {model} is made for the data set's classes",
    ),
    Condition(
        ("crop_padding", "flip", "cutout", "views"),
        lambda run, _: run.augment,
        "--no-augment leaves images as they are",
    ),
    Condition(
        ("momentum",),
        lambda run, _: run.optimizer not in ("adam", "adamw"),
        "it belongs to sgd, and the optimizer is {optimizer}",
    ),
    Condition(
        ("decay_rate",),
        lambda run, _: has_milestones(run),
        "--decay-milestones names no milestone",
    ),
    Condition(
        ("loss", "loss_options", "loss_from", "head_lr_factor", "last_lr_factor"),
        lambda run, _: not run.is_global,
        "the network is trained as one unit, whose loss is the cross-entropy of its output (rule "
        "{rule}, at {at})",
    ),
    Condition(
        ("at",),
        is_cut,
        "the rule {rule} trains the network as one unit",
    ),
    Condition(
        ("train_from", "teacher"),
        lambda run, _: not run.is_global,
        "the network is trained as one unit (rule {rule}, at {at})",
    ),
    Condition(  # it also says where separability is measured
        ("output_layer",),
        lambda run, execution: not run.is_global or execution.separability_every > 0,
        "the network is trained as one unit (rule {rule}, at {at})",
    ),
    Condition(
        ("global_share", "growth"),
        lambda run, _: run.rule != "growing" or groups_grow(run),
        "--groups-first and --groups-last are the same number",
    ),
    Condition(("data_dir",), reads_files, "the data set {data} is installed with this program"),
    Condition(("download",), can_be_downloaded, "the data set {data} has no published files"),
    Condition(
        ("workers",), may_have_image_files, "the images of the data set {data} fit into memory"
    ),
    Condition(("keep_memory",), lambda *both: not is_on_gpu(*both), "it is for training on a CPU"),
    Condition(("graphs", "streams"), is_on_gpu, "it is for training on a GPU"),
    Condition(
        ("memory",),
        lambda run, execution: takes_limit(run) or is_on_gpu(run, execution),
        "it is for training on a GPU, and for rules such as checkpointed that take a limit",
    ),
    Condition(("streams",), lambda _, execution: execution.graphs, "it needs --graphs"),
    Condition(
        ("separability_measures", "separability_against"),
        lambda _, execution: execution.separability_every > 0,
        "it needs --separability-every",
    ),
    Condition(
        ("ranks", "run_ahead", "rank_timeout"),
        on_several_ranks,
        "torchrun has not started several ranks",
    ),
    Condition(
        ("sync_batch_norm", "gather_examples"),
        lambda _, execution: execution.replicas > 1,
        "it needs --replicas",
    ),
)
# those that say what is trained; the output layer of one unit says only where it is measured later
REFUSED = {item.name for item in fields(Run)} | {"loss_options", "global_share", "growth"}
REFUSED -= {"output_layer"}


def check_effects(
    written: Iterable[str], in_file: Iterable[str], runs: Sequence[Run], execution: Execution
) -> None:
    """Refuse, or say, which of the given options change nothing in any of some runs.

    Args:
        written: names of options on the command line; in_file: names in a configuration file.

    Raises:
        InvalidInput: naming the first that is refused.
    """
    for name in dict.fromkeys([*written, *in_file]):
        reason = without_effect(name, runs, execution)
        if reason is None:
            continue
        flag = as_flag(name)
        if name in written and condition_name(name) in REFUSED:
            raise InvalidInput(
                f"Cannot use {flag}: it would change nothing, because {reason}. Leave it out."
            )
        if is_first():
            print(f"layerwise: {flag} changes nothing here: {reason}.", file=sys.stderr, flush=True)


def without_effect(name: str, runs: Sequence[Run], execution: Execution) -> str | None:
    """Why an option changes nothing in any of some runs, in words; None: it does change one."""
    for condition in CONDITIONS:
        if condition_name(name) in condition.options and not any(
            condition.holds(run, execution) for run in runs
        ):
            run = runs[0]
            values = {item.name: getattr(run, item.name) for item in fields(run)}
            return condition.reason.format(**values)
    return None


def condition_name(name: str) -> str:
    """The name by which conditions know an option: those of losses by one."""
    from layerwise.training.declared_options import registries

    if name in {item.name for kind in (Run, Execution) for item in fields(kind)}:
        return name
    declared = {
        kind: {option for factory in registry.values() for option in options_of(factory)}
        for kind, registry in registries().items()
    }
    kinds = [kind for kind, names in declared.items() if name in names]
    return "loss_options" if kinds == ["loss"] else name
