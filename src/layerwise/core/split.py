"""Cut a network into a chain of units, by its traced graph and without its help.

The graph has a *main path*: the path from input to output that passes the most weighted layers. The
*segment* of a layer leads from it to its *feature*: the last tensor before the next layer, less the
pooling, dropout and flattening in front of that layer, which belong to the next unit. What lies
beside the main path (a shortcut) joins the unit that needs its result, so that its weights learn
from that unit's loss. All tensors that are alive at a cut pass it, the feature first: the
*activations* of a unit.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from layerwise.core.axes import Axes, find_axes
from layerwise.core.layers import Network
from layerwise.core.order import refuse_turned_changes
from layerwise.core.settings import Check
from layerwise.core.side_effects import modes_kept, states_kept
from layerwise.core.trace import TrainingFlag, owner, settings_of, trace_network
from layerwise.core.tracer import FLAG, strip_root
from layerwise.errors import CannotSplit, choose

OUTPUT_LAYERS = ("separate", "joined")
CHECK = "settings_check"  # path of the check of settings in a unit


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


class Chain(nn.Module):
    """A network as a chain of pieces.

    Composed, the pieces are the network; their modules and parameters are the network's own.

    Attributes:
        pieces: modules that map the activations that enter them to those that leave them, a tuple
            with the feature first.
        names: a name per piece: its layer's path, the path of the block that holds its layers, or
            its first and last layer.
        channels: axis of each feature that holds its channels, the batch counted as axis 0.
    """

    def __init__(
        self,
        pieces: Sequence[nn.Module],
        names: Sequence[str],
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.names = tuple(names)
        self.channels = tuple(channels or [1] * len(self.pieces))

    def __len__(self) -> int:
        return len(self.pieces)

    def forward(self, images: Tensor) -> Tensor:
        activations: tuple[Any, ...] = (images,)
        for piece in self.pieces:
            activations = piece(*activations)
        return activations[0]


def split(
    model: nn.Module,
    at: str | int | Sequence[str] = "layer",
    sample: Tensor | None = None,
    leaves: Iterable[str] = (),
    output_layer: str = "separate",
) -> Chain:
    """Cut a network that fx can trace into a chain of units.

    Args:
        model: a module that maps one tensor to one tensor, batch first.
        at: ``"layer"``, a unit per weighted layer, also inside residual blocks; ``"block"``, the
            finest units between which a single tensor passes; a number K, K units of about equal
            multiply-adds; or the paths of the modules that end a unit.
        sample: a batch of images, from which the axes of features are found; None: all features are
            taken for vectors or maps (B, C, H, W). It is needed when ``at`` is a number above 1, to
            count multiply-adds.
        leaves: paths of modules to keep whole inside one unit, without looking inside.
        output_layer: ``"separate"``, it is a unit of its own; or ``"joined"``, it shares the unit
            of the weighted layer before it. Where ``at`` is a list of paths, they decide.

    Returns:
        The chain; its pieces share the model's modules, and the model stays as it was.

    Raises:
        CannotSplit: the network cannot be cut so; the message says which module, why, and what to
            do.
        InvalidInput: ``output_layer`` is neither of the two, or a path in ``leaves`` is unknown.
    """
    joined = choose("output layer", output_layer, OUTPUT_LAYERS) == "joined"
    network = Network(*trace_network(model, leaves))
    if sample is not None:
        network.axes = axes_of(network, sample)
    cuts = choose_cuts(network, at, sample, joined)
    place = network.place(cuts)
    refuse_empty_units(network, place)
    refuse_lost_parameters(model, network)
    refuse_shared_parameters(model, network, place)
    refuse_turned_changes(network, place)
    chain = Chain(
        [build_piece(network, place, cuts, index) for index in range(len(cuts) + 1)],
        name_units(network, place),
        [*map(network.axes.channels_or_guess, cuts), 1],
    )
    # but not the modules that they hold: some of the model's may be frozen singly
    for module in (chain, *chain.pieces):
        module.training = model.training
    return chain


def axes_of(network: Network, sample: Tensor) -> Axes:
    """The axes of what the network computes, found on a sample; the network stays as it is."""
    with modes_kept(network.root):
        network.root.eval()
        targets = piece_root(network, network.graph.nodes)
        return find_axes(network.root, network.graph, targets, sample)


def choose_cuts(
    network: Network, at: str | int | Sequence[str], sample: Tensor | None, joined: bool = False
) -> list[fx.Node]:
    """The nodes that a cut follows, in order."""
    if at == "layer":
        return layer_cuts(network, joined)
    if at == "block":
        return block_cuts(network, joined)
    if isinstance(at, int) and not isinstance(at, bool):
        return equal_cuts(network, at, sample, joined)
    if (
        not isinstance(at, str)
        and isinstance(at, Sequence)
        and at
        and all(isinstance(path, str) for path in at)
    ):
        return path_cuts(network, at)
    raise CannotSplit(
        f"Cannot split at={at!r}: it names no place to cut. Give 'layer', 'block', a number of "
        "units, or a list of module paths."
    )


def separable_segments(network: Network, joined: bool) -> list[list[fx.Node]]:
    """The segments that a cut may follow.

    A joined output layer leaves out the cut before it.
    """
    segments = network.segments()
    return segments[:-1] if joined else segments


def layer_cuts(network: Network, joined: bool = False) -> list[fx.Node]:
    """Cuts behind the feature of every layer.

    A layer whose feature does not have the batch first, such as one inside of windows, shares the
    unit of the next.
    """
    cuts = []
    for segment in separable_segments(network, joined):
        network.axes.refuse_batch_later(segment[-1], owner(segment[0]))
        if network.axes.batch_first(segment[-1]):
            cuts.append(segment[-1])
    return cuts


def block_cuts(network: Network, joined: bool = False) -> list[fx.Node]:
    """Cuts behind the last node of every segment that all paths pass, where there is one."""
    ends = (network.block_end(segment) for segment in separable_segments(network, joined))
    return [end for end in ends if end is not None]


def equal_cuts(
    network: Network, count: int, sample: Tensor | None, joined: bool = False
) -> list[fx.Node]:
    """``count`` − 1 cuts that make the costliest unit as cheap as possible.

    They lie between blocks where there are enough of those, else between layers.
    """
    if count == 1:
        return []
    candidates = block_cuts(network, joined)
    if len(candidates) + 1 < count:
        candidates = layer_cuts(network, joined)
    if not 1 <= count <= len(candidates) + 1:
        counted = ", the output layer counted with the one before it" if joined else ""
        raise CannotSplit(
            f"Cannot split into {count} units: the network has {len(candidates) + 1} weighted "
            f"layers{counted}. Choose 1 to {len(candidates) + 1}."
        )
    if sample is None:
        raise CannotSplit(
            f"Cannot split at={count}: multiply-adds are balanced, and counting them takes a "
            "sample. Pass sample=, a batch of images."
        )
    place = network.place(candidates)
    costs = [0.0] * (len(candidates) + 1)
    for node, cost in multiply_adds(network, sample).items():
        costs[place[node]] += cost
    return [candidates[last] for last in balance(costs, count)]


def balance(costs: Sequence[float], count: int) -> list[int]:
    """Cut a row of costs into ``count`` runs so that the costliest run is as cheap as possible.

    Returns:
        The last index of every run but the last.
    """
    return next(islice(balances(costs), count - 1, None))


def balances(costs: Sequence[float]) -> Iterator[list[int]]:
    """``balance`` into one run, two, and so on up to as many as there are costs.

    All of them together cost little more than the last.
    """
    sums = [0.0, *accumulate(costs)]
    # cheapest[i]: (costliest run, cuts) of the best way to cut the first i costs
    cheapest: dict[int, tuple[float, tuple[int, ...]]] = {
        i: (sums[i], ()) for i in range(1, len(costs) + 1)
    }
    yield []
    for runs in range(2, len(costs) + 1):
        cheapest = {
            i: min(
                (max(cheapest[j][0], sums[i] - sums[j]), (*cheapest[j][1], j - 1))
                for j in range(runs - 1, i)
            )
            for i in range(runs, len(costs) + 1)
        }
        yield list(cheapest[len(costs)][1])


def multiply_adds(network: Network, sample: Tensor) -> dict[fx.Node, float]:
    """Multiply-adds of every node's forward pass on a sample, counted by PyTorch."""
    counts: dict[fx.Node, float] = {}

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with FlopCounterMode(display=False) as counter:
                result = super().run_node(n)
            counts[n] = counter.get_total_flops() / 2
            return result

    root, graph = piece_root(network, network.graph.nodes), network.graph
    with torch.no_grad(), modes_kept(network.root), states_kept(network.root):
        network.root.eval()
        Counting(fx.GraphModule(root, graph)).run(sample[:2])
    return counts


