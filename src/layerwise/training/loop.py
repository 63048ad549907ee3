"""The training loop, from a run's first batch to its result, in the order a batch meets it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NoReturn

from layerwise.core.learner import Learner
from layerwise.data import Splits
from layerwise.distributed import decided_by_first, gathered, print_once, together, whole, world
from layerwise.errors import InvalidInput
from layerwise.rules import Tick
from layerwise.runs.digests import sealed
from layerwise.runs.folder import NEXT_BEST, RESULT, SEPARABILITY, RunFolder
from layerwise.training.checkpoint import save
from layerwise.training.description import describe
from layerwise.training.evaluate import network_accuracy, unit_scores
from layerwise.training.exits import measure_exits
from layerwise.training.meter import Meter
from layerwise.training.prepare import Prepared
from layerwise.training.progress import Progress
from layerwise.training.ranks import check_ranks
from layerwise.training.session import Session, begin, check_folder
from layerwise.training.weights import digests_of_files, save_weights
from layerwise.utils.files import write_json
from layerwise.utils.terminal import discard, unguarded
from layerwise.utils.words import counted


class Interrupted(Exception):
    """Training was asked to stop; its state is saved."""


def train(
    prepared: Prepared, folder: RunFolder, resume: bool, progress: Progress
) -> dict[str, Any]:
    """Carry out a run, or go on with it, and return its result.

    Args:
        resume: go on where the folder's run was stopped; without a folder, begin.

    Raises:
        InvalidInput: the run cannot be carried out as described; nothing was written.
        Diverged: a loss became NaN or infinite; the folder keeps the state of the epoch before.
        Interrupted: stopped by a signal; the folder keeps the state.
    """
    with together():
        check_ranks(prepared)
    world().stopping.asked = world().stopping.agreed = False
    going_on = decided_by_first(lambda: check_folder(prepared, folder, resume))
    if going_on and decided_by_first(lambda: folder.finished):
        return decided_by_first(lambda: verified_result(folder))
    with begin(prepared, folder, going_on, progress) as session, stop_requests() as stop_requested:
        meter = session.meter
        while tick := meter.next_tick(session.ticks):
            progress.tick(tick, meter)
            if tick.ends_epoch:
                progress.epoch(end_epoch(tick, session, prepared, folder))
            if should_stop(session, stop_requested()) and tick.resumable and not tick.ends_training:
                stop(tick, session, prepared, folder)
        return end_training(session, prepared, folder)


def verified_result(folder: RunFolder) -> dict[str, Any]:
    """The result of a finished run whose files are those that it wrote."""
    folder.verify_all()
    return folder.result()


def end_epoch(
    tick: Tick, session: Session, prepared: Prepared, folder: RunFolder
) -> dict[str, Any]:
    """Evaluate, log and save what is due at an epoch's end, and return the epoch's record.

    The first rank writes; where units live on several, it has all of them meanwhile.
    """
    learner, meter, execution = session.learner, session.meter, prepared.execution
    if learner.replicas is not None:
        learner.replicas.share_buffers()
    due = is_due(tick, execution.eval_every)
    scores = evaluate_epoch(tick, learner, session.data, prepared) if due else {}
    meter.collect()
    record = meter.end_epoch(tick, scores)
    watched = session.watch is not None and is_due(tick, execution.separability_every)
    saved = is_due(tick, execution.save_every)
    with whole(learner) if record["best"] or watched or saved else nullcontext(world().first):
        if world().first:
            write_epoch(record, session, folder)
            if watched:
                with saving_what_was_learned(folder, prepared, learner, meter, tick):
                    measure_separability(tick, session, folder)
            if saved:
                save(folder, prepared.run, learner, meter, tick.after)
    return record


def write_epoch(record: dict[str, Any], session: Session, folder: RunFolder) -> None:
    """Write an epoch's line, and the weights if they are the best so far."""
    meter = session.meter
    if record["best"]:
        meter.best["sha256"] = save_weights(folder.file(NEXT_BEST), session.learner.model)
    folder.append(record)
    session.log(record)


