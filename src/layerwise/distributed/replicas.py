"""Replicas: copies of a learner on several ranks, each of which learns from a share of every batch.

A unit's backward pass ends long before the next unit's begins. Its gradients travel from then on,
as one bucket, while the next units compute; the unit's update follows when their sum has come, at
the latest when the step ends. Weights so stay alike on all ranks.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from layerwise.core.learner import Learner
from layerwise.core.unit import Unit
from layerwise.distributed.agreement import together
from layerwise.distributed.averages import Average, Bucket
from layerwise.distributed.grid import Place, group_of_position, place_in_grid
from layerwise.distributed.state import share as share_state
from layerwise.distributed.world import naming_lost_ranks, world
from layerwise.errors import InvalidInput, check_flags
from layerwise.losses import Evaluated, Targets
from layerwise.losses.site import AT_HAND, Examples
from layerwise.ops.replicated import GatherRows, synchronised
from layerwise.utils.device import device_of
from layerwise.utils.seeds import derived_seed


@dataclass(frozen=True)
class BatchShare(Examples):
    """This replica's part of a batch; see ``ops.replicated.Share``.

    Attributes:
        sizes: number of examples of each replica.
        rank: number of this replica.
        group: process group of the replicas' ranks; None: all ranks.
    """

    sizes: tuple[int, ...]
    rank: int
    group: Any = None

    @property
    def examples(self) -> int:
        """Number of examples of all replicas."""
        return sum(self.sizes)

    @property
    def portion(self) -> float:
        return self.sizes[self.rank] / self.examples

    @property
    def own_rows(self) -> slice:
        start = sum(self.sizes[: self.rank])
        return slice(start, start + self.sizes[self.rank])

    def gather(self, values: Tensor) -> Tensor:
        rows: Tensor = GatherRows.apply(values, self)
        return rows

    def own(self, values: Tensor) -> Tensor:
        return values[self.own_rows]

    def all_rows(self, rows: Tensor) -> Tensor:
        """Rows of all replicas, (b, ...) -> (B, ...); they travel in blocks of equal size."""
        block = rows.new_zeros(max(self.sizes), *rows.shape[1:])
        block[: len(rows)] = rows
        blocks = [torch.empty_like(block) for _ in self.sizes]
        with naming_lost_ranks():
            dist.all_gather(blocks, block, group=self.group)
        return torch.cat([each[:size] for each, size in zip(blocks, self.sizes, strict=True)])

    def each(self, numbers: Tensor) -> Tensor:
        """The numbers of every replica, (F,) -> (replicas, F)."""
        every = [torch.empty_like(numbers) for _ in self.sizes]
        with naming_lost_ranks():
            dist.all_gather(every, numbers.contiguous(), group=self.group)
        return torch.stack(every)

    def total(self, numbers: Tensor) -> Tensor:
        """The sum over all replicas, (F,) -> (F,)."""
        total = numbers.clone()
        with naming_lost_ranks():
            dist.all_reduce(total, group=self.group)
        return total


class Replicas:
    """This rank's replica of a learner, and its connections to the others.

    Args:
        synchronises: whether batch normalisation takes its statistics of all replicas' examples.
        gathers: whether losses that compare examples compare those of all replicas.

    Attributes:
        share: this replica's part of the batch at hand; None between steps.
        examples: number of examples of the last batch, of all replicas.
        coming: sums of gradients on their way, in the order of updates.
    """

    def __init__(self, learner: Learner, place: Place, synchronises: bool, gathers: bool) -> None:
        self.learner = learner
        self.rank, self.count = place.replica, place.replicas
        self.group, self.counts_wish = group_of_position(place), place.position == 0
        self.synchronises, self.gathers = synchronises, gathers
        self.device = device_of(learner.model)
        backends = str(dist.get_backend_config())
        self.counting = torch.device("cpu") if "gloo" in backends else self.device
        self.share: BatchShare | None = None
        self.examples = 0
        self.coming: deque[Average] = deque()
        for unit in learner.own_units:
            unit.sharing = self
            if unit.seed is not None and self.rank > 0:  # dropout of its own
                unit.seed = derived_seed(unit.seed, "replica", self.rank)
        learner.replicas = self

    def around(self, make_step: Callable[..., list[Evaluated]]) -> Callable[..., list[Evaluated]]:
        """A step of this replica's units as one of all replicas."""
        return partial(self.step, make_step)

    def step(
        self,
        make_step: Callable[..., list[Evaluated]],
        units: Sequence[Unit],
        images: Tensor,
        targets: Targets,
        step: int,
        update: bool = True,
    ) -> list[Evaluated]:
        """Let every unit learn from a batch that replicas share.

        Args:
            make_step: makes the step of this replica's share, as ``step_units`` does.
            images, targets: this replica's share, (b, ...).

        Returns:
            The loss of each unit and its number of correct examples, of all replicas.
        """
        if self.learner.stage is not None:  # the first rank of a replica tells the others
            update = self.learner.stage.tells_update(update)
        self.share = share = self.meet(len(targets.labels), update)
        self.examples = share.examples
        targets = replace(targets, examples=share if self.gathers else AT_HAND)
        try:
            with synchronised(share) if self.synchronises else nullcontext():
                results = make_step(units, images, targets, step, update)
            self.finish()
        finally:
            self.share = None
            self.coming.clear()
        return of_all(results, share)

    def meet(self, size: int, update: bool) -> BatchShare:
        """This replica's share of a batch, once all replicas have one; a wish to stop goes along.

        Raises:
            InvalidInput: the replicas do not make the same steps.
            LostRank: a replica does not answer.
        """
        stopping = world().stopping
        asked = self.counts_wish and stopping.asked  # other ranks are told with a batch
        facts = torch.tensor([size, update, asked], device=self.counting)
        every = [torch.empty_like(facts) for _ in range(self.count)]
        with naming_lost_ranks():
            dist.all_gather(every, facts, group=self.group)
        sizes, updates, stops = zip(*(each.tolist() for each in every), strict=True)
        stopping.agreed |= any(stops)
        if len(set(updates)) > 1:
            raise InvalidInput(
                "Cannot make a step: some replicas end a batch with it and others do not. Make "
                "the same steps on all ranks."
            )
        return BatchShare(sizes, self.rank, self.group)

    def examples_at_hand(self, unit: Unit) -> int:
        """Number of examples of the batch, or the part of one, of all replicas.

        Raises:
            InvalidInput: the step is none of ``Learner.step``, which all replicas make.
        """
        if self.share is None:
            raise InvalidInput(
                f"Cannot update unit {unit.index} ({unit.name}): its learner has replicas, which "
                "share batches in learner.step alone. Make steps by it."
            )
        return self.share.examples

    def average(self, unit: Unit, divisor: float) -> None:
        """Begin to add up the gradients of a unit's update, and finish those that have arrived."""
        weights = defaultdict[tuple[torch.device, torch.dtype], list[nn.Parameter]](list)
        for weight in unit.held():
            if weight.requires_grad:
                weights[weight.device, weight.dtype].append(weight)
        unit.zero_grad()
        buckets = [Bucket(each, self.group) for each in weights.values()]
        self.coming.append(Average(unit, divisor, buckets))
        while self.coming[0].arrived and self.coming[0].unit is not unit:
            self.coming.popleft().finish()

    def finish(self) -> None:
        """Update all units whose gradients are on their way."""
        while self.coming:
            self.coming.popleft().finish()

    def smallest(self, size: int) -> int:
        """The smallest of all replicas' numbers; all must call this."""
        number = torch.tensor([size], device=self.counting)
        with naming_lost_ranks():
            dist.all_reduce(number, dist.ReduceOp.MIN, group=self.group)
        return int(number)

    def share_buffers(self) -> None:
        """Give all replicas the first one's buffers, such as running statistics."""
        source = dist.get_global_rank(self.group, 0) if self.group is not None else 0
        with naming_lost_ranks():
            for unit in self.learner.own_units:
                for buffer in [*unit.piece.buffers(), *unit.loss.buffers()]:
                    dist.broadcast(buffer, source, group=self.group)


