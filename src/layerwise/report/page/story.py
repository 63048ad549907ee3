"""The page's beginning and end: the headline, what was run, what could not be read."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from layerwise.hierarchy import format_hierarchy
from layerwise.paper.numbers import Measured, difference, place_of
from layerwise.paper.over_scales import standings
from layerwise.paper.rows import BY_NAME, ROMAN, SCALES, Row
from layerwise.paper.verdicts import VERDICTS, Evidence, gap
from layerwise.report.page.cells import Column, Table, percent, points
from layerwise.report.tables import machine
from layerwise.utils.words import counted

# published networks and their accelerated forms, as the paper names its best: table, before, after
ACCELERATED = (
    (5, "resnet18", "resnet18_r4"),
    (5, "resnet50", "resnet50_r4"),
    (6, "resnet18", "resnet18_r5"),
    (6, "resnet50", "resnet50_r2"),
)
SEVERAL = {"holds": "hold", "does not hold": "do not hold"}
MOST_BROKEN = 200  # lines


HEADLINE_COLUMNS = (
    Column("network"),
    Column("numbers"),
    Column("before", "layer-wise, %"),
    Column("after", "layer-wise, %"),
    Column("change", "layer-wise, %"),
    Column("before", "gap to global, points"),
    Column("after", "gap to global, points"),
)
HEADLINE_CAPTION = (
    "Downsampling acceleration: convolutions moved from the shallow stages to the deep ones. "
    "Test accuracy of the last epoch; the gap is global less layer-wise. Differences are over the "
    "seeds that both numbers have."
)


def headline(evidence: Evidence) -> dict[str, Any]:
    """The effect of moving convolutions out of the shallow stages, and counts of verdicts."""
    rows = [
        cells
        for table, before, after in ACCELERATED
        for cells in changes(evidence, BY_NAME[table, before], BY_NAME[table, after])
    ]
    return {
        "verdicts": list(verdict_counts(evidence)),
        "table": Table(HEADLINE_CAPTION, HEADLINE_COLUMNS, rows),
    }


def changes(evidence: Evidence, before: Row, after: Row) -> Iterator[tuple[object, ...]]:
    """A line for the paper, and one for each setting that has both rows."""
    change = f"{format_hierarchy(before.hierarchy)} → {format_hierarchy(after.hierarchy)}"
    name = f"{before.name} {change}, {before.data}"
    first, second = before.layerwise_accuracy, after.layerwise_accuracy
    gaps = [gap(row.layerwise_accuracy, row.global_accuracy) for row in (before, after)]
    printed_source = f"paper, Table {ROMAN[before.table - 1]}"
    yield (
        name,
        printed_source,
        *map(percent, (first, second)),
        *map(points, (second - first, *gaps)),
    )
    for setting in evidence.settings:
        local, globally = (
            [evidence.number(setting, row, column) for row in (before, after)]
            for column in ("layerwise", "global")
        )
        if all(local):
            measured_source = f"measured, {setting.title}; {seeds_of(local, globally)}"
            means = (number.mean if number else None for number in local)
            apart = (difference(local[1], local[0]), *map(difference, globally, local))
            yield name, measured_source, *map(percent, means), *map(points, apart)


def seeds_of(local: Sequence[Measured | None], globally: Sequence[Measured | None]) -> str:
    """The number of seeds of layer-wise runs; of global ones where it differs.

    Of several rows that of the one with fewest.
    """
    fewest, fewest_globally = (
        min(len(number.seeds) if number else 0 for number in numbers)
        for numbers in (local, globally)
    )
    differs = fewest_globally not in (0, fewest)
    return counted(fewest, "seed") + (f" layer-wise, {fewest_globally} globally" if differs else "")


def verdict_counts(evidence: Evidence) -> Iterator[str]:
    """Counts of the claims that hold, setting by setting."""
    for setting in evidence.settings:
        verdicts = Counter(verdict.verdict for verdict in evidence.verdicts[setting])
        counts = ", ".join(verdicts_in_words(verdicts[word], word) for word in VERDICTS)
        yield f"{setting.title}: of the paper's {sum(verdicts.values())} claims, {counts}."
    if len(evidence.settings) > 1:
        decided = Counter(standing.verdict for standing in standings(evidence))
        counts = ", ".join(
            verdicts_in_words(decided[word], word) for word in VERDICTS if decided[word]
        )
        yield (
            f"Together they measure {sum(decided.values())}; each judged by the first setting that "
            f"decides it, {counts}."
        )
    if not evidence.settings:
        yield (
            "No finished run gives a number of the paper's tables; what is shown of them below is "
            "the paper's alone."
        )


def verdicts_in_words(number: int, verdict: str) -> str:
    return f"{number} {verdict if number == 1 else SEVERAL.get(verdict, verdict)}"


def overview(evidence: Evidence) -> list[str]:
    """Counts, scales, machines and commits, a line each."""
    records = evidence.records
    finished = sum(record.result is not None for record in records)
    matched = sum(bool(place_of(record)) and record.result is not None for record in records)
    counts = (
        f"{counted(len(records), 'run')} read: {finished} finished, {len(records) - finished} not; "
        f"{matched} of the finished give a number of the paper's tables."
    )
    return [counts, *scales(evidence), *places(evidence)]


def scales(evidence: Evidence) -> Iterator[str]:
    """Every setting in words, with the scale it departs from."""
    seen: set[str] = set()
    for setting in evidence.settings:
        runs = {
            record.path
            for (of, _, _), number in evidence.numbers.items()
            if of == setting
            for record in number.records
        }
        shared = {path for path in runs if path in seen}
        seen |= runs
        again = (
            f" (of which {len(shared)} are above: global training knows no local loss)"
            if shared
            else ""
        )
        departs = (
            f" Departs from it by: {'; '.join(setting.departures)}." if setting.departures else ""
        )
        text = SCALES[setting.scale].text
        yield f"{setting.scale} scale, {counted(len(runs), 'run')}{again}: {text}.{departs}"


def places(evidence: Evidence) -> Iterator[str]:
    """Machines and commits with the number of runs of each."""
    machines = Counter(machine(record.facts) or "not noted" for record in evidence.records)
    yield from (
        f"Machine: {name} ({counted(number, 'run')})." for name, number in machines.most_common()
    )
    commits = Counter(str(record.facts.get("commit") or "not noted") for record in evidence.records)
    listed = ", ".join(
        f"{name} ({counted(number, 'run')})" for name, number in commits.most_common()
    )
    if listed:
        yield f"Commits (+: changed since): {listed}."


def problems(evidence: Evidence) -> dict[str, Any]:
    """The first of what could not be read, or only in part, and how many more there are."""
    return {
        "listed": evidence.broken[:MOST_BROKEN],
        "more": max(0, len(evidence.broken) - MOST_BROKEN),
    }
