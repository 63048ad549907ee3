"""Pieces of a traced network: the part of its graph that one unit computes."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx, nn

from layerwise.core.layers import Network
from layerwise.core.settings import Check
from layerwise.core.side_effects import modes_kept
from layerwise.core.trace import TrainingFlag, settings_of
from layerwise.core.tracer import FLAG, strip_root

CHECK = "settings_check"  # path of the check of settings in a unit


class Piece(fx.GraphModule):
    """A part of a network's graph. It raises errors as they are: fx would print them first."""

    def recompile(self) -> Any:
        code = super().recompile()
        type(self).__call__ = nn.Module.__call__  # type: ignore[method-assign]
        return code


class Reused(nn.Module):
    """A module without state, such as a dropout, that is called at several places.

    It is the network's own, called in the mode of the unit that this module belongs to.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = (module,)  # not its parent: units that share it may be in different modes
        self.training = module.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (module,) = self.module
        if module.training == self.training:
            return module(*args, **kwargs)
        with modes_kept(module):
            return module.train(self.training)(*args, **kwargs)

    @property
    def inplace(self) -> bool:
        """Whether it changes its input."""
        return getattr(self.module[0], "inplace", False) is True

    def extra_repr(self) -> str:
        return repr(self.module[0])


def follow_network(piece: nn.Module) -> None:
    """Give the modules that a piece shares with others the modes that the network gave them."""
    for module in piece.modules():
        if isinstance(module, Reused):
            module.training = module.module[0].training


def build_piece(
    network: Network, place: dict[fx.Node, int], cuts: Sequence[fx.Node], index: int
) -> fx.GraphModule:
    """The part of the graph that one unit computes, from one cut to the next."""
    graph, copies = fx.Graph(), {}
    root: dict[str, Any] = {}
    for number, node in enumerate(crossing(network, place, cuts, index - 1)):
        copies[node] = graph.placeholder(f"activation_{number}")
    inside = [
        node
        for node in network.graph.nodes
        if place[node] == index and node.op not in ("placeholder", "output")
    ]
    settings = settings_of(network.root).of(read_for(network, inside, first=index == 0))
    if settings:
        root[CHECK] = Check(settings)
        graph.call_module(CHECK)
    for node in inside:
        copies[node] = graph.node_copy(node, lambda source: copies[source])
    graph.output(tuple(copies[node] for node in crossing(network, place, cuts, index)))
    root |= piece_root(network, inside)
    return Piece(root, graph, class_name="Piece")


def read_for(network: Network, inside: Sequence[fx.Node], first: bool) -> set[str]:
    """Paths of the modules on whose settings a unit relies.

    The first also relies on modules of which no operation is left, such as an identity by choice.
    """
    paths = looked_through(inside)
    if first:
        everywhere = settings_of(network.root)
        readers = {*everywhere.modules, *everywhere.readers.values()}
        paths |= readers - looked_through(network.graph.nodes)
    return paths


def looked_through(nodes: Iterable[fx.Node]) -> set[str]:
    """Paths of the modules whose forward passes made some of the nodes."""
    return {
        strip_root(str(path))
        for node in nodes
        for path, _ in (node.meta.get("nn_module_stack") or {}).values()
    }


def crossing(
    network: Network, place: dict[fx.Node, int], cuts: Sequence[fx.Node], index: int
) -> list[fx.Node]:
    """The activations that pass from unit ``index`` to the next.

    They are the feature, then everything else that is computed before the cut and used after it.
    """
    if index == len(cuts):
        return [network.main_path[-1]]
    first = [cuts[index]] if index >= 0 else []
    alive = [
        node
        for node in network.graph.nodes
        if node not in first
        and (node.op == "placeholder" or place[node] <= index)
        and any(place[user] > index for user in node.users)
    ]
    return first + alive


def piece_root(network: Network, nodes: Iterable[fx.Node]) -> dict[str, Any]:
    """The modules and parameters that the nodes name: the network's own, and the piece's mode flag.

    A module without state that is called at several places, such as one dropout for a whole block,
    gets a mode in each piece, since pieces can be in different modes.
    """
    calls = Counter(node.target for node in network.graph.nodes if node.op == "call_module")
    root: dict[str, Any] = {}
    for node in nodes:
        if node.target == FLAG:
            root[FLAG] = TrainingFlag().train(network.root.training)
        elif node.op in ("call_module", "get_attr"):
            path, _, name = str(node.target).rpartition(".")
            value = getattr(network.root.get_submodule(path), name)
            several = node.op == "call_module" and calls[node.target] > 1
            root[str(node.target)] = Reused(value) if several and not value.state_dict() else value
    return root
