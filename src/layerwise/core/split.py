"""Cut a network into a chain of units, by its traced graph and without its help.

The graph has a *main path*: the path from input to output that passes the most weighted layers. The
*segment* of a layer leads from it to its *feature*: the last tensor before the next layer, less the
pooling, dropout and flattening in front of that layer, which belong to the next unit. What lies
beside the main path (a shortcut) joins the unit that needs its result, so that its weights learn
from that unit's loss. All tensors that are alive at a cut pass it, the feature first: the
*activations* of a unit.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from layerwise.core.axes import Axes, find_axes
from layerwise.core.cuts import choose_cuts, paths_of_cuts
from layerwise.core.layers import Network
from layerwise.core.order import refuse_turned_changes
from layerwise.core.outputs import LOGITS, Key, parts_of_output
from layerwise.core.pieces import build_piece, piece_root
from layerwise.core.side_effects import modes_kept, states_kept
from layerwise.core.trace import SingleInput, trace_network
from layerwise.core.tracer import FLAG, owner
from layerwise.errors import CannotSplit, InvalidInput, choose, names_in

OUTPUT_LAYERS = ("separate", "joined")


class Chain(nn.Module):
    """A network as a chain of pieces.

    Composed, the pieces are the network; their modules and parameters are the network's own.

    Attributes:
        pieces: modules that map the activations that enter them to those that leave them, a tuple
            with the feature first.
        names: a name per piece: its layer's path, the path of the block that holds its layers, or
            its first and last layer.
        channels: axis of each feature that holds its channels, the batch counted as axis 0.
        output: where the network's result holds the logits that the chain computes, beside other
            values; None: nowhere, its result is the logits.
        untrained: names of the network's parameters that only other outputs depend on, and that no
            piece holds.
        normalises_layers: whether the network's last features pass layer normalisation before they
            are classified.
        joined: whether the last piece holds another weighted layer than the output layer.
        recomputes: whether the network's own forward pass changes what is saved for backward, such
            as by checkpointing; the pieces do not.
    """

    def __init__(
        self,
        pieces: Sequence[nn.Module],
        names: Sequence[str],
        channels: Sequence[int] | None = None,
        output: Key = None,
        untrained: Sequence[str] = (),
        normalises_layers: bool = False,
        joined: bool = False,
        recomputes: bool = False,
    ) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.names = tuple(names)
        self.channels = tuple(channels or [1] * len(self.pieces))
        self.output, self.untrained = output, tuple(untrained)
        self.normalises_layers, self.joined = normalises_layers, joined
        self.recomputes = recomputes

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
    output: Key = None,
) -> Chain:
    """Cut a network into a chain of units.

    A gate, such as squeeze and excitation, stays in the unit whose feature it scales.

    Args:
        model: a module that maps one tensor to one tensor, batch first. Outputs that it returns in
            training only, such as those of auxiliary heads, are left out.
        at: ``"layer"``, a unit per weighted layer, also inside residual blocks; ``"block"``, the
            finest units between which a single tensor passes; ``"module"``, a unit per child of the
            network's Sequentials and ModuleLists (of those inside its blocks not), or else per
            child of the network; a number K, K units of about equal multiply-adds; or the paths of
            the modules that end a unit.
        sample: a batch of images, from which the axes of features are found; None: all features are
            taken for vectors or maps (B, C, H, W). It is needed when ``at`` is a number above 1, to
            count multiply-adds, and for networks whose forward pass computes with the sizes of its
            tensors. Their units refuse images of another size.
        leaves: paths of modules to keep whole inside one unit, without looking inside.
        output_layer: ``"separate"``, it is a unit of its own; or ``"joined"``, it shares the unit
            of the weighted layer before it. Where ``at`` is a list of paths, they decide.
        output: where the network's result holds its logits beside other values: the key of a
            dictionary, an attribute of an object, or the index in a tuple. What is called
            ``logits`` is found without it.

    Returns:
        The chain; its pieces share the model's modules, and the model stays as it was.

    Raises:
        CannotSplit: the network cannot be cut so; the message says which module, why, and what to
            do.
        InvalidInput: ``model`` is no module, ``output_layer`` is neither of the two, a path in
            ``leaves`` is unknown, or the network's result has no such ``output``.
    """
    joined = choose("output layer", output_layer, OUTPUT_LAYERS) == "joined"
    network, root = traced(model, sample, leaves, output)
    cuts = choose_cuts(network, at, sample, joined)
    place = network.place(cuts)
    refuse_empty_units(network, place)
    lost = lost_parameters(model, network)
    if lost and root.output is None:
        raise CannotSplit(lost_message(lost))
    refuse_shared_parameters(model, network, cuts)
    refuse_shared_statistics(model, network, cuts)
    refuse_turned_changes(network, place)
    chain = Chain(
        [build_piece(network, place, cuts, index) for index in range(len(cuts) + 1)],
        name_units(network, place),
        [*map(network.axes.channels_or_guess, cuts), 1],
        root.output,
        lost,
        network.normalises_layers(),
        len(network.layers_behind(cuts)) > 1,
        root.recomputes,
    )
    # but not the modules that they hold: some of the model's may be frozen singly
    for module in (chain, *chain.pieces):
        module.training = model.training
    return chain


def cut_paths(
    model: nn.Module,
    at: str,
    sample: Tensor,
    leaves: Iterable[str] = (),
    output_layer: str = "separate",
    output: Key = None,
) -> list[str]:
    """Paths of the modules that end the units of ``split``, in order, such as to take some of them.

    Units that no path ends are left out: together they are one with the next. For the arguments and
    what is raised, see ``split``.
    """
    joined = choose("output layer", output_layer, OUTPUT_LAYERS) == "joined"
    network, _ = traced(model, sample, leaves, output)
    return paths_of_cuts(network, choose_cuts(network, at, sample, joined))


def traced(
    model: nn.Module, sample: Tensor | None, leaves: Iterable[str], output: Key
) -> tuple[Network, SingleInput]:
    """A traced network, and the root of its graph.

    Raises:
        CannotSplit, InvalidInput: see ``split``.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(
            f"Cannot split the network: model is {type(model).__name__}. Give an instance of "
            "nn.Module."
        )
    leaves = names_in("leaves", leaves)  # which may be read only once
    root, graph = trace_network(model, leaves, sample, output)
    if output is None and root.output is None and LOGITS in root.parts:
        root, graph = trace_network(model, leaves, sample, LOGITS)
    refuse_several_outputs(root, model, sample)
    network = Network(root, graph)
    if sample is not None:
        network.axes = axes_of(network, sample)
    return network, root


