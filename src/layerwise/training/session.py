"""A training session: what a run trains with, made before the first batch."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from layerwise.core.doubts import warn_of_slow_bfloat16
from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format
from layerwise.data import Splits
from layerwise.distributed import agree, decided_by_first, together, world
from layerwise.distributed.grid import place_in_grid
from layerwise.distributed.state import share as share_state
from layerwise.errors import InvalidInput
from layerwise.measures.watch import Watch
from layerwise.rules import Tick
from layerwise.rules.frozen_features import ordered
from layerwise.runs.command import differences
from layerwise.runs.folder import STATE, RunFolder
from layerwise.training.checkpoint import Restored, refuse_without_state, restore
from layerwise.training.description import choices_in_words, describe_session
from layerwise.training.device import apply_execution
from layerwise.training.feature_keeping import feature_keeping, keeping_in_memory
from layerwise.training.meter import Meter
from layerwise.training.origins import refuse_changed_code, refuse_changed_weights
from layerwise.training.prepare import Prepared
from layerwise.training.progress import Progress
from layerwise.training.ranks import (
    check_placement,
    comparable,
    load_in_turn,
    place,
    share_data,
    versions,
)
from layerwise.training.recorded_steps import choose_steps, memory_limit, record_steps
from layerwise.training.tensorboard import open_log
from layerwise.training.watch import build_watch, check_comparison
from layerwise.training.weights import settle_best


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
    if folder.archived:
        refuse_without_state(folder)
    return True


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
        # a run that was stopped before its first saved state begins anew
        anew = decided_by_first(lambda: not (going_on and folder.has(STATE)))
        before = decided_by_first(lambda: layouts_of(folder, held) if going_on else None)
        apply_execution(prepared.device, execution)
        data = load_in_turn(prepared, progress)
        with together():
            data = share_data(prepared, data)
            learner = prepared.make_learner(data, True, weights=anew, say=progress.data)
            check_placement(prepared, learner)
        warn_of_slow_bfloat16(learner)
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
        if going_on and not alone:
            share_state(learner)  # frozen units compute features before units take their places
        start = restored.position
        meter.share(alike=execution.replicas == here.size)
        options = {**run.rule_options, **keeping, **memory_limit(run, execution)}
        with together():
            order, given = prepared.rule.order, (run.epochs, prepared.schedule, start)
            if place_in_grid(execution.replicas).position == 0:
                keeping_features = keeping_in_memory(prepared)
                ticks = ordered(order, learner, data.train, keeping_features, *given, **options)
            else:  # no images enter here
                ticks = order(learner, data.train, *given, **options)
        choice = choose_steps(learner, run, execution) if alone else None
        if not going_on:
            decided_by_first(lambda: create_folder(prepared, folder, held, data, learner, formats))
        placement = place(prepared, learner)
        chosen = choices_in_words(prepared, learner, formats, choice)
        progress.begin(run, folder.path, chosen, len(learner.units), start.epoch)
        progress.ranks(placement)
        log: Callable[[dict[str, Any]], None] = lambda record: None  # noqa: E731
        if here.first:
            log = held.enter_context(open_log(execution.log, folder, start.epoch))
            folder.truncate_log(start.epoch, restored.marks)
            settle_best(folder, meter)
        yield Session(data, learner, meter, ticks, watch, log, placement)


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


def set_formats(prepared: Prepared, learner: Learner, before: Any) -> list[str]:
    """Set the memory formats of units, on all ranks as the first one chooses them."""
    choice = prepared.execution.memory_format
    formats = decided_by_first(lambda: set_memory_format(learner, choice, before))
    return formats if world().first else set_memory_format(learner, choice, formats)
