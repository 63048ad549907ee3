"""The ranks that a run trains on: what is refused, what they share, and where units live."""

from dataclasses import asdict, replace
from typing import Any

import torch

from layerwise.core.learner import Learner
from layerwise.data import Splits
from layerwise.data.loader import Share
from layerwise.distributed import (
    check_placeable,
    decided_by_first,
    distribute,
    place_in_grid,
    rank_bytes,
    replicate,
    together,
    world,
)
from layerwise.errors import InvalidInput
from layerwise.memory.per_unit import predict_units
from layerwise.rules import RULES
from layerwise.runs.run import described
from layerwise.training.prepare import Prepared
from layerwise.training.progress import Progress
from layerwise.utils.version import version
from layerwise.utils.words import counted

# options of the execution that say when ranks wait for each other, so all must have them alike
ALIKE = (
    *("memory_format", "eval_every", "save_every", "separability_every"),
    *("ranks", "run_ahead", "rank_timeout"),
    *("replicas", "sync_batch_norm", "gather_examples"),
)
MOST_TRIED = 128  # images of the steps by which ranks are balanced


def check_ranks(prepared: Prepared) -> None:
    """Refuse ranks that the run does not use, and replicas that it cannot have.

    Raises:
        InvalidInput: as said.
    """
    check_replicas(prepared)
    size, rule = world().size, prepared.rule
    if size > 1 and not rule.on_ranks and prepared.execution.replicas == 1:
        shared = f"--replicas {size}, which share every batch, or " if rule.replicated else ""
        raise InvalidInput(
            f"Cannot train by the rule {prepared.run.rule!r} on {size} ranks: its units are all in "
            f"one process. Give {shared}--rule parallel, whose units live on different ranks, or "
            "start one process."
        )


def check_replicas(prepared: Prepared) -> None:
    """Refuse a number of replicas that there are no ranks for, or a rule that has none.

    Raises:
        InvalidInput: as said.
    """
    replicas, rule, ranks = prepared.execution.replicas, prepared.rule, world().size
    if replicas > 1 and not rule.replicated:
        accepted = " or ".join(name for name, entry in RULES.items() if entry.replicated)
        raise InvalidInput(
            f"Cannot train by the rule {prepared.run.rule!r} with --replicas {replicas}: only some "
            f"rules share batches. Give --rule {accepted}, or leave --replicas out."
        )
    if rule.on_ranks:
        place_in_grid(replicas)
    elif replicas > 1 and replicas != ranks:
        raise InvalidInput(
            f"Cannot use --replicas {replicas} on {counted(ranks, 'rank')}: each replica is "
            f"a rank. Start with torchrun --nproc-per-node {replicas}, or give --replicas {ranks}."
        )


def comparable(prepared: Prepared) -> dict[str, Any]:
    """The options that all ranks must have alike: the run's, and when they wait for each other."""
    execution = asdict(prepared.execution)
    return {**described(prepared.run), **{name: execution[name] for name in ALIKE}}


def versions() -> dict[str, str]:
    """The versions that all ranks must have alike."""
    return {"layerwise": version(), "torch": torch.__version__}


def load_in_turn(prepared: Prepared, progress: Progress) -> Splits:
    """The run's images; those to download are read by one rank of a machine before the others."""
    data: Splits | None = None
    turns = (True, False) if prepared.execution.download else (None,)
    for first in turns:
        with together():
            if first in (None, world().local_rank == 0):
                data = prepared.load_data(progress.data)
    assert data is not None
    return data


def share_data(prepared: Prepared, data: Splits) -> Splits:
    """The data, of which this rank reads its replica's share of every batch to train on.

    Raises:
        InvalidInput: batches are too small to be shared.
    """
    count = prepared.execution.replicas
    if count == 1:
        return data
    parts = prepared.run.rule_options.get("micro_batches", 1)
    share = Share(place_in_grid(count).replica, count, parts)
    return replace(data, train=data.train.shared(share))


def check_placement(prepared: Prepared, learner: Learner) -> None:
    """Refuse units that cannot live on the ranks that there are.

    Raises:
        InvalidInput: saying why.
    """
    execution = prepared.execution
    if 1 < world().size != execution.replicas:
        check_placeable(learner, execution.ranks, execution.run_ahead, execution.replicas)


def place(prepared: Prepared, learner: Learner) -> list[dict[str, Any]]:
    """Let the units live on the ranks that there are; each one's units and predicted bytes.

    Where every rank is a replica, with all units, there is no such list.
    """
    run, execution = prepared.run, prepared.execution
    choices_of_replicas = {
        "sync_batch_norm": execution.sync_batch_norm,
        "gather_examples": execution.gather_examples,
    }
    if execution.replicas == world().size:
        replicate(learner, **choices_of_replicas)
        return []
    size = run.batch_size // execution.replicas
    parts = run.rule_options.get("micro_batches", 1)
    needs = decided_by_first(lambda: predict_units(learner, max(2, size // parts)))
    rounded = run.rule_options.get("bfloat16_features", False)
    placement = distribute(
        learner,
        execution.ranks,
        run_ahead=execution.run_ahead,
        bfloat16_features=rounded,
        batch_size=min(size, MOST_TRIED),
        replicas=execution.replicas,
        **choices_of_replicas,
    )
    predicted = rank_bytes(needs, placement, execution.run_ahead)
    return [
        {"units": [units.start, units.stop - 1], "predicted_memory_bytes": peak}
        for units, peak in zip(placement, predicted, strict=True)
    ] * execution.replicas
