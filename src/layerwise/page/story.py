"""The page's beginning and end: the headline, what was run, what could not be read."""

from collections import Counter
from collections.abc import Iterator, Sequence

from layerwise.claims import VERDICTS
from layerwise.evidence import Evidence, gap
from layerwise.hierarchy import format_hierarchy
from layerwise.page.markup import Column, Markup, items, join, percent, points, section, table, tag
from layerwise.paper import ROMAN, ROWS, SCALES, Row
from layerwise.tables import machine

# published networks and their accelerated forms, as the paper names its best: table, before, after
ACCELERATED = (
    (5, "resnet18", "resnet18_r4"),
    (5, "resnet50", "resnet50_r4"),
    (6, "resnet18", "resnet18_r5"),
    (6, "resnet50", "resnet50_r2"),
)
SEVERAL = {"holds": "hold", "does not hold": "do not hold"}
MOST_BROKEN = 200  # lines


def headline(evidence: Evidence) -> Markup:
    """What moving convolutions out of the shallow stages does, in the paper and as measured; the verdicts counted."""
    by_name = {(row.table, row.name): row for row in ROWS}
    rows = []
    for number, before, after in ACCELERATED:
        pair = by_name[number, before], by_name[number, after]
        rows += list(changes(evidence, *pair))
    columns = (
        Column("network"),
        Column("numbers"),
        Column("before", "layer-wise, %"),
        Column("after", "layer-wise, %"),
        Column("change", "layer-wise, %"),
        Column("before", "gap to global, points"),
        Column("after", "gap to global, points"),
    )
    caption = (
        "Downsampling acceleration: convolutions moved from the shallow stages to the deep ones. Test accuracy of the last "
        "epoch; the gap is global less layer-wise."
    )
    return section("headline", "Headline", items(verdict_counts(evidence)), table(caption, columns, rows))


def changes(evidence: Evidence, before: Row, after: Row) -> Iterator[tuple[object, ...]]:
    """A line for the paper, and one for each setting that has both rows."""
    name = f"{before.name} {format_hierarchy(before.hierarchy)} → {format_hierarchy(after.hierarchy)}, {before.data}"
    printed = [(row.layerwise_accuracy, row.global_accuracy) for row in (before, after)]
    yield line(name, f"paper, Table {ROMAN[before.table - 1]}", printed)
    for setting in evidence.settings:
        found = []
        for row in (before, after):
            local, globally = (evidence.number(setting, row, column) for column in ("layerwise", "global"))
            found.append((local.mean if local else None, globally.mean if globally else None))
        if all(local is not None for local, _ in found):
            seeds = min(len(evidence.numbers[setting, row, "layerwise"].seeds) for row in (before, after))
            yield line(name, f"measured, {setting.title}; {count(seeds, 'seed')}", found)


def line(name: str, source: str, pair: Sequence[tuple[float | None, float | None]]) -> tuple[object, ...]:
    (first, _), (second, _) = pair
    change = second - first if first is not None and second is not None else None
    gaps = [gap(*one) for one in pair]
    return name, source, percent(first), percent(second), points(change), *map(points, gaps)


def verdict_counts(evidence: Evidence) -> Iterator[str]:
    """How many claims hold, setting by setting."""
    for setting in evidence.settings:
        verdicts = Counter(verdict.verdict for verdict in evidence.verdicts[setting])
        counts = ", ".join(f"{verdicts[word]} {SEVERAL.get(word, word)}" for word in VERDICTS)
        yield f"{setting.title}: of the paper's {sum(verdicts.values())} claims, {counts}."
    if not evidence.settings:
        yield "No finished run gives a number of the paper's tables; what is shown of them below is the paper's alone."


def overview(evidence: Evidence) -> Markup:
    """Counts, scales, machines and commits."""
    records = evidence.records
    finished = sum(record.result is not None for record in records)
    counted = sum(record.match is not None and record.result is not None for record in records)
    lines: list[str | Markup] = [
        f"{count(len(records), 'run')} read: {finished} finished, {len(records) - finished} not; {counted} of the finished "
        "give a number of the paper's tables.",
        *scales(evidence),
        *places(evidence),
    ]
    if evidence.broken:
        lines.append(join([tag("a", f"{count(len(evidence.broken), 'problem')} with what was read", href="#broken"), "."]))
    return section("runs-read", "What was run", items(lines))


def scales(evidence: Evidence) -> Iterator[str]:
    """Every setting in words, with the scale it departs from."""
    seen: set[str] = set()
    for setting in evidence.settings:
        runs = {record.path for (of, _, _), number in evidence.numbers.items() if of == setting for record in number.records}
        shared = {path for path in runs if path in seen}
        seen |= runs
        again = f" (of which {len(shared)} are above: global training knows no local loss)" if shared else ""
        departs = f" Departs from it by: {'; '.join(setting.departures)}." if setting.departures else ""
        yield f"{setting.scale} scale, {count(len(runs), 'run')}{again}: {SCALES[setting.scale].text}.{departs}"


def places(evidence: Evidence) -> Iterator[str]:
    """Machines and commits with the number of runs of each."""
    found = Counter(machine(record.facts) or "not noted" for record in evidence.records)
    yield from (f"Machine: {name} ({count(number, 'run')})." for name, number in found.most_common())
    commits = Counter(str(record.facts.get("commit") or "not noted") for record in evidence.records)
    listed = ", ".join(f"{name} ({count(number, 'run')})" for name, number in commits.most_common())
    if listed:
        yield f"Commits (+: changed since): {listed}."


def count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def broken(evidence: Evidence) -> Markup:
    """What could not be read, or only in part."""
    if not evidence.broken:
        return section("broken", "Problems", tag("p", "Everything in the folders was read in full."))
    lines = [join([tag("code", item.path), " ", item.reason]) for item in evidence.broken[:MOST_BROKEN]]
    if len(evidence.broken) > MOST_BROKEN:
        lines.append(Markup(f"and {len(evidence.broken) - MOST_BROKEN:,} more"))
    intro = tag("p", "What could not be read, or only in part. What could be read of these runs is shown.")
    return section("broken", "Problems", intro, items(lines))
