"""Gates: layers that scale a feature by something computed from it alone.

Squeeze and excitation, efficient channel attention and the like belong to the unit whose feature
they scale. As units of their own they would learn from a vector that the network never classifies
by, and where the normalisation before them starts at zero they would never learn at all.
"""

import operator
from bisect import bisect_left, bisect_right

import torch
from torch import fx

from layerwise.core.layers import Network, gives_size

PRODUCTS = {operator.mul, operator.imul, torch.mul, torch.multiply, "mul", "mul_", "multiply"}


def layers_before_gates(network: Network) -> set[int]:
    """Numbers of the layers behind which a gate follows or goes on, so that no unit ends there."""
    place = {node: number for number, node in enumerate(network.main_path)}
    layers = [place[layer] for layer in network.layers]
    before: set[int] = set()
    for node in network.main_path[1:]:
        source = scaled(network, node, place) if node.target in PRODUCTS else None
        if source is None:
            continue
        last = bisect_left(layers, place[node]) - 1  # of the gate
        first = bisect_right(layers, place[source]) - 1  # the layer whose feature is scaled
        before.update(range(max(first, 0), last))
    return before


def scaled(network: Network, product: fx.Node, place: dict[fx.Node, int]) -> fx.Node | None:
    """The node on the main path that a gate scales in a product, if the product is of a gate."""
    gate = network.main_path[place[product] - 1]
    for factor in product.all_input_nodes:
        source: fx.Node | None = factor
        while source is not None and (source is gate or source not in place):
            source = None if source is gate else only_feature(network, source)
        if source is not None and depends_on_alone(network, source, gate, place):
            return source
    return None


def only_feature(network: Network, node: fx.Node) -> fx.Node | None:
    """The tensor that a node without weights is computed from, if there is only one."""
    if node.op == "placeholder" or network.parameters(node):
        return None
    features = [source for source in node.all_input_nodes if not gives_size(source)]
    return features[0] if len(features) == 1 else None


def depends_on_alone(
    network: Network, source: fx.Node, gate: fx.Node, place: dict[fx.Node, int]
) -> bool:
    """Whether a gate follows a node on the main path, and depends on no tensor before that."""
    waiting, seen = [gate], {source}
    while waiting:
        node = waiting.pop()
        if node in seen or gives_size(node):
            continue
        if node.op == "placeholder" or place.get(node, place[source]) < place[source]:
            return False
        seen.add(node)
        waiting.extend(node.all_input_nodes)
    return place[source] < place[gate]
