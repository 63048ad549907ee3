"""Accuracy of a network, and of every unit of a learner, on images that are not learned from."""

from dataclasses import dataclass

import torch
from torch import nn

from layerwise.core.learner import Learner
from layerwise.core.outputs import logits_of
from layerwise.core.side_effects import modes_kept
from layerwise.core.unit import Activations, precision
from layerwise.data.loader import Loader
from layerwise.losses import Targets


@dataclass(frozen=True)
class UnitScore:
    """Mean loss and accuracy (percent) of one unit."""

    loss: float
    accuracy: float


@torch.no_grad()
def accuracy(model: nn.Module, loader: Loader, amp: torch.dtype | None = None) -> float:
    """Percent of a set that the network classifies correctly, in evaluation mode."""
    correct = torch.zeros((), dtype=torch.long, device=loader.labels.device)
    with modes_kept(model):
        model.eval()
        for images, labels in loader.in_order():
            with precision((images,), amp):
                correct += torch.sum(logits_of(model(images)).argmax(1) == labels)
    return 100.0 * correct.item() / len(loader.labels)


@torch.no_grad()
def unit_scores(learner: Learner, loader: Loader, first: int, last: int) -> list[UnitScore]:
    """Loss and accuracy of units ``first`` to ``last`` on a set, in evaluation mode.

    The images come shuffled, always alike: the similarity loss compares those of a batch, which
    must not be of one class.
    """
    learner.train(False)
    count = 0
    total = torch.zeros(last - first + 1, 2, device=loader.labels.device)
    for images, labels in loader.batches(epoch=0):
        count += len(labels)
        targets = Targets(labels, learner.num_classes, images)
        activations: Activations = (images,)
        for unit in learner.units[: last + 1]:
            if unit.index < first:
                activations = unit.forward(activations)
            else:
                activations, (loss, correct) = unit.evaluate(activations, targets)
                total[unit.index - first] += torch.stack(
                    [loss.float() * len(labels), correct.float()]
                )
    shares = total.double().cpu() / count
    return [UnitScore(loss, 100.0 * share) for loss, share in shares.tolist()]
