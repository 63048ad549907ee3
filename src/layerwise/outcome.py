"""What ``layerwise accelerate`` shows: proposals with their costs, what the base's units gain, the outcome and its figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from layerwise import hierarchy, timeline
from layerwise.compare import summarise
from layerwise.costs import Cost
from layerwise.hierarchy import design_of, fulfils_equation_7, segments, shallow_scale
from layerwise.proposals import mean_height, scale_layers
from layerwise.ranking import Ranked
from layerwise.runs import Run, replacing

LOCAL, GLOBAL = "simultaneous", "global"


def show_proposals(run: Run, costs: Sequence[Cost], found: int, budgets: Sequence[str]) -> None:
    """Print the costs of the base, which is the first, and of the first proposals; memory in MB (10^6 bytes)."""
    base = costs[0]
    title = f"{run.model} {base.design.text} on {run.data}: {found:,} designs with downsampling accelerated within "
    table = Table(title=title + ", ".join(budgets), caption=PROPOSALS.format(batch=run.batch_size, shown=len(costs) - 1))
    for heading in ("hierarchy", "relation", "equation 7"):
        table.add_column(heading)
    for heading in ("shallow scale, pixels", "parameters", "multiply-adds, M", "of a step, G", "activations, MB", "peak, MB"):
        table.add_column(heading, justify="right")
    for cost in costs:
        between = segments(cost.design)
        table.add_row(
            cost.design.text,
            "base" if cost == base else relation(cost, base),
            "<" if fulfils_equation_7(between) else "≤" if fulfils_equation_7(between, False) else "no",
            f"{scale(cost, base):.1f}",
            f"{cost.parameters:,}",
            f"{cost.multiply_adds / 1e6:,.1f}",
            pair(cost.local_step_multiply_adds, cost.global_step_multiply_adds, 1e9),
            pair(cost.local_activation_bytes, cost.global_activation_bytes, 1e6),
            pair(cost.local_peak_bytes, cost.global_peak_bytes, 1e6),
        )
    print_table(table)


def relation(cost: Cost, base: Cost) -> str:
    """A proposal's relation to the base in a word or two."""
    if cost.downsample_after is None:
        return hierarchy.relation(cost.hierarchy, base.hierarchy)
    return "halved earlier" if cost.resolutions[-1] == base.resolutions[-1] else "halved once more"


def scale(cost: Cost, base: Cost) -> float:
    """Scale(X_i), i ≤ k, of equation 8, in pixels: the mean height of the shallow part's maps."""
    if cost.downsample_after is None:
        return shallow_scale(cost.hierarchy, cost.resolutions, scale_layers(base.hierarchy))
    return mean_height(cost.design, base.resolutions[0], scale_layers(base.hierarchy))


PROPOSALS = (
    "The first {shown}; --listed shows more, --json all. Multiply-adds of a forward pass on an image; of a step on a batch of "
    "{batch}, layer-wise / global, as are activations kept for the backward pass and the peak of memory counted whole. "
    "Equation 7: shallow stages have fewer (<) or no more (≤) convolutions than deep ones."
)


def show_gains(gains: Sequence[Sequence[float]]) -> None:
    """Print what each convolution or block of the base adds to a linear probe's accuracy, in points."""
    for stage, measured in enumerate(gains, start=1):
        print(f"stage {stage} gains, points: {', '.join(f'{gain:+.2f}' for gain in measured)}", flush=True)