def of_all(results: Sequence[Evaluated], share: BatchShare) -> list[Evaluated]:
    """Losses and numbers of correct examples of all replicas, from this one's."""
    losses = torch.stack([loss.detach() for loss, _ in results]).double()
    correct = torch.stack([correct for _, correct in results]).double()
    losses, correct = share.total(torch.cat([losses * share.portion, correct])).chunk(2)
    kinds = [loss.dtype for loss, _ in results]
    return [
        Evaluated(loss.to(kind), number.long())
        for loss, number, kind in zip(losses, correct, kinds, strict=True)
    ]


def replicate(
    learner: Learner, *, sync_batch_norm: bool = True, gather_examples: bool = True
) -> None:
    """Let each of the ranks that torchrun started learn from a share of every batch.

    All ranks call this with a learner of the same network; the weights are the first rank's. Then
    they make the same steps, each ``learner.step(images, labels)`` with its own share of the batch,
    of 2 images or more; shares may differ in size. The updates are those of one process with the
    whole batch, to rounding, but for dropout, whose masks every replica draws for itself. A step's
    result is that of the whole batch. Where there is one process alone, nothing changes.

    Args:
        learner: made by ``localize``.
        sync_batch_norm: let batch normalisation take its statistics of the whole batch. False: of
            each share, which saves two messages per layer. Running statistics then differ between
            ranks, until all of them call ``learner.replicas.share_buffers()``, which gives all the
            first rank's: do so before evaluating or saving.
        gather_examples: let losses that compare the examples of a batch, such as ``sim``, compare
            those of the whole batch. False: those of each share.

    Raises:
        InvalidInput: the learner is distributed already, or ranks differ.
        LostRank: a rank does not answer.
    """
    check_flags(sync_batch_norm=sync_batch_norm, gather_examples=gather_examples)
    if world().size == 1:
        return
    with together():
        check_replicable(learner)
    share_state(learner)
    Replicas(learner, place_in_grid(world().size), sync_batch_norm, gather_examples)
    learner.span = learner.span  # steps are made anew
    learner.step_singly()


def check_replicable(learner: Learner) -> None:
    """Refuse a learner whose ranks have parts already.

    Raises:
        InvalidInput: as said.
    """
    if learner.stage is not None or learner.replicas is not None:
        raise InvalidInput("Cannot replicate the learner: it is distributed. Leave the call out.")
