"""Networks that end in local heads: behind the first units, or in the ensemble of all heads."""

import copy
import math
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from layerwise.core.feature import Feature
from layerwise.core.frozen import pieces_of
from layerwise.core.pieces import CHECK, Reused
from layerwise.core.settings import refuse_changes
from layerwise.core.table import name_of_loss
from layerwise.core.tracer import ROOT, strip_root
from layerwise.core.unit import Activations, Unit, precision
from layerwise.errors import InvalidInput
from layerwise.losses.site import classifies

HEAD = "local_head"  # path of the head in an early exit; of several, local_heads


class LocalHead(nn.Module):
    """The part of a unit's loss that turns the unit's feature into logits.

    Shapes: (B, *shape of the feature) -> (B, num_classes).
    """

    def __init__(self, feature: Feature, loss: nn.Module) -> None:
        super().__init__()
        self.feature, self.loss = feature, loss

    def forward(self, feature: Tensor) -> Tensor:
        result: Tensor = self.loss.logits(self.feature.turned(feature))  # type: ignore[operator]
        return result


def early_exit(units: Sequence[Unit], count: int) -> nn.Module:
    """The first units of a chain as a network of its own; see ``Learner.early_exit``."""
    refuse_exit(units, count)
    return ending_in(units, [units[count - 1]], "EarlyExit")


def ensemble(units: Sequence[Unit]) -> nn.Module:
    """A chain that ends in all its classifiers; see ``Learner.ensemble``."""
    exits = [unit for unit in units if can_end(units, unit)]
    if len(exits) < 2:
        raise InvalidInput(
            "Cannot make an ensemble of the local heads: no unit but the last classifies. Train "
            "with a loss that is a classifier's, such as pred, and in two units or more."
        )
    return ending_in(units, exits, "Ensemble")


def ending_in(units: Sequence[Unit], exits: Sequence[Unit], name: str) -> nn.Module:
    """A copy of a chain up to the last of its exits, in evaluation mode, from images to logits.

    Those of several exits are the logarithm of the mean of their probabilities.

    Args:
        name: of the module's class.
    """
    passing = units[: exits[-1].index + 1]
    pieces = [[uncompiled(each) for each in pieces_of(uncompiled(unit.piece))] for unit in passing]
    refuse_changes(chain(*pieces))
    graph = fx.Graph()
    root: dict[str, Any] = {}
    head = free_name(path for piece in chain(*pieces) for path in paths_in(piece))
    passed: tuple[fx.Node, ...] = (graph.placeholder("images"),)
    outputs = []
    for unit, own in zip(passing, pieces, strict=True):
        for piece in own:
            passed = append(graph, root, piece, passed)
        if not any(unit is each for each in exits):
            continue
        if unit is units[-1]:
            outputs.append(passed[0])
            continue
        # called before the next piece, which may change the feature in place
        path = head if len(exits) == 1 else f"{head}s.{unit.index}"
        root[path] = LocalHead(unit.feature, uncompiled(unit.loss))
        outputs.append(graph.call_module(path, passed[:1]))
    graph.output(outputs[0] if len(exits) == 1 else mean_of_probabilities(graph, outputs))
    root = copy.deepcopy(root)
    for module in root.values():
        if isinstance(module, LocalHead):
            leave_out_training(module)
    return fx.GraphModule(root, graph, class_name=name).eval()


def mean_of_probabilities(graph: fx.Graph, logits: Sequence[fx.Node]) -> fx.Node:
    """The logarithm of the mean of probabilities, (B, num_classes), from logits of that shape."""
    stacked = graph.call_function(torch.stack, (list(logits),))
    each = graph.call_function(torch.log_softmax, (stacked, 2))
    summed = graph.call_function(torch.logsumexp, (each, 0))
    return graph.call_function(torch.sub, (summed, math.log(len(logits))))


def paths_in(piece: fx.GraphModule) -> list[str]:
    """Paths in the network of what a piece calls and reads."""
    return [
        strip_root(str(node.target)) or ROOT
        for node in piece.graph.nodes
        if node.op in ("call_module", "get_attr")
    ]


def free_name(paths: Iterable[str]) -> str:
    """A name for heads, which none of the network's own paths begins with, nor with an s."""
    taken = {path.partition(".")[0] for path in paths}
    name = HEAD
    while name in taken or f"{name}s" in taken:
        name += "_"
    return name


def leave_out_training(head: nn.Module) -> None:
    """Remove what a loss reads beside its logits, such as a decoder."""
    for module in head.modules():
        for name in getattr(module, "training_only", ()):
            if hasattr(module, name):
                delattr(module, name)


def refuse_exit(units: Sequence[Unit], count: Any) -> None:
    """Refuse a number of units that the chain does not have, and a head without logits.

    Raises:
        InvalidInput: as said.
    """
    if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= len(units):
        raise InvalidInput(
            f"Cannot end the network behind {count!r} units: it has {len(units)}. Give a whole "
            f"number from 1 to {len(units)}."
        )
    last = units[count - 1]
    if not can_end(units, last):
        able = [str(number) for number, unit in enumerate(units, 1) if can_end(units, unit)]
        raise InvalidInput(
            f"Cannot end the network behind {count} units: the loss of the last of them "
            f"({last.name}), {name_of_loss(last.loss)}, has no logits. Units whose loss is a "
            f"classifier's can end it; give one of {', '.join(able)}, or train with another loss, "
            "such as pred."
        )


def append(
    graph: fx.Graph, root: dict[str, Any], piece: fx.GraphModule, entering: Sequence[fx.Node]
) -> tuple[fx.Node, ...]:
    """Add a piece to a graph, with the network's own paths in ``root``, and return what leaves it.

    The check of the network's settings is left out, since the graph is of a copy.
    """
    copies: dict[fx.Node, fx.Node] = {}
    waiting = iter(entering)
    for node in piece.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(waiting)
        elif node.op != "output" and node.target != CHECK:
            copies[node] = graph.node_copy(node, lambda source: copies[source])
        if node.op in ("call_module", "get_attr") and node.target != CHECK:
            path = strip_root(str(node.target)) or ROOT
            copies[node].target = path
            root[path] = held(piece, str(node.target))
    values: Any = piece.graph.output_node().args[0]
    return tuple(copies[value] for value in values)


def held(piece: nn.Module, path: str) -> Any:
    """What a piece holds at a path: of a module that other pieces call too, the network's own."""
    folder, _, name = path.rpartition(".")
    value = getattr(piece.get_submodule(folder), name)
    return value.module[0] if isinstance(value, Reused) else value


def uncompiled(module: nn.Module) -> Any:
    """The module that ``torch.compile`` was given."""
    return getattr(module, "_orig_mod", module)


def can_end(units: Sequence[Unit], unit: Unit) -> bool:
    """Whether a chain can end behind a unit: it is the last, or its head classifies."""
    return unit is units[-1] or classifies(uncompiled(unit.loss))


def exit_logits(units: Sequence[Unit], unit: Unit, passed: Activations) -> Tensor:
    """The logits of a unit's head, or of the network, from what the unit passes on.

    They are computed in the unit's precision.

    Shapes: (B, num_classes).
    """
    result: Tensor = passed[0]
    if unit is units[-1]:
        return result
    with precision(passed, unit.amp):
        result = LocalHead(unit.feature, unit.loss)(passed[0])
    return result
