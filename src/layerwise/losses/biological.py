"""Local losses without labels at the output and without weight transport.

Nøkland & Eidnes 2019, section 2.3: the targets are random projections of the labels, and gradients
pass classifiers by fixed random weights. Published together, with 0.01 for the similarity and 0.99
for the prediction; here each is a loss of its own.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.losses.pred import pooled_shape
from layerwise.losses.sim import count_nearest
from layerwise.losses.site import Evaluated, Site, Targets, at_least_float32, similarity_matrix
from layerwise.ops.pooling import average
from layerwise.ops.spatial_std import spatial_deviation

PROJECTED = 128  # numbers that stand for a label


def projected_labels(site: Site) -> Tensor:
    """A random projection of every class, (num_classes, 128).

    It is normal, and alike at every unit and with every seed; the published program draws one from
    a uniform distribution for each unit.
    """
    generator = torch.Generator().manual_seed(0)
    return torch.randn(site.num_classes, PROJECTED, generator=generator, device="cpu")


class FeedbackAlignment(torch.autograd.Function):
    """A linear layer whose gradient returns by other weights (Lillicrap et al. 2016)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor, feedback: Tensor) -> Tensor:
        ctx.save_for_backward(inputs, feedback)
        return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        inputs, feedback = ctx.saved_tensors
        gradient = gradient.to(feedback.dtype)
        inputs_gradient = (gradient @ feedback).to(inputs.dtype)
        return inputs_gradient, gradient.T @ inputs.to(gradient), gradient.sum(0), None


class BiologicalPred(nn.Module):
    """Binary cross-entropy of a linear layer against the signs of a random projection of the label.

    The layer reads average-pooled features, and gradients pass it by fixed random weights. An
    example counts as correct when its projected label is nearer to the output than the others.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        decoder_dim: largest input of the linear layer; see ``Pred``.

    Raises:
        InvalidInput: ``decoder_dim`` is below 1, or the features are of another shape.
    """

    training_only = ("feedback",)
    signs: Tensor
    feedback: Tensor

    def __init__(self, site: Site, *, decoder_dim: int = 4096) -> None:
        super().__init__()
        self.kernel, pooled = pooled_shape(site, decoder_dim)
        inputs = prod(pooled)
        self.classifier = nn.Linear(inputs, PROJECTED)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.register_buffer("signs", (projected_labels(site) > 0).float())
        bound = inputs**-0.5  # as PyTorch draws a layer's weights
        self.register_buffer("feedback", torch.empty(PROJECTED, inputs).uniform_(-bound, bound))

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        inputs = average(features, self.kernel).flatten(1)
        logits = FeedbackAlignment.apply(
            inputs, self.classifier.weight, self.classifier.bias, self.feedback
        )
        with torch.autocast(features.device.type, enabled=False):
            projected = at_least_float32(logits)
            signs = self.signs[targets.labels].to(projected.dtype)
            loss = F.binary_cross_entropy_with_logits(projected, signs)
        scores = self.scores(logits.detach())
        return Evaluated(loss, torch.sum(scores.argmax(1) == targets.labels))

    def scores(self, projected: Tensor) -> Tensor:
        """Nearness of the layer's output to every class: (B, 128) -> (B, num_classes)."""
        with torch.autocast(projected.device.type, enabled=False):
            wide = at_least_float32(projected)
            return wide @ (2 * self.signs - 1).T.to(wide.dtype)

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        return self.scores(self.classifier(average(features, self.kernel).flatten(1)))


class BiologicalSim(nn.Module):
    """Mean squared difference between similarities of features and those of projected labels.

    Features are average-pooled and pass no layer, so nothing is learned outside of the unit. Of
    maps of more than 3 channels and more than one pixel, the deviation over space is compared.
    See ``Sim`` for the matrices and for what counts as correct.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,).
        decoder_dim: largest number of pooled features; see ``Pred``.

    Raises:
        InvalidInput: ``decoder_dim`` is below 1, or the features are of another shape.
    """

    projected: Tensor

    def __init__(self, site: Site, *, decoder_dim: int = 4096) -> None:
        super().__init__()
        self.kernel, (channels, *size) = pooled_shape(site, decoder_dim)
        self.deviation = channels > 3 and prod(size) > 1
        self.register_buffer("projected", projected_labels(site))

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        pooled = average(features, self.kernel)
        # of a copy, since the deviation overwrites what it reads
        vectors = spatial_deviation(pooled.clone()) if self.deviation else pooled.flatten(1)
        with torch.autocast(features.device.type, enabled=False):
            similarity = similarity_matrix(targets.examples.gather(at_least_float32(vectors)))
            wanted = similarity_matrix(at_least_float32(self.projected[targets.compared_labels]))
            loss = torch.mean((similarity - wanted) ** 2)
        return Evaluated(loss, count_nearest(similarity.detach(), targets))
