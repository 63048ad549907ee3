"""Early exits: the first units of a network, and the local head of the last of them."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from layerwise.core.feature import Feature
from layerwise.core.pieces import CHECK, Reused
from layerwise.core.settings import refuse_changes
from layerwise.core.table import name_of_loss
from layerwise.core.tracer import ROOT, strip_root
from layerwise.core.unit import Activations, Unit, precision
from layerwise.errors import InvalidInput
from layerwise.losses.site import classifies

HEAD = "local_head"  # path of the head in an early exit


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
    pieces = [uncompiled(unit.piece) for unit in units[:count]]
    refuse_changes(pieces)
    graph = fx.Graph()
    root: dict[str, Any] = {}
    passed: tuple[fx.Node, ...] = (graph.placeholder("images"),)
    for piece in pieces:
        passed = append(graph, root, piece, passed)
    if count == len(units):
        graph.output(passed[0])
        return fx.GraphModule(copy.deepcopy(root), graph, class_name="EarlyExit").eval()
    name, last = free_name(root), units[count - 1]
    root[name] = LocalHead(last.feature, uncompiled(last.loss))
    graph.output(graph.call_module(name, passed[:1]))
    root = copy.deepcopy(root)
    leave_out_training(root[name])
    return fx.GraphModule(root, graph, class_name="EarlyExit").eval()


def free_name(paths: Iterable[str]) -> str:
    """A name for the head, which none of the network's own paths begins with."""
    name = HEAD
    while any(path.partition(".")[0] == name for path in paths):
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
    return unit is units[-1] or classifies(unit.loss)


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
