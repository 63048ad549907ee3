"""The main path of a traced network, which passes its weighted layers in order.

Each layer has a segment of the path; what lies beside the path goes to one of the units.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from layerwise.core.axes import Axes, is_turn
from layerwise.core.trace import owner
from layerwise.core.tracer import FLAG, without_gradient
from layerwise.errors import CannotSplit

# Operations that may stand between a feature and the next weighted layer; by the published method
# they belong to the next unit.
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
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    F.interpolate, F.pad, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d,
    F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d, torch.flatten, torch.mean,
    torch.amax, torch.reshape, torch.permute, torch.transpose, torch.squeeze,
}  # fmt: skip
DEFERRED_METHODS = {
    "view", "reshape", "flatten", "mean", "amax", "contiguous", "permute", "transpose", "squeeze",
    "unsqueeze", "unflatten",
}  # fmt: skip
NORMS = (  # also subclasses of them, whose weights may have several dimensions
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
WEIGHTED_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.linear, F.bilinear,
}  # fmt: skip

# operations that give several tensors
SEVERAL_FUNCTIONS = {
    torch.chunk, torch.split, torch.unbind, torch.tensor_split, torch.hsplit, torch.vsplit,
    torch.dsplit, torch.split_with_sizes,
}  # fmt: skip
SEVERAL_METHODS = {
    "chunk", "split", "unbind", "tensor_split", "hsplit", "vsplit", "dsplit", "split_with_sizes",
}  # fmt: skip

# attributes that describe a tensor; others, such as x.T, pass its features on
SIZES = ("shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad")


def holds_weights(module: nn.Module) -> bool:
    """Whether a module has a weight matrix or kernel, unlike a norm or activation."""
    return not isinstance(module, NORMS) and any(p.dim() > 1 for p in module.parameters())


@dataclass
class Network:
    """A traced network and its main path.

    The main path is the path from input to output that passes the most weighted layers.

    Attributes:
        root: where the graph's targets are found.
        main_path: nodes from the first operation to the last, in order.
        layers: the weighted layers among them.
        axes: which axes of a node's tensor are the batch and the channels, where it is known.
    """

    root: nn.Module
    graph: fx.Graph
    axes: Axes = field(default_factory=Axes)

    def __post_init__(self) -> None:
        self.main_path = self.find_main_path()
        self.layers = [node for node in self.main_path if self.is_weighted(node)]
        if not self.layers:
            raise CannotSplit(
                "Cannot split the network: no weighted layer (convolution, linear) lies between "
                "its input and its output. Pass the module that holds the layers."
            )

    def layers_behind(self, cuts: Sequence[fx.Node]) -> list[fx.Node]:
        """The weighted layers behind the last cut."""
        first = self.main_path.index(cuts[-1]) + 1 if cuts else 0
        return [node for node in self.main_path[first:] if self.is_weighted(node)]

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
        """Whether a node is a layer with a weight matrix or kernel, unlike a norm or activation."""
        module = self.module(node)
        if module is None:
            weighted = node.op == "call_function" and node.target in WEIGHTED_FUNCTIONS
            return weighted and any(
                self.holds_parameter(source) for source in node.all_input_nodes[1:]
            )
        return holds_weights(module)

    def holds_parameter(self, node: fx.Node) -> bool:
        """Whether a node is a parameter or computed from one, as opposed to a fixed kernel."""
        return bool(self.parameters(node)) or any(
            self.holds_parameter(source) for source in node.all_input_nodes
        )

    def is_deferred(self, node: fx.Node) -> bool:
        """Whether a node at a feature's end, such as pooling or dropout, is the next unit's."""
        module = self.module(node)
        if module is not None:
            return isinstance(module, DEFERRED_MODULES)
        return node.target in (DEFERRED_METHODS if node.op == "call_method" else DEFERRED_FUNCTIONS)

    def find_main_path(self) -> list[fx.Node]:
        """The longest path from input to output, by weighted layers, then by their parameters."""
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
                "Cannot split the network: it does not return one tensor that depends on its "
                "input. Let it return the logits alone, (B, classes), without auxiliary outputs, "
                "tuples or dictionaries."
            )
        backwards = [output.args[0]]
        while backwards[-1] in before:
            backwards.append(before[backwards[-1]])
        return backwards[-2::-1]  # from the first operation on, without the placeholder

    def segments(self) -> list[list[fx.Node]]:
        """The main path from each layer to its feature, for all layers but the last."""
        position = {node: number for number, node in enumerate(self.main_path)}
        segments = []
        for layer, following in pairwise(self.layers):
            stretch = self.main_path[position[layer] : position[following]]
            end = self.axes.readable_end(stretch, self.feature_end(stretch))
            segments.append(stretch[:end])
        return segments

    def feature_end(self, stretch: Sequence[fx.Node]) -> int:
        """Number of nodes, on the way from a layer to the next, up to the layer's feature."""
        end = len(stretch)
        while self.is_deferred(stretch[end - 1]) or gives_several(stretch[end - 1]):
            end -= 1
        # a feature whose axes are put back in order ends behind that
        for node in stretch[end:]:
            if not is_turn(node) or self.leads_to_several(node):
                break
            end += 1
        return end

    def block_end(self, segment: Sequence[fx.Node]) -> fx.Node | None:
        """The last node of a segment that all paths pass, if there is one with the batch first.

        Raises:
            CannotSplit: the batch is another axis of theirs.
        """
        tensors = (node for node in reversed(segment) if not self.leads_to_several(node))
        last = None
        for node in filter(self.is_bottleneck, tensors):
            if self.axes.batch_first(node):
                return node
            last = last or node
        if last is not None:
            self.axes.refuse_batch_later(last, owner(segment[0]))
        return None

    def normalises_layers(self) -> bool:
        """Whether layer normalisation stands between the last two weighted layers.

        Residual streams are often normalised so before they are classified, and between blocks not
        at all.
        """
        end = self.main_path.index(self.layers[-1])
        begin = self.main_path.index(self.layers[-2]) if len(self.layers) > 1 else 0
        return any(self.is_layer_norm(node) for node in self.main_path[begin:end])

    def is_layer_norm(self, node: fx.Node) -> bool:
        module = self.module(node)
        if module is not None:
            return isinstance(module, nn.LayerNorm | nn.RMSNorm)
        return node.op == "call_function" and node.target in (F.layer_norm, F.rms_norm)

    def leads_to_several(self, node: fx.Node) -> bool:
        """Whether a node gives several tensors, or only prepares its input for one that does."""
        return gives_several(node) or (
            self.is_deferred(node)
            and bool(node.users)
            and all(self.leads_to_several(user) for user in node.users)
        )

    def is_bottleneck(self, cut: fx.Node) -> bool:
        """Whether every path from input to output passes this node.

        A single tensor then passes a cut behind it.
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

        On the main path the cuts decide. Beside it, what holds weights, or depends on what does,
        goes where its result is first needed, so that a loss reaches it. The rest goes where its
        inputs are, since it is often smaller than they are (a subsampled shortcut).
        """
        ends, on_path, passed = set(cuts), {}, 0
        for node in self.main_path:
            on_path[node] = passed
            passed += node in ends
        latest: dict[fx.Node, int] = {}
        for node in reversed(self.graph.nodes):
            latest[node] = on_path.get(
                node, min((latest[user] for user in node.users), default=passed)
            )
        place: dict[fx.Node, int] = {}
        learns: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node in on_path or node.op == "output":
                place[node] = latest[node]
                continue
            if is_item(node):  # where its tensors are, since only tensors pass a cut
                place[node] = place[node.args[0]]
                if node.args[0] in learns:
                    learns.add(node)
                continue
            has_state = node.op == "get_attr" or node.target == FLAG or self.parameters(node)
            if has_state or not learns.isdisjoint(node.all_input_nodes):
                learns.add(node)
                place[node] = latest[node]
            else:
                place[node] = max(
                    (place[source] + (source in ends) for source in node.all_input_nodes), default=0
                )
        return place


def gives_several(node: fx.Node) -> bool:
    """Whether a node gives a tuple of tensors, from which others take theirs."""
    if node.op == "call_function" and node.target in SEVERAL_FUNCTIONS:
        return True
    if node.op == "call_method" and node.target in SEVERAL_METHODS:
        return True
    # a leaf module that returns a tuple, or a tuple whose gradient was cut
    return (
        (node.op == "call_module" or node.target is without_gradient)
        and bool(node.users)
        and all(takes_item(user) for user in node.users)
    )


def takes_item(node: fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target in (operator.getitem, without_gradient)
        and all(isinstance(index, int) for index in node.args[1:])
    )


def is_item(node: fx.Node) -> bool:
    """Whether a node takes one tensor of several."""
    return takes_item(node) and isinstance(node.args[0], fx.Node) and gives_several(node.args[0])


def gives_size(node: fx.Node) -> bool:
    """Whether a node gives numbers about a tensor, such as its shape, and passes no features."""
    if node.op == "call_method":
        return node.target in ("size", "dim", "numel")
    return node.op == "call_function" and node.target is getattr and node.args[1] in SIZES