def path_cuts(network: Network, paths: Sequence[str]) -> list[fx.Node]:
    """The cuts that end a unit with each of the modules named.

    They lie behind a layer's feature, or where a block is left.
    """
    segments = dict(zip(network.layers, network.segments(), strict=False))
    cuts = []
    for path in paths:
        inside = [
            node for node in network.main_path if path and f"{owner(node)}.".startswith(f"{path}.")
        ]
        if not inside:
            raise CannotSplit(
                f"Cannot cut behind {path!r}: it is not a module on the main path, the way through "
                "the most weighted layers from input to output. Name a module that holds such "
                f"layers, like {owner(network.layers[0])!r}."
            )
        layers = [node for node in inside if node in segments]
        last = inside[-1]
        if layers:
            segment = segments[layers[-1]]
            holds_layer = owner(layers[-1]) != path
            last = (network.block_end(segment) if holds_layer else None) or segment[-1]
        if last is not network.main_path[-1] and network.layers[-1] not in inside:
            network.axes.refuse_folded(last, path, able_after(network, last))
            cuts.append(last)
    order = {node: number for number, node in enumerate(network.main_path)}
    return sorted(set(cuts), key=lambda node: order[node])


def able_after(network: Network, node: fx.Node) -> str:
    """Path of the next layer behind a node whose feature has the batch first; empty: none has."""
    behind = set(network.main_path[network.main_path.index(node) :])
    ends = zip(network.layers, network.segments(), strict=False)
    able = (owner(layer) for layer, (*_, end) in ends if network.axes.batch_first(end))
    later = {owner(layer) for layer in network.layers if layer in behind}
    return next((path for path in able if path in later), "")


