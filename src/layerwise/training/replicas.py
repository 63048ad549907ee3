"""Replicas of a run: what is refused, and what each reads."""

from dataclasses import replace

from layerwise.data import Splits
from layerwise.data.loader import Share
from layerwise.distributed import place_in_grid, world
from layerwise.errors import InvalidInput
from layerwise.rules import RULES
from layerwise.training.prepare import Prepared


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
            f"Cannot use --replicas {replicas} on {ranks} rank{'s' * (ranks > 1)}: each replica is "
            f"a rank. Start with torchrun --nproc-per-node {replicas}, or give --replicas {ranks}."
        )


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
