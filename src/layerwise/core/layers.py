"""The spine of a traced network: its weighted layers in order, what belongs to each, and where
everything beside it goes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from layerwise.core.trace import FLAG
from layerwise.errors import CannotSplit

# What may stand between a feature and the next unit's anchor; by the published method it belongs to
# the next unit.
DEFERRED_MODULES: tuple[type[nn.Module], ...] = (
    nn.modules.dropout._DropoutNd,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.Flatten,
    nn.Unflatten,
    nn.Identity,
    nn.Upsample,
)
DEFERRED_FUNCTIONS = {
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, F.interpolate, F.pad,
    F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d,
    F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d,
    torch.flatten, torch.mean, torch.amax, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
}  # fmt: skip
DEFERRED_METHODS = {
    "view", "reshape", "flatten", "mean", "amax", "contiguous", "permute", "transpose", "squeeze", "unsqueeze", "unflatten",
}  # fmt: skip
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
WEIGHTED_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, F.linear, F.bilinear,
}  # fmt: skip

# what x.name says about x, unlike x.T
SIZES = ("shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad")


@dataclass
class Network:
    """A traced network and its spine: the path from input to output that passes the most weighted
    layers.

    Attributes:
        root: where the graph's targets are found.
        spine: nodes from the first operation to the last, in order.
        anchors: the weighted layers among them.
    """

    root: nn.Module
    graph: fx.Graph

    def __post_init__(self) -> None:
        self.spine = self.find_spine()
        self.anchors = [node for node in self.spine if self.is_weighted(node)]
        if not self.anchors:
            raise CannotSplit(
                "no weighted layer (convolution, linear) lies between the network's input and "
                "its output, so there is nothing to train unit by unit: pass the module that "
                "holds the layers."
            )

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module that a node calls, if it calls one of the network's."""
        return (
            self.root.get_submodule(str(node.target))
            if node.op == "call_module" and node.target != FLAG
            else None
        )

    def parameters(self, node: fx.Node) -> list[Tensor]:
        """Parameters that a node reads itself."""
        module = self.module(node)
        if module is not None:
            return list(module.parameters())
        if node.op != "get_attr":
            return []
        path, _, name = str(node.target).rpartition(".")
        value = getattr(self.root.get_submodule(path), name)
        return [value] if isinstance(value, nn.Parameter) else []

    def is_weighted(self, node: fx.Node) -> bool:
        """Whether a node is a layer with a weight matrix or kernel, as opposed to a norm or an
        activation.
        """
        module = self.module(node)
        if module is None:
            weighted = node.op == "call_function" and node.target in WEIGHTED_FUNCTIONS
            return weighted and any(
                self.holds_parameter(source) for source in node.all_input_nodes[1:]
            )
        return not isinstance(module, NORMS) and any(
            parameter.dim() > 1 for parameter in module.parameters()
        )

    def holds_parameter(self, node: fx.Node) -> bool:
        """Whether a node is a parameter or computed from one, as opposed to a fixed kernel."""
        return bool(self.parameters(node)) or any(
            self.holds_parameter(source) for source in node.all_input_nodes
        )

    def is_deferred(self, node: fx.Node) -> bool:
        """Whether a node at a feature's end belongs to the next unit: pooling, dropout, reshaping."""
        module = self.module(node)
        if module is not None:
            return isinstance(module, DEFERRED_MODULES)
        return node.target in (DEFERRED_METHODS if node.op == "call_method" else DEFERRED_FUNCTIONS)

    def find_spine(self) -> list[fx.Node]:
        """The longest path from input to output, counted in weighted layers, then in their
        parameters.
        """
        best: dict[fx.Node, tuple[int, int]] = {}
        before: dict[fx.Node, fx.Node] = {}
        output = None
        for node in self.graph.nodes:
            if node.op == "placeholder":
                best[node] = (0, 0)
            sources = [source for source in node.all_input_nodes if source in best]
            if not sources or gives_size(node):
                continue
            before[node] = max(sources, key=lambda source: best[source])
            layers, parameters = best[before[node]]
            best[node] = (
                layers + self.is_weighted(node),
                parameters + sum(p.numel() for p in self.parameters(node)),
            )
            if node.op == "output":
                output = node
        if output is None or not isinstance(output.args[0], fx.Node):
            raise CannotSplit(
                "the network does not return one tensor that depends on its input: return the "
                "logits alone, (B, classes), without auxiliary outputs, tuples or dictionaries."
            )
        spine = [output.args[0]]
        while spine[-1] in before:
            spine.append(before[spine[-1]])
        return spine[-2::-1]  # from the first operation on, without the placeholder

    def stretches(self) -> list[list[fx.Node]]:
        """Per anchor but the last, the spine from the anchor to its feature."""
        position = {node: number for number, node in enumerate(self.spine)}
        stretches = []
        for anchor, following in pairwise(self.anchors):
            stretch = self.spine[position[anchor] : position[following]]
            while self.is_deferred(stretch[-1]):
                stretch.pop()
            stretches.append(stretch)
        return stretches

    def block_end(self, stretch: Sequence[fx.Node]) -> fx.Node | None:
        """The last node of a stretch that all paths pass, if there is one."""
        return next(filter(self.is_bottleneck, reversed(stretch)), None)

    def is_bottleneck(self, cut: fx.Node) -> bool:
        """Whether every path from input to output passes this node: a cut behind it is passed by
        one tensor.
        """
        reached = {node for node in self.graph.nodes if node.op == "placeholder"}
        for node in self.graph.nodes:
            if (
                node is not cut
                and not gives_size(node)
                and not reached.isdisjoint(node.all_input_nodes)
            ):
                reached.add(node)
        return not any(node.op == "output" for node in reached)

    def place(self, cuts: Sequence[fx.Node]) -> dict[fx.Node, int]:
        """The unit of every node, when a cut follows each of ``cuts``.

        On the spine the cuts decide. Beside it, what holds weights, or depends on what does, goes
        where its result is first needed, so that a loss reaches it; the rest goes where its inputs
        are, since it is often smaller than they are (a subsampled shortcut).
        """
        ends, segment, passed = set(cuts), {}, 0
        for node in self.spine:
            segment[node] = passed
            passed += node in ends
        latest: dict[fx.Node, int] = {}
        for node in reversed(self.graph.nodes):
            latest[node] = segment.get(
                node, min((latest[user] for user in node.users), default=passed)
            )
        place: dict[fx.Node, int] = {}
        learns: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in segment or node.op == "output":
                place[node] = latest[node]
                continue
            own = node.op == "get_attr" or node.target == FLAG or bool(self.parameters(node))
            if own or not learns.isdisjoint(node.all_input_nodes):
                learns.add(node)
                place[node] = latest[node]
            else:
                place[node] = max(
                    (place[source] + (source in ends) for source in node.all_input_nodes), default=0
                )
        return place


def gives_size(node: fx.Node) -> bool:
    """Whether a node gives numbers about a tensor, such as its shape: no features pass there."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr and node.args[1] in SIZES
