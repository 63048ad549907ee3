"""The prediction loss: a linear classifier on the unit's features (Nøkland & Eidnes 2019)."""

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses.site import Evaluated, Site, Targets, check_shape
from layerwise.ops.pooling import Kernel, average, averaged, pooling_kernel


class Pred(nn.Module):
    """Cross-entropy of a linear classifier on features that are average-pooled to at most
    ``decoder_dim`` numbers.

    The classifier starts at zero, so every class is equally likely before the first update.

    Args:
        site: where in the chain the loss sits; its features are (C, H, W) or (C,).
        decoder_dim: the largest input of the classifier. The published program used 4096, and 2048
            for VGG8b on CIFAR.
    """

    def __init__(self, site: Site, *, decoder_dim: int = 4096) -> None:
        super().__init__()
        if decoder_dim < 1:
            raise InvalidInput(f"decoder_dim {decoder_dim} is too small: give 1 or more")
        check_shape(site)
        pooled = site.shape
        self.kernel: Kernel = None
        if len(site.shape) == 3 and (kernel := pooling_kernel(site.shape, decoder_dim)) != (1, 1):
            self.kernel, pooled = kernel, averaged(site.shape, kernel)
        self.classifier = nn.Linear(prod(pooled), site.num_classes)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        return cross_entropy(self.classifier(average(features, self.kernel).flatten(1)), targets)


class Output(nn.Module):
    """Cross-entropy of the network's own logits: the loss of a chain's last unit, with no head of
    its own.

    Args:
        scale: factor of the cross-entropy of a separate output layer; 1 − β under predsim.
    """

    def __init__(self, site: Site, *, scale: float = 1.0) -> None:
        super().__init__()
        # A single unit is plain global backpropagation. In a joined one the cross-entropy is all
        # that the layer before the output learns from: scaled, it would slow that layer under SGD.
        self.scale = 1.0 if site.joined or site.count == 1 else scale

    def forward(self, logits: Tensor, targets: Targets) -> Evaluated:
        """Shapes: logits (B, num_classes)."""
        loss, correct = cross_entropy(logits, targets)
        return Evaluated(loss if self.scale == 1.0 else self.scale * loss, correct)


def cross_entropy(logits: Tensor, targets: Targets) -> Evaluated:
    correct = torch.sum(logits.argmax(1) == targets.labels)
    return Evaluated(F.cross_entropy(logits, targets.labels), correct)
