"""The prediction loss: a linear classifier on the unit's features (Nøkland & Eidnes 2019)."""

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses.site import Evaluated, Site, Targets, check_shape
from layerwise.ops.pooling import Kernel, average, averaged, pooling_kernel


class Pred(nn.Module):
    """Cross-entropy of a linear classifier on average-pooled features.

    Maps are pooled to at most ``decoder_dim`` numbers. The classifier's weights start at zero, so
    all classes are about equally likely before the first update.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        decoder_dim: largest input of the classifier. The published program used 4096, and 2048 for
            VGG8b on CIFAR.

    Raises:
        InvalidInput: ``decoder_dim`` is below 1, or the features are of another shape.
    """

    def __init__(self, site: Site, *, decoder_dim: int = 4096) -> None:
        super().__init__()
        if decoder_dim < 1:
            raise InvalidInput(
                f"Cannot use decoder_dim {decoder_dim}: it is too small. Give 1 or more."
            )
        check_shape(site)
        pooled = site.shape
        self.kernel: Kernel = None
        if len(site.shape) == 3 and (kernel := pooling_kernel(site.shape, decoder_dim)) != (1, 1):
            self.kernel, pooled = kernel, averaged(site.shape, kernel)
        self.classifier = nn.Linear(prod(pooled), site.num_classes)
        nn.init.zeros_(self.classifier.weight)

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        result: Tensor = self.classifier(average(features, self.kernel).flatten(1))
        return result

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        return cross_entropy(self.logits(features), targets)


class Output(nn.Module):
    """Cross-entropy of the network's own logits: the loss of a chain's last unit, without a head.

    Args:
        site: place in the chain, the last.
        scale: factor of the cross-entropy of a separate output layer.
    """

    def __init__(self, site: Site, *, scale: float = 1.0) -> None:
        super().__init__()
        # A single unit is plain global backpropagation. In a joined unit the layer before the
        # output learns from the cross-entropy alone: scaled, it would slow that layer under SGD.
        self.plain = site.joined or site.count == 1
        self.scale = 1.0 if self.plain else scale

    def forward(self, logits: Tensor, targets: Targets) -> Evaluated:
        """Shapes: logits (B, num_classes)."""
        loss, correct = cross_entropy(logits, targets)
        return Evaluated(loss if self.scale == 1.0 else self.scale * loss, correct)


def cross_entropy(logits: Tensor, targets: Targets) -> Evaluated:
    """Mean cross-entropy and number of correct examples of logits (B, num_classes)."""
    correct = torch.sum(logits.argmax(1) == targets.labels)
    return Evaluated(F.cross_entropy(logits, targets.labels), correct)
