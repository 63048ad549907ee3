"""What follows a unit in its network, for losses whose heads look ahead."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.feature import AS_IT_IS, Feature
from layerwise.core.order import changes_input
from layerwise.core.outputs import Key
from layerwise.core.settings import Check, Settings
from layerwise.core.side_effects import modes_kept
from layerwise.core.split import Chain, split


@dataclass(frozen=True)
class Block:
    """A block of a network, between places where a single tensor passes.

    Attributes:
        name: path of the block.
        module: the network's own, from a tensor to a tuple of one; copy it with ``new_copy`` or
            ``exact_copy``. The tensors are as losses read them.
        entering, leaving: shapes of the tensors without the batch.
    """

    name: str
    module: nn.Module
    entering: tuple[int, ...]
    leaving: tuple[int, ...]

    @property
    def changes_input(self) -> bool:
        """Whether the block may change the tensor that enters it in place."""
        return changes_input(self.module)

    def exact_copy(self) -> nn.Module:
        """The block with weights of its own, which start as the network has them, and learn."""
        settings = [each.settings for each in self.module.modules() if isinstance(each, Check)]
        # the copy relies on nothing of the network
        block = copy.deepcopy(self.module, {id(each): Settings() for each in settings})
        for parameter in block.parameters():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(True)
        return block

    def new_copy(self) -> nn.Module:
        """The block with weights of its own, drawn anew where its layers can draw them.

        Parameters of a user's own module that has no ``reset_parameters`` start as the network has
        them.
        """
        block = self.exact_copy()
        for layer in block.modules():
            reset = getattr(layer, "reset_parameters", None) or getattr(
                layer, "_reset_parameters", None
            )
            if callable(reset):
                reset()
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
    model: nn.Module,
    pieces: Sequence[nn.Module],
    sample: Tensor,
    leaves: Sequence[str],
    output: Key = None,
) -> Callable[[int], Place]:
    """A function that gives the place of a unit by its index; the network is cut when it is called.

    Args:
        pieces: what the units hold of the network, in order.
        sample: a batch of images (B, ...).
        output: where the network's result holds its logits; see ``split``.
    """

    @cache
    def blocks() -> list[Block]:
        return blocks_of(split(model, "block", sample, leaves, output=output), sample)

    def place(index: int) -> Place:
        held = {id(p) for piece in pieces[: index + 1] for p in piece.parameters()}
        begun = [any(id(p) in held for p in block.module.parameters()) for block in blocks()]
        *inner, output = blocks()
        return Place(sum(begun), inner, output)

    return place


class Joined(nn.Module):
    """Neighbouring pieces, between which more passes than a tensor, such as the batch's size."""

    def __init__(self, pieces: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    def forward(self, *activations: Any) -> tuple[Any, ...]:
        for piece in self.pieces:
            activations = piece(*activations)
        return activations


class Turned(nn.Module):
    """A piece of a network between features as losses read them.

    Args:
        piece: from a tensor to a tuple of one.
        entering, leaving: the features as the network has them.
    """

    def __init__(self, piece: nn.Module, entering: Feature, leaving: Feature) -> None:
        super().__init__()
        self.piece, self.entering, self.leaving = piece, entering, leaving

    def forward(self, feature: Tensor) -> tuple[Tensor]:
        (result,) = self.piece(self.entering.restored(feature))
        return (self.leaving.turned(result),)


@torch.no_grad()
def blocks_of(chain: Chain, sample: Tensor) -> list[Block]:
    """The blocks of a chain; pieces are joined where a number passes beside the tensor."""
    activations: tuple[Any, ...] = (sample,)
    blocks, held, entering = list[Block](), list[nn.Module](), AS_IT_IS
    shape = tuple(sample.shape[1:])
    with modes_kept(chain):
        chain.eval()
        for name, piece, axis in zip(chain.names, chain.pieces, chain.channels, strict=True):
            activations = piece(*activations)
            held.append(piece)
            if len(activations) == 1:
                leaving = Feature(tuple(activations[0].shape[1:]), axis)
                module = piece if len(held) == 1 else Joined(held)
                if not (entering.as_it_is and leaving.as_it_is):
                    module = Turned(module, entering, leaving)
                blocks.append(Block(name, module, shape, leaving.read))
                held, entering, shape = [], leaving, leaving.read
    return blocks
