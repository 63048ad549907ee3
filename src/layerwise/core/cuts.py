"""Where to cut a traced network: at layers, blocks or modules, into equal units, or by path."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import Any

import torch
from torch import Tensor, fx

from layerwise.core.gates import layers_before_gates
from layerwise.core.layers import Network
from layerwise.core.module_ends import ends_of_children, ends_of_lists
from layerwise.core.pieces import piece_root
from layerwise.core.side_effects import modes_kept, states_kept
from layerwise.core.tracer import ROOT, owner
from layerwise.errors import CannotSplit, InvalidInput, reason_of
from layerwise.utils.multiply_adds import MultiplyAdds

BUDGET = "memory:"  # begins a cut that is planned above this package, by predicted memory
COARSEST = 2.0  # times the costliest unit between layers, above which blocks are cut inside


def choose_cuts(
    network: Network, at: str | int | Sequence[str], sample: Tensor | None, joined: bool = False
) -> list[fx.Node]:
    """The nodes that a cut follows, in order."""
    if at == "layer":
        return layer_cuts(network, joined)
    if at == "block":
        return block_cuts(network, joined)
    if at == "module":
        return module_cuts(network, joined)
    if isinstance(at, int) and not isinstance(at, bool):
        return equal_cuts(network, at, sample, joined)
    if (
        not isinstance(at, str)
        and isinstance(at, Sequence)
        and at
        and all(isinstance(path, str) for path in at)
    ):
        return path_cuts(network, at)
    if isinstance(at, str) and at.startswith(BUDGET):
        raise CannotSplit(
            f"Cannot split at={at!r}: memory is predicted of training with a loss. Give it to "
            "layerwise.localize, or a number of units here."
        )
    raise CannotSplit(
        f"Cannot split at={at!r}: it names no place to cut. Give 'layer', 'block', 'module', a "
        "number of units, a list of module paths, or in localize 'memory:SIZE'."
    )


def separable_segments(network: Network, joined: bool) -> dict[int, list[fx.Node]]:
    """The segments that a cut may follow, by the number of their layer.

    A gate stays with the feature that it scales. A joined output layer leaves out the cut before
    it.
    """
    segments = network.segments()
    before_gates = layers_before_gates(network)
    return {
        number: segment
        for number, segment in enumerate(segments[:-1] if joined else segments)
        if number not in before_gates
    }


def layer_cuts(network: Network, joined: bool = False) -> list[fx.Node]:
    """Cuts behind the feature of every layer.

    A layer whose feature does not have the batch first, such as one inside of windows, shares the
    unit of the next.
    """
    cuts = []
    for segment in separable_segments(network, joined).values():
        network.axes.refuse_batch_later(segment[-1], owner(segment[0]))
        if network.axes.batch_first(segment[-1]):
            cuts.append(segment[-1])
    return cuts


def block_cuts(network: Network, joined: bool = False) -> list[fx.Node]:
    """Cuts behind the last node of every segment that all paths pass, where there is one."""
    segments = separable_segments(network, joined).values()
    ends = (network.block_end(segment) for segment in segments)
    return [end for end in ends if end is not None]


def module_cuts(network: Network, joined: bool = False) -> list[fx.Node]:
    """Cuts where the children of the network's lists of modules end.

    Raises:
        CannotSplit: no module ends between two weighted layers.
    """
    segments = separable_segments(network, joined)
    paths = [owner(layer) for layer in network.layers]
    model = network.root.get_submodule(ROOT)
    for ends in (ends_of_lists(model), ends_of_children(model)):
        cuts: dict[int, fx.Node] = {}
        for path, at_bottlenecks in ends:
            inside = [n for n, layer in enumerate(paths) if f"{layer}.".startswith(f"{path}.")]
            if not inside or inside[-1] not in segments:
                continue
            segment = segments[inside[-1]]
            end = network.block_end(segment) or (None if at_bottlenecks else segment[-1])
            if end is not None and network.axes.batch_first(end):
                cuts[inside[-1]] = end
        if cuts:
            return [cuts[number] for number in sorted(cuts)]
    raise CannotSplit(
        "Cannot split at='module': no child of a Sequential, of a ModuleList or of the network "
        "itself ends between two weighted layers. Give at='layer', or a list of module paths."
    )


def equal_cuts(
    network: Network, count: int, sample: Tensor | None, joined: bool = False
) -> list[fx.Node]:
    """``count`` − 1 cuts that make the costliest unit as cheap as possible.

    They lie between blocks, or between layers where there are too few blocks or where blocks make
    the costliest unit more than ``COARSEST`` times as costly.
    """
    if count == 1:
        return []
    blocks, layers = block_cuts(network, joined), layer_cuts(network, joined)
    if not 1 <= count <= len(layers) + 1:
        counted = ", the output layer counted with the one before it" if joined else ""
        gates = ", a gate counted with what it scales" if layers_before_gates(network) else ""
        raise CannotSplit(
            f"Cannot split into {count} units: the network has {len(layers) + 1} weighted "
            f"layers{counted}{gates}. Choose 1 to {len(layers) + 1}."
        )
    if sample is None:
        raise CannotSplit(
            f"Cannot split at={count}: multiply-adds are balanced, and counting them takes a "
            "sample. Pass sample=, a batch of images."
        )
    work = multiply_adds(network, sample)
    finest = balanced(network, layers, count, work)
    if len(blocks) + 1 < count:
        return finest[1]
    coarsest = balanced(network, blocks, count, work)
    return (coarsest if coarsest[0] <= COARSEST * finest[0] else finest)[1]


def balanced(
    network: Network, candidates: Sequence[fx.Node], count: int, work: dict[fx.Node, float]
) -> tuple[float, list[fx.Node]]:
    """The cost of the costliest of ``count`` units, and the cuts that make it cheapest."""
    place = network.place(candidates)
    costs = [0.0] * (len(candidates) + 1)
    for node, cost in work.items():
        costs[place[node]] += cost
    lasts = balance(costs, count)
    ends = [-1, *lasts, len(costs) - 1]
    dearest = max(sum(costs[a + 1 : b + 1]) for a, b in pairwise(ends))
    return dearest, [candidates[last] for last in lasts]


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
    """Multiply-adds of every node's forward pass on a sample, counted by PyTorch.

    Raises:
        InvalidInput: the network cannot process the sample.
    """
    counts: dict[fx.Node, float] = {}

    class Counting(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with MultiplyAdds() as counter:
                result = super().run_node(n)
            counts[n] = counter.total
            return result

    root, graph = piece_root(network, network.graph.nodes), network.graph
    with torch.no_grad(), modes_kept(network.root), states_kept(network.root):
        network.root.eval()
        try:
            Counting(fx.GraphModule(root, graph)).run(sample[:2])
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            reason = reason_of(error)
            raise InvalidInput(
                "Cannot count multiply-adds: the network cannot process the sample of shape "
                f"{tuple(sample.shape)} ({reason}). Give a batch of images as it is trained on."
            ) from error
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


def paths_of_cuts(network: Network, cuts: Sequence[fx.Node]) -> list[str]:
    """The paths by which ``path_cuts`` finds each of some cuts; cuts without one are left out."""
    place = network.place(cuts)
    paths = []
    for number, cut in enumerate(cuts):
        layers = [layer for layer in network.layers if place[layer] == number]
        inside = (node for node in (cut, *reversed(layers)) if owner(node))
        names = dict.fromkeys(path for node in inside for path in holders(owner(node)))
        path = next((path for path in names if ends_at(network, path, cut)), None)
        paths += [path] if path else []
    return paths


def holders(path: str) -> list[str]:
    """The paths of the modules that hold a module, from the outermost on, and its own."""
    return list(accumulate(path.split("."), "{}.{}".format))


def ends_at(network: Network, path: str, cut: fx.Node) -> bool:
    """Whether a path is one of ``path_cuts`` that stands for a cut."""
    try:
        return path_cuts(network, [path]) == [cut]
    except CannotSplit:
        return False
