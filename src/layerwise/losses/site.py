"""Sites, which local losses are built for, and targets, which they read at each step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.errors import InvalidInput

if TYPE_CHECKING:
    from layerwise.core.later import Place
    from layerwise.core.teacher import TeacherUnit

SHORTEST = 1e-6  # length of a vector that has a direction


@dataclass(frozen=True)
class Site:
    """Place of a local loss in a chain.

    Attributes:
        index: position of the unit, from 0.
        count: number of units in the chain.
        shape: shape of the unit's features without the batch: (C, H, W) or (C,).
        num_classes: number of classes of the labels.
        joined: whether the network's output layer shares the last unit with another weighted layer.
        image_shape: shape of an image, (C, H, W).
        entering: shape of what enters the unit, without the batch: the image's, or the shape of the
            features of the unit before.
        normalization: mean and standard deviation of each channel that the images were normalised
            by, of values from 0 to 1; None: unknown.
        place: function that gives the unit's place among the blocks of its network, for heads made
            of later blocks; None: nothing is known of them.
        teacher: part of a trained network whose features the unit's can be compared with; None:
            nothing is known of one.
        tokens: whether the features are tokens, which are read as maps (C, N, 1) of N positions.
        normalises_layers: whether the network's last features pass layer normalisation before they
            are classified.
    """

    index: int
    count: int
    shape: tuple[int, ...]
    num_classes: int
    joined: bool = False
    image_shape: tuple[int, ...] = ()
    entering: tuple[int, ...] = ()
    normalization: tuple[Sequence[float], Sequence[float]] | None = None
    place: "Callable[[], Place] | None" = None
    teacher: "TeacherUnit | None" = None
    tokens: bool = False
    normalises_layers: bool = False

    @property
    def last(self) -> bool:
        """Whether the unit's output is the network's output."""
        return self.index == self.count - 1


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor in float32 or its own wider type, since sums of many squares round in bfloat16."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_shape(site: Site) -> None:
    """Refuse features that are neither maps (C, H, W) nor vectors (C,).

    Raises:
        InvalidInput: naming the shape.
    """
    if len(site.shape) not in (1, 3):
        raise InvalidInput(
            f"Cannot use the loss at unit {site.index}: its features have shape {site.shape} "
            "without the batch, and the loss reads maps (C, H, W) or vectors (C,). Cut the "
            "network where its features have such a shape, or give a loss of your own."
        )


def classifies(loss: nn.Module) -> bool:
    """Whether a loss has logits of its own: a method ``logits``, from features to (B, num_classes).

    A loss whose class has the method, but which cannot use it, has a false ``classifies``.
    """
    has_method = callable(getattr(type(loss), "logits", None))  # no layer of that name
    return has_method and bool(getattr(loss, "classifies", True))


def end_update(loss: nn.Module) -> None:
    """Tell a loss that has a method ``end_update`` that its unit has updated its weights."""
    if end := getattr(loss, "end_update", None):
        end()


class Evaluated(NamedTuple):
    """A loss, and the number of examples of the batch that the unit alone classifies correctly.

    Both are 0-dimensional.
    """

    loss: Tensor
    correct: Tensor


class Examples:
    """The examples that a loss compares: those of the batch at hand.

    Replicas of a learner share a batch; theirs are the examples of all of them.
    """

    def gather(self, values: Tensor) -> Tensor:
        """A row of every example that is compared, from the rows at hand, (B, ...) -> (A, ...).

        A gradient goes to the rows at hand alone.
        """
        return values

    def own(self, values: Tensor) -> Tensor:
        """The rows at hand among all, (A, ...) -> (B, ...)."""
        return values


AT_HAND = Examples()


@dataclass
class Targets:
    """Labels of a batch, and their similarity, which is computed once for all units.

    Attributes:
        labels: (B,), integers from 0 to num_classes − 1.
        num_classes: number of classes.
        images: the batch's images (B, C, H, W), for losses that say ``reads_images``; None: no loss
            reads them.
        shared: what losses of several units have computed of this batch, such as a teacher's
            features, by a name of theirs.
        examples: those that a loss compares with each other, A of them; see ``Examples``.
    """

    labels: Tensor
    num_classes: int
    images: Tensor | None = None
    shared: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    examples: Examples = AT_HAND

    @cached_property
    def compared_labels(self) -> Tensor:
        """Labels of the examples that are compared, (A,)."""
        return self.examples.gather(self.labels)

    @cached_property
    def similarity(self) -> Tensor:
        """Cosine similarity of the centred one-hot labels of these examples, (A, A)."""
        return similarity_matrix(F.one_hot(self.compared_labels, self.num_classes).float())


def unit_length(vectors: Tensor, epsilon: float = 0.0) -> Tensor:
    """Vectors scaled to unit length.

    One that is shorter than ``SHORTEST`` becomes 0 and has no gradient, which would be as large as
    the inverse of its length.

    Shapes: (B, F) -> (B, F).

    Args:
        epsilon: is added to a length.
    """
    length = vectors.norm(dim=1, keepdim=True)
    return vectors / torch.where(length > SHORTEST, epsilon + length, torch.inf)


def similarity_matrix(features: Tensor) -> Tensor:
    """Cosine similarity between the examples of a batch, each centred over its own features.

    Nøkland & Eidnes 2019, section 2.1: centre each example, scale it to unit length, take inner
    products; clamped to [−1, 1] against rounding.

    Shapes: (B, F) -> (B, B).
    """
    unit = unit_length(features - features.mean(1, keepdim=True), 1e-8)
    return (unit @ unit.T).clamp(-1.0, 1.0)
