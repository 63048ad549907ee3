"""The effective rank: the number of directions that features use."""

import torch
from torch import Tensor

from layerwise.measures.base import checked, measure


@measure("effective rank")
def effective_rank(features: Tensor, labels: Tensor) -> float:
    """Effective rank of the centred features, from 1 to F: the number of directions they use.

    It is exp of the entropy of the singular values' shares σ / Σσ (Roy & Vetterli 2007, definition
    1). The labels are not read.
    """
    features, _ = checked(features, labels)
    values = features.double() - features.double().mean(0)
    gram = values @ values.T if len(values) < values.shape[1] else values.T @ values
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = singular / singular.sum()
    return float(torch.special.entr(shares).sum().exp())
