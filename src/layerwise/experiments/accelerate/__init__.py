"""``layerwise accelerate``: designs that downsample earlier, ranked, the best of them trained."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from layerwise.data import DATASETS
from layerwise.errors import InvalidInput, check_range, choose
from layerwise.experiments.accelerate.budgets import Budget, parse_budgets
from layerwise.experiments.accelerate.costs import Cost, Costs, base_hierarchy, with_design
from layerwise.experiments.accelerate.proposals import propose, propose_downsampling
from layerwise.experiments.accelerate.ranking import (
    RANKINGS,
    SHORT_EPOCHS,
    SHORT_SEEDS,
    Ranked,
    mean_gains,
    measured_gains,
    rank_by_count,
    rank_by_gain,
)
from layerwise.experiments.accelerate.results import (
    GLOBAL,
    LOCAL,
    describe,
    draw,
    print_gains,
    print_proposals,
    print_results,
    result_rows,
)
from layerwise.experiments.engines import Engine
from layerwise.experiments.entry import entries
from layerwise.experiments.sweep import trained
from layerwise.hierarchy import Design, check_stages, design_of
from layerwise.models import MODELS, Published, published_hierarchy
from layerwise.profiling.plot import check_figure
from layerwise.runs.command import command
from layerwise.runs.ranges import MOST_EPOCHS, MOST_SEEDS
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare
from layerwise.utils.plugins import IMPORTED
from layerwise.utils.words import counted

MOVES = ("convolutions", "downsampling")
SHORT = "short"  # folder of the runs that gains are measured in, in the output folder


@dataclass(frozen=True)
class Search:
    """Designs to look for, and trainings to compare them by.

    Attributes:
        budgets: see ``budgets.parse_budgets``.
        move: a name in ``MOVES``: what proposals change.
        rank: a name in ``RANKINGS``.
        finalists: the designs that are trained beside the base, layer-wise and globally.
        seeds: of each, from the run's on.
        final_epochs: of a finalist; 0: a tenth of the run's.
        listed: proposals in the table.
        figure: file for a figure of accuracy against work.
    """

    budgets: tuple[str, ...] = ()
    move: str = "convolutions"
    rank: str = "count"
    finalists: int = 3
    seeds: int = 1
    final_epochs: int = 0
    listed: int = 5
    figure: str | None = None


def accelerate(
    base: Run,
    search: Search,
    output: Path,
    execution: Execution,
    dry_run: bool,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Find a design within budgets that learns better layer-wise than the base's.

    Finished runs are not trained again.

    Args:
        base: the run to improve on; its epochs are those of a full-length training.
        output: folder that holds all runs.
        dry_run: list the proposals with their costs and train nothing.
        engine: whose workers train the runs; None: this process.

    Returns:
        ``base`` and ``proposals``, those listed or trained: costs (see ``costs.Cost``) and how
        each relates to the base; ``ranking``, of all within the budgets but that of memory;
        ``gains``, by stage; ``results`` (see ``results.result_rows``), ``winner`` and ``command``,
        None in a dry run.

    Raises:
        InvalidInput: an option cannot be used, or no design is within the budgets.
        KeyboardInterrupt: stopped by a signal; the same command goes on.
    """
    base, search = checked(base, search, dry_run)
    if not dry_run:
        refuse_nothing_held_out(base, execution)
    costs, budgets = Costs(base), parse_budgets(search.budgets)
    proposals = propose_designs(base, search.move, budgets, costs)
    gains = short_gains(base, output, execution, engine) if search.rank == "gain" else None
    ranking = rank_by_count(proposals) if gains is None else rank_by_gain(proposals, gains)
    own = costs.cost(base_hierarchy(base))
    first = first_costs(ranking, max(search.listed, search.finalists), budgets, costs, own)
    print_proposals(base, own, first, count_text(budgets, len(proposals)))
    report = {
        "model": base.model,
        "data": base.data,
        "budgets": [describe_budget(budget, costs, own) for budget in budgets],
        "move": search.move,
        "base": describe(own, own),
        "proposals": [describe(cost, own) for cost in first],
        "ranking": [ranked.describe() for ranked in ranking],
        "gains": gains,
        **dict.fromkeys(("results", "winner", "command")),
    }
    if dry_run:
        print("nothing was trained", flush=True)
        return report
    chosen = [own, *first[: search.finalists]]
    runs = finals(base, search, chosen)
    results = trained(entries(runs, output, execution), engine)
    rows = result_rows(chosen, ranking, results)
    print_results(base, search.final_epochs, search.seeds, rows)
    if search.figure is not None:
        draw(
            search.figure,
            f"{base.model} on {base.data}, {counted(search.final_epochs, 'epoch')}",
            rows,
        )
        print(f"written: {search.figure}", flush=True)
    return report | {"results": rows} | announce(base, rows, execution)