def gather(costs: Sequence[Cost], ranking: Sequence[Ranked], results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per design of what was trained, the base first.

    Returns:
        The cost's entries; ``predicted_rank`` (None of the base) and ``predicted``; ``rules``, ``gap`` as ``summarise`` gives
        them (test accuracy in percent, memory in bytes, seconds); ``val_accuracy``, layer-wise, the mean over seeds; ``gain``,
        points of layer-wise test accuracy above the base's; ``pareto``, whether no other has as much of it for fewer
        multiply-adds, or more for as many. What has no results yet is None.
    """
    places = {ranked.design: ranked for ranked in ranking}
    rows = []
    for cost in costs:
        own = [dict(result) for result in results if design_of(result) == cost.design]
        local = [result["val_accuracy"] for result in own if result["rule"] == LOCAL]
        whole = {result["rule"] for result in own} == {LOCAL, GLOBAL}
        ranked = places.get(cost.design)
        rows.append(
            cost.describe()
            | {"predicted_rank": ranked.rank or None if ranked else None, "predicted": ranked.text if ranked else None}
            | dict.fromkeys(("rules", "gap", "gain", "pareto"))
            | (summarise(cost.design.text, (LOCAL, GLOBAL), own) if whole else {})
            | {"hierarchy": list(cost.hierarchy), "val_accuracy": mean(local) if local and whole else None}
        )
    judge(rows)
    return rows


def judge(rows: Sequence[dict[str, Any]]) -> None:
    """Add ``gain`` and ``pareto`` to the rows that have results."""
    known = [row for row in rows if row["rules"]]
    for row in known:
        if rows[0]["rules"]:
            row["gain"] = local_accuracy(row) - local_accuracy(rows[0])
        row["pareto"] = not any(dominates(other, row) for other in known)


def dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one is at least as good and as cheap as the other, and better in one of both."""
    pairs = (local_accuracy(one), -one["multiply_adds"]), (local_accuracy(other), -other["multiply_adds"])
    return pairs[0] != pairs[1] and all(mine >= its for mine, its in zip(*pairs, strict=True))


def local_accuracy(row: Mapping[str, Any]) -> float:
    accuracy: float = row["rules"][LOCAL]["test_accuracy"]
    return accuracy


def show(run: Run, epochs: int, seeds: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the outcome: test accuracy of the last epoch in percent, memory in MB (10^6 bytes), time in seconds."""
    title = f"{run.model} on {run.data}, {epochs} epochs, {seeds} seed{'s' * (seeds > 1)}: test accuracy, %"
    table = Table(title=title, caption=OUTCOME)
    table.add_column("hierarchy")
    headings = ("predicted rank", "parameters", "multiply-adds, M", "layer-wise", "global", "gap", "peak memory, MB", "time, s")
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        words = f" ({row['predicted']})" if row["predicted"] else ""
        cells = [f"{row['predicted_rank'] or 'base'}{words}"]
        cells += [f"{row['parameters']:,}", f"{row['multiply_adds'] / 1e6:,.1f}", *measured_cells(row)]
        table.add_row(design_of(row).text + (" *" if row["pareto"] else ""), *cells)
    print_table(table)


OUTCOME = "* on the Pareto front of layer-wise accuracy against multiply-adds. Peaks and times: layer-wise / global."


def measured_cells(row: Mapping[str, Any]) -> list[str]:
    """Accuracies, gap, memory and time; dashes where another process has not finished yet."""
    if not row["rules"]:
        return ["–"] * 5
    local, whole = row["rules"][LOCAL], row["rules"][GLOBAL]
    return [
        *(with_deviation(cell) for cell in (local, whole)),
        f"{row['gap'][LOCAL]:.2f}",
        pair(local["peak_memory_bytes"], whole["peak_memory_bytes"], 1e6),
        f"{local['train_seconds']:.0f} / {whole['train_seconds']:.0f}",
    ]


def with_deviation(cell: Mapping[str, Any]) -> str:
    return f"{cell['test_accuracy']:.2f}" + (f" ± {cell['deviation']:.2f}" if cell["deviation"] is not None else "")


def pair(local: int | None, whole: int | None, unit: float) -> str:
    return " / ".join("–" if value is None else f"{value / unit:,.1f}" for value in (local, whole))


def print_table(table: Table) -> None:
    Console(width=None if Console().is_terminal else 240).print(table)


def check_figure(path: str) -> None:
    """Refuse a figure that could not be drawn in the end.

    Raises:
        InvalidInput: its type or folder does not exist, or matplotlib is missing.
    """
    timeline.check_figure(path, predict=False)


def draw(path: str, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a figure of accuracy against work; see ``figures.pareto``."""
    import matplotlib

    from layerwise.figures import pareto
    from layerwise.figures.style import DPI, RULES

    kind = Path(path).suffix[1:]
    with matplotlib.rc_context(RULES), replacing(Path(path)) as draft:
        figure = pareto.draw(title, rows)
        figure.savefig(draft, format=kind, dpi=DPI, metadata={"Date": None} if kind == "svg" else None)
