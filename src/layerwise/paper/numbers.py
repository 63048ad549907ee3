"""Measured numbers of the paper's rows: mean and deviation over seeds. No torch.

No number mixes scales, losses or schedules.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from layerwise.errors import choose
from layerwise.paper.rows import (
    COLUMNS,
    NO_MATCH,
    ROWS,
    SCALES,
    Match,
    Row,
    departures,
    match,
    row_run,
)
from layerwise.runs.records import Record
from layerwise.runs.run import Run


@dataclass(frozen=True)
class Setting:
    """All that runs must share for their numbers to stand in one table.

    Attributes:
        scale: a name in ``SCALES``.
        loss: of the layer-wise runs; the global ones know none and belong to the setting of every
            loss.
        epochs, amp: as in ``Run``.
    """

    scale: str
    loss: str
    epochs: int
    amp: bool

    @property
    def departures(self) -> tuple[str, ...]:
        """Differences of the setting from its scale, in words."""
        return tuple(departures(self.run, expected(self.scale)))

    @property
    def run(self) -> Run:
        """A layer-wise run of the setting, of whichever row."""
        return row_run(
            ROWS[0], self.scale, "layerwise", loss=self.loss, epochs=self.epochs, amp=self.amp
        )

    @property
    def title(self) -> str:
        """In words, such as ``small scale: pred instead of predsim``."""
        return f"{self.scale} scale" + (
            f": {'; '.join(self.departures)}" if self.departures else ""
        )

    @property
    def key(self) -> str:
        """For file names and anchors, such as ``small-pred`` or ``paper-100-epochs``."""
        usual, parts = expected(self.scale), [self.scale]
        if self.loss != usual.loss:
            parts.append(self.loss)
        if self.epochs != usual.epochs:
            parts.append(f"{self.epochs}-epochs")
        if self.amp != usual.amp:
            parts.append("bfloat16" if self.amp else "float32")
        return "-".join(parts)


def place_of(record: Record) -> Match:
    """The rows that a run gives the number of, by what it is and how it was carried out.

    Replicas give one only if their layers and losses read whole batches, not their shares.
    """
    execution = record.facts.get("execution")
    if isinstance(execution, dict) and (execution.get("replicas") or 1) != 1:
        alone = not execution.get("gather_examples") and not record.run.is_global
        if alone or not execution.get("sync_batch_norm"):
            return NO_MATCH
    return match(record.run)


def own_columns(setting: Setting) -> tuple[str, ...]:
    """The columns whose numbers are of this setting alone: global training knows no loss."""
    return tuple(COLUMNS) if setting.loss == Run.loss else ("layerwise",)


def expected(scale: str) -> Run:
    """A layer-wise run of a scale without any departure, of whichever row."""
    return row_run(ROWS[0], scale, "layerwise")


@dataclass(frozen=True)
class Measured:
    """A row's number in one column and setting.

    Attributes:
        mean: test accuracy of the last epoch, percent.
        deviation: of a single run, estimated from the seeds (n - 1 in the denominator); None with
            one seed.
        records: a run per seed, in the order of ``seeds``.
        departures: from the scale's setting, in words, of all the runs together.
    """

    mean: float
    deviation: float | None
    seeds: tuple[int, ...]
    records: tuple[Record, ...]
    departures: tuple[str, ...]

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Test accuracy of the last epoch in percent, seed by seed."""
        return tuple(accuracies(self.records))


def accuracies(records: Iterable[Record]) -> list[float]:
    return [record.test_accuracy for record in records if record.test_accuracy is not None]


def settings(records: Iterable[Record]) -> list[Setting]:
    """The settings of the finished runs that give a row's number.

    Returns:
        By scale, the paper's first; then by the number of departures; then predsim first, more
        epochs first, float32 first. Global runs make a setting of their own, named by predsim, only
        where no layer-wise run has their schedule.
    """
    counted = [
        record for record in records if place_of(record) and record.test_accuracy is not None
    ]
    layerwise = {setting_of(record) for record in counted if place_of(record).column == "layerwise"}
    schedules = {(setting.scale, setting.epochs, setting.amp) for setting in layerwise}
    alone = {setting_of(record) for record in counted}
    return sorted(
        layerwise
        | {item for item in alone if (item.scale, item.epochs, item.amp) not in schedules},
        key=rank,
    )


def repeated(records: Iterable[Record]) -> list[tuple[Record, Record]]:
    """Finished runs that do not count, each behind the one of its row and seed that does."""
    first: dict[tuple[Setting, str, tuple[Row, ...], int], Record] = {}
    pairs = []
    for record in records:
        place = place_of(record)
        if place and record.test_accuracy is not None:
            key = (setting_of(record), place.column, place.rows, record.run.seed)
            if first.setdefault(key, record) is not record:
                pairs.append((first[key], record))
    return pairs


def setting_of(record: Record) -> Setting:
    """The setting of a run that gives a row's number; the loss of a global one is the default."""
    place = place_of(record)
    loss = record.run.loss if place.column == "layerwise" else Run.loss
    return Setting(place.scale, loss, record.run.epochs, record.run.amp)


def rank(setting: Setting) -> tuple[int, int, bool, str, int, bool]:
    """Where a setting stands among others."""
    scale = list(SCALES).index(setting.scale)
    return (
        scale,
        len(setting.departures),
        setting.loss != Run.loss,
        setting.loss,
        -setting.epochs,
        setting.amp,
    )


def measured(records: Sequence[Record], row: Row, column: str, setting: Setting) -> Measured | None:
    """A row's number, from the finished runs of one setting.

    Args:
        column: ``layerwise`` or ``global``.

    Returns:
        None where no run gives it. Where a seed was trained more than once, the first of its runs
        counts.

    Raises:
        InvalidInput: there is no such column.
    """
    choose("column", column, COLUMNS)
    by_seed: dict[int, Record] = {}
    for record in records:
        if gives(record, row, column, setting):
            by_seed.setdefault(record.run.seed, record)
    if not by_seed:
        return None
    seeds = tuple(sorted(by_seed))
    chosen = tuple(by_seed[seed] for seed in seeds)
    numbers = accuracies(chosen)
    differing = dict.fromkeys(text for record in chosen for text in place_of(record).departures)
    return Measured(
        fmean(numbers),
        stdev(numbers) if len(numbers) > 1 else None,
        seeds,
        chosen,
        tuple(differing),
    )


def difference(above: Measured | None, below: Measured | None) -> float | None:
    """Mean difference of two numbers in points, over the seeds that both have; None without any."""
    if above is None or below is None:
        return None
    ours, theirs = (
        dict(zip(number.seeds, number.accuracies, strict=True)) for number in (above, below)
    )
    apart = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    return fmean(apart) if apart else None


def gives(record: Record, row: Row, column: str, setting: Setting) -> bool:
    """Whether a run gives a row's number in a column and setting."""
    place, run = place_of(record), record.run
    return (
        place is not None
        and record.test_accuracy is not None
        and (place.column, place.scale, run.epochs, run.amp)
        == (column, setting.scale, setting.epochs, setting.amp)
        and (column == "global" or run.loss == setting.loss)
        and row in place.rows
    )
