"""Early exits of a learner: accuracy and cost of every prefix, and the ensemble of local heads."""

from typing import Any

import torch
from torch import Tensor

from layerwise.core.early_exit import can_end, exit_logits
from layerwise.core.learner import Learner
from layerwise.core.unit import Activations
from layerwise.data.loader import Loader
from layerwise.utils.multiply_adds import MultiplyAdds


@torch.no_grad()
def measure_exits(
    learner: Learner, test: Loader, validation: Loader | None = None
) -> dict[str, Any]:
    """Accuracy of every local head and of their ensemble on test images, beside their costs.

    The ensemble is the mean of the heads' probabilities. Weights that grow with depth were worse
    wherever they were tried, and nothing is fitted (docs/export.md).

    Returns:
        Empty where fewer than two units classify. Else ``exits``: of each unit that does its
        ``index``, ``name``, ``test_accuracy`` and, with validation images, ``val_accuracy``
        (percent), and ``multiply_adds`` on an image of the units up to it and its head;
        ``best_exit``, with validation images: the row of the head that is best on them, of equals
        the first; and ``ensemble``: ``test_accuracy``, and ``multiply_adds`` of all units and all
        these heads.
    """
    units = [unit for unit in learner.units if can_end(learner.units, unit)]
    if len(units) < 2:
        return {}
    learner.train(False)
    *shares, ensemble = accuracies(learner, test, len(units))
    costs, whole = exit_costs(learner, next(test.in_order())[0][:1])
    rows: list[dict[str, Any]] = [
        {
            "index": unit.index,
            "name": unit.name,
            "test_accuracy": share,
            "multiply_adds": costs[unit.index],
        }
        for unit, share in zip(units, shares, strict=True)
    ]
    result: dict[str, Any] = {
        "exits": rows,
        "ensemble": {"test_accuracy": ensemble, "multiply_adds": whole},
    }
    if validation is not None:
        for row, share in zip(rows, accuracies(learner, validation, len(units)), strict=False):
            row["val_accuracy"] = share
        result["best_exit"] = max(rows, key=lambda row: float(row["val_accuracy"]))
    return result


def accuracies(learner: Learner, loader: Loader, exits: int) -> list[float]:
    """Percent of a set that each exit classifies correctly, and last their ensemble."""
    correct = torch.zeros(exits + 1, dtype=torch.long, device=loader.labels.device)
    for images, labels in loader.in_order():
        correct += correct_of_exits(learner, images, labels)
    shares: list[float] = (100.0 * correct.double() / len(loader.labels)).tolist()
    return shares


def correct_of_exits(learner: Learner, images: Tensor, labels: Tensor) -> Tensor:
    """Number of images that each exit classifies correctly; the last is of the ensemble."""
    activations: Activations = (images,)
    outputs = []
    for unit in learner.units:
        activations = unit.forward(activations)
        if can_end(learner.units, unit):
            outputs.append(exit_logits(learner.units, unit, activations).double())
    votes = torch.stack(outputs).softmax(2).mean(0)
    return torch.stack([torch.sum(each.argmax(1) == labels) for each in (*outputs, votes)])


def exit_costs(learner: Learner, image: Tensor) -> tuple[dict[int, int], int]:
    """Multiply-adds on an image of the units up to each that classifies with its head, and of all.

    Args:
        image: (1, ...).
    """
    activations: Activations = (image,)
    costs, network, heads = {}, 0, 0
    for unit in learner.units:
        with MultiplyAdds() as counter:
            activations = unit.forward(activations)
        network += counter.total
        if can_end(learner.units, unit):
            with MultiplyAdds() as counter:
                exit_logits(learner.units, unit, activations)
            head = counter.total
            costs[unit.index] = network + head
            heads += head
    return costs, network + heads
