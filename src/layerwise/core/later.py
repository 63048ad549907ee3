"""What follows a unit in its network, for losses whose heads look ahead."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.settings import Check, Settings
from layerwise.core.split import Chain, split


@dataclass(frozen=True)
class Block:
    """A block of a network, between places where a single tensor passes.

    Attributes:
        name: path of the block.
        module: the network's own, from a tensor to a tuple of one; copy it with ``new_copy``.
        entering, leaving: shapes of the tensors without the batch.
    """

    name: str
    module: nn.Module
    entering: tuple[int, ...]
    leaving: tuple[int, ...]

    def new_copy(self) -> nn.Module:
        """The block with weights of its own, drawn anew where its layers can draw them.

        Parameters of a user's own module that has no ``reset_parameters`` start as the network has
        them.
        """
        settings = [each.settings for each in self.module.modules() if isinstance(each, Check)]
        # the copy relies on nothing of the network
        block = copy.deepcopy(self.module, {id(each): Settings() for each in settings})
        for layer in block.modules():
            reset = getattr(layer, "reset_parameters", None) or getattr(
                layer, "_reset_parameters", None
            )
            if callable(reset):
                reset()
        for parameter in block.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        return block


@dataclass(frozen=True)
class Place:
    """Place of a unit's end among the blocks of its network.

    Attributes:
        passed: number of blocks that begin before the unit's end.
        blocks: blocks of the network in order, without the last.
        output: the last block, which holds the output layer.
    """

    passed: int
    blocks: Sequence[Block]
    output: Block


def places(
    model: nn.Module, pieces: Sequence[nn.Module], sample: Tensor, leaves: Sequence[str]
) -> Callable[[int], Place]:
    """A function that gives the place of a unit by its index; the network is cut when it is called.

    Args:
        pieces: what the units hold of the network, in order.
        sample: a batch of images (B, ...).
    """

    @cache
    def blocks() -> list[Block]:
        chain = split(model, "block", sample, leaves)
        shapes = [tuple(sample.shape[1:]), *shapes_between(chain, sample)]
        return [
            Block(name, piece, entering, leaving)
            for name, piece, entering, leaving in zip(
                chain.names, chain.pieces, shapes, shapes[1:], strict=False
            )
        ]

    def place(index: int) -> Place:
        held = {id(p) for piece in pieces[: index + 1] for p in piece.parameters()}
        begun = [any(id(p) in held for p in block.module.parameters()) for block in blocks()]
        *inner, output = blocks()
        return Place(sum(begun), inner, output)

    return place


@torch.no_grad()
def shapes_between(chain: Chain, sample: Tensor) -> list[tuple[int, ...]]:
    """The shape of what leaves every piece of a chain, without the batch."""
    from layerwise.core.side_effects import modes_kept

    activations: tuple[Any, ...] = (sample,)
    shapes = []
    with modes_kept(chain):
        chain.eval()
        for piece in chain.pieces:
            activations = piece(*activations)
            shapes.append(tuple(activations[0].shape[1:]))
    return shapes
