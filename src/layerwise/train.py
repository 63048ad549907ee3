"""One training run, from its description to its result; the loop reads from top to bottom in the order a batch meets it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from layerwise.build import (
    amp_type,
    build_keeping,
    build_learner,
    decay,
    options_for,
    parse_cut,
    prepare_device,
)
from layerwise.captured import capture
from layerwise.data import Splits, load_data
from layerwise.errors import InvalidInput
from layerwise.evaluation import accuracy, unit_scores
from layerwise.headings import parse_measures
from layerwise.hierarchy import parse_downsampling, parse_hierarchy
from layerwise.learner import Learner
from layerwise.machine import describe_device, describe_machine
from layerwise.memory_format import set_memory_format, summary
from layerwise.meter import Meter
from layerwise.models import published_hierarchy
from layerwise.probing import WATCHED_IMAGES, Watch
from layerwise.progress import Progress
from layerwise.rules import RULES, Position, Tick
from layerwise.runs import BEST, RESULT, SEPARABILITY, WEIGHTS, Execution, Run, RunFolder, differences, write_json
from layerwise.states import restore, save, save_weights, verify
from layerwise.survey import compared_run, refuse_other_depth
from layerwise.tensorboard import check_log, open_log


class Interrupted(Exception):
    """Training was asked to stop; its state is saved."""


def train(run: Run, folder: RunFolder, execution: Execution, resume: bool, progress: Progress) -> dict[str, Any]:
    """Carry out a run, or go on with it, and return its result.

    Args:
        resume: go on where the folder's run was stopped; without a folder, begin.

    Raises:
        InvalidInput: the run cannot be carried out as described; nothing was written.
        Diverged: a loss became NaN or infinite; the folder keeps the state of the epoch before.
        Interrupted: stopped by a signal; the folder keeps the state.
    """
    resume = resume and folder.begun
    if resume:
        refuse_other_run(run, folder)
        if folder.finished:
            return folder.result()
    else:
        folder.refuse_existing()
    keeping = build_keeping(run, execution, folder)
    check_log(execution.log)
    with ExitStack() as held:
        if resume:
            held.enter_context(folder.locked())
        device = prepare_device(execution)
        data = load_data(run, execution, device)
        learner = build_learner(run, data, device)
        before = folder.facts().get("layouts") if resume else None
        memory_formats = set_memory_format(learner, execution.memory_format, before)
        meter = Meter(learner, memory=RULES[run.rule].one_thread)
        watch = build_watch(run, execution, learner, data, resume)
        recorded = capture(learner, execution) if RULES[run.rule].one_step else ""
        start = restore(folder, learner, meter, data.facts()) if resume else Position()
        options = options_for("rule", run.rule, run) | ({"keeping": keeping} if run.cache else {})
        ticks = RULES[run.rule].order(learner, data.train, run.epochs, decay(run), start, **options)
        if not resume:
            facts = {"data": data.facts(), "units": meter.names, "layouts": memory_formats, "execution": asdict(execution)}
            held.enter_context(folder.created(run, {**facts, **describe_machine(device)}))
        chosen = ", ".join(filter(None, (describe_device(device, run.amp), summary(memory_formats), recorded)))
        progress.begin(run, folder.path, chosen, len(learner.units), start.epoch)
        stop_requested = held.enter_context(stop_requests())
        log = held.enter_context(open_log(execution.log, folder, start.epoch))
        folder.truncate_log(start.epoch)
        while tick := meter.next_tick(ticks):
            progress.tick(tick, meter)
            if tick.ends_epoch:
                evaluate = is_due(tick, execution.eval_every)
                record = meter.end_epoch(tick, evaluate_epoch(tick, learner, data, run) if evaluate else {})
                if record["best"]:
                    meter.best["sha256"] = save_weights(folder.file(BEST), learner.model)
                folder.append(record)
                log(record)
                if watch and is_due(tick, execution.separability_every):
                    folder.append(watch.record(tick.after.epoch, last_unit(tick), folder.log()), SEPARABILITY)
                if is_due(tick, execution.save_every):
                    save(folder, run, learner, meter, tick.after)
                progress.epoch(record)
            if stop_requested() and tick.settled and not tick.ends_training:
                meter.check()
                save(folder, run, learner, meter, tick.after)
                raise Interrupted(f"stopped after {tick.after.epoch} epochs and {tick.after.batch} batches; all is saved")
        digests = {WEIGHTS: save_weights(folder.file(WEIGHTS), learner.model)}
        if meter.best:
            digests[BEST] = meter.best["sha256"]
            verify(folder.file(BEST), digests[BEST])
        result = {**describe(run, folder), **meter.result(), "sha256": digests}
        write_json(folder.file(RESULT), result)
    return result


def build_watch(run: Run, execution: Execution, learner: Learner, data: Splits, resume: bool) -> Watch | None:
    """What measures separability while training, if that is asked for.

    Raises:
        InvalidInput, CannotSplit: it cannot be measured, or the run to compare with cannot.
    """
    if not execution.separability_every:
        if execution.separability_against and not resume:  # a run that goes on may be watched no longer
            raise InvalidInput("--separability-against is read by --separability-every: give both, or leave it out")
        return None
    watch = Watch(learner, data, parse_cut(run.at), parse_measures(execution.separability_measures))
    if execution.separability_against:
        try:
            depths, sample, epoch = compared_run(execution.separability_against, data.facts(), watch.loader, WATCHED_IMAGES)
            refuse_other_depth(watch.depths, (depths, sample))
        except InvalidInput as refusal:
            raise InvalidInput(f"--separability-against {execution.separability_against}: {refusal}") from None
        watch.other = depths, sample
        watch.against = {"against": execution.separability_against, "against_epoch": epoch}
    return watch


def is_due(tick: Tick, every: int) -> bool:
    """Whether something is to be done after this epoch that is done every so many epochs and at the end."""
    return tick.ends_training or tick.after.epoch % every == 0


def last_unit(tick: Tick) -> int:
    """Index of the last unit that has learned."""
    return tick.first + len(tick.result.correct_tensor()) - 1


def describe(run: Run, folder: RunFolder) -> dict[str, Any]:
    """The run's name and main choices, as results show them."""
    halvings = run.downsample_after
    return {
        "run": str(folder.path),
        "model": run.model,
        "hierarchy": list(parse_hierarchy(run.hierarchy) if run.hierarchy else published_hierarchy(run.model)),
        "downsample_after": list(parse_downsampling(halvings)) if halvings else None,
        "data": run.data,
        "rule": run.rule,
        "loss": run.loss if RULES[run.rule].at is None else "cross-entropy",
        "seed": run.seed,
    }


def evaluate_epoch(tick: Tick, learner: Learner, data: Splits, run: Run) -> dict[str, Any]:
    """Scores at an epoch's end of the units that learned in it; of the network only once its last unit has."""
    last = last_unit(tick)
    scores: dict[str, Any] = {}
    if data.validation is not None:
        scores["units"] = unit_scores(learner, data.validation, tick.first, last)
    if last == len(learner.units) - 1:
        scores["val_accuracy"] = scores["units"][-1].accuracy if data.validation is not None else None
        scores["test_accuracy"] = accuracy(learner.model, data.test, amp_type(run))
    return scores


def refuse_other_run(run: Run, folder: RunFolder) -> None:
    """Refuse to go on with a run as another.

    Raises:
        InvalidInput: the folder's run differs.
    """
    other = differences(run, folder.run())
    if other:
        raise InvalidInput(
            f"{folder.path} holds another run ({'; '.join(other[:3])}): resume it with its own options (or --resume "
            f"{folder.path} alone), or choose another --output"
        )


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn the first Ctrl-C (or SIGTERM) into a wish that the loop grants between two steps; the second stops at once."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        print("stopping as soon as the state is whole; once more to stop at once, unsaved", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():  # only the main thread receives signals
        yield lambda: False
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
