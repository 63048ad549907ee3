"""Results of ``layerwise accelerate``: proposals with their costs, gains, what was trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from layerwise import hierarchy
from layerwise.experiments.accelerate.costs import Cost
from layerwise.experiments.accelerate.proposals import mean_height, scale_layers
from layerwise.experiments.accelerate.ranking import Ranked
from layerwise.experiments.compare import summarise
from layerwise.experiments.front import on_front
from layerwise.hierarchy import design_of, fulfils_equation_7, segments, shallow_scale
from layerwise.runs.run import Run
from layerwise.utils.files import figure_metadata, replacing
from layerwise.utils.terminal import print_table
from layerwise.utils.words import counted, plus_minus

LOCAL, GLOBAL = "simultaneous", "global"
PROPOSALS = (
    "The first {shown}; --listed shows more. Multiply-adds of a forward pass on an image; of a "
    "step on a batch of {batch}, layer-wise / global, as are activations kept for the backward "
    "pass and the peak of memory counted whole. Equation 7: shallow stages have fewer (<) or no "
    "more (≤) convolutions than deep ones."
)
TRAINED = (
    "* on the Pareto front of layer-wise accuracy against multiply-adds. "
    "Peaks and times: layer-wise / global."
)


def print_proposals(run: Run, base: Cost, proposals: Sequence[Cost], count_text: str) -> None:
    """Print the costs of the base and of the first proposals; memory in MB (10^6 bytes).

    Args:
        count_text: how many there are, in words.
    """
    table = Table(
        title=f"{run.model} {base.design.text} on {run.data}: {count_text}",
        caption=PROPOSALS.format(batch=run.batch_size, shown=len(proposals)),
    )
    for heading in ("hierarchy", "relation", "equation 7"):
        table.add_column(heading)
    for heading in ("shallow scale, pixels", "parameters", "multiply-adds, M", "of a step, G"):
        table.add_column(heading, justify="right")
    for heading in ("activations, MB", "peak, MB"):
        table.add_column(heading, justify="right")
    for cost in (base, *proposals):
        between = segments(cost.design)
        table.add_row(
            cost.design.text,
            "base" if cost == base else relation(cost, base),
            "<"
            if fulfils_equation_7(between)
            else "≤"
            if fulfils_equation_7(between, False)
            else "no",
            f"{scale(cost, base):.1f}",
            f"{cost.parameters:,}",
            f"{cost.multiply_adds / 1e6:,.1f}",
            pair(cost.local_step_multiply_adds, cost.global_step_multiply_adds, 1e9),
            pair(cost.local_activation_bytes, cost.global_activation_bytes, 1e6),
            pair(cost.local_peak_bytes, cost.global_peak_bytes, 1e6),
        )
    print_table(table)


def describe(cost: Cost, base: Cost) -> dict[str, Any]:
    """A proposal as the command's JSON shows it."""
    between = segments(cost.design)
    return cost.describe() | {
        "relation": relation(cost, base),
        "segments": list(between),
        "equation_7": fulfils_equation_7(between),
        "equation_7_weakly": fulfils_equation_7(between, strict=False),
        "shallow_scale": scale(cost, base),
    }


def relation(cost: Cost, base: Cost) -> str:
    """A proposal's relation to the base in a word or two."""
    if cost.downsample_after is None:
        return hierarchy.relation(cost.hierarchy, base.hierarchy)
    as_often = cost.resolutions[-1] == base.resolutions[-1]
    return "halved earlier" if as_often else "halved once more"


def scale(cost: Cost, base: Cost) -> float:
    """Scale(X_i), i ≤ k, of equation 8, in pixels: the mean height of the shallow part's maps."""
    layers = scale_layers(base.hierarchy)
    if cost.downsample_after is None:
        return shallow_scale(cost.hierarchy, cost.resolutions, layers)
    return mean_height(cost.design, base.resolutions[0], layers)


