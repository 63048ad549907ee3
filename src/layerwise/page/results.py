"""The page's tables: the paper's six with what was measured beside them, the claims, the hierarchies."""

from collections.abc import Iterator, Sequence

from layerwise.claims import INCONSISTENCIES, Verdict, rank_correlation
from layerwise.evidence import Evidence, gap
from layerwise.hierarchy import format_hierarchy
from layerwise.measured import Measured, Setting, own_columns
from layerwise.page.markup import NOTHING, Column, Markup, Number, items, join, percent, points, section, table, tag, uncertain
from layerwise.page.story import count
from layerwise.paper import ROMAN, ROWS, TABLES, Row

MARKS = {"holds": "✓", "does not hold": "✗", "undecided": "?", "not measured": "–"}
PAPER = (Column("layer-wise", "paper, %"), Column("global", "paper, %"), Column("gap", "paper, %", "global less layer-wise"))


def paper_tables(evidence: Evidence) -> Markup:
    """All six; each setting has tables of its own, so that no column mixes two."""
    parts = []
    for number in TABLES:
        rows = [row for row in ROWS if row.table == number]
        parts.append(tag("h3", f"Table {ROMAN[number - 1]}: {rows[0].data}", id=f"table-{number}"))
        measured = [setting for setting in evidence.settings if evidence.has(setting, rows)]
        parts += [measured_table(evidence, setting, rows) for setting in measured] or [printed_table(rows)]
    note = tag(
        "p",
        "Test accuracy of the last epoch in percent, mean ± deviation of a single run (seeds). The gap is global less "
        "layer-wise. Numbers of different scales never share a column: where the scale is not the paper's, the difference to "
        "the paper tells how far the scales are apart, and the order of the rows is what can be compared.",
    )
    return section("tables", "The paper's tables", note, *parts)


def printed_table(rows: Sequence[Row]) -> Markup:
    """A table of which nothing was measured."""
    caption = f"Table {ROMAN[rows[0].table - 1]}, the paper's numbers. Nothing of it was measured in these runs."
    return table(caption, (Column("model"), Column("hierarchy"), *PAPER), (printed(row) for row in rows))


def printed(row: Row) -> tuple[object, ...]:
    local, globally = row.layerwise_accuracy, row.global_accuracy
    return row.name, format_hierarchy(row.hierarchy), percent(local), percent(globally), points(gap(local, globally))


def measured_table(evidence: Evidence, setting: Setting, rows: Sequence[Row]) -> Markup:
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
    departs = f" Departs from this scale by: {'; '.join(setting.departures)}." if setting.departures else ""
    caption = f"Table {ROMAN[rows[0].table - 1]} beside what was measured at {setting.scale} scale.{departs}"
    body = [measured_row(evidence, setting, row) for row in rows]
    orders = tag("p", " ".join(order(evidence, setting, rows[0].table, column) for column in own_columns(setting)))
    return join([table(caption, columns, body), orders])


def measured_row(evidence: Evidence, setting: Setting, row: Row) -> tuple[object, ...]:
    found = [evidence.number(setting, row, column) for column in ("layerwise", "global")]
    local, globally = (number.mean if number else None for number in found)
    ours = (local, globally, gap(local, globally))
    theirs = (row.layerwise_accuracy, row.global_accuracy, gap(row.layerwise_accuracy, row.global_accuracy))
    apart = [None if one is None or other is None else one - other for one, other in zip(ours, theirs, strict=True)]
    return *printed(row), *map(spread, found), points(ours[2]), *map(points, apart)


def spread(number: Measured | None) -> Number:
    return uncertain(number.mean, number.deviation, len(number.seeds)) if number else uncertain(None, None, 0)


def order(evidence: Evidence, setting: Setting, number: int, column: str) -> str:
    """The rank correlation in a sentence."""
    found = rank_correlation(evidence.of_table(number), number, setting, column)
    name = "Layer-wise" if column == "layerwise" else "Global"
    total = sum(row.table == number for row in ROWS)
    if found.spearman is None:
        return f"{name}: {found.n} of {total} rows measured, too few for a rank correlation."
    value = f"{found.spearman:.2f}".replace("-", "−")
    return f"{name}: rank correlation of the rows' order with the paper's {value} (Spearman, {found.n} of {total} rows)."


