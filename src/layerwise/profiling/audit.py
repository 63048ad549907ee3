"""Audit of a learner by any rule, with the memory that its steps are predicted to take."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from layerwise.core.audit import audit_steps
from layerwise.core.learner import Learner
from layerwise.core.locality import Audit
from layerwise.core.reach import reach_of_span, span_text
from layerwise.errors import InvalidInput, brief, choose
from layerwise.profiling.predict import predict_steps
from layerwise.rules import RULES
from layerwise.utils.options import keyword_only


def audit(
    learner: Learner,
    images: Tensor,
    labels: Tensor,
    rule: str = "simultaneous",
    batch_size: int | None = None,
    **options: Any,
) -> Audit:
    """Find by differentiating what the loss of each unit reaches, on a batch.

    The steps that the rule makes are repeated on the batch while losses count with different
    factors, and nothing is updated; see ``core.audit``. It works for any network and any loss. The
    learner, its generators of random numbers and its modules' attributes stay as they are.

    Args:
        images: (B, ...) with B ≥ 2, on the model's device; a few are enough.
        labels: (B,), integers from 0 to num_classes − 1; a contrastive loss has gradients only
            where some are equal and some are not.
        rule: a name in ``RULES``.
        batch_size: number of images in the batch that memory is predicted for; None: B.
        options: of the rule; the span is the learner's.

    Returns:
        The units that each loss reaches, the number of isolated parts and the span in truth, leaks,
        dead parameters, updates of batch statistics, and memory. ``print`` shows it as a table;
        ``problem`` is None if the locality is as declared.

    Raises:
        InvalidInput: the rule is unknown or cannot train such a learner, or the batch cannot be
            used.
        Diverged: a loss is not finite.
    """
    if not isinstance(learner, Learner):
        raise InvalidInput(
            f"Cannot audit {type(learner).__name__}: it is no learner. Give what "
            "layerwise.localize returned."
        )
    learner.check(images, labels)
    span = options.pop("span", learner.span)
    if reach_of_span(span, len(learner.units)) != learner.reach:
        raise InvalidInput(
            f"Cannot audit with another span than the learner's, {span_text(learner.span)}. Set "
            "learner.span."
        )
    order = RULES[choose("rule", rule, RULES)].order
    for name in options:
        choose(f"option of the rule {rule}:", name, [*keyword_only(order)])
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 2):
        raise InvalidInput(
            f"Cannot use batch_size={brief(repr(batch_size))}: it is no number of images. Give 2 "
            "or more."
        )
    if images.shape[1:] != learner.image_shape or images.dtype != learner.image_type:
        raise InvalidInput(
            f"Cannot audit with images {tuple(images.shape)} of {images.dtype}: the learner reads "
            f"(B, {', '.join(map(str, learner.image_shape))}) of {learner.image_type}. Give such."
        )
    batches = SingleBatch(images, labels)
    make_steps = partial(order, learner, batches, 1, lambda done: 1.0, **options)
    found = audit_steps(learner, images, labels, make_steps)
    kept, peak = predicted_memory(learner, rule, batch_size or len(images), options)
    return replace(found, kept_bytes=kept, peak_bytes=peak)


def predicted_memory(
    learner: Learner, rule: str, batch_size: int, options: dict[str, Any]
) -> tuple[int | None, int | None]:
    """Bytes between steps, and at the peak of a step; None where they cannot be predicted."""
    try:
        steps = predict_steps(rule, learner, batch_size, options)
    except Exception:  # a network or a loss of the user's own need not run without contents
        return None, None
    peaks = [max(step.peaks().values()) for step in steps]
    return max(step.persistent_bytes for step in steps), max(peaks)


class SingleBatch:
    """One batch of images as the training data of a rule."""

    views = 1

    def __init__(self, given: Tensor, labels: Tensor) -> None:
        self.given, self.labels = given, labels

    def __len__(self) -> int:
        return 1

    def order(self, epoch: int) -> list[Tensor]:
        return [self.labels.new_tensor(range(len(self.labels)))]

    def images(self, indices: Tensor, epoch: int) -> Tensor:
        return self.given[indices]

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        if start == 0:
            yield self.given, self.labels
