"""Matching a teacher: features are to be those of a trained network, instead of telling classes.

The teacher runs on the images, piece by piece: the unit that asks first computes the pieces before
its own too, the next goes on from there. So all units together cost one forward pass of the teacher
a step, and only the activations between two of its pieces are held.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses.pred import Output
from layerwise.losses.sim import count_nearest
from layerwise.losses.site import (
    Evaluated,
    Site,
    Targets,
    at_least_float32,
    check_shape,
    classifies,
    end_update,
    similarity_matrix,
)

if TYPE_CHECKING:
    from layerwise.core.teacher import TeacherUnit

LEAST_VARIANCE = 0.01  # of a channel, relative to the mean over channels


class Guided(nn.Module):
    """What follows a teacher's features: its pieces, which learn nothing.

    Args:
        unit: the teacher's unit.
    """

    reads_images = True
    reads_teacher = True

    def __init__(self, unit: "TeacherUnit") -> None:
        super().__init__()
        self.borrowed, own = unit.claim()  # those before its own, which are parts of other losses
        self.pieces, self.feature = nn.ModuleList(own), unit.feature

    def train(self, mode: bool = True) -> "Guided":
        super().train(mode)
        if "pieces" in self._modules:  # an early exit leaves them out
            self.pieces.eval()
        return self

    @torch.no_grad()
    def teachers_features(self, targets: Targets) -> Tensor:
        """The features of the teacher's unit, channels first."""
        if targets.images is None:
            raise InvalidInput(
                "Cannot compute match: the targets hold no images to show the teacher. Give "
                "Targets(labels, num_classes, images)."
            )
        pieces = [*self.borrowed, *self.pieces]
        walk = targets.shared.get("teacher")
        if walk is None or walk.passed > len(pieces):
            walk = targets.shared["teacher"] = Walk(0, (targets.images.detach(),))
        walk.go_on(pieces)
        return self.feature.turned(walk.activations[0])


@dataclass
class Walk:
    """Way of a batch through a teacher: pieces passed, and what left the last of them."""

    passed: int
    activations: tuple[Any, ...]

    def go_on(self, pieces: Sequence[nn.Module]) -> None:
        for piece in pieces[self.passed :]:
            for value in self.activations:
                if isinstance(value, Tensor) and value.is_cuda:
                    # units may take turns on several streams
                    value.record_stream(torch.cuda.current_stream(value.device))
            self.activations = piece(*self.activations)
        self.passed = len(pieces)


class Match(Guided):
    """Mean squared error to the features of a teacher's unit: mean (g(h) − t)².

    The teacher reads the images in evaluation mode and learns nothing; t are its own features, not
    those that it would compute from the student's, so that a unit also repairs what units before it
    do differently. g is the identity where both have the same shape. Larger maps are averaged to
    the smaller size, and where channel counts differ, g is a learned 1×1 convolution (a linear
    layer, for vectors).

    The network's last unit learns from the teacher's probabilities, −Σ p_t log p; or, where labels
    have a weight, from the labels. There is no classifier without labels: an example counts as
    correct when the example of the batch whose channel means are most similar has the same label.

    Args:
        site: place in the chain of a network; its teacher is that of ``localize(teacher=…)``, or
            else the network itself as it is then.
        label_weight: weight of a local loss of the labels beside the error. None: 0, or without a
            teacher 1, since a unit that only matches itself does not learn.
        match_weight: weight of the error.
        standardize: divide the squared error by the variance of the teacher's channel over the
            batch, or a hundredth of the mean variance where that is more.
        head_loss: the local loss of the labels; see ``layerwise list losses``.
        options: of that loss.

    Raises:
        InvalidInput: an option is out of range or unknown, the site names no teacher, or the
            teacher has no features for the unit.
    """

    training_only = ("borrowed", "pieces", "projection")

    def __init__(
        self,
        site: Site,
        *,
        label_weight: float | None = None,
        match_weight: float = 1.0,
        standardize: bool = False,
        head_loss: str = "pred",
        **options: Any,
    ) -> None:
        from layerwise.losses import create_loss

        check_shape(site)
        check_weights(label_weight, match_weight)
        unit = teacher_of(site)
        super().__init__(unit)
        self.match_weight, self.standardize = match_weight, standardize
        self.label_weight = labels_weight(site, label_weight)
        self.size, channels = common_size(site.shape, unit.shape), (site.shape[0], unit.shape[0])
        self.projection: nn.Module = nn.Identity()
        if channels[0] != channels[1]:
            self.projection = nn.Conv2d(*channels, 1) if self.size else nn.Linear(*channels)
        self.loss: nn.Module | None = None
        if not self.label_weight and not match_weight:
            raise InvalidInput(
                "Cannot use match_weight 0 without labels: nothing would be learned. Give "
                "label_weight too, or another match_weight."
            )
        if self.label_weight:
            self.loss = create_loss(head_loss, replace(site, teacher=None), **options)
        elif options or head_loss != "pred":
            raise InvalidInput(
                f"Cannot use {', '.join(options or ['head_loss'])} with match: without labels "
                "there is no head. Give label_weight too, or leave it out."
            )
        self.reads_later_weights = getattr(self.loss, "reads_later_weights", False)

    @staticmethod
    def output(site: Site, *, label_weight: float | None = None) -> nn.Module:
        """The loss of the network's own logits: of the teacher's probabilities, or of labels."""
        if site.teacher is None or labels_weight(site, label_weight):
            return Output(site)
        return MatchOutput(site)

    def end_update(self) -> None:
        if self.loss is not None:
            end_update(self.loss)

    @property
    def classifies(self) -> bool:
        return self.loss is not None and classifies(self.loss)

    def logits(self, features: Tensor) -> Tensor:
        """Logits of the local loss of the labels; shapes: (B, …) -> (B, num_classes)."""
        result: Tensor = self.loss.logits(features)  # type: ignore[union-attr, operator]
        return result

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        wanted = pooled(self.teachers_features(targets), self.size)
        compared = self.projection(pooled(features, self.size))
        with torch.autocast(features.device.type, enabled=False):
            compared, wanted = map(at_least_float32, (compared, wanted))
            error = self.match_weight * self.error(compared, wanted, targets)
            if self.loss is None:
                means = at_least_float32(pooled(features.detach(), None))
                compared = similarity_matrix(targets.examples.gather(means))
                return Evaluated(error, count_nearest(compared, targets))
        loss, correct = self.loss(features, targets)
        return Evaluated(self.label_weight * loss + error, correct)

    def error(self, features: Tensor, wanted: Tensor, targets: Targets) -> Tensor:
        """Mean squared error, of standardised channels if so chosen."""
        if not self.standardize:
            return F.mse_loss(features, wanted)
        variance = channel_variance(wanted, targets)
        least = (LEAST_VARIANCE * variance.mean()).clamp(min=torch.finfo(variance.dtype).tiny)
        return ((features - wanted) ** 2 / variance.clamp(min=least)).mean()