def checked(base: Run, search: Search, dry_run: bool) -> tuple[Run, Search]:
    """The base trained layer-wise and the search with its epochs.

    All refusals that need no data are made here.

    Raises:
        InvalidInput: naming the option.
    """
    choose("data set", base.data, DATASETS)
    check_search(search, dry_run)
    if base.downsample_after is not None:
        raise InvalidInput(
            "Cannot use --downsample-after: it is what --move downsampling proposes. Leave it out."
        )
    hierarchy = base_hierarchy(base)
    check_stages(base.model, hierarchy, published_hierarchy(base.model))
    base = replace(base, rule=LOCAL, hierarchy=",".join(map(str, hierarchy)))
    prepare(base, Execution())
    if base.at not in ("layer", "block"):
        raise InvalidInput(
            f"Cannot use --at {base.at}: it cuts different hierarchies at different places. Give "
            "layer or block."
        )
    if not dry_run and not 0 < base.val_fraction < 1:
        raise InvalidInput(
            f"Cannot use --val-fraction {base.val_fraction}: it holds no images out to rank by. "
            "Give a share such as 0.1."
        )
    return base, replace(search, final_epochs=search.final_epochs or max(1, base.epochs // 10))


def refuse_nothing_held_out(base: Run, execution: Execution) -> None:
    """Refuse data of which no image is held out to rank by.

    Raises:
        InvalidInput: as said, or the data cannot be read.
    """
    if prepare(base, execution).load_data().validation is None:
        raise InvalidInput(
            f"Cannot use --val-fraction {base.val_fraction}: of so few images it holds none out to "
            "rank by. Give a larger share, or more --train-images."
        )


def check_search(search: Search, dry_run: bool) -> None:
    """Refuse options of a search that cannot be used.

    Raises:
        InvalidInput: naming the option.
    """
    choose("move", search.move, MOVES)
    choose("rank", search.rank, RANKINGS)
    if search.rank == "gain" and search.move != "convolutions":
        raise InvalidInput(
            "Cannot use --rank gain with --move downsampling: it ranks by what convolutions add, "
            "which says nothing of where maps are halved. Leave one of them out."
        )
    if search.rank == "gain" and dry_run:
        raise InvalidInput(
            "Cannot use --rank gain with --dry-run: it trains the base, and --dry-run trains "
            "nothing. Leave one of them out."
        )
    for name, least in (("finalists", 1), ("seeds", 1), ("listed", 1), ("final_epochs", 0)):
        most = MOST_EPOCHS if name == "final_epochs" else MOST_SEEDS
        check_range(f"--{name.replace('_', '-')}", getattr(search, name), least, most)
    if search.figure is not None:
        check_figure(search.figure, "accelerate")
        if dry_run:
            raise InvalidInput(
                "Cannot use --figure with --dry-run: it shows accuracies, and --dry-run trains "
                "nothing. Leave one of them out."
            )


def propose_designs(base: Run, move: str, budgets: Sequence[Budget], costs: Costs) -> list[Design]:
    """The proposals of either kind of move, in order."""
    arguments = base_hierarchy(base), budgets, costs.amount, costs.resolutions
    if move == "convolutions":
        return [Design(hierarchy) for hierarchy in propose(*arguments)]
    return propose_downsampling(*arguments, pools=pools_maps(base.model))


def pools_maps(model: str) -> bool:
    """Whether maps are halved by pooling, and not by a stride."""
    factory = MODELS[model]
    return isinstance(factory, Published) and factory.family.pools_maps


def short_gains(
    base: Run, output: Path, execution: Execution, engine: Engine | None
) -> list[list[float]]:
    """The mean gains of the base's units, after short runs of the base."""
    print("short runs of the base, to measure what its units gain", flush=True)
    runs = [
        replace(base, epochs=SHORT_EPOCHS, seed=base.seed + number) for number in range(SHORT_SEEDS)
    ]
    wanted = entries(runs, output / SHORT, execution)
    trained(wanted, engine)
    folders = [entry.folder for entry in wanted]
    gains = mean_gains([measured_gains(folder, execution) for folder in folders])
    print_gains(gains)
    return gains


def first_costs(
    ranking: Sequence[Ranked], most: int, budgets: Sequence[Budget], costs: Costs, own: Cost
) -> list[Cost]:
    """The costs of the best of a ranking, at most so many, that are within a budget of memory.

    Raises:
        InvalidInput: none is.
    """
    designs = iter([ranked.design for ranked in ranking])
    memory = next((budget for budget in budgets if budget.kind == "memory"), None)
    if memory is not None:
        designs = costs.within_memory(designs, memory.limit(own.local_peak_bytes))
    chosen = list(islice(designs, most))
    if not chosen and memory is not None:
        raise InvalidInput(
            f"Cannot keep to --budget {memory.text}: no proposal is within it. Give more memory."
        )
    return [costs.cost(design.hierarchy, design.downsample_after) for design in chosen]


def count_text(budgets: Sequence[Budget], count: int) -> str:
    """A sentence on how many designs are within the budgets.

    Only the first designs are held against a budget of memory.
    """
    counted = ", ".join(budget.text for budget in budgets if budget.kind != "memory")
    memory = [f", the first within {budget.text}" for budget in budgets if budget.kind == "memory"]
    return f"{count:,} designs with downsampling accelerated within {counted}" + "".join(memory)


def finals(base: Run, search: Search, chosen: Sequence[Cost]) -> list[Run]:
    """The runs that are compared: seed by seed, each design layer-wise and globally."""
    return [
        replace(
            with_design(base, cost.design),
            rule=rule,
            seed=base.seed + number,
            epochs=search.final_epochs,
        )
        for number in range(search.seeds)
        for cost in chosen
        for rule in (LOCAL, GLOBAL)
    ]


def announce(base: Run, rows: Sequence[dict[str, Any]], execution: Execution) -> dict[str, Any]:
    """Say which design did best layer-wise on validation images, and how to train it in full."""
    winner = max(rows, key=lambda row: row["val_accuracy"])
    design = design_of(winner)
    command = train_command(with_design(base, design), execution)
    gained = f"{winner['gain']:+.2f} points on test images"
    how = "the base itself" if winner is rows[0] else gained
    print(
        f"best layer-wise on validation images: {design.text} ({how}); at full length:\n{command}",
        flush=True,
    )
    return {"winner": design.describe(), "command": command}


def train_command(run: Run, execution: Execution) -> str:
    """The command that trains a run, and where its data are."""
    elsewhere = execution.data_dir != Execution.data_dir
    place = [shlex.join(["--data-dir", execution.data_dir])] if elsewhere else []
    return " ".join([command(run, IMPORTED), *place])


def describe_budget(budget: Budget, costs: Costs, own: Cost) -> dict[str, Any]:
    limit = budget.limit(costs.amount(budget.kind, own.hierarchy))
    return {"budget": budget.text, "kind": budget.kind, "limit": limit}
