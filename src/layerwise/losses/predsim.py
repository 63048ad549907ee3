"""The loss of the paper: β · sim + (1 − β) · pred (Nøkland & Eidnes 2019)."""

from torch import Tensor, nn

from layerwise.errors import InvalidInput
from layerwise.losses.pred import Output, Pred
from layerwise.losses.sim import Sim
from layerwise.losses.site import Evaluated, Site, Targets


class PredSim(nn.Module):
    """Similarity matching and prediction on the same features: β · sim + (1 − β) · pred.

    Nøkland & Eidnes 2019.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        beta: weight of the similarity loss, 0 ≤ β < 1. The cross-entropy of a separate output layer
            is scaled by 1 − β too.
        decoder_dim: see ``Pred``.
        similarity_size, similarity_channels: see ``Sim``.

    Raises:
        InvalidInput: ``beta`` or another option is out of range, or the features are of another
            shape.
    """

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
        if not 0 <= beta < 1:
            raise InvalidInput(
                f"Cannot use beta {beta}: it is out of range. Give a number from 0 up to but not "
                "including 1, or use the loss 'sim'."
            )
        self.beta = beta
        self.pred = Pred(site, decoder_dim=decoder_dim)
        self.sim = Sim(
            site, similarity_size=similarity_size, similarity_channels=similarity_channels
        )

    @staticmethod
    def output(site: Site, *, beta: float = 0.99) -> Output:
        """The loss of the network's output: cross-entropy scaled by 1 − β."""
        return Output(site, scale=1 - beta)

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        pred, correct = self.pred(features, targets)
        sim, _ = self.sim.compare(features, targets)
        return Evaluated(self.beta * sim + (1 - self.beta) * pred, correct)
