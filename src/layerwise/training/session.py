"""A training session: what a run trains with, made before the first batch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from layerwise.core.audit import audit_steps, labels_in_pairs
from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format, summary
from layerwise.core.table import count
from layerwise.data import Splits
from layerwise.distributed import (
    agree,
    check_placeable,
    decided_by_first,
    distribute,
    rank_bytes,
    replicate,
    together,
    unit_needs,
    world,
)
from layerwise.errors import Diverged, InvalidInput
from layerwise.hierarchy import parse_downsampling
from layerwise.measures.depths import depths_of, refuse_other_depth
from layerwise.measures.watch import WATCHED_IMAGES, Watch
from layerwise.memory.streams import StepChoice
from layerwise.rules import Tick
from layerwise.rules.frozen_features import ordered
from layerwise.runs.folder import RunFolder
from layerwise.runs.losses import loss_in_words
from layerwise.runs.run import Execution, Run, described, differences
from layerwise.training.checkpoint import Restored, restore
from layerwise.training.machine import describe_device, describe_machine
from layerwise.training.meter import Meter
from layerwise.training.origins import origins, refuse_changed_code, refuse_changed_weights
from layerwise.training.prepare import (
    Prepared,
    apply_execution,
    choices,
    choose_steps,
    feature_keeping,
    hierarchy_of,
    keeping_in_memory,
    memory_limit,
    record_steps,
    registries_of,
)
from layerwise.training.progress import Progress
from layerwise.training.replicas import check_replicas, share_data
from layerwise.training.saved import compared_run
from layerwise.training.tensorboard import open_log
from layerwise.training.weights import settle_best
from layerwise.utils.options import options_of
from layerwise.utils.sizes import format_size
from layerwise.utils.version import version

# options of the execution that say when ranks wait for each other, so all must have them alike
ALIKE = (
    *("memory_format", "eval_every", "save_every", "separability_every"),
    *("ranks", "run_ahead", "rank_timeout"),
    *("replicas", "sync_batch_norm", "gather_examples"),
)
MOST_TRIED = 128  # images of the steps by which ranks are balanced
AUDITED_IMAGES = 4  # of the first batch; with fewer, a contrastive loss has no gradient


@dataclass(frozen=True)
class Session:
    """The objects of one training.

    Attributes:
        ticks: of the rule, from where the run goes on.
        watch: measures separability while training, or None.
        log: writes an epoch's record for a viewer.
        placement: of several ranks, each one's units and predicted memory.
    """

    data: Splits
    learner: Learner
    meter: Meter
    ticks: Iterator[Tick]
    watch: Watch | None
    log: Callable[[dict[str, Any]], None]
    placement: list[dict[str, Any]]


def check_ranks(prepared: Prepared) -> None:
    """Refuse ranks that the run does not use, and replicas that it cannot have.

    Raises:
        InvalidInput: as said.
    """
    check_replicas(prepared)
    size, rule = world().size, prepared.rule
    if size > 1 and not rule.on_ranks and prepared.execution.replicas == 1:
        shared = f"--replicas {size}, which share every batch, or " if rule.replicated else ""
        raise InvalidInput(
            f"Cannot train by the rule {prepared.run.rule!r} on {size} ranks: its units are all in "
            f"one process. Give {shared}--rule parallel, whose units live on different ranks, or "
            "start one process."
        )


def check_folder(prepared: Prepared, folder: RunFolder, resume: bool) -> bool:
    """Whether the folder's run goes on.

    Raises:
        InvalidInput: it holds another run, or one that was not asked to go on; or the run to
            compare with cannot be read.
    """
    going_on = resume and folder.begun
    check_comparison(prepared.execution, going_on)
    if not going_on:
        folder.refuse_existing()
        prepared.check_network()
        return False
    refuse_changed_code(folder)
    refuse_changed_weights(folder)
    changes = differences(prepared.run, folder.run())
    if changes:
        raise InvalidInput(
            f"Cannot go on with {folder.path}: it holds another run ({'; '.join(changes[:3])}). "
            f"Resume it with its own options (or --resume {folder.path} alone), or choose another "
            "--output."
        )
    return True


def check_comparison(execution: Execution, going_on: bool) -> None:
    """Refuse a run to compare features with that is not one, or that nothing is measured for.

    Raises:
        InvalidInput: as said.
    """
    against = execution.separability_against
    if not against:
        return
    if execution.separability_every:
        with naming_comparison(against):
            RunFolder(against).run()
    elif not going_on:  # a run that goes on may be watched no longer
        raise InvalidInput(
            "Cannot use --separability-against without --separability-every: nothing would be "
            "measured. Give both, or leave it out."
        )


@contextmanager
def naming_comparison(against: str) -> Iterator[None]:
    """Name the option in refusals of the run to compare features with."""
    try:
        yield
    except InvalidInput as refusal:
        reason = str(refusal)
        raise InvalidInput(
            f"Cannot use --separability-against {against}: {reason[0].lower()}{reason[1:]}"
        ) from None


@contextmanager
def begin(
    prepared: Prepared, folder: RunFolder, going_on: bool, progress: Progress
) -> Iterator[Session]:
    """Make what a run trains with, restore its state, and hold its folder until training ends.

    Raises:
        InvalidInput: the data cannot be read, or the state does not fit; nothing was written.
    """
    run, execution, here = prepared.run, prepared.execution, world()
    keeping = feature_keeping(prepared, folder.path)
    agree(configuration=comparable(prepared), version=versions())
    with ExitStack() as held:
        before = decided_by_first(lambda: layouts_of(folder, held) if going_on else None)
        apply_execution(prepared.device, execution)
        data = load_in_turn(prepared, progress)
        with together():
            data = share_data(prepared, data)
            learner = prepared.make_learner(data, True, weights=not going_on, say=progress.data)
            check_placement(prepared, learner)
        agree(data=data.facts())
        formats = set_formats(prepared, learner, before)
        meter = Meter(learner)
        with together():
            watch = build_watch(prepared, learner, data)
        alone = here.size == 1
        if alone:
            record_steps(learner, execution)
        restored = decided_by_first(
            lambda: restore(folder, learner, meter, data.facts()) if going_on else Restored()
        )
        start = restored.position
        meter.share(alike=execution.replicas == here.size)
        options = {**run.rule_options, **keeping, **memory_limit(run, execution)}
        with together():
            ticks = ordered(
                prepared.rule.order,
                learner,
                data.train,
                keeping_in_memory(prepared),
                *(run.epochs, prepared.schedule, start),
                **options,
            )
        choice = choose_steps(learner, run, execution) if alone else None
        if not going_on:
            decided_by_first(lambda: create_folder(prepared, folder, held, data, learner, formats))
        placement = place(prepared, learner)
        parts = (
            describe_device(prepared.device, run.amp),
            summary(formats),
            describe_steps(learner, choice),
            f"{execution.replicas} replicas" if execution.replicas > 1 else "",
        )
        chosen = ", ".join(filter(None, parts))
        progress.begin(run, folder.path, chosen, len(learner.units), start.epoch)
        progress.ranks(placement)
        log: Callable[[dict[str, Any]], None] = lambda record: None  # noqa: E731
        if here.first:
            log = held.enter_context(open_log(execution.log, folder, start.epoch))
            folder.truncate_log(start.epoch, restored.marks)
            settle_best(folder, meter)
        yield Session(data, learner, meter, ticks, watch, log, placement)


def load_in_turn(prepared: Prepared, progress: Progress) -> Splits:
    """The run's images; those to download are read by one rank of a machine before the others."""
    data: Splits | None = None
    turns = (True, False) if prepared.execution.download else (None,)
    for first in turns:
        with together():
            if first in (None, world().local_rank == 0):
                data = prepared.load_data(progress.data)
    assert data is not None
    return data