def axes_of(network: Network, sample: Tensor) -> Axes:
    """The axes of what the network computes, found on a sample; the network stays as it is."""
    with modes_kept(network.root):
        network.root.eval()
        targets = piece_root(network, network.graph.nodes)
        return find_axes(network.root, network.graph, targets, sample)


def refuse_empty_units(network: Network, place: dict[fx.Node, int]) -> None:
    filled = {place[layer] for layer in network.layers}
    empty = sorted(set(place.values()) - filled)
    if empty:
        raise CannotSplit(
            f"Cannot split the network: unit {empty[0]} would hold no weighted layer, since two of "
            "the paths to cut at lie between the same two layers. Leave one of them out."
        )


def refuse_several_outputs(root: SingleInput, model: nn.Module, sample: Tensor | None) -> None:
    if root.parts and root.output is None:
        shapes = shapes_of_output(model, sample) if sample is not None else {}
        told = [f"{part!r}{shapes.get(part, '')}" for part in root.parts]
        rows = [part for part in root.parts if shapes.get(part, "").count("×") == 1]
        raise CannotSplit(
            "Cannot split the network: it does not return one tensor that depends on its input, "
            f"but several values, {', '.join(told)}. Say which holds the logits, (B, classes), "
            f"with output=, such as output={(rows if len(rows) == 1 else root.parts)[0]!r}, or let "
            "it return the logits alone."
        )


def shapes_of_output(model: nn.Module, sample: Tensor) -> dict[Key, str]:
    """Words for the shapes of the tensors that a network returns, by key, attribute or index.

    They are a hint in a refusal, which nothing that the network does may replace.
    """
    parts: dict[Key, Any] = {}
    with modes_kept(model), states_kept(model), torch.no_grad(), suppress(Exception):
        parts = parts_of_output(model.eval()(sample[:2]))
    return {
        key: f" ({'×'.join(map(str, value.shape)) or 'a number'})"
        for key, value in parts.items()
        if isinstance(value, Tensor)
    }


def lost_parameters(model: nn.Module, network: Network) -> list[str]:
    """Names of the parameters that the network's output does not depend on."""
    reached = {
        id(parameter) for node in network.graph.nodes for parameter in network.parameters(node)
    }
    return [name for name, parameter in model.named_parameters() if id(parameter) not in reached]


def lost_message(lost: Sequence[str]) -> str:
    more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
    return (
        f"Cannot split the network: parameter {lost[0]!r}{more} would belong to no unit, since "
        "the output does not depend on it. Remove the module, or make forward use it."
    )


def refuse_shared_parameters(model: nn.Module, network: Network, cuts: list[fx.Node]) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    place = network.place(cuts)
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
                "gradient. Give each layer weights of its own, or "
                f"{uniting(network, cuts, units.values())}."
            )


def refuse_shared_statistics(model: nn.Module, network: Network, cuts: list[fx.Node]) -> None:
    names = {id(module): name for name, module in model.named_modules()}
    place = network.place(cuts)
    units: dict[int, set[int]] = defaultdict(set)
    for node in network.graph.nodes:
        if node.op == "call_module" and node.target != FLAG:
            for module in network.root.get_submodule(str(node.target)).modules():
                if isinstance(module, _NormBase) and module.running_mean is not None:
                    units[id(module)].add(place[node])
    for key, shared in units.items():
        if len(shared) > 1:
            raise CannotSplit(
                f"Cannot split the network: module {names[key]!r}, which holds running "
                f"statistics, is used in units {', '.join(map(str, sorted(shared)))}, of which "
                "some may train while others are frozen. Give each layer statistics of its own, or "
                f"{uniting(network, cuts, units.values())}."
            )


def uniting(network: Network, cuts: Sequence[fx.Node], used: Iterable[set[int]]) -> str:
    """Words for the cut that leaves out what parts the units that use the same weights.

    Args:
        used: for each of the weights, the units that use it.
    """
    parted = {number for units in used if units for number in range(min(units), max(units))}
    kept = [cut for number, cut in enumerate(cuts) if number not in parted]
    paths = paths_of_cuts(network, kept)
    named = f": at={paths}" if paths and len(paths) == len(kept) else ""
    return f"cut so that all uses fall into one unit{named}"


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