def claims(evidence: Evidence) -> Markup:
    """Every claim in every setting, with the verdict and its numbers."""
    parts: list[Markup] = []
    for setting in evidence.settings:
        verdicts = evidence.verdicts[setting]
        measured = [verdict for verdict in verdicts if verdict.verdict != "not measured"]
        parts.append(tag("h3", f"Measured at {setting.title}"))
        parts.append(claims_table(setting, measured))
        missing = [verdict for verdict in verdicts if verdict.verdict == "not measured"]
        if missing:
            listed = items(quoted(verdict) for verdict in missing)
            parts.append(tag("details", join([tag("summary", f"{count(len(missing), 'claim')} not measured"), listed])))
    if not parts:
        parts.append(tag("p", "No run decides any: nothing of the paper's tables was measured."))
    rule = tag(
        "p",
        "Runs with the same seed are paired. A comparison holds where the difference, averaged over the seeds that both sides "
        "have, exceeds what their scatter explains (95 %), does not hold where it is as far below zero, and is undecided "
        "between. The scatter is of all runs of the data set and column once row and seed are accounted for; rows with one "
        "seed borrow it, and say so. A claim holds where all comparisons that are measured do, and does not hold where one "
        "does not, beyond what chance does to so many. The effect is the claim's weakest comparison, in points.",
    )
    return section("claims", "Does the paper hold?", rule, *parts, inconsistencies())


def claims_table(setting: Setting, verdicts: Sequence[Verdict]) -> Markup:
    columns = (
        Column("verdict"),
        Column("claim"),
        Column("effect"),
        Column("error", note="standard error"),
        Column("seeds"),
        Column("measured", note="comparisons"),
        Column("in detail"),
    )
    caption = f"The paper's claims at {setting.title}"
    return table(caption, columns, map(claim_row, verdicts))


def claim_row(verdict: Verdict) -> tuple[object, ...]:
    effect, error = verdict.effect, verdict.deviation
    known = [outcome.line for outcome in verdict.outcomes if outcome.verdict != "not measured" or outcome.remark]
    comparisons = tag("details", join([tag("summary", count(len(known), "comparison")), items(known)]))
    return (
        mark(verdict),
        quoted(verdict),
        points(effect),
        Number(error, NOTHING if error is None else f"{error:.2f}"),
        Number(verdict.seeds, str(verdict.seeds)),
        Number(verdict.measured, f"{verdict.measured} of {len(verdict.outcomes)}"),
        comparisons,
    )


def mark(verdict: Verdict) -> Markup:
    key = verdict.verdict.replace(" ", "-")
    return tag("span", f"{MARKS[verdict.verdict]} {verdict.verdict}", class_=f"verdict {key}")


def quoted(verdict: Verdict) -> Markup:
    """The paper's sentence, what is compared, and what else a reader should know."""
    claim = verdict.claim
    words = {True: "The paper's tables bear it out.", False: "The paper's own tables do not bear it out.", None: ""}
    remarks = " ".join(filter(None, [words[verdict.paper_agrees], verdict.note]))
    return join([tag("q", claim.sentence), Markup("<br>"), claim.meaning, " ", tag("small", remarks)])


def inconsistencies() -> Markup:
    """Where the paper's own numbers contradict each other."""
    return join([tag("h3", "Where the paper contradicts itself"), items(item.text for item in INCONSISTENCIES)])


def hierarchies() -> Markup:
    """Figures 2 and 3: the networks as tables of their stages."""
    vgg, resnet = (list(dict.fromkeys(networks(prefix))) for prefix in ("vgg", "resnet"))
    note = tag(
        "p",
        "Convolutions (VGG) or residual blocks (ResNet) between two downsamplings, shallow to deep. Shallow: the first half of "
        "the stages, in which the paper sees the trouble.",
    )
    return section(
        "hierarchies",
        "Hierarchies",
        note,
        hierarchy_table("Figure 2 as a table: hierarchies of the VGG family, in convolutions", vgg),
        hierarchy_table("Figure 3 as a table: hierarchies of the ResNet family, in residual blocks", resnet),
    )


def networks(prefix: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((row.name, row.hierarchy) for row in ROWS if row.name.startswith(prefix))


def hierarchy_table(caption: str, found: Sequence[tuple[str, tuple[int, ...]]]) -> Markup:
    stages = max(len(hierarchy) for _, hierarchy in found)
    columns = (
        Column("model"),
        *(Column(f"stage {index + 1}") for index in range(stages)),
        Column("all"),
        Column("shallow"),
        Column("share of shallow, %"),
    )
    return table(caption, columns, (hierarchy_row(name, hierarchy, stages) for name, hierarchy in found))


def hierarchy_row(name: str, hierarchy: tuple[int, ...], stages: int) -> tuple[object, ...]:
    padded = [Number(depth, str(depth)) for depth in hierarchy] + [Number(None, NOTHING)] * (stages - len(hierarchy))
    total, shallow = sum(hierarchy), sum(hierarchy[: len(hierarchy) // 2])
    return name, *padded, Number(total, str(total)), Number(shallow, str(shallow)), percent(100 * shallow / total, 0)