def measure_separability(tick: Tick, session: Session, folder: RunFolder) -> None:
    """Write a line of what is measured of the features."""
    assert session.watch is not None
    rows = session.watch.record(tick.after.epoch, last_unit(tick), folder.log())
    folder.append(rows, SEPARABILITY)


def should_stop(session: Session, requested: bool) -> bool:
    """Whether training stops here; on several ranks, once all know that it does."""
    if world().size == 1:
        return requested
    world().stopping.asked = requested
    return world().stopping.agreed


def stop(tick: Tick, session: Session, prepared: Prepared, folder: RunFolder) -> NoReturn:
    """Save the state and stop.

    Raises:
        Interrupted: always.
    """
    session.meter.check()
    session.meter.collect()
    with whole(session.learner) as first:
        if first:
            save(folder, prepared.run, session.learner, session.meter, tick.after)
    done = f"{counted(tick.after.epoch, 'epoch')} and {counted(tick.after.batch, 'batch')}"
    raise Interrupted(f"stopped after {done}; all is saved")


def end_training(session: Session, prepared: Prepared, folder: RunFolder) -> dict[str, Any]:
    """Write the last weights and the run's result, and return it."""
    learner, meter = session.learner, session.meter
    peaks = gathered(meter.peak_bytes)
    numbers = {**describe(prepared, folder, learner), **meter.result()}
    numbers["peak_memory_bytes"] = max(filter(None, peaks), default=None)
    if learner.replicas is not None:
        numbers["replicas"] = learner.replicas.count
    if session.placement:
        numbers["ranks"] = [
            {**rank, "peak_memory_bytes": peak}
            for rank, peak in zip(session.placement, peaks, strict=True)
        ]
    with whole(learner):
        return decided_by_first(lambda: write_result(numbers, session, folder))


def write_result(numbers: dict[str, Any], session: Session, folder: RunFolder) -> dict[str, Any]:
    """Write the last weights and the run's result."""
    exits = measure_exits(session.learner, session.data.test, session.data.validation)
    digests = digests_of_files(folder, session.learner.model, session.meter)
    result = sealed({**numbers, **exits, **digests})
    write_json(folder.file(RESULT), result)
    return result


@contextmanager
def saving_what_was_learned(
    folder: RunFolder, prepared: Prepared, learner: Learner, meter: Meter, tick: Tick
) -> Iterator[None]:
    """Save the state if a measure fails, so that the epoch is not lost with it."""
    try:
        yield
    except InvalidInput:
        save(folder, prepared.run, learner, meter, tick.after)
        raise


def is_due(tick: Tick, every: int) -> bool:
    """Whether something is due that is done every so many epochs and at the end."""
    return tick.ends_training or tick.after.epoch % every == 0


def last_unit(tick: Tick) -> int:
    """Index of the last unit that has learned."""
    return tick.first + len(tick.result.correct_tensor()) - 1


def evaluate_epoch(
    tick: Tick, learner: Learner, data: Splits, prepared: Prepared
) -> dict[str, Any]:
    """Scores at an epoch's end of the units that learned in it, and of the network.

    The network is scored only once its last unit has learned.
    """
    last = last_unit(tick)
    scores: dict[str, Any] = {}
    if data.validation is not None:
        scores["units"] = unit_scores(learner, data.validation, tick.first, last)
    if last == len(learner.units) - 1:
        scores["val_accuracy"] = scores["units"][-1].accuracy if data.validation else None
        scores["test_accuracy"] = network_accuracy(learner, data.test, prepared.amp)
    return scores


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a wish that the loop grants between two steps.

    The second stops at once. A closed terminal (SIGHUP) is the same wish, however often it is sent,
    except where ``nohup`` has it ignored.
    """
    asked = False
    terminals = [stream for stream in (sys.stdout, sys.stderr) if stream.isatty()]

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print_once(
            "stopping as soon as the state can be saved; once more stops at once, without saving"
        )

    def hang_up(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        for stream in terminals:  # writing to a closed one is an error
            discard(unguarded(stream))

    # only the main thread receives signals
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    handlers = {signal.SIGINT: ask, signal.SIGTERM: ask}
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        handlers[signal.SIGHUP] = hang_up
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
