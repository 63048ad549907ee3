"""The watch of a run: separability that is measured while it trains."""

from collections.abc import Iterator
from contextlib import contextmanager

from layerwise.core.learner import Learner
from layerwise.data import Splits
from layerwise.errors import InvalidInput
from layerwise.measures.depths import depths_of, refuse_other_depth
from layerwise.measures.watch import WATCHED_IMAGES, Watch
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution
from layerwise.training.prepare import Prepared
from layerwise.training.saved import compared_run


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
