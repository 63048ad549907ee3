"""Optimizers of a run by name."""

from collections.abc import Callable
from functools import partial

import torch

from layerwise.core.factories import OptimizerFactory
from layerwise.runs.run import Run

# fused: one call per unit instead of several per tensor
OPTIMIZERS: dict[str, Callable[[Run], OptimizerFactory]] = {
    "adam": lambda run: partial(
        torch.optim.Adam, lr=run.lr, weight_decay=run.weight_decay, fused=True
    ),
    "adamw": lambda run: partial(
        torch.optim.AdamW, lr=run.lr, weight_decay=run.weight_decay, fused=True
    ),
    "sgd": lambda run: partial(
        torch.optim.SGD,
        lr=run.lr,
        weight_decay=run.weight_decay,
        momentum=run.momentum,
        fused=True,
    ),
    "nesterov": lambda run: partial(
        torch.optim.SGD,
        lr=run.lr,
        weight_decay=run.weight_decay,
        momentum=run.momentum,
        nesterov=run.momentum > 0,  # which PyTorch refuses otherwise
        fused=True,
    ),
}
