"""InfoPro: features that keep what is in the image and tell classes apart.

Wang et al. 2021, arXiv:2101.10832: λ₁ · reconstruction + λ₂ · task, both weights linear over the
units from the first to the last but one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses.heads import convolution, linear
from layerwise.losses.pred import cross_entropy
from layerwise.losses.sim import count_nearest
from layerwise.losses.site import (
    Evaluated,
    Site,
    Targets,
    at_least_float32,
    check_shape,
    unit_length,
)
from layerwise.losses.terms import term_weight

WIDTH = 12  # channels of the decoder
EMBEDDING = 128  # numbers of an example before the classifier, and those that are contrasted
TEMPERATURE = 0.07
COARSE = 4  # a vector is decoded from so many pixels a side


class InfoPro(nn.Module):
    """Reconstruction of the image and cross-entropy: λ₁ · reconstruction + λ₂ · cross-entropy.

    The decoder scales features up to the image's size (bilinear), then has two 3×3 convolutions. It
    is compared with the image by the mean squared error, or, where the normalisation of the images
    is known, with the image as stored by binary cross-entropy, as published. The classifier has a
    3×3 convolution (with stride 2 to twice the channels where maps are larger than a quarter of the
    image), global average pooling and a hidden layer of 128.

    Args:
        site: place in the chain; its features are (C, H, W) or (C,), and its images (C, H, W).
        reconstruction: weight λ₁ of the reconstruction in the first unit, 0 or more.
        reconstruction_last: the same in the last unit but one. None: as in the first.
        task: weight λ₂ of the cross-entropy in the first unit, 0 or more.
        task_last: the same in the last unit but one. None: as in the first.

    Raises:
        InvalidInput: an option is out of range, both weights of the unit are 0 as training begins,
            or features or images are of another shape.
    """

    reads_images = True
    name = "infopro"  # in LOSSES
    training_only = ("decoder",)
    reconstruction, reconstruction_last = term_weight(), term_weight(optional=True)
    task, task_last = term_weight(), term_weight(optional=True)
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        site: Site,
        *,
        reconstruction: float = 5.0,
        reconstruction_last: float | None = None,
        task: float = 1.0,
        task_last: float | None = None,
    ) -> None:
        super().__init__()
        check_shape(site)
        if len(site.image_shape) != 3:
            raise InvalidInput(
                f"Cannot use {self.name} at unit {site.index}: it reconstructs images (C, H, W), "
                f"and these have shape {site.image_shape}. Use another loss, such as dgl-cnn."
            )
        self.reconstruction, self.reconstruction_last = reconstruction, reconstruction_last
        self.task, self.task_last = task, task_last
        self.depth = min(site.index / max(site.count - 2, 1), 1.0)  # 0 first, 1 last but one
        if not any(self.weights()):
            raise InvalidInput(
                f"Cannot use {self.name} at unit {site.index} with a weight of 0 for both the "
                "reconstruction and the task: nothing would be learned. Give one of them another."
            )
        self.keep_normalization(site)
        self.decoder = decoder(site)
        self.embedding = embedding(site)
        self.classifier = nn.Linear(EMBEDDING, self.outputs(site))

    def outputs(self, site: Site) -> int:
        return site.num_classes

    @property
    def classifies(self) -> bool:
        """Whether the classifier learns: the task has a weight in this unit."""
        return self.weights()[1] > 0

    def keep_normalization(self, site: Site) -> None:
        """Keep mean and deviation as buffers, which move with the module and are not saved."""
        for name, values in zip(("mean", "std"), site.normalization or (None, None), strict=True):
            if values is not None and len(values) != site.image_shape[0]:
                raise InvalidInput(
                    f"Cannot use normalization of {len(values)} channels: images have "
                    f"{site.image_shape[0]}. Give a mean and a standard deviation of each channel."
                )
            tensor = None if values is None else torch.tensor(values)[:, None, None]
            self.register_buffer(name, tensor, persistent=False)

    def reconstruct(self, features: Tensor, targets: Targets) -> Tensor:
        """Loss of the decoder."""
        if targets.images is None:
            raise InvalidInput(
                f"Cannot compute {self.name}: the targets hold no images to reconstruct. Give "
                "Targets(labels, num_classes, images)."
            )
        decoded, images = map(at_least_float32, (self.decoder(features), targets.images.detach()))
        with torch.autocast(features.device.type, enabled=False):
            if self.mean is None or self.std is None:
                return F.mse_loss(decoded, images)
            stored = (images * self.std + self.mean).clamp(0.0, 1.0)  # rounding leaves this range
            return F.binary_cross_entropy_with_logits(decoded, stored)

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        result: Tensor = self.classifier(self.embedding(features))
        return result

    def classify(self, features: Tensor, targets: Targets) -> Evaluated:
        """The task's loss."""
        return cross_entropy(self.logits(features), targets)

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        task, correct = self.classify(features, targets)
        first, second = self.weights()
        return Evaluated(first * self.reconstruct(features, targets) + second * task, correct)

    def weights(self) -> list[float]:
        """λ₁ and λ₂ of this unit, linear from the first unit to the last but one."""
        both = (self.reconstruction, self.reconstruction_last), (self.task, self.task_last)
        return [
            first if last is None else first + (last - first) * self.depth for first, last in both
        ]


