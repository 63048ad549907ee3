"""Stages: the units of a learner on several ranks, of which each holds only its own.

Features and targets travel forward, from a rank to the next; nothing travels back. A unit's update
waits for no later unit, so a rank begins its next batch as soon as it has sent the last one: there
is no bubble between batches, and no feature is stale. What comes out is ``simultaneous`` to the
bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.core.unit import Activations, Unit
from layerwise.distributed.agreement import decided_by_first, together
from layerwise.distributed.grid import Place, place_in_grid
from layerwise.distributed.messages import Message, Receiver, Sender
from layerwise.distributed.placement import (
    balanced_ranks,
    check_room,
    parsed_ranks,
    unit_seconds,
)
from layerwise.distributed.replicas import Replicas, replicate
from layerwise.distributed.state import part_of, put, received, send_parts, share, tensors_of
from layerwise.distributed.world import world
from layerwise.errors import InvalidInput, check_flags, check_least
from layerwise.losses import Evaluated, Targets
from layerwise.utils.device import device_of

TRIAL_BATCH = 32  # images of the steps by which ranks are balanced


class Stage:
    """The units of this rank, and its connections to the ranks before and behind.

    Args:
        place: of this rank in the grid.
        placement: units of each rank of a replica, in order.
        run_ahead: batches that a rank may be ahead of the next one.
        rounded: whether features of float32 travel as bfloat16.

    Attributes:
        own: indices of this rank's units.
        before, behind: the neighbouring ranks; None at the chain's ends.
        whole: whether the first rank has all units' weights at the moment.
        updates: whether the batch at hand, or the part of one, ends in an update.
    """

    def __init__(
        self,
        learner: Learner,
        place: Place,
        placement: Sequence[range],
        run_ahead: int,
        rounded: bool,
    ) -> None:
        self.learner, self.place, self.placement = learner, place, list(placement)
        self.own = self.placement[place.position]
        self.run_ahead, self.rounded = run_ahead, rounded
        self.before = place.rank - 1 if place.position > 0 else None
        self.behind = place.rank + 1 if place.position + 1 < place.length else None
        device = device_of(learner.model)
        wire = device if "nccl" in str(dist.get_backend_config()) else torch.device("cpu")
        self.receiver = self.sender = None
        if self.before is not None:
            self.receiver = Receiver(self.before, device, wire, rounded)
        if self.behind is not None:
            self.sender = Sender(self.behind, run_ahead, wire, rounded)
        self.images_wanted = any(
            learner.units[index].reads_images for index in range(self.own.stop, len(learner.units))
        )
        self.whole, self.updates = False, True
        self.batches = 0  # passed on since the last pause
        self.passed_bytes = [0, 0]  # of the last message that came, and that went

    @property
    def units(self) -> list[Unit]:
        """The units of this rank."""
        return [self.learner.units[index] for index in self.own]

    def take(self) -> tuple[Any, Targets]:
        """What the rank before passed on: activations of its last unit, and the targets.

        Raises:
            LostRank: it sends nothing.
        """
        assert self.receiver is not None
        message = self.receiver.receive()
        if "last" in message.facts:
            raise InvalidInput(
                "Cannot make a step: the first rank has made fewer. Make the same steps on all "
                "ranks."
            )
        self.batches += 1
        self.updates = message.facts["update"]
        world().stopping.agreed |= message.facts["stop"]
        self.passed_bytes[0] = tensor_bytes(message.values)
        count = message.facts["activations"]
        labels, *images = message.values[count:]
        return message.values[:count], Targets(labels, self.learner.num_classes, *images or (None,))

    def give(self, activations: Activations, targets: Targets) -> None:
        """Pass activations of this rank's last unit on; the last rank has nobody to.

        Raises:
            LostRank: the next rank takes nothing.
        """
        if self.sender is None:
            return
        images = (targets.images,) if self.images_wanted else ()
        values = (*activations, targets.labels, *images)
        if self.before is None:  # a loop may fill its batch anew before it is sent
            values = copied_from(values, targets)
        facts = {
            "activations": len(activations),
            "update": self.updates,
            "stop": world().stopping.agreed,
        }
        self.batches += self.before is None
        self.passed_bytes[1] = tensor_bytes(values)
        self.sender.send(Message(values, facts))

    def tells_update(self, update: bool) -> bool:
        """Whether the batch at hand ends in an update, which its first rank alone is told."""
        return update if self.before is None else self.updates

    def step(
        self,
        units: Sequence[Unit],
        entering: Any,
        targets: Targets,
        step: int,
        update: bool = True,
    ) -> list[Evaluated]:
        """The step of this rank's units, as ``Learner.make_step``.

        Args:
            entering: images, or what the rank before passed on.
            update: read on the first rank alone, which tells the others.

        Returns:
            A result for every unit, 0 for those of other ranks.
        """
        if self.before is None:
            self.updates = update
            world().stopping.agreed |= world().stopping.asked
            entering = (entering.detach(),)
        waiting: list[Activations] = [entering]
        del entering
        zero = torch.zeros((), device=targets.labels.device)
        results = [Evaluated(zero, zero.long())] * len(units)
        for index in self.own:
            passed, results[index] = units[index].step(waiting.pop(), targets, step, self.updates)
            waiting.append(passed)
            del passed
        self.give(waiting.pop(), targets)
        return results

    def pause(self) -> None:
        """Let all that is on its way arrive; all ranks must call this after the same step.

        Raises:
            InvalidInput: the ranks made different numbers of steps.
            LostRank: a rank does not answer.
        """
        passed, self.batches = self.batches > 0, 0
        if self.receiver is not None and passed:
            last = self.receiver.receive(more=False)
            if "last" not in last.facts:
                raise InvalidInput(
                    "Cannot go on: the first rank has made more steps. Make the same steps on all "
                    "ranks."
                )
        if self.sender is not None and passed:
            self.sender.send(Message(facts={"last": True}))
            self.sender.wait()

    @property
    def kept_bytes(self) -> int:
        """Bytes of features that a step of this thread does not make: two batches that come, the
        one at hand and the next, and those that may be ahead.
        """
        coming, going = self.passed_bytes
        return 2 * coming + self.run_ahead * going

    def drop(self) -> None:
        """Leave nothing of other ranks' units but the shapes of their weights."""
        own = {
            id(tensor) for unit in self.units for tensor in (*tensors_of(unit), *borrowed_by(unit))
        }
        for unit in self.learner.units:
            if unit.index not in self.own:
                for tensor in tensors_of(unit):
                    if id(tensor) not in own:
                        tensor.data = tensor.data.new_zeros(()).expand(tensor.shape)
                if unit.optimizer is not None:
                    unit.optimizer.state.clear()
        self.whole = False

    def collect(self) -> None:
        """Give the first rank the weights and optimizer states of all others' units."""
        self.pause()
        if world().first:
            for rank in range(1, self.place.length):
                for index, part in zip(self.placement[rank], received(rank), strict=True):
                    put(self.learner.units[index], part)
        elif self.place.replica == 0:
            send_parts([part_of(unit) for unit in self.units])
        self.whole = True