def channel_variance(features: Tensor, targets: Targets) -> Tensor:
    """Variance of each channel over all pixels of all examples that are compared.

    It is the mean variance inside of examples and the variance of their means, so that replicas
    exchange two numbers per example and channel.

    Shapes: (B, C, H, W) or (B, C) -> (1, C, 1, 1) or (1, C).
    """
    pixels = features.flatten(2) if features.dim() > 2 else features.unsqueeze(2)
    inside, means = torch.var_mean(pixels, 2, correction=0)
    inside, means = targets.examples.gather(inside), targets.examples.gather(means)
    variance = inside.mean(0) + means.var(0, correction=0)
    return variance.view(1, -1, *[1] * (features.dim() - 2))


class MatchOutput(Guided):
    """Cross-entropy of the teacher's probabilities, of the network's own logits: −Σ p_t log p.

    Args:
        site: place in the chain, the last.

    Raises:
        InvalidInput: the teacher has another number of logits.
    """

    def __init__(self, site: Site) -> None:
        unit = teacher_of(site)
        if unit.shape != site.shape:
            raise InvalidInput(
                f"Cannot match the teacher's output: it has shape {unit.shape} per image, and the "
                f"network's has {site.shape}. Give label_weight, so that the last unit learns "
                "from labels."
            )
        super().__init__(unit)

    def forward(self, logits: Tensor, targets: Targets) -> Evaluated:
        """Shapes: logits (B, num_classes)."""
        wanted = at_least_float32(self.teachers_features(targets)).softmax(1)
        correct = torch.sum(logits.argmax(1) == targets.labels)
        return Evaluated(F.cross_entropy(logits, wanted), correct)


def teacher_of(site: Site) -> "TeacherUnit":
    """The teacher's unit of a site.

    Raises:
        InvalidInput: the site names no teacher.
    """
    if site.teacher is None:
        raise InvalidInput(
            f"Cannot use match at unit {site.index}: its site names no teacher. Let "
            "layerwise.localize make its site, and do not make it the head of another loss."
        )
    return site.teacher


def labels_weight(site: Site, given: float | None) -> float:
    """Weight of the labels: as given, else 0, or 1 where the network is its own teacher."""
    if given is None:
        return float(teacher_of(site).own)
    return given


def check_weights(label_weight: float | None, match_weight: float) -> None:
    """Refuse weights that are none.

    Raises:
        InvalidInput: naming the weight.
    """
    for name, value in (("label_weight", label_weight), ("match_weight", match_weight)):
        if value is not None and not 0 <= value < float("inf"):
            raise InvalidInput(
                f"Cannot use {name} {value}: it is out of range. Give a number, 0 or more."
            )


def common_size(shape: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, int] | None:
    """Height and width that features and the teacher's are averaged to; None: to vectors."""
    if len(shape) != 3 or len(wanted) != 3:
        return None
    return min(shape[1], wanted[1]), min(shape[2], wanted[2])


def pooled(features: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Maps averaged to a size, or to vectors: (B, C, H, W) -> (B, C, *size) or (B, C)."""
    if features.dim() == 2 or features.shape[2:] == size:
        return features
    return F.adaptive_avg_pool2d(features, size or 1) if size else features.mean((2, 3))