class InfoProContrast(InfoPro):
    """Reconstruction and the supervised contrastive loss: λ₁ · reconstruction + λ₂ · contrast.

    Khosla et al. 2020, of a single view and with temperature 0.07; an example without another of
    its class adds nothing. There is no classifier: an example counts as correct when the example of
    the batch that is most similar to it has the same label. See ``InfoPro``.
    """

    name = "infopro-contrast"

    @property
    def classifies(self) -> bool:
        return False

    def outputs(self, site: Site) -> int:
        return EMBEDDING

    def classify(self, features: Tensor, targets: Targets) -> Evaluated:
        """The task's loss."""
        vectors = self.classifier(self.embedding(features))
        with torch.autocast(features.device.type, enabled=False):
            vectors = targets.examples.gather(unit_length(at_least_float32(vectors)))
            similarity = vectors @ vectors.T
            loss = contrast(similarity, targets.compared_labels)
        return Evaluated(loss, count_nearest(similarity.detach(), targets))


def contrast(similarity: Tensor, labels: Tensor) -> Tensor:
    """Supervised contrastive loss from cosine similarities (B, B).

    The mean over examples of −mean over positives of log softmax of similarity / temperature, the
    example itself left out.
    """
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    logits = (similarity / TEMPERATURE).masked_fill(itself, float("-inf"))
    log_shares = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(itself, 0.0)
    positive = (labels[:, None] == labels) & ~itself
    counts = positive.sum(1)
    return -((log_shares * positive).sum(1) / counts.clamp(min=1)).mean()


def decoder(site: Site) -> nn.Module:
    """Layers from features to the logits of an image's pixels."""
    channels, *size = site.shape
    colours, *pixels = site.image_shape
    coarse: list[nn.Module] = []
    if not size:
        coarse = [
            nn.Linear(channels, WIDTH * COARSE**2),
            nn.Unflatten(1, (WIDTH, COARSE, COARSE)),
        ]
        channels = WIDTH
    return nn.Sequential(
        *coarse,
        nn.Upsample(tuple(pixels), mode="bilinear", align_corners=True),
        *convolution(channels, WIDTH, 3),
        nn.Conv2d(WIDTH, colours, 3, padding=1),
    )


def embedding(site: Site) -> nn.Module:
    """Layers from features to 128 numbers."""
    channels, *size = site.shape
    if not size:
        return linear(channels, EMBEDDING)
    stride = 2 if COARSE * size[0] > site.image_shape[1] else 1
    return nn.Sequential(
        nn.Conv2d(channels, channels * stride, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels * stride),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels * stride, EMBEDDING),
        nn.ReLU(),
    )
