"""The prediction loss: a linear classifier on the unit's features (Nøkland & Eidnes 2019)."""

from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import check_least
from layerwise.losses.site import Evaluated, Site, Targets, at_least_float32, check_shape
from layerwise.ops.pooling import Kernel, average, averaged, pooling_kernel

EPSILON = 1e-5  # added to a variance


class Pred(nn.Module):
    """Cross-entropy of a linear classifier on average-pooled features.

    Maps are pooled to at most ``decoder_dim`` numbers. For tokens, the batch-normalised mean
    and standard deviation over positions are read; see ``Positions``. Where the network
    layer-normalises its own last features, other features are batch-normalised too, so that a
    residual stream gains nothing by growing. The classifier's weights start at zero, so all classes
    are about equally likely before the first update.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        decoder_dim: largest input of the classifier on maps. The published program used 4096, and
            2048 for VGG8b and VGG11b on CIFAR-10, SVHN and STL-10.

    Raises:
        InvalidInput: ``decoder_dim`` is below 1, or the features are of another shape.
    """

    def __init__(self, site: Site, *, decoder_dim: int = 4096) -> None:
        super().__init__()
        self.kernel, pooled = pooled_shape(site, decoder_dim)
        inputs = prod(pooled)
        self.reading: nn.Module = nn.Flatten()
        if site.tokens and site.shape[2:] == (1,):  # of another shape behind a look-ahead
            inputs, self.kernel = 2 * site.shape[0], None
            self.reading = Positions(site.shape[0])
        elif site.normalises_layers:
            self.reading = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(inputs))
        self.classifier = nn.Linear(inputs, site.num_classes)
        nn.init.zeros_(self.classifier.weight)

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        result: Tensor = self.classifier(self.reading(average(features, self.kernel)))
        return result

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        return cross_entropy(self.logits(features), targets)


class Positions(nn.Module):
    """Mean and standard deviation of tokens over positions, each batch-normalised.

    A classifier of every position has 100 % on small data at once, and rewards a transformer's
    residual stream, which nothing normalises between blocks, for growing. The units behind it then
    learn little. What is read here does not depend on the scale of the stream, and has to be
    gathered from all positions.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2 * channels)

    def forward(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, N, 1) -> (B, 2C)."""
        tokens = at_least_float32(features.flatten(2))
        variance, mean = torch.var_mean(tokens, 2, correction=0)
        # a single position has no deviation, and a root no gradient at 0
        both = torch.cat([mean, (variance + EPSILON).sqrt()], 1)
        normalised: Tensor = self.norm(both.to(self.norm.weight.dtype))
        return normalised


def pooled_shape(site: Site, decoder_dim: int) -> tuple[Kernel, tuple[int, ...]]:
    """The kernel that pools maps to at most ``decoder_dim`` numbers, and their shape then.

    Raises:
        InvalidInput: ``decoder_dim`` is below 1, or the features are neither maps nor vectors.
    """
    check_least(1, decoder_dim=decoder_dim)
    check_shape(site)
    kernel = pooling_kernel(site.shape, decoder_dim)
    return kernel, site.shape if kernel is None else averaged(site.shape, kernel)


class Output(nn.Module):
    """Cross-entropy of the network's own logits: the loss of a chain's last unit, without a head.

    Args:
        site: place in the chain, the last.
    """

    def __init__(self, site: Site) -> None:
        super().__init__()

    def forward(self, logits: Tensor, targets: Targets) -> Evaluated:
        """Shapes: logits (B, num_classes)."""
        return cross_entropy(logits, targets)


def cross_entropy(logits: Tensor, targets: Targets) -> Evaluated:
    """Mean cross-entropy and number of correct examples of logits (B, num_classes)."""
    correct = torch.sum(logits.argmax(1) == targets.labels)
    return Evaluated(F.cross_entropy(logits, targets.labels), correct)
