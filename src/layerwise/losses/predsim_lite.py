"""Predsim at a fraction of its cost, on averaged features and fewer channels."""

from dataclasses import replace

from torch import Tensor

from layerwise.errors import check_least
from layerwise.losses.predsim import PredSim
from layerwise.losses.site import Evaluated, Site, Targets, check_shape
from layerwise.ops.pooling import average, average_alone, averaging


class PredSimLite(PredSim):
    """Predsim on features averaged over space, with similarity on even fewer pixels and channels.

    Nearly all of predsim's arithmetic is the 3×3 convolution of its similarity loss at the
    features' full width and resolution, from which only a standard deviation over space is taken.
    Resolution can be given up, and the classifier needs little of it. Mixing of channels cannot, so
    wide features are mixed into fewer channels before they are convolved. Both losses read the
    averaged features, so their gradient is one number per window until the unit takes it in parts.
    docs/predsim-lite.md has what was tried.

    Args:
        site, beta, decoder_dim: see ``PredSim``.
        head_size: largest side of the averaged features, in pixels.
        similarity_size, similarity_channels: see ``Sim``.

    Raises:
        InvalidInput: ``head_size`` is below 1; see ``PredSim`` for the rest.
    """

    def __init__(
        self,
        site: Site,
        *,
        beta: float = 0.99,
        decoder_dim: int = 4096,
        head_size: int = 8,
        similarity_size: int | None = 4,
        similarity_channels: int | None = 256,
    ) -> None:
        check_least(1, head_size=head_size)
        check_shape(site)
        kernel, shape = averaging(site.shape, head_size)
        super().__init__(
            replace(site, shape=shape),
            beta=beta,
            decoder_dim=decoder_dim,
            similarity_size=similarity_size,
            similarity_channels=similarity_channels,
        )
        self.kernel = kernel

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        return super().logits(average(features, self.kernel))

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        return super().forward(average_alone(features, self.kernel), targets)
