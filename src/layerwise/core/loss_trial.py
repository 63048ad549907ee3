"""Trial of every unit's loss, so that a faulty one is refused before training."""

import copy

import torch
from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.core.result import checked_result
from layerwise.core.side_effects import modes_kept
from layerwise.core.unit import Activations, Unit, entered_feature, precision
from layerwise.errors import InvalidInput, raised
from layerwise.losses import Targets
from layerwise.losses.site import classifies


@torch.no_grad()
def try_losses(learner: Learner, sample: Tensor) -> None:
    """Compute a copy of every unit's loss once, so that a faulty one fails before any training.

    Raises:
        InvalidInput: a loss raises an error, or returns something else than it should.
    """
    labels = torch.arange(len(sample), device=sample.device) % learner.num_classes
    targets = Targets(labels, learner.num_classes, sample)
    activations: Activations = (sample,)
    devices = [sample.device] if sample.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for unit in learner.units:
            loss = copy.deepcopy(unit.loss).eval()  # it may keep something of what it is given
            with modes_kept(unit.piece), precision(activations, unit.amp):
                unit.piece.eval()
                entered = entered_feature(unit, activations)
                activations = unit.piece(*activations)
                try:
                    feature = unit.feature.turned(activations[0])
                    version = feature._version
                    checked_result(loss(feature, targets, *entered))
                    if classifies(loss):
                        logits = loss.logits(feature)  # type: ignore[operator]
                        check_logits(logits, learner.num_classes)
                    refuse_changed_feature(feature, version, unit)
                except InvalidInput:
                    raise
                except Exception as error:  # the user's code runs here: anything can be raised
                    raise InvalidInput(
                        f"Cannot compute the loss of unit {unit.index} ({unit.name}): it "
                        f"{raised(error)}. Correct it."
                    ) from error


def refuse_changed_feature(feature: Tensor, version: int, unit: Unit) -> None:
    """Refuse a loss that changed the feature it was given, which the next unit reads too.

    Args:
        version: of the feature before.

    Raises:
        InvalidInput: naming the unit.
    """
    if feature._version != version:
        raise InvalidInput(
            f"Cannot use the loss of unit {unit.index} ({unit.name}): it changes the unit's "
            "feature in place, and the next unit reads it too. Make a new tensor, such as by "
            "nn.ReLU(inplace=False)."
        )


def check_logits(logits: Tensor, num_classes: int) -> None:
    """Refuse what a loss's ``logits`` gives if it is not a logit per image and class.

    Raises:
        InvalidInput: as said.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] != num_classes:
        words = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else "no shape"
        raise InvalidInput(
            f"Cannot use the logits of a loss: they have {words}, not (B, {num_classes}). Let its "
            "method logits give one per image and class, or name it otherwise."
        )