def borrowed_by(unit: Unit) -> Iterator[Tensor]:
    """Weights and buffers that a unit's loss reads of other units' losses."""
    for module in unit.loss.modules():
        for part in getattr(module, "borrowed", ()):
            yield from part.state_dict(keep_vars=True).values()


def tensor_bytes(values: Sequence[Any]) -> int:
    """Bytes of the tensors among values that are sent."""
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def copied_from(values: Sequence[Any], targets: Targets) -> tuple[Any, ...]:
    """Values, of which those that lie in the memory of a batch's images or labels are copied."""
    batch = {
        given.untyped_storage().data_ptr()
        for given in (targets.labels, targets.images)
        if given is not None
    }
    return tuple(
        value.clone()
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() in batch
        else value
        for value in values
    )


def distribute(
    learner: Learner,
    ranks: str | None = None,
    *,
    run_ahead: int = 2,
    bfloat16_features: bool = False,
    batch_size: int = TRIAL_BATCH,
    replicas: int = 1,
    sync_batch_norm: bool = True,
    gather_examples: bool = True,
) -> list[range]:
    """Let a learner's units live on the ranks that torchrun started, consecutive ones together.

    All ranks call this with a learner of the same network, and then make the same steps; the
    weights are the first rank's. ``Learner.step`` reads its images and labels on the first rank
    alone. Updates are those of one process, to the bit; where the network draws random numbers,
    as for dropout, if ``localize`` was given a seed. Where there is one process alone, nothing
    changes.

    Args:
        learner: made by ``localize``; afterwards it holds only the weights, heads and optimizer
            states of this rank's units. ``whole`` brings them together.
        ranks: numbers of units on each rank, such as ``5,4``; None or empty: balanced by measured
            seconds.
        run_ahead: batches that a rank may be ahead of the next one, each of which costs the memory
            of the features between them.
        bfloat16_features: let features of float32 travel as bfloat16: half the bytes, other bits.
        batch_size: images of the steps that are measured.
        replicas: number of replicas, each on an equal number of ranks that follow each other. The
            first rank of each reads its own share of every batch.
        sync_batch_norm, gather_examples: see ``replicate``.

    Returns:
        The indices of the units of each rank of a replica.

    Raises:
        InvalidInput: there are more ranks than units, losses reach over units, or ranks differ.
        LostRank: a rank does not answer.
    """
    check_flags(
        bfloat16_features=bfloat16_features,
        sync_batch_norm=sync_batch_norm,
        gather_examples=gather_examples,
    )
    if world().size == 1:
        return [range(len(learner.units))]
    with together():
        check_placeable(learner, ranks, run_ahead, replicas)
    place = place_in_grid(replicas)
    if place.length == 1:
        replicate(learner, sync_batch_norm=sync_batch_norm, gather_examples=gather_examples)
        return [range(len(learner.units))]
    share(learner)
    placement = decided_by_first(lambda: chosen_placement(learner, ranks, batch_size, place.length))
    learner.step_singly()
    learner.stage = stage = Stage(learner, place, placement, run_ahead, bfloat16_features)
    learner.plain_step = learner.make_step = stage.step
    if replicas > 1:
        shared = Replicas(learner, place, sync_batch_norm, gather_examples)
        learner.plain_step = learner.make_step = shared.around(stage.step)
    stage.drop()
    return placement


