"""Heads that classify a unit's features, and the loss that they share: cross-entropy."""

from torch import Tensor, nn

from layerwise.losses.pred import cross_entropy
from layerwise.losses.site import Evaluated, Targets


class HeadLoss(nn.Module):
    """Cross-entropy of the logits that an auxiliary head computes from a unit's features.

    Args:
        head: module from features (B, C, H, W) or (B, C) to logits (B, num_classes).
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        result: Tensor = self.head(features)
        return result

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        return cross_entropy(self.logits(features), targets)


def convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation and ReLU; the size of maps is divided by the stride."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def linear(inputs: int, outputs: int) -> nn.Sequential:
    """Linear layer, batch normalisation and ReLU."""
    return nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU())


def perceptron(inputs: int, layers: int, classes: int) -> nn.Sequential:
    """Hidden layers that are as wide as their input, and a linear classifier."""
    hidden = [linear(inputs, inputs) for _ in range(layers)]
    return nn.Sequential(*hidden, nn.Linear(inputs, classes))