def refuse_empty_units(network: Network, place: dict[fx.Node, int]) -> None:
    filled = {place[layer] for layer in network.layers}
    empty = sorted(set(place.values()) - filled)
    if empty:
        raise CannotSplit(
            f"Cannot split the network: unit {empty[0]} would hold no weighted layer, since two of "
            "the paths to cut at lie between the same two layers. Leave one of them out."
        )


def refuse_lost_parameters(model: nn.Module, network: Network) -> None:
    reached = {
        id(parameter) for node in network.graph.nodes for parameter in network.parameters(node)
    }
    lost = [name for name, parameter in model.named_parameters() if id(parameter) not in reached]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise CannotSplit(
            f"Cannot split the network: parameter {lost[0]!r}{more} would belong to no unit, since "
            "the output does not depend on it. Remove the module, or make forward use it."
        )


def refuse_shared_parameters(model: nn.Module, network: Network, place: dict[fx.Node, int]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    units: dict[int, set[int]] = defaultdict(set)
    for node in network.graph.nodes:
        # a bare parameter works where it is used
        users = node.users if node.op == "get_attr" else [node]
        for parameter in network.parameters(node):
            units[id(parameter)].update(place[user] for user in users)
    for key, shared in units.items():
        if len(shared) > 1:
            raise CannotSplit(
                f"Cannot split the network: parameter {names[key]!r} is used in units "
                f"{', '.join(map(str, sorted(shared)))}, and each would train it by a part of its "
                "gradient. Give each layer weights of its own, or cut so that all uses fall into "
                "one unit."
            )


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
    return fx.GraphModule(root, graph, class_name="Piece")


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


def name_units(network: Network, place: dict[fx.Node, int]) -> list[str]:
    """A name per unit.

    It is the path of its only layer, of the module that holds just its layers, or of its first and
    its last layer.
    """
    paths_of: dict[int, list[str]] = defaultdict(list)
    for layer in network.layers:
        paths_of[place[layer]].append(owner(layer) or "network")
    names = []
    for index in sorted(paths_of):
        elsewhere = [path for unit, paths in paths_of.items() if unit != index for path in paths]
        names.append(name_unit(paths_of[index], elsewhere))
    return [
        f"{name}#{index}" if names.count(name) > 1 else name for index, name in enumerate(names)
    ]


def name_unit(layers: Sequence[str], elsewhere: Sequence[str]) -> str:
    """The name of a unit from the paths of its layers and of those in the other units."""
    if len(layers) == 1:
        return layers[0]
    parts = []
    for together in zip(*(path.split(".") for path in layers), strict=False):
        if len(set(together)) > 1:
            break
        parts.append(together[0])
    holder = ".".join(parts)
    if any(path == holder or path.startswith(holder + ".") or not holder for path in elsewhere):
        return f"{layers[0]}..{layers[-1]}"
    return holder or "network"
