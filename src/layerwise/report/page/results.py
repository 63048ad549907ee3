"""The page's tables: the paper's six beside the measured numbers, claims, hierarchies."""

from collections.abc import Iterator, Sequence
from typing import Any

from layerwise.hierarchy import format_hierarchy, shallow
from layerwise.paper.numbers import Measured, Setting, difference, own_columns
from layerwise.paper.over_scales import Standing, by_weight, standings
from layerwise.paper.rows import ROMAN, ROWS, TABLES, Row
from layerwise.paper.verdicts import (
    Evidence,
    Verdict,
    gap,
    rank_correlations,
)
from layerwise.report.page.cells import (
    NOTHING,
    Column,
    Number,
    Table,
    percent,
    points,
    uncertain,
    whole,
)
from layerwise.utils.words import plus_minus

MARKS = {"holds": "✓", "does not hold": "✗", "undecided": "?", "not measured": "–"}
PAPER = (
    Column("layer-wise", "paper, %"),
    Column("global", "paper, %"),
    Column("gap", "paper, %", "global less layer-wise"),
)


AGREEMENT = {
    True: "The paper's tables bear it out.",
    False: "The paper's own tables do not bear it out.",
    None: "",
}
CLAIM_COLUMNS = (
    Column("verdict"),
    Column("claim"),
    Column("effect"),
    Column("error", note="standard error"),
    Column("seeds"),
    Column("measured", note="comparisons"),
    Column("in detail"),
)


def paper_tables(evidence: Evidence) -> Iterator[dict[str, Any]]:
    """All six; each setting has tables of its own, so that no column mixes two."""
    for number in TABLES:
        rows = [row for row in ROWS if row.table == number]
        settings = [setting for setting in evidence.settings if evidence.has(setting, rows)]
        yield {
            "number": number,
            "title": f"Table {ROMAN[number - 1]}: {rows[0].data}",
            "tables": [measured_table(evidence, setting, rows) for setting in settings]
            or [(printed_table(rows), "")],
        }


def printed_table(rows: Sequence[Row]) -> Table:
    """A table of which nothing was measured."""
    number = ROMAN[rows[0].table - 1]
    caption = f"Table {number}, the paper's numbers. Nothing of it was measured in these runs."
    return Table(
        caption, (Column("model"), Column("hierarchy"), *PAPER), [printed(row) for row in rows]
    )


def printed(row: Row) -> tuple[object, ...]:
    local, globally = row.layerwise_accuracy, row.global_accuracy
    return (
        row.name,
        format_hierarchy(row.hierarchy),
        percent(local),
        percent(globally),
        points(gap(local, globally)),
    )


def measured_table(evidence: Evidence, setting: Setting, rows: Sequence[Row]) -> tuple[Table, str]:
    """A table of the paper beside the numbers of one setting, and how alike the two orders are."""
    ours, apart = f"measured, {setting.scale} scale, %", "measured less paper"
    columns = (
        Column("model"),
        Column("hierarchy"),
        *PAPER,
        Column("layer-wise", ours),
        Column("global", ours),
        Column("gap", ours, "global less layer-wise"),
        Column("layer-wise", apart),
        Column("global", apart),
        Column("gap", apart),
    )
    departs = (
        f" Departs from this scale by: {'; '.join(setting.departures)}."
        if setting.departures
        else ""
    )
    table = f"Table {ROMAN[rows[0].table - 1]}"
    caption = f"{table} beside what was measured at {setting.scale} scale.{departs}"
    body = [measured_row(evidence, setting, row) for row in rows]
    orders = [order(evidence, setting, rows[0].table, column) for column in own_columns(setting)]
    return Table(caption, columns, body), " ".join(orders)


def measured_row(evidence: Evidence, setting: Setting, row: Row) -> tuple[object, ...]:
    local, globally = (evidence.number(setting, row, column) for column in ("layerwise", "global"))
    means = [number.mean if number else None for number in (local, globally)]
    ours = (*means, difference(globally, local))
    theirs = (
        row.layerwise_accuracy,
        row.global_accuracy,
        gap(row.layerwise_accuracy, row.global_accuracy),
    )
    apart = [
        None if own is None or paper is None else own - paper
        for own, paper in zip(ours, theirs, strict=True)
    ]
    return *printed(row), *map(spread, (local, globally)), points(ours[2]), *map(points, apart)


def spread(number: Measured | None) -> Number:
    return (
        uncertain(number.mean, number.deviation, len(number.seeds))
        if number
        else uncertain(None, None, 0)
    )


