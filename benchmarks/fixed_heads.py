"""A loss that leaves the network as it is: is an ensemble of heads owed to local training?

The head is that of `strided`, and no gradient reaches the features. On a network that was trained
globally, it tells what the same heads add to backpropagation:

    layerwise train resnet18 --rule global --output GLOBAL …
    layerwise train resnet18 --weights GLOBAL/model.safetensors --import benchmarks/fixed_heads.py
    --loss fixed-strided --at block --last-lr-factor 1e-6 …

The last unit's output layer learns by the rule's own rate, so that is made nearly nothing.
"""

from torch import Tensor

from layerwise.losses import LOSSES, Evaluated, Targets
from layerwise.losses.strided import Strided


class FixedStrided(Strided):
    """The loss `strided` of features that stay."""

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        return super().forward(features.detach(), targets)


LOSSES["fixed-strided"] = FixedStrided