def chosen_placement(
    learner: Learner, ranks: str | None, batch_size: int, length: int
) -> list[range]:
    """The units of each of so many ranks, as given or balanced."""
    if ranks:
        return parsed_ranks(ranks, len(learner.units), length)
    return balanced_ranks(unit_seconds(learner, batch_size), length)


def check_placeable(
    learner: Learner, ranks: str | None = None, run_ahead: int = 1, replicas: int = 1
) -> None:
    """Refuse a learner whose units cannot live on different ranks.

    Raises:
        InvalidInput: saying why.
    """
    if learner.stage is not None or learner.replicas is not None:
        raise InvalidInput("Cannot distribute the learner: it is already. Leave the call out.")
    check_least(1, run_ahead=run_ahead)
    if world().size > 1 and "cpu:" not in str(dist.get_backend_config()):
        raise InvalidInput(
            "Cannot distribute the learner: the process group has no backend for the CPU, which "
            "describes what is sent. Make it with the backend 'cpu:gloo,cuda:nccl'."
        )
    length = place_in_grid(replicas).length
    check_room(len(learner.units), length)
    if ranks:
        parsed_ranks(ranks, len(learner.units), length)
    learner.refuse_windows("parallel")
    for unit in learner.units:
        if unit.reads_later_weights:
            raise InvalidInput(
                f"Cannot train by the rule 'parallel': the loss of unit {unit.index} ({unit.name}) "
                "reads weights of a later unit, which another rank may be changing. Use the rule "
                "'simultaneous', or another loss."
            )


@contextmanager
def whole(learner: Learner) -> Iterator[bool]:
    """All of a learner's weights and states on the first rank, for as long as the context lasts.

    All ranks must enter it after the same step. The first rank needs the memory of all units
    meanwhile. Where all units are in one process, nothing changes.

    Yields:
        Whether this is the first rank.

    Raises:
        LostRank: a rank does not answer.
    """
    if learner.stage is None:
        yield world().first
        return
    learner.stage.collect()
    try:
        yield world().first
    finally:
        learner.stage.drop()