def order(evidence: Evidence, setting: Setting, number: int, column: str) -> str:
    """The rank correlations in a sentence."""
    found = rank_correlations(evidence.of_table(number), number, setting, column)
    name = "Layer-wise" if column == "layerwise" else "Global"
    total = sum(row.table == number for row in ROWS)
    values = [
        f"{each.spearman:.2f} (Spearman, {len(each.rows)} of {total} rows"
        f"{f', of width {each.width:g}' if len(found) > 1 else ''})".replace("-", "−")
        for each in found
        if each.spearman is not None
    ]
    if not values:
        measured = sum(len(each.rows) for each in found)
        return f"{name}: {measured} of {total} rows measured, too few for a rank correlation."
    return f"{name}: rank correlation of the rows' order with the paper's {' and '.join(values)}."


def claims(evidence: Evidence) -> Iterator[dict[str, Any]]:
    """Every claim in every setting, those with a verdict apart from those not measured."""
    for setting in evidence.settings:
        verdicts = evidence.verdicts[setting]
        yield {
            "title": setting.title,
            "measured": [claim_row(item) for item in verdicts if item.verdict != "not measured"],
            "missing": [item for item in verdicts if item.verdict == "not measured"],
        }


def claims_over_scales(evidence: Evidence) -> Table | None:
    """The claims with a column for each scale; None where fewer than two measure any."""
    rows = list(standings(evidence))
    settings = [
        setting
        for setting in by_weight(evidence.settings)
        if any(setting in standing.verdicts for standing in rows)
    ]
    if len(settings) < 2:
        return None
    columns = (
        Column("claim"),
        Column("verdict"),
        Column("rests on"),
        *(Column(setting.title, "mean difference, points") for setting in settings),
        Column("paper", "mean difference, points"),
        Column("comparisons", note="that all settings of the line have"),
        Column("with scale", note="from the smallest to the largest that is not departed from"),
    )
    caption = (
        "The paper's claims over the scales. The verdict is that of the first setting that decides "
        "the claim. Marks are the verdicts of the settings, on all comparisons that each has. "
        "Differences are means over the comparisons that all settings of the line have."
    )
    return Table(caption, columns, [scale_row(item, settings) for item in rows])


def scale_row(standing: Standing, settings: Sequence[Setting]) -> tuple[object, ...]:
    said = f"{MARKS[standing.verdict]} {standing.verdict}"
    return (
        standing.claim.meaning,
        f"{said}; the scales disagree" if standing.disagree else said,
        standing.rests_on.title,
        *(scale_cell(standing, setting) for setting in settings),
        points(standing.paper),
        whole(standing.shared),
        standing.trend,
    )


def scale_cell(standing: Standing, setting: Setting) -> Number:
    """A setting's mean difference ± its standard error, behind the mark of its verdict."""
    verdict, point = standing.verdicts.get(setting), standing.points.get(setting)
    if verdict is None:
        return Number(None, NOTHING)
    if point is None:
        return Number(None, MARKS[verdict.verdict])
    text = points(point.difference).text + plus_minus(point.error)
    return Number(point.difference, f"{MARKS[verdict.verdict]} {text}")


def claim_row(verdict: Verdict) -> tuple[Verdict, Sequence[Number], Sequence[str]]:
    """A verdict with its numbers and its comparisons in words."""
    error = verdict.deviation
    numbers = (
        points(verdict.effect),
        Number(error, NOTHING if error is None else f"{error:.2f}"),
        whole(verdict.seeds),
        Number(verdict.measured, f"{verdict.measured} of {len(verdict.outcomes)}"),
    )
    told = [item for item in verdict.outcomes if item.verdict != "not measured" or item.remark]
    return verdict, numbers, [item.line for item in told]


def hierarchies() -> list[Table]:
    """Figures 2 and 3: the networks as tables of their stages."""
    vgg, resnet = (list(dict.fromkeys(networks(prefix))) for prefix in ("vgg", "resnet"))
    return [
        hierarchy_table("Figure 2 as a table: hierarchies of the VGG family, in convolutions", vgg),
        hierarchy_table(
            "Figure 3 as a table: hierarchies of the ResNet family, in residual blocks", resnet
        ),
    ]


def networks(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((row.name, row.hierarchy) for row in ROWS if row.name.startswith(prefix))


def hierarchy_table(caption: str, designs: Sequence[tuple[str, tuple[int, ...]]]) -> Table:
    stages = max(len(hierarchy) for _, hierarchy in designs)
    columns = (
        Column("model"),
        *(Column(f"stage {index + 1}") for index in range(stages)),
        Column("all"),
        Column("shallow"),
        Column("share of shallow, %"),
    )
    return Table(caption, columns, [hierarchy_row(*design, stages) for design in designs])


def hierarchy_row(name: str, hierarchy: tuple[int, ...], stages: int) -> tuple[object, ...]:
    padded = [*map(whole, hierarchy), *[Number(None, NOTHING)] * (stages - len(hierarchy))]
    total, first = sum(hierarchy), sum(shallow(hierarchy))
    return name, *padded, whole(total), whole(first), percent(100 * first / total, 0)
