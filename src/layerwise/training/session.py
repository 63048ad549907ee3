"""A training session: what a run trains with, made before the first batch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from layerwise.core.audit import audit_steps, labels_in_pairs
from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format, summary
from layerwise.core.table import count
from layerwise.data import Splits
from layerwise.errors import Diverged, InvalidInput
from layerwise.hierarchy import parse_downsampling
from layerwise.measures.depths import depths_of, refuse_other_depth
from layerwise.measures.watch import WATCHED_IMAGES, Watch
from layerwise.memory.streams import StepChoice
from layerwise.rules import Tick
from layerwise.runs.folder import RunFolder
from layerwise.runs.losses import loss_in_words
from layerwise.runs.run import Execution, Run, differences
from layerwise.training.checkpoint import Restored, restore
from layerwise.training.machine import describe_device, describe_machine
from layerwise.training.meter import Meter
from layerwise.training.prepare import (
    Prepared,
    apply_execution,
    choices,
    choose_steps,
    feature_keeping,
    hierarchy_of,
    memory_limit,
    record_steps,
    registries,
)
from layerwise.training.progress import Progress
from layerwise.training.saved import compared_run
from layerwise.training.tensorboard import open_log
from layerwise.training.weights import settle_best
from layerwise.utils.options import options_of
from layerwise.utils.plugins import IMPORTED
from layerwise.utils.sizes import format_size

AUDITED_IMAGES = 4  # of the first batch; with fewer, a contrastive loss has no gradient


@dataclass(frozen=True)
class Session:
    """The objects of one training.

    Attributes:
        ticks: of the rule, from where the run goes on.
        watch: measures separability while training, or None.
        log: writes an epoch's record for a viewer.
    """

    data: Splits
    learner: Learner
    meter: Meter
    ticks: Iterator[Tick]
    watch: Watch | None
    log: Callable[[dict[str, Any]], None]


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
        return False
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
    run, execution, device = prepared.run, prepared.execution, prepared.device
    keeping = feature_keeping(prepared, folder.path)
    with ExitStack() as held:
        if going_on:
            folder.refuse_links()
            held.enter_context(folder.locked())
        apply_execution(device, execution)
        data = prepared.load_data(progress.data)
        learner = prepared.make_learner(data, check=True)
        before = folder.facts().get("layouts") if going_on else None
        formats = set_memory_format(learner, execution.memory_format, before)
        meter = Meter(learner, memory=prepared.rule.one_thread)
        watch = build_watch(prepared, learner, data)
        record_steps(learner, execution)
        restored = restore(folder, learner, meter, data.facts()) if going_on else Restored()
        start = restored.position
        options = {**run.rule_options, **keeping, **memory_limit(run, execution)}
        ticks = prepared.rule.order(
            learner, data.train, run.epochs, prepared.schedule, start, **options
        )
        choice = choose_steps(learner, run, execution)
        if not going_on:
            facts = describe_session(prepared, data, learner, formats)
            held.enter_context(folder.created(run, facts))
        parts = describe_device(device, run.amp), summary(formats), describe_steps(learner, choice)
        chosen = ", ".join(filter(None, parts))
        progress.begin(run, folder.path, chosen, len(learner.units), start.epoch)
        log = held.enter_context(open_log(execution.log, folder, start.epoch))
        folder.truncate_log(start.epoch, restored.marks)
        settle_best(folder, meter)
        yield Session(data, learner, meter, ticks, watch, log)


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
        "imported": dict(IMPORTED),
        "layouts": formats,
        "execution": asdict(prepared.execution),
        **({"preset": prepared.preset} if prepared.preset else {}),
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
    declared = options_of(registries()[kind][name])
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
    hierarchy = hierarchy_of(run)
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
