"""Predsim at a fraction of its cost: both losses read features averaged over space, and few channels are compared."""

from dataclasses import replace

from torch import Tensor
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses.predsim import PredSim
from layerwise.losses.site import Evaluated, Site, Targets, check_shape


class PredSimLite(PredSim):
    """Predsim on features averaged to few pixels, with its similarity taken over few channels.

    Of predsim's arithmetic nearly all is the similarity loss's 3×3 convolution at the features' full width and resolution, of
    which only a standard deviation over space is taken. Space can be given up; mixing of channels cannot, so wide features are
    mixed into fewer by a 1×1 convolution before the 3×3 one. `docs/predsim-lite.md` has what was measured.

    Args:
        site, beta, decoder_dim: see ``PredSim``.
        head_size: pixels a side of the averaged features.
        head_channels: the most channels of the 3×3 convolution.
    """

    def __init__(
        self, site: Site, *, beta: float = 0.99, decoder_dim: int = 4096, head_size: int = 4, head_channels: int = 256
    ) -> None:
        if head_size < 1:
            raise InvalidInput(f"head_size {head_size} is too small: give 1 or more pixels")
        if head_channels < 1:
            raise InvalidInput(f"head_channels {head_channels} is too small: give 1 or more")
        check_shape(site)
        channels, *size = site.shape
        kernel = tuple(-(-side // head_size) for side in size)
        averaged = tuple(-(-side // step) for side, step in zip(size, kernel, strict=True))
        super().__init__(
            replace(site, shape=(channels, *averaged)), beta=beta, decoder_dim=decoder_dim, head_channels=head_channels
        )
        self.kernel = kernel if max(kernel, default=1) > 1 else None

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        if self.kernel is not None:
            features = F.avg_pool2d(features, self.kernel, ceil_mode=True)
        return super().forward(features, targets)
