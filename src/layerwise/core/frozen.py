"""Units that are frozen: they pass features on to the first unit that learns, and learn nothing."""

from collections.abc import Iterable
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from layerwise.core.split import Chain
from layerwise.errors import InvalidInput, choose
from layerwise.utils.options import is_whole_number

stopped: "WeakSet[nn.Module]" = WeakSet()  # modules that frozen units put in evaluation mode


class Frozen(nn.Module):
    """Pieces of a network that are frozen: without gradients, in evaluation mode.

    So their batch normalisation uses its running statistics, which stay as they are, and dropout is
    off, whatever mode the network is in. ``requires_grad`` of their weights stays as it is, since
    another learner of the network may train them.
    """

    def __init__(self, pieces: Iterable[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    @torch.no_grad()
    def forward(self, *activations: Any) -> tuple[Any, ...]:
        stopped.update(module for module in self.pieces.modules() if module.training)
        self.pieces.eval()  # the network's train() reaches them too
        for piece in self.pieces:
            activations = piece(*activations)
        return activations


class Entered(nn.Module):
    """The piece of the first unit that learns, behind those that are frozen.

    Attributes:
        frozen: what comes before it.
        piece: the unit's own part of the network.
        skips: whether it is given what the frozen part has computed already, in place of images.
    """

    def __init__(self, frozen: Frozen, piece: nn.Module) -> None:
        super().__init__()
        self.frozen, self.piece = frozen, piece
        self.skips = False

    def forward(self, *activations: Any) -> tuple[Any, ...]:
        result: tuple[Any, ...] = self.piece(
            *(activations if self.skips else self.frozen(*activations))
        )
        return result


def wake(model: nn.Module) -> None:
    """Put modules that only an earlier learner froze back in their network's training mode.

    Where some of them are in training mode, the network's mode was set since, and the others are
    in evaluation mode on purpose.
    """
    found = [module for module in model.modules() if module in stopped]
    if model.training and not any(module.training for module in found):
        for module in found:
            module.training = True
    stopped.difference_update(found)


def frozen_before(chain: Chain, train_from: "int | str | None") -> Chain:
    """A chain of the units that learn; those before are frozen, and enter with the first.

    Args:
        train_from: name or number of the first unit that learns; None or 0: all learn.

    Raises:
        InvalidInput: there is no such unit, or nothing would be left to learn.
    """
    first = number_of_unit(chain, train_from)
    if not first:
        return chain
    if not any(weight.requires_grad for p in chain.pieces[first:] for weight in p.parameters()):
        raise InvalidInput(
            f"Cannot train from unit {first} ({chain.names[first]}): all weights from there on are "
            "frozen, so nothing is left to train. Unfreeze some with requires_grad_(True)."
        )
    entered = Entered(Frozen(chain.pieces[:first]), chain.pieces[first])
    entered.training = chain.training
    return Chain(
        [entered, *chain.pieces[first + 1 :]],
        chain.names[first:],
        chain.channels[first:],
        chain.output,
        chain.untrained,
        chain.normalises_layers,
        chain.joined,
        chain.recomputes,
    )


def number_of_unit(chain: Chain, unit: "int | str | None") -> int:
    """Number of a unit that is given by its name or its number.

    Raises:
        InvalidInput: there is no such unit.
    """
    if unit is None:
        return 0
    if isinstance(unit, str) and unit not in chain.names and is_whole_number(unit):
        unit = int(unit)
    if isinstance(unit, str):
        return chain.names.index(choose("unit to train from", unit, chain.names))
    if len(chain) == 1:
        raise InvalidInput(
            f"Cannot train from unit {unit}: the network is one unit. Cut it, such as by "
            "at='block'."
        )
    if not isinstance(unit, int) or isinstance(unit, bool) or not 0 <= unit < len(chain):
        raise InvalidInput(
            f"Cannot train from unit {unit}: the network has {len(chain)} units. Give 0 to "
            f"{len(chain) - 1}, or the name of one, such as {chain.names[-1]!r}."
        )
    return unit


def pieces_of(piece: nn.Module) -> list[Any]:
    """A unit's piece, behind those that are frozen and enter with it."""
    return [*piece.frozen.pieces, piece.piece] if isinstance(piece, Entered) else [piece]


def entrance(piece: nn.Module) -> nn.Module:
    """What the input of a unit enters first."""
    first: nn.Module = pieces_of(piece)[0]
    return first


def frozen_weights(module: nn.Module) -> set[int]:
    """Identities of the weights that are frozen for good in a unit's piece."""
    return {
        id(weight)
        for part in module.modules()
        if isinstance(part, Frozen)
        for weight in part.parameters()
    }


def trainable(module: nn.Module) -> list[Tensor]:
    """The weights of a unit's piece, or of its head, that learn."""
    frozen = frozen_weights(module)
    return [
        weight
        for weight in module.parameters()
        if weight.requires_grad and id(weight) not in frozen
    ]
