"""Accuracy of a network, and of every unit of a learner, on images that are not learned from."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layerwise.core.learner import Learner
from layerwise.core.outputs import logits_of
from layerwise.core.side_effects import modes_kept
from layerwise.core.unit import Activations, precision
from layerwise.data.loader import Loader
from layerwise.distributed import gathered, world
from layerwise.losses import Targets


@dataclass(frozen=True)
class UnitScore:
    """Mean loss and accuracy (percent) of one unit."""

    loss: float
    accuracy: float


def accuracy(model: nn.Module, loader: Loader, amp: torch.dtype | None = None) -> float:
    """Percent of a set that the network classifies correctly, in evaluation mode."""
    return 100.0 * count_correct(model, loader, amp).item() / len(loader.labels)


@torch.no_grad()
def count_correct(
    model: nn.Module, loader: Loader, amp: torch.dtype | None, batches: tuple[int, int] = (0, 1)
) -> Tensor:
    """Number of images that the network classifies correctly, in evaluation mode.

    Args:
        batches: the first that is looked at, and the distance to the next one.
    """
    correct = torch.zeros((), dtype=torch.long, device=loader.labels.device)
    with modes_kept(model):
        model.eval()
        for images, labels in loader.in_order(*batches):
            with precision((images,), amp):
                correct += torch.sum(logits_of(model(images)).argmax(1) == labels)
    return correct


@torch.no_grad()
def unit_scores(learner: Learner, loader: Loader, first: int, last: int) -> list[UnitScore]:
    """Loss and accuracy of units ``first`` to ``last`` on a set, in evaluation mode.

    The images come shuffled, always alike: the similarity loss compares those of a batch, which
    must not be of one class.
    """
    learner.train(False)
    count = 0
    total = torch.zeros(last - first + 1, 2, device=loader.labels.device)
    for images, labels in loader.batches(0, *own_batches(learner)):
        count += len(labels)
        activations, targets = entering(learner, images, labels)
        for unit in learner.own_units:
            if unit.index < first:
                activations = unit.forward(activations)
            elif unit.index <= last:
                activations, (loss, correct) = unit.evaluate(activations, targets)
                total[unit.index - first] += torch.stack(
                    [loss.float() * len(labels), correct.float()]
                )
        pass_on(learner, activations, targets)
    if learner.replicas is not None:
        count = sum(gathered(count)) // (world().size // learner.replicas.count)
    shares = summed_over_ranks(learner, total).double().cpu() / count
    return [UnitScore(loss, 100.0 * share) for loss, share in shares.tolist()]


@torch.no_grad()
def network_accuracy(learner: Learner, loader: Loader, amp: torch.dtype | None) -> float:
    """``accuracy`` of a learner's network, also where it is on several ranks."""
    if learner.stage is None:
        correct = count_correct(learner.model, loader, amp, own_batches(learner))
        return 100.0 * summed_over_ranks(learner, correct).item() / len(loader.labels)
    learner.train(False)
    total = torch.zeros((), dtype=torch.long, device=loader.labels.device)
    for images, labels in loader.in_order(*own_batches(learner)):
        activations, targets = entering(learner, images, labels)
        for unit in learner.own_units:
            if unit.index < len(learner.units) - 1:
                activations = unit.forward(activations)
            else:
                activations, (_, correct) = unit.evaluate(activations, targets)
                total += correct
        pass_on(learner, activations, targets)
    return 100.0 * summed_over_ranks(learner, total).item() / len(loader.labels)


def own_batches(learner: Learner) -> tuple[int, int]:
    """The first batch that is evaluated here, and the distance to the next one."""
    replicas = learner.replicas
    return (0, 1) if replicas is None else (replicas.rank, replicas.count)


def entering(learner: Learner, images: Tensor, labels: Tensor) -> tuple[Activations, Targets]:
    """What enters the first unit that is here, and the targets."""
    if learner.stage is not None and learner.stage.before is not None:
        return learner.stage.take()
    return (images,), Targets(labels, learner.num_classes, images)


def pass_on(learner: Learner, activations: Activations, targets: Targets) -> None:
    """Send what the last unit here made to the next rank, if there is one."""
    if learner.stage is not None:
        learner.stage.give(activations, targets)


def summed_over_ranks(learner: Learner, total: Tensor) -> Tensor:
    """A sum over all ranks, each of which counted its own units or batches alone."""
    if learner.stage is not None:
        learner.stage.pause()
    elif learner.replicas is None:
        return total
    return torch.stack(gathered(total.cpu())).sum(0)
