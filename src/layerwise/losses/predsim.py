"""The loss of the paper: β · sim + (1 − β) · pred (Nøkland & Eidnes 2019)."""

from torch import Tensor, nn

from layerwise.losses.pred import Output, Pred
from layerwise.losses.sim import Sim
from layerwise.losses.site import Evaluated, Site, Targets
from layerwise.utils.changing import Changing


def weight_of_similarity() -> Changing:
    return Changing(
        lambda beta: 0 <= beta < 1,
        "a number from 0 up to but not including 1, or use the loss 'sim'",
    )


class PredSimOutput(Output):
    """Cross-entropy of the network's own logits; that of a separate output layer times 1 − β."""

    beta = weight_of_similarity()

    def __init__(self, site: Site, *, beta: float = 0.99) -> None:
        super().__init__(site)
        # A single unit is plain global backpropagation. In a joined unit the layer before the
        # output learns from the cross-entropy alone: scaled, it would slow that layer under SGD.
        self.plain = site.joined or site.count == 1
        self.beta = beta

    def forward(self, logits: Tensor, targets: Targets) -> Evaluated:
        """Shapes: logits (B, num_classes)."""
        loss, correct = super().forward(logits, targets)
        return Evaluated(loss if self.plain else (1 - self.beta) * loss, correct)


class PredSim(nn.Module):
    """Similarity matching and prediction on the same features: β · sim + (1 − β) · pred.

    Nøkland & Eidnes 2019.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        beta: weight of the similarity loss, 0 ≤ β < 1. The cross-entropy of an output layer that
            is a unit by itself is scaled by 1 − β too.
        decoder_dim: see ``Pred``.
        similarity_size, similarity_channels: see ``Sim``.

    Raises:
        InvalidInput: ``beta`` or another option is out of range, or the features are of another
            shape.
    """

    training_only = ("sim",)
    beta = weight_of_similarity()

    def __init__(
        self,
        site: Site,
        *,
        beta: float = 0.99,
        decoder_dim: int = 4096,
        similarity_size: int | None = None,
        similarity_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.beta = beta
        self.pred = Pred(site, decoder_dim=decoder_dim)
        self.sim = Sim(
            site, similarity_size=similarity_size, similarity_channels=similarity_channels
        )

    output = PredSimOutput

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        return self.pred.logits(features)

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        pred, correct = self.pred(features, targets)
        sim, _ = self.sim.compare(features, targets)
        return Evaluated(self.beta * sim + (1 - self.beta) * pred, correct)
