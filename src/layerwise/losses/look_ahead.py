"""The look-ahead of MAN++: heads that begin with two copies of the network's next block.

Su et al. 2026, arXiv:2507.16279, Momentum Auxiliary Network++.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from layerwise.errors import InvalidInput, choose
from layerwise.losses.auglocal import Contiguous, Single, place_of, projection
from layerwise.losses.site import Evaluated, Site, Targets, classifies, end_update

BRANCHES = {
    "both": ("copy", "average"),
    "sum": ("copy", "average"),
    "copy": ("copy",),
    "average": ("average",),
}
MOMENTUM = 0.995  # of the average


class LookAhead(nn.Module):
    """A loss behind a trained and an averaged copy of the next block: s · copy + (2 − s) · average.

    Both copies start with the weights that the network's next block has then, and both pass
    gradients to the features. The first is trained with the unit. The weights of the second are an
    exponential moving average of those in the network: m · average + (1 − m) · network's, after
    each update of the unit, without a gradient. Buffers, such as running statistics, are each
    copy's own and describe what it computes itself. s is learned, from 1. A projection stands
    before them where the features are not of the shape that enters the block; see ``AugLocal``.

    Args:
        site: place in the chain of a network.
        branches: both; sum: both, with s fixed at 1; copy: the trained copy alone; average: the
            averaged copy alone.
        average_momentum: m, weight of the old average at each update, from 0 to 1.
        head_loss: local loss of the copies' output; see ``layerwise list losses``.
        options: of that loss.

    Raises:
        InvalidInput: an option is out of range, unknown or without effect, the other loss cannot be
            used there, or no block of the network follows that could be copied.
    """

    training_only = ("averages", "followed")

    def __init__(
        self,
        site: Site,
        *,
        branches: str = "both",
        average_momentum: float = MOMENTUM,
        head_loss: str = "pred",
        **options: Any,
    ) -> None:
        from layerwise.losses import create_loss

        choose("branches", branches, BRANCHES)
        if not 0 <= average_momentum <= 1:
            raise InvalidInput(
                f"Cannot use average_momentum {average_momentum}: it is out of range. Give a "
                "number from 0 to 1."
            )
        if branches == "copy" and average_momentum != MOMENTUM:
            raise InvalidInput(
                f"Cannot use average_momentum {average_momentum}: it would change nothing, because "
                "branches 'copy' has no average. Leave it out, or give other branches."
            )
        place = place_of(site, "look-ahead")
        block = [*place.blocks, place.output][place.passed]
        super().__init__()
        self.entrance = nn.Sequential()
        if site.shape != block.entering:
            self.entrance.append(projection(site.shape, block.entering))
        if block is place.output:
            self.entrance.append(Contiguous())  # it may begin with .view
        self.blocks = nn.ModuleDict(
            {name: Single(block.exact_copy(), block.changes_input) for name in BRANCHES[branches]}
        )
        self.scale = nn.Parameter(torch.ones(())) if branches == "both" else None
        self.average_momentum = average_momentum
        # in lists, so that the network's own weights are no parameters of this module
        self.averages, self.followed = list[Tensor](), list[Tensor]()
        if "average" in self.blocks:
            self.follow(block.module)
        behind = replace(site, shape=block.leaving, entering=site.shape, place=None, teacher=None)
        self.loss = create_loss(head_loss, behind, **options)
        self.reads_images = getattr(self.loss, "reads_images", False)
        self.reads_later_weights = bool(self.followed)

    def follow(self, block: nn.Module) -> None:
        """Let the weights of the average follow those that a block has in the network."""
        own = dict(block.named_parameters(remove_duplicate=False))
        average = self.blocks["average"].get_submodule("piece")  # it may order them otherwise
        for name, weight in average.named_parameters():
            weight.requires_grad_(False)
            if weight.is_floating_point() or weight.is_complex():
                self.averages.append(weight)
                self.followed.append(own[name])

    def end_update(self) -> None:
        """Move the average towards the weights that the block has in the network now."""
        if self.averages:
            get_ema_multi_avg_fn(self.average_momentum)(self.averages, self.followed, None)
        end_update(self.loss)

    def look_ahead(self, features: Tensor) -> Tensor:
        """What leaves the copies of the next block.

        Shapes: (B, C, H, W) or (B, C) -> (B, ...), as what leaves that block in the network.
        """
        entering = self.entrance(features)
        outputs = [block(entering) for block in self.blocks.values()]
        if self.scale is None:
            return sum(outputs[1:], start=outputs[0])
        copied, averaged = outputs
        return self.scale * copied + (2 - self.scale) * averaged

    @property
    def classifies(self) -> bool:
        return classifies(self.loss)

    def logits(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) or (B, C) -> (B, num_classes)."""
        result: Tensor = self.loss.logits(self.look_ahead(features))  # type: ignore[operator]
        return result

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        """Shapes: features (B, C, H, W) or (B, C)."""
        return self.loss(self.look_ahead(features), targets)
