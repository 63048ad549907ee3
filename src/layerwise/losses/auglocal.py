"""AugLocal: heads made of later blocks of the network itself (Ma et al. 2024, arXiv:2402.17318)."""

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from torch import Tensor, nn

from layerwise.errors import InvalidInput
from layerwise.losses.heads import HeadLoss
from layerwise.losses.site import Site

if TYPE_CHECKING:
    from layerwise.core.later import Block, Place

DEPTH = 4  # of a head, where a network has so many later blocks


class AugLocal(HeadLoss):
    """Cross-entropy of a head of d later blocks of the network, new and unshared, and its output.

    The blocks are chosen uniformly: of L blocks, unit l has those at round(l + i · (L − 1 − l) / d)
    for i = 1 … d; all later ones where there are fewer. Deeper units have fewer: with a pyramid c,
    d falls linearly from the first unit to the last, to (1 − c) · d + c. A block that the features
    before it do not fit gives way to the latest one before it, behind the unit, that leads from
    their shape to the same shape: in a residual network, to the first of its stage. Where there is
    none, a projection (a 1×1 convolution with a stride, or a linear layer) stands before the block.

    Args:
        site: place in the chain of a network.
        head_depth: d, 1 or more, and less than the number of blocks. None: 4, or as many as there
            are.
        pyramid: c, from 0 to 1. With 0, all heads are equally deep; with 1, depth falls to 1 at the
            last unit.

    Raises:
        InvalidInput: an option is out of range, or no block of the network follows that could be
            copied.
    """

    def __init__(self, site: Site, *, head_depth: int | None = None, pyramid: float = 0.5) -> None:
        if not 0 <= pyramid <= 1:
            raise InvalidInput(
                f"Cannot use pyramid {pyramid}: it is out of range. Give a number from 0 to 1."
            )
        place = place_of(site, "auglocal")
        count = len(place.blocks)
        most = max(count - 1, 1)
        if head_depth is None:
            head_depth = min(DEPTH, most)
        if not 1 <= head_depth <= most:
            raise InvalidInput(
                f"Cannot use head_depth {head_depth}: the network has {count} blocks and its "
                f"output layer. Give 1 to {most}."
            )
        last = place.passed - 1  # index of the block that the unit ends in or behind
        depth = pyramid_depth(site.index, site.count, head_depth, pyramid)
        shape, layers = site.shape, list[nn.Module]()
        for index in chosen_blocks(last, count, depth):
            block = fitting_block(shape, place.blocks[last + 1 : index + 1])
            layers += [
                *joint(shape, block.entering),
                Single(block.new_copy(), block.changes_input),
            ]
            shape = block.leaving
        layers += joint(shape, place.output.entering)
        layers.append(Contiguous())  # the output's block may begin with .view
        layers.append(Single(place.output.new_copy(), place.output.changes_input))
        super().__init__(nn.Sequential(*layers))


def place_of(site: Site, loss: str) -> "Place":
    """The place of a unit behind which a whole block of the network follows.

    Raises:
        InvalidInput: the site does not say what follows the unit, or it ends inside the block of
            the output layer, behind which there is none.
    """
    if site.place is None:
        raise InvalidInput(
            f"Cannot use {loss} at unit {site.index}: its site does not say what follows it. "
            "Let layerwise.localize make its site, and do not make it the head of another loss."
        )
    place = site.place()
    if place.passed > len(place.blocks):
        able = f"Units that end in {place.blocks[-1].name} or before can. " if place.blocks else ""
        raise InvalidInput(
            f"Cannot use {loss} at unit {site.index}: it ends inside the last block, "
            f"{place.output.name}, and none follows that could be copied: between blocks, a single "
            f"tensor passes. {able}Cut at='block', or use another loss, such as dgl-cnn."
        )
    return place


def pyramid_depth(unit: int, units: int, depth: int, pyramid: float) -> int:
    """Depth of a unit's head: max(1, round((1 − c·l/(K − 2)) · d + c·l/(K − 2)))."""
    share = pyramid * unit / max(units - 2, 1)
    return max(1, round((1 - share) * depth + share))


def chosen_blocks(last: int, count: int, depth: int) -> list[int]:
    """Indices of the later blocks that make a head, in order."""
    later = count - 1 - last
    if depth >= later:
        return list(range(last + 1, count))
    return [round(last + number * later / depth) for number in range(1, depth + 1)]


def fitting_block(shape: tuple[int, ...], blocks: "Sequence[Block]") -> "Block":
    """The last block, or the latest that leads from features of a shape to what it leads to."""
    *_, chosen = blocks
    wanted = shape, chosen.leaving
    return next((b for b in reversed(blocks) if (b.entering, b.leaving) == wanted), chosen)


class Contiguous(nn.Module):
    """Maps in PyTorch's default memory format."""

    def forward(self, features: Tensor) -> Tensor:
        return features.contiguous()


class Single(nn.Module):
    """A piece of a network, from a tensor to a tensor.

    Args:
        piece: from a tensor to a tuple of one.
        changes_input: whether it may change what enters it, of which it is then given a copy:
            others read it too.
    """

    def __init__(self, piece: nn.Module, changes_input: bool) -> None:
        super().__init__()
        self.piece, self.changes_input = piece, changes_input

    def forward(self, features: Tensor) -> Tensor:
        (result,) = self.piece(features.clone() if self.changes_input else features)
        return result


def joint(shape: tuple[int, ...], wanted: tuple[int, ...]) -> list[nn.Module]:
    """What stands between features of one shape and a block that takes another."""
    return [] if shape == wanted else [projection(shape, wanted)]


def projection(shape: tuple[int, ...], wanted: tuple[int, ...]) -> nn.Module:
    """Layers from features of one shape to those of another.

    Shapes: (B, *shape) -> (B, *wanted).
    """
    if len(shape) == len(wanted) == 3:
        (height, width), (wanted_height, wanted_width) = shape[1:], wanted[1:]
        stride = max(height // wanted_height, 1), max(width // wanted_width, 1)
        size = -(-height // stride[0]), -(-width // stride[1])
        return nn.Sequential(
            nn.Conv2d(shape[0], wanted[0], 1, stride, bias=False),
            nn.BatchNorm2d(wanted[0]),
            *([] if size == wanted[1:] else [nn.AdaptiveAvgPool2d((wanted_height, wanted_width))]),
        )
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if len(shape) == 3 else []
    inputs = shape[0] if len(shape) == 3 else prod(shape)
    layers = [nn.Flatten(), nn.Linear(inputs, prod(wanted)), nn.Unflatten(1, wanted)]
    return nn.Sequential(*pooled, *layers)
