"""The effective rank: how many directions features use."""

import torch
from torch import Tensor

from layerwise.measures.base import checked, measure


@measure("effective rank")
def effective_rank(features: Tensor, labels: Tensor) -> float:
    """How many directions the centred features use: exp of the entropy of their singular values σ /
    Σσ; from 1 to F.

    Roy & Vetterli 2007, definition 1. The labels are not read.
    """
    features, _ = checked(features, labels)
    values = features.double() - features.double().mean(0)
    gram = values @ values.T if len(values) < values.shape[1] else values.T @ values
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())
