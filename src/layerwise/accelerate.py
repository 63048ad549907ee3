"""``layerwise accelerate``: propose hierarchies that downsample earlier, rank them, train the best, say what was gained."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerwise.budgets import Budget, parse_budgets
from layerwise.build import check_run
from layerwise.compare import train_all
from layerwise.costs import IMAGES, Cost, Costs, base_hierarchy, with_design
from layerwise.errors import InvalidInput, choose
from layerwise.halving import check_optuna, rank_by_halving
from layerwise.hierarchy import Design, Hierarchy, check_stages, design_of, fulfils_equation_7, segments
from layerwise.models import MODELS, published_hierarchy
from layerwise.models.vgg import VGG
from layerwise.outcome import check_figure, draw, gather, relation, scale, show, show_gains, show_proposals
from layerwise.proposals import candidates, propose, propose_downsampling
from layerwise.ranking import Ranked, rank_by_gain, scored
from layerwise.runs import Execution, Run, RunFolder, run_name
from layerwise.tables import command as command_of

SEARCHES = ("gain", "halving")
MOVES = ("convolutions", "downsampling")
RULES = ("simultaneous", "global")
SHORT = "short"  # folder of the runs that only rank, in the output folder


@dataclass(frozen=True)
class Search:
    """What is looked for, and how long.

    Attributes:
        budgets: see ``budgets.parse_budgets``.
        move: a name in ``MOVES``: what proposals change.
        search: a name in ``SEARCHES``; None: gain, or halving for downsampling, which gains say nothing of.
        candidates: the most designs that ``halving`` tries: of hierarchies see ``proposals.candidates``, of earlier halvings
            the first in order.
        finalists: the designs that are trained beside the base, layer-wise and globally.
        seeds: of each, from the run's on.
        short_epochs: of a run that only ranks; 0: 1 to measure gains, a fortieth of the run's to halve. final_epochs: of a
            finalist; 0: a tenth.
        short_seeds: short runs that are averaged over, of the base or of each candidate, with seeds from the run's on; 0: 3 of
            the base, 1 of each candidate.
        listed: proposals in the table, for which global memory is computed.
        figure: file for a figure of accuracy against work.
    """

    budgets: tuple[str, ...] = ()
    move: str = "convolutions"
    search: str | None = None
    candidates: int = 30
    finalists: int = 3
    seeds: int = 1
    short_epochs: int = 0
    final_epochs: int = 0
    short_seeds: int = 0
    listed: int = 5
    figure: str | None = None


def accelerate(base: Run, search: Search, output: Path, execution: Execution, dry_run: bool) -> dict[str, Any]:
    """Find a design that learns better layer-wise than the base's within budgets. What is finished is not trained again.

    Args:
        base: the run to improve on; its hierarchy is the base, its epochs those of a full-length training.
        output: folder that holds all runs and the study.
        dry_run: list the proposals with their costs and train nothing.

    Returns:
        ``base`` and ``proposals``: costs (see ``costs.Cost``) and how each relates to the base; ``ranking``, ``gains`` (by
        stage, of ``gain``), ``outcome`` (see ``outcome.gather``), ``winner`` and ``command``, None in a dry run.

    Raises:
        InvalidInput: an option cannot be used, or no hierarchy is within the budgets.
        KeyboardInterrupt: stopped by a signal; the same command goes on.
    """
    base, search = checked(base, search, dry_run)
    costs = Costs(base)
    hierarchy, budgets = base_hierarchy(base), parse_budgets(search.budgets)
    proposals = propose_designs(base, search.move, budgets, costs)
    designs = [Design(hierarchy), *proposals]
    counted = [costs.cost(one.hierarchy, one.downsample_after, number <= search.listed) for number, one in enumerate(designs)]
    listed = [costs.with_global_memory(cost) for cost in counted[: search.listed + 1]]
    show_proposals(base, listed, len(proposals), [budget.text for budget in budgets])
    result = {
        "model": base.model,
        "data": base.data,
        "budgets": [describe_budget(budget, costs, hierarchy) for budget in budgets],
        "move": search.move,
        "base": describe(listed[0], listed[0]),
        "proposals": [describe(cost, listed[0]) for cost in [*listed[1:], *counted[search.listed + 1 :]]],
        **dict.fromkeys(("ranking", "gains", "outcome", "winner", "command")),
    }
    if dry_run:
        print("nothing was trained", flush=True)
        return result
    ranking, gains = rank(base, search, proposals, output, execution)
    known = {cost.design: cost for cost in counted}
    chosen = [counted[0], *(known[ranked.design] for ranked in ranking[: search.finalists])]
    wanted = finals(base, search, chosen)
    results = train_all(wanted, output, execution, shared=True)
    scores = [*ranking, *([Ranked(Design(hierarchy), 0, *scored(hierarchy, gains))] if gains else [])]
    rows = gather(chosen, scores, results)
    show(base, search.final_epochs, search.seeds, rows)
    # with runs missing that other processes train, designs would be compared over different seeds
    winner = max(rows, key=lambda row: row["val_accuracy"]) if len(results) == len(wanted) else None
    if search.figure is not None:
        draw(search.figure, f"{base.model} on {base.data}, {search.final_epochs} epochs", rows)
        print(f"written: {search.figure}", flush=True)
    result |= {"ranking": [ranked.describe() for ranked in ranking], "gains": gains, "outcome": rows}
    return result | announce(base, winner, execution)


def checked(base: Run, search: Search, dry_run: bool) -> tuple[Run, Search]:
    """The base trained layer-wise and the search with its epochs, all refusals made that need no data.

    Raises:
        InvalidInput: naming the option.
    """
    choose("data set", base.data, IMAGES)
    choose("move", search.move, MOVES)
    moves_convolutions = search.move == "convolutions"
    search = replace(search, search=search.search or ("gain" if moves_convolutions else "halving"))
    choose("search", str(search.search), SEARCHES)
    if search.search == "gain" and not moves_convolutions:
        raise InvalidInput(
            "--search gain ranks by what convolutions add, which says nothing of where maps are halved: give --search halving "
            "with --move downsampling"
        )
    if base.downsample_after is not None:
        raise InvalidInput("--downsample-after is what --move downsampling proposes: leave it out")
    hierarchy = base_hierarchy(base)
    check_stages(base.model, hierarchy, published_hierarchy(base.model))
    base = replace(base, rule="simultaneous", hierarchy=",".join(map(str, hierarchy)))
    check_run(base)
    # gains foretell the paper's orders best after one epoch (results/orders.csv)
    short = search.short_epochs or (1 if search.search == "gain" else max(1, base.epochs // 40))
    final = search.final_epochs or max(1, base.epochs // 10)
    seeds = search.short_seeds or (3 if search.search == "gain" else 1)
    search = replace(search, short_epochs=short, short_seeds=seeds, final_epochs=final)
    for name in ("candidates", "finalists", "seeds", "short_epochs", "short_seeds", "final_epochs", "listed"):
        if getattr(search, name) < 1:
            raise InvalidInput(f"--{name.replace('_', '-')} {getattr(search, name)} is too small: give 1 or more")
    if base.batch_size < 2:
        raise InvalidInput(f"batch_size {base.batch_size} is too small: give 2 or more, since local losses compare images")
    if base.at not in ("layer", "block"):
        raise InvalidInput(f"--at {base.at} cuts different hierarchies at different places: give layer or block")
    if search.figure is not None:
        check_figure(search.figure)
    if not dry_run and not 0 < base.val_fraction < 1:
        raise InvalidInput(f"--val-fraction {base.val_fraction} holds no images out to rank by: give a share such as 0.1")
    if not dry_run and search.search == "halving":
        check_optuna()
    return base, search


def propose_designs(base: Run, move: str, budgets: Sequence[Budget], costs: Costs) -> list[Design]:
    """The proposals of either kind of move, in order."""
    hierarchy = base_hierarchy(base)
    if move == "convolutions":
        return [Design(one) for one in propose(hierarchy, budgets, costs.amount, costs.resolutions)]
    pools = MODELS[base.model][0] is VGG
    return propose_downsampling(hierarchy, budgets, costs.amount, costs.resolutions, pools)


def rank(
    base: Run, search: Search, proposals: Sequence[Design], output: Path, execution: Execution
) -> tuple[list[Ranked], list[list[float]] | None]:
    """The proposals ranked as the search says; and the gains that ``gain`` ranks by."""
    seeds = [replace(base, epochs=search.short_epochs, seed=base.seed + number) for number in range(search.short_seeds)]
    if search.search == "gain":
        print("short runs of the base, to measure what its units gain", flush=True)
        train_all(seeds, output / SHORT, execution)
        folders = [RunFolder(output / SHORT / run_name(run)) for run in seeds]
        ranking, gains = rank_by_gain([one.hierarchy for one in proposals], folders, execution)
        show_gains(gains)
        return ranking, gains
    runs = {
        design: [(run, RunFolder(output / SHORT / run_name(run))) for run in (with_design(one, design) for one in seeds)]
        for design in tried(base, search, proposals)
    }
    return rank_by_halving(runs, output, execution), None


def tried(base: Run, search: Search, proposals: Sequence[Design]) -> list[Design]:
    """The proposals that halving tries, in their order."""
    if search.move != "convolutions":
        return list(proposals[: search.candidates])
    chosen = candidates([one.hierarchy for one in proposals], base_hierarchy(base), search.candidates)
    return [Design(one) for one in chosen]


def finals(base: Run, search: Search, chosen: Sequence[Cost]) -> list[Run]:
    """The runs that are compared: seed by seed, each design layer-wise and globally."""
    return [
        replace(with_design(base, cost.design), rule=rule, seed=base.seed + number, epochs=search.final_epochs)
        for number in range(search.seeds)
        for cost in chosen
        for rule in RULES
    ]


def announce(base: Run, winner: dict[str, Any] | None, execution: Execution) -> dict[str, Any]:
    """Say which design did best layer-wise on validation images, and how to train it at full length."""
    if winner is None:
        print("no winner yet: other processes train some of these runs; give the same command again", flush=True)
        return {"winner": None, "command": None}
    design = design_of(winner)
    command = train_command(with_design(base, design), execution)
    how = "the base itself" if design == Design(base_hierarchy(base)) else f"{winner['gain']:+.2f} points on test images"
    print(f"best layer-wise on validation images: {design.text} ({how}); at full length:\n{command}", flush=True)
    return {"winner": design.describe(), "command": command}


def train_command(run: Run, execution: Execution) -> str:
    """The command that trains a run, and where its data are."""
    place = [] if execution.data_dir == Execution.data_dir else ["--data-dir", execution.data_dir]
    return " ".join([command_of(run), *([shlex.join(place)] if place else [])])


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


def describe_budget(budget: Budget, costs: Costs, base: Hierarchy) -> dict[str, Any]:
    return {"budget": budget.text, "kind": budget.kind, "limit": budget.limit(costs.amount(budget.kind, base))}
