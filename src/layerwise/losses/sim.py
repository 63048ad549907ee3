"""The similarity-matching loss (Nøkland & Eidnes 2019).

Features of one class should be alike, those of different classes should not.
"""

from math import prod

import torch
from torch import Tensor, nn

from layerwise.errors import check_least
from layerwise.losses.site import (
    Evaluated,
    Site,
    Targets,
    at_least_float32,
    check_shape,
    similarity_matrix,
)
from layerwise.ops.pooling import average, averaging
from layerwise.ops.small_conv import Convolution
from layerwise.ops.spatial_std import spatial_deviation


class Sim(nn.Module):
    """Mean squared difference between the similarity matrix of the features and that of the labels.

    The features pass a 3×3 convolution of equal width without bias (a linear layer, for vectors).
    Maps of more than 3 channels and more than one pixel are then replaced by the standard deviation
    of each channel over space. The matrices are those of ``similarity_matrix``.

    There is no classifier: an example counts as correct when the example of the batch that is most
    similar to it has the same label.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        similarity_size: largest side of the maps in pixels; larger ones are first averaged. None:
            no limit.
        similarity_channels: largest number of channels; a 1×1 convolution first mixes more channels
            into that many. None: no limit.

    Raises:
        InvalidInput: an option is below 1, or the features are of another shape.
    """

    def __init__(
        self,
        site: Site,
        *,
        similarity_size: int | None = None,
        similarity_channels: int | None = None,
    ) -> None:
        super().__init__()
        check_least(1, similarity_size=similarity_size, similarity_channels=similarity_channels)
        check_shape(site)
        self.kernel, (channels, *size) = averaging(site.shape, similarity_size)
        compared = min(channels, similarity_channels or channels)
        self.transform: nn.Module
        if size:
            self.transform = Convolution(compared, compared, bias=False)
            if compared < channels:
                self.transform = nn.Sequential(
                    nn.Conv2d(channels, compared, 1, bias=False), self.transform
                )
        else:
            self.transform = nn.Linear(channels, channels, bias=False)
        self.deviation = bool(size) and compared > 3 and prod(size) > 1

    def compare(self, features: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
        """The loss, and the similarity matrix (A, A) it was computed from."""
        transformed = self.transform(average(features, self.kernel))
        # (B, number of features)
        vectors = spatial_deviation(transformed) if self.deviation else transformed.flatten(1)
        with torch.autocast(features.device.type, enabled=False):
            # in bfloat16, inner products lose too much precision
            similarity = similarity_matrix(targets.examples.gather(at_least_float32(vectors)))
            return torch.mean((similarity - targets.similarity) ** 2), similarity

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        loss, similarity = self.compare(features, targets)
        return Evaluated(loss, count_nearest(similarity.detach(), targets))


def count_nearest(similarity: Tensor, targets: Targets) -> Tensor:
    """Number of examples at hand that share the label of the nearest of those compared.

    A single example has none, and does not count.

    Shapes: (A, A) -> ().
    """
    labels = targets.compared_labels
    if len(labels) == 1:
        return torch.zeros((), dtype=torch.long, device=labels.device)
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    nearest = similarity.masked_fill(itself, -2.0).argmax(1)  # below every similarity
    return torch.sum(targets.examples.own(labels[nearest] == labels))