def print_gains(gains: Sequence[Sequence[float]]) -> None:
    """Print what each convolution or block of the base adds to a linear probe, in points."""
    for stage, measured in enumerate(gains, start=1):
        points = ", ".join(f"{gain:+.2f}" for gain in measured)
        print(f"stage {stage} gains, points: {points}", flush=True)


def result_rows(
    costs: Sequence[Cost], ranking: Sequence[Ranked], results: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row per trained design, the base first.

    Args:
        ranking: of the designs that were ranked.
        results: of every design's layer-wise and global runs.

    Returns:
        The cost's entries; ``predicted_rank`` and ``predicted``, None of the base; ``rules`` and
        ``gap`` as ``summarise`` gives them (test accuracy in percent, memory in bytes, seconds);
        ``val_accuracy``, layer-wise, the mean over seeds; ``gain``, points of layer-wise test
        accuracy above the base's; ``pareto``, whether no row has as much of it for fewer
        multiply-adds, or more for as many.
    """
    places = {ranked.design: ranked for ranked in ranking}
    rows = []
    for cost in costs:
        own = [dict(result) for result in results if design_of(result) == cost.design]
        ranked = places.get(cost.design)
        rows.append(
            cost.describe()
            | summarise(cost.design.text, (LOCAL, GLOBAL), own)
            | {
                "hierarchy": list(cost.hierarchy),
                "predicted_rank": ranked.rank if ranked else None,
                "predicted": ranked.text if ranked else None,
                "val_accuracy": mean(r["val_accuracy"] for r in own if r["rule"] == LOCAL),
            }
        )
    for row in rows:
        row["gain"] = local_accuracy(row) - local_accuracy(rows[0])
    front = on_front([(local_accuracy(row), row["multiply_adds"]) for row in rows])
    for row, best in zip(rows, front, strict=True):
        row["pareto"] = best
    return rows


def local_accuracy(row: Mapping[str, Any]) -> float:
    accuracy: float = row["rules"][LOCAL]["test_accuracy"]
    return accuracy


def print_results(run: Run, epochs: int, seeds: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the results: test accuracy of the last epoch in percent, MB (10^6 bytes), seconds."""
    length = f"{counted(epochs, 'epoch')}, {counted(seeds, 'seed')}"
    title = f"{run.model} on {run.data}, {length}: test accuracy, %"
    table = Table(title=title, caption=TRAINED)
    table.add_column("hierarchy")
    for heading in ("predicted rank", "parameters", "multiply-adds, M", "layer-wise", "global"):
        table.add_column(heading, justify="right")
    for heading in ("gap", "peak memory, MB", "time, s"):
        table.add_column(heading, justify="right")
    for row in rows:
        words = f" ({row['predicted']})" if row["predicted"] else ""
        local, whole = row["rules"][LOCAL], row["rules"][GLOBAL]
        table.add_row(
            design_of(row).text + (" *" if row["pareto"] else ""),
            f"{row['predicted_rank'] or 'base'}{words}",
            f"{row['parameters']:,}",
            f"{row['multiply_adds'] / 1e6:,.1f}",
            with_deviation(local),
            with_deviation(whole),
            f"{row['gap'][LOCAL]:.2f}",
            pair(local["peak_memory_bytes"], whole["peak_memory_bytes"], 1e6),
            f"{local['train_seconds']:.0f} / {whole['train_seconds']:.0f}",
        )
    print_table(table)


def with_deviation(cell: Mapping[str, Any]) -> str:
    return f"{cell['test_accuracy']:.2f}{plus_minus(cell['deviation'])}"


def pair(local: int | None, whole: int | None, unit: float) -> str:
    return " / ".join("–" if value is None else f"{value / unit:,.1f}" for value in (local, whole))


def draw(path: str, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a figure of accuracy against work; see ``accelerate.pareto``."""
    import matplotlib

    from layerwise.experiments.accelerate import pareto
    from layerwise.report.figures.style import DPI, RULES

    kind = Path(path).suffix[1:]
    with matplotlib.rc_context(RULES), replacing(Path(path)) as draft:
        pareto.draw(title, rows).savefig(
            draft, format=kind, dpi=DPI, metadata=figure_metadata(kind)
        )
