"""Axes of what a network computes: whether the first is the batch, and which holds the channels.

The batch's axis is found by two batches, of 2 and of 3 images. The channels' axis is the one that
the last layer wrote channels to: the last of a linear layer and of attention, the one behind the
batch of a convolution. Operations without weights carry it on, by the shapes before and after.
Where they do not say, such as where two branches disagree, it is what the next layer reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from layerwise.core.side_effects import states_kept
from layerwise.core.tracer import operation_name
from layerwise.errors import CannotSplit
from layerwise.ops.batch_norm import Normalisation

Shape = tuple[int, ...]

BATCHES = 2, 3
LAST_MODULES = (
    nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.MultiheadAttention, nn.TransformerEncoderLayer,
    nn.TransformerEncoder, nn.RNNBase, nn.Embedding,
)  # fmt: skip
LAST_FUNCTIONS = {F.linear, F.layer_norm, F.rms_norm, F.multi_head_attention_forward, F.embedding}
SECOND_MODULES = (
    nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, Normalisation,
)  # fmt: skip
SECOND_FUNCTIONS = {
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
    F.batch_norm, F.instance_norm, F.group_norm,
}  # fmt: skip
TURNS = {"permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t"}
RESHAPES = {"view", "reshape", "flatten", "unflatten"}


class Shapes(fx.Interpreter):
    """A run of a graph that keeps the shape of every tensor; of several, the first one's."""

    def __init__(self, root: nn.Module, graph: fx.Graph, targets: Mapping[str, Any]) -> None:
        super().__init__(root, graph=graph)
        self.targets = targets
        self.shapes: dict[fx.Node, Shape] = {}
        self.several: set[fx.Node] = set()

    def fetch_attr(self, target: str) -> Any:
        return self.targets[target]

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        first = next(iter(result), None) if isinstance(result, tuple | list) else result
        if isinstance(first, Tensor):
            self.shapes[n] = tuple(first.shape)
            if first is not result:
                self.several.add(n)
        return result


@dataclass
class Axes:
    """Shapes of a graph's tensors for two batches, and where their channels are.

    Attributes:
        shapes: of a batch of 2, by node; empty: nothing is known.
        larger: of a batch of 3.
        several: nodes that give several tensors.
        written: axis that the last layer wrote channels to.
        read: axis that the next layer reads channels from.
    """

    shapes: dict[fx.Node, Shape] = field(default_factory=dict)
    larger: dict[fx.Node, Shape] = field(default_factory=dict)
    several: set[fx.Node] = field(default_factory=set)
    written: dict[fx.Node, int] = field(default_factory=dict)
    read: dict[fx.Node, int] = field(default_factory=dict)

    def channels(self, node: fx.Node) -> int | None:
        """The axis of a node's channels, the batch counted as axis 0; None: it is not known."""
        if len(self.shapes.get(node, ())) == 2:
            return 1
        return self.written.get(node, self.read.get(node))

    def channels_or_guess(self, node: fx.Node) -> int:
        """``channels``, or where it is not known the last axis of (B, N, C), else the second."""
        axis, shape = self.channels(node), self.shapes.get(node, ())
        return axis if axis is not None else 2 if len(shape) == 3 else 1

    def batch_axes(self, node: fx.Node) -> list[int]:
        """The axes that differ between the two batches."""
        pairs = zip(self.shapes.get(node, ()), self.larger.get(node, ()), strict=False)
        return [axis for axis, (small, large) in enumerate(pairs) if small != large]

    def batch_first(self, node: fx.Node) -> bool:
        """Whether the first axis is the batch alone, or nothing is known."""
        if node not in self.shapes:
            return not self.shapes
        sizes = self.shapes[node][:1], self.larger[node][:1]
        return self.batch_axes(node) == [0] and sizes == ((BATCHES[0],), (BATCHES[1],))

    def batch_later(self, node: fx.Node) -> bool:
        """Whether the batch is an axis that is not the first, as in (N, B, C)."""
        axes = self.batch_axes(node)
        return len(axes) == 1 and axes != [0] and self.shapes[node][axes[0]] == BATCHES[0]

    def readable(self, node: fx.Node) -> bool:
        """Whether a loss can read a node's tensor: batch first, and channels in a known axis."""
        if not self.shapes:
            return True
        return (
            node not in self.several and self.batch_first(node) and self.channels(node) is not None
        )

    def readable_end(self, stretch: Sequence[fx.Node], end: int) -> int:
        """Where a feature ends on the way from a layer to the next.

        Args:
            stretch: the nodes, from the layer on.
            end: number of nodes up to where it would end.

        Returns:
            The number up to the nearest node that a loss can read, ``end`` itself first, then
            behind it, then before it; ``end`` if there is none.
        """
        order = (*range(end, len(stretch) + 1), *range(end - 1, 0, -1))
        return next((count for count in order if self.readable(stretch[count - 1])), end)

    def refuse_batch_later(self, node: fx.Node, path: str) -> None:
        """Refuse to cut where the batch is not the first axis but another.

        Args:
            path: module to cut behind.

        Raises:
            CannotSplit: naming it.
        """
        if self.batch_later(node):
            raise CannotSplit(
                f"Cannot cut behind {path!r}: its feature has shape {self.shapes[node]} for "
                f"{BATCHES[0]} images, so the batch is not its first axis. Put the batch first, "
                "such as by batch_first=True of PyTorch's attention, or cut only behind modules "
                "where it is, at=[…]."
            )

    def refuse_folded(self, node: fx.Node, path: str, able: str) -> None:
        """Refuse to cut where the first axis is not the batch.

        Args:
            path: module to cut behind.
            able: another, behind which the batch is the first axis; or nothing.

        Raises:
            CannotSplit: naming both.
        """
        self.refuse_batch_later(node, path)
        if not self.batch_first(node):
            remedy = f"a later module, such as {able!r}" if able else "an earlier module"
            raise CannotSplit(
                f"Cannot cut behind {path!r}: its feature has shape {self.shapes.get(node)} for "
                f"{BATCHES[0]} images, so its first axis is not the batch, such as where windows "
                f"are folded into it. Cut behind {remedy}."
            )