def check_placement(prepared: Prepared, learner: Learner) -> None:
    """Refuse units that cannot live on the ranks that there are.

    Raises:
        InvalidInput: saying why.
    """
    execution = prepared.execution
    if 1 < world().size != execution.replicas:
        check_placeable(learner, execution.ranks, execution.run_ahead, execution.replicas)


def place(prepared: Prepared, learner: Learner) -> list[dict[str, Any]]:
    """Let the units live on the ranks that there are; each one's units and predicted bytes.

    Where every rank is a replica, with all units, there is no such list.
    """
    run, execution = prepared.run, prepared.execution
    choices_of_replicas = {
        "sync_batch_norm": execution.sync_batch_norm,
        "gather_examples": execution.gather_examples,
    }
    if execution.replicas == world().size:
        replicate(learner, **choices_of_replicas)
        return []
    size = run.batch_size // execution.replicas
    parts = run.rule_options.get("micro_batches", 1)
    needs = decided_by_first(lambda: unit_needs(learner, max(2, size // parts)))
    rounded = run.rule_options.get("bfloat16_features", False)
    placement = distribute(
        learner,
        execution.ranks,
        run_ahead=execution.run_ahead,
        bfloat16_features=rounded,
        batch_size=min(size, MOST_TRIED),
        replicas=execution.replicas,
        **choices_of_replicas,
    )
    predicted = rank_bytes(needs, placement, execution.run_ahead)
    return [
        {"units": [units.start, units.stop - 1], "predicted_memory_bytes": peak}
        for units, peak in zip(placement, predicted, strict=True)
    ] * execution.replicas


def layouts_of(folder: RunFolder, held: ExitStack) -> Any:
    """The memory formats of a run that goes on, whose folder is locked until training ends."""
    folder.refuse_links()
    held.enter_context(folder.locked())
    return folder.facts().get("layouts")


def create_folder(
    prepared: Prepared,
    folder: RunFolder,
    held: ExitStack,
    data: Splits,
    learner: Learner,
    formats: list[str],
) -> None:
    """Make the folder of a run that begins, and hold it until training ends."""
    facts = describe_session(prepared, data, learner, formats)
    held.enter_context(folder.created(prepared.run, facts))


def comparable(prepared: Prepared) -> dict[str, Any]:
    """The options that all ranks must have alike: the run's, and when they wait for each other."""
    execution = asdict(prepared.execution)
    return {**described(prepared.run), **{name: execution[name] for name in ALIKE}}


def versions() -> dict[str, str]:
    """The versions that all ranks must have alike."""
    return {"layerwise": version(), "torch": torch.__version__}


def set_formats(prepared: Prepared, learner: Learner, before: Any) -> list[str]:
    """Set the memory formats of units, on all ranks as the first one chooses them."""
    choice = prepared.execution.memory_format
    formats = decided_by_first(lambda: set_memory_format(learner, choice, before))
    return formats if world().first else set_memory_format(learner, choice, formats)


def describe_session(
    prepared: Prepared, data: Splits, learner: Learner, formats: list[str]
) -> dict[str, Any]:
    """The record of a run beside the run itself: data, units, options in full, the machine."""
    return {
        "data": data.facts(),
        "units": [unit.name for unit in learner.units],
        "audit": audit_session(data, learner),
        "local": len(learner.units) > 1,
        "options": options_in_full(prepared.run),
        **origins(prepared.run),
        "layouts": formats,
        "execution": asdict(prepared.execution),
        **({"preset": prepared.preset} if prepared.preset else {}),
        **({"plan": prepared.plan} if prepared.plan else {}),
        **describe_machine(prepared.device),
    }


def audit_session(data: Splits, learner: Learner) -> dict[str, Any] | None:
    """What the units' losses really reach, on a few images; None where a loss is not finite."""
    images = data.train.images(data.train.order(0)[0][:AUDITED_IMAGES], 0)
    labels = labels_in_pairs(len(images), learner.num_classes).to(images.device)
    try:
        found = audit_steps(learner, images, labels)
    except Diverged:  # of so few images; the first step says so if it is of a batch too
        return None
    return found.summary()


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
    declared = options_of(registries_of(run)[kind][name])
    return {option: given.get(option, declared[option].default) for option in declared}


def describe_steps(learner: Learner, choice: StepChoice | None) -> str:
    """Words for how steps are made; empty unless they are recorded, or their memory predicted.

    Args:
        choice: how they were chosen to be made, if their memory was predicted.
    """
    need = f", predicted {format_size(choice.predicted_bytes)}" if choice else ""
    if learner.captured is None:
        return f"steps made singly{need}" if choice else ""
    count = max(1, len(learner.captured.streams))
    return f"recorded steps on {count} stream{'s' if count > 1 else ''}{need}"


def describe(prepared: Prepared, folder: RunFolder, learner: Learner) -> dict[str, Any]:
    """The run's name and main choices, as results show them."""
    run, local = prepared.run, len(learner.units) > 1
    hierarchy, plan = hierarchy_of(run), folder.facts().get("plan")
    return {
        "run": str(folder.path),
        "model": run.model,
        "hierarchy": list(hierarchy) if hierarchy else None,
        "downsample_after": list(parse_downsampling(run.downsample_after))
        if run.downsample_after
        else None,
        "data": run.data,
        "rule": run.rule,
        "loss": loss_in_words(run) if local else "cross-entropy",
        "local": local,
        "span": learner.span,
        "head_parameters": sum(count(unit.loss) for unit in learner.units),
        "seed": run.seed,
        **({"plan": plan} if plan else {}),
    }


def build_watch(prepared: Prepared, learner: Learner, data: Splits) -> Watch | None:
    """The measurement of separability while training; None if it is not asked for.

    Raises:
        InvalidInput, CannotSplit: it cannot be measured, or the run to compare with cannot.
    """
    execution = prepared.execution
    if not execution.separability_every:
        return None
    loader = data.validation or data.test
    depths = depths_of(learner, prepared.own_cut, prepared.run.output_layer)
    split = "validation" if data.validation else "test"
    watch = Watch(depths, loader, split, data.num_classes, prepared.measures)
    if execution.separability_against:
        against = execution.separability_against
        with naming_comparison(against):
            depths, sample, epoch = compared_run(against, data.facts(), loader, WATCHED_IMAGES)
            refuse_other_depth(watch.depths, (depths, sample))
        watch.other = depths, sample
        watch.against = {"against": against, "against_epoch": epoch}
    return watch
