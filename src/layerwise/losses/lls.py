"""LLS: a head of fixed sinusoids, without anything to learn (Apolinario et al., WACV 2025)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import check_least
from layerwise.losses.pred import cross_entropy
from layerwise.losses.site import (
    Evaluated,
    Site,
    Targets,
    at_least_float32,
    check_shape,
    unit_length,
)

LOWEST, HIGHEST = 50.0, 512.0  # angular frequencies of the first class and the last


class Lls(nn.Module):
    """Cross-entropy of products of the features with a fixed sinusoid per class; no parameters.

    Maps are average-pooled to at most ``head_size`` pixels a side. All features of an example are
    scaled to unit length, z, and logit c is Σ_t z_t · sin(f_c · t), t = 0, 1, …, with frequencies
    f_c evenly from 50 to 512.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        head_size: largest side of the pooled maps, in pixels. The published program used 4 in the
            first layer of VGG and 2 in the others.

    Raises:
        InvalidInput: ``head_size`` is below 1, or the features are of another shape.
    """

    basis: Tensor

    def __init__(self, site: Site, *, head_size: int = 2) -> None:
        super().__init__()
        check_least(1, head_size=head_size)
        check_shape(site)
        self.size: tuple[int, int] | None = None
        numbers = site.shape[0]
        if len(site.shape) == 3:
            height, width = (min(side, head_size) for side in site.shape[1:])
            self.size, numbers = (height, width), numbers * height * width
        self.register_buffer("basis", sinusoids(site.num_classes, numbers), persistent=False)

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        pooled = features if self.size is None else F.adaptive_avg_pool2d(features, self.size)
        with torch.autocast(features.device.type, enabled=False):
            unit = unit_length(at_least_float32(pooled.flatten(1)))
            return unit @ self.basis.T.to(unit.dtype)

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        with torch.autocast(features.device.type, enabled=False):
            return cross_entropy(self.logits(features), targets)


def sinusoids(classes: int, numbers: int) -> Tensor:
    """A sinusoid per class, (classes, numbers), in float64, since phases are large."""
    frequencies = torch.linspace(LOWEST, HIGHEST, classes, dtype=torch.float64)
    positions = torch.arange(numbers, dtype=torch.float64)
    return torch.sin(torch.outer(frequencies, positions))