def find_axes(root: nn.Module, graph: fx.Graph, targets: Mapping[str, Any], sample: Tensor) -> Axes:
    """The axes of a traced network, from two small batches; the network is in evaluation mode.

    Where the network cannot process them, nothing is known.

    Args:
        root: see ``Network``; it stays as it was.
        targets: the modules, parameters and buffers that the graph names.
        sample: images (B, ...), of which the first are taken.
    """
    runs = [Shapes(root, graph, targets) for _ in BATCHES]
    with torch.no_grad(), states_kept(root):
        try:
            images = in_type_of_weights(root, sample)  # as units may be in mixed precision
            for run, size in zip(runs, BATCHES, strict=True):
                run.run(images[torch.arange(size) % len(images)])
        except Exception:  # whoever asked computes the network too, and says what is wrong
            return Axes()
    axes = Axes(runs[0].shapes, runs[1].shapes, runs[0].several)
    nodes = [node for node in graph.nodes if node in axes.shapes]
    for node in nodes:
        note(axes.written, node, written_by(targets, axes, node))
    for node in reversed(nodes):
        note(axes.read, node, read_behind(targets, axes, node))
    return axes


def in_type_of_weights(root: nn.Module, images: Tensor) -> Tensor:
    """Images of floating point in the type of the network's weights."""
    weight = next((p for p in root.parameters() if p.is_floating_point()), images)
    return images.to(weight.dtype) if images.is_floating_point() else images


def note(table: dict[fx.Node, int], node: fx.Node, axes: Iterator[int]) -> None:
    """Keep the axis of a node if there is exactly one."""
    different = set(axes)
    if len(different) == 1:
        table[node] = different.pop()


def written_by(targets: Mapping[str, Any], axes: Axes, node: fx.Node) -> Iterator[int]:
    """The axes that hold a node's channels by what it does, or by what its inputs hold."""
    axis = axis_of_layer(targets, node, len(axes.shapes[node]))
    if node.op == "placeholder":
        axis = 1
    if axis is not None:
        yield axis
        return
    for source in node.all_input_nodes:
        if source in axes.written:
            after = carried(node, axes.shapes[source], axes.shapes[node], axes.written[source])
            if after is not None:
                yield after


def read_behind(targets: Mapping[str, Any], axes: Axes, node: fx.Node) -> Iterator[int]:
    """The axes of a node that the layers read that use it, or use what is made of it."""
    shape = axes.shapes[node]
    for user in node.users:
        axis = axis_of_layer(targets, user, len(shape))
        if axis is not None:
            if user.all_input_nodes[0] is node:
                yield axis
            continue
        if user not in axes.read:
            continue
        before = [
            axis
            for axis in range(1, len(shape))
            if carried(user, shape, axes.shapes[user], axis) == axes.read[user]
        ]
        if len(before) == 1:
            yield before[0]


def axis_of_layer(targets: Mapping[str, Any], node: fx.Node, dims: int) -> int | None:
    """The axis that a layer reads channels from and writes them to; None: it is no such layer."""
    if node.op == "call_module":
        module = targets[str(node.target)]
        if isinstance(module, LAST_MODULES):
            return None if len(getattr(module, "normalized_shape", ())) > 1 else dims - 1
        return 1 if isinstance(module, SECOND_MODULES) else None
    if node.op != "call_function":
        return None
    if node.target in LAST_FUNCTIONS:
        normalized = node.args[1:2] if node.target in (F.layer_norm, F.rms_norm) else ()
        shape = normalized[0] if normalized else node.kwargs.get("normalized_shape", ())
        return None if isinstance(shape, tuple | list) and len(shape) > 1 else dims - 1
    return 1 if node.target in SECOND_FUNCTIONS else None


def is_turn(node: fx.Node) -> bool:
    """Whether a node changes the order of axes and nothing else."""
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    return node.op in ("call_method", "call_function") and operation_name(node) in TURNS


def carried(node: fx.Node, before: Shape, after: Shape, axis: int) -> int | None:
    """Where an axis of an operation's input is in its result; None: it is not there.

    Args:
        node: an operation without weights.
        before, after: shapes of the input and of the result.
        axis: of the input.
    """
    if is_turn(node):
        return turned_axis(node, len(before), axis)
    reshapes = node.op != "call_module" and operation_name(node) in RESHAPES
    if len(before) == len(after) and not reshapes:
        return axis
    for count in (elements_behind, elements_before):
        for place in reversed(range(1, len(after))):
            same_size = after[place] == before[axis]
            if same_size and count(after, place) == count(before, axis):
                return place
    return None


def elements_behind(shape: Shape, axis: int) -> int:
    return prod(shape[axis + 1 :])


def elements_before(shape: Shape, axis: int) -> int:
    return prod(shape[:axis])


def turned_axis(node: fx.Node, dims: int, axis: int) -> int | None:
    """Where a change of the order of axes puts one, by doing it to a tensor of marked sizes."""
    marked = torch.empty(tuple(range(dims)), device="meta")  # axis k has size k
    given, options = node.args[1:], node.kwargs
    if any(isinstance(value, fx.Node) for value in (*given, *options.values())):
        return None
    if node.target is getattr:
        turned = getattr(marked, str(given[0]))
    else:
        turned = getattr(marked, operation_name(node))(*given, **options)
    return tuple(turned.shape).index(axis)
