"""Trace a network into a graph that evaluates and trains alike.

fx freezes what ``forward`` reads from ``self.training``. So a network is traced twice, in both
modes; where the two graphs differ in a flag only, the flag becomes a node that asks the unit it
ends up in; where they differ in more, the network is refused.
"""

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from layerwise.errors import CannotSplit, choose
from layerwise.ops.batch_norm import Normalisation
from layerwise.ops.small_conv import Convolution

ROOT = "network"  # path of the user's model inside the traced wrapper
FLAG = "training_flag"  # path of the mode flag in every unit


class TrainingFlag(nn.Module):
    """Answers whether the unit it belongs to is in training mode."""

    def forward(self) -> bool:
        return self.training


# a norm also writes to its buffers, which only a whole module does
KEPT_WHOLE = (nn.modules.batchnorm._NormBase, Normalisation, Convolution)


class SingleInput(nn.Module):
    """The user's model called with one tensor, its other arguments at their defaults."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Any:
        return self.network(images)


class Tracer(fx.Tracer):
    """Traces through the user's own modules and remembers where it is, to name the place when it
    fails.
    """

    def __init__(self, leaves: Iterable[str]) -> None:
        super().__init__()
        self.leaves = {f"{ROOT}.{path}" for path in leaves}
        self.path: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == ROOT:
            return False
        if module_qualified_name in self.leaves or isinstance(m, KEPT_WHOLE):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not reached when tracing fails inside: the path then names the place
        return result


def trace_network(model: nn.Module, leaves: Iterable[str] = ()) -> tuple[nn.Module, fx.Graph]:
    """Trace a model of one tensor into a graph without dead nodes.

    Args:
        leaves: paths of modules to treat as one operation, without looking inside.

    Returns:
        The root in which the graph's targets are found, and the graph.

    Raises:
        CannotSplit: the forward pass cannot be traced, or differs between training and evaluation
            in more than flags.
    """
    leaves = {
        choose("module in leaves=", path, [name for name, _ in model.named_modules() if name])
        for path in leaves
    }
    # one each: tracing keeps constant tensors in its root
    root, twin = SingleInput(model), SingleInput(model)
    with modes_kept(model), buffers_kept(model):
        in_training, in_evaluation = (
            trace_in_mode(root, leaves, True),
            trace_in_mode(twin, leaves, False),
        )
    graph = merge_modes(in_training, in_evaluation)
    refuse_changing_constants(root, twin)
    refuse_lost_changes(root, graph)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    root.training = model.training
    return root, graph


@contextmanager
def modes_kept(*networks: nn.Module) -> Iterator[None]:
    """Give every module its own mode back at the end; some may have been frozen one by one."""
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Refuse a forward pass that writes to a buffer, which a graph does not show, and give the
    buffer its values back.
    """
    before = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in network.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    changed = []
    try:
        yield
    finally:
        for module, name, buffer, version, values in before:
            if module._buffers[name] is not buffer or buffer._version != version:
                changed.append(name)
                module._buffers[name] = buffer.copy_(values)
    if changed:
        raise CannotSplit(
            f"the forward pass writes to buffer {changed[0]!r}, and the units would not do so. "
            "Update it outside of forward, or keep its module whole inside one unit with leaves=."
        )


def refuse_changing_constants(root: nn.Module, twin: nn.Module) -> None:
    """Refuse tensors that forward makes without its input and that came out different when it ran
    again.
    """
    for name, value in vars(root).items():
        if isinstance(value, Tensor) and not torch.equal(value, vars(twin)[name]):
            raise CannotSplit(
                f"the forward pass makes a tensor of shape {[*value.shape]} that is another each "
                "time, such as random noise; in the units it would be the same for ever. Make it "
                "from the input, such as by torch.randn_like, or keep its module whole inside "
                "one unit with leaves=."
            )


def refuse_lost_changes(root: nn.Module, graph: fx.Graph) -> None:
    """Refuse an operation in place whose result is not used by name: a graph does not show who sees
    the change.
    """
    for node in graph.nodes:
        if node.users or node.op not in ("call_module", "call_method", "call_function"):
            continue
        inplace = node.kwargs.get("inplace", False)
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if node.op == "call_module":
            inplace = getattr(root.get_submodule(str(node.target)), "inplace", False)
        if inplace is True or (str(name).endswith("_") and not str(name).endswith("__")):
            where = f"in module {owner(node)!r}" if owner(node) else "in the network itself"
            raise CannotSplit(
                f"{node.name!r} {where} changes a tensor in place and its result is thrown away, "
                "so no graph shows who uses the change. Use its result, such as x = F.relu_(x)."
            )


def trace_in_mode(root: SingleInput, leaves: Iterable[str], training: bool) -> fx.Graph:
    for module in root.modules():
        module.training = training
    tracer = Tracer(leaves)
    try:
        return tracer.trace(root)
    except Exception as error:  # the user's forward runs here: anything can be raised
        place = strip_root(tracer.path[-1]) if tracer.path else ""
        where = (
            f"module {place!r} ({type(root.network.get_submodule(place)).__name__})"
            if place
            else "the network itself"
        )
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        whole = (
            f"keep it whole inside one unit with leaves=[{place!r}]"
            if place
            else "move it into a module named in leaves="
        )
        raise CannotSplit(
            f"{where} cannot be traced: {reason}. Its forward pass depends on the values or the "
            "sizes of its input, or needs more than one tensor, so no fixed chain of units "
            "exists. Rewrite that part without control flow on tensors (an assert on a shape is "
            f"such), or {whole}."
        ) from error


def merge_modes(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """Return the training graph with every argument that depends on the mode replaced by a flag
    node.
    """
    pairs = list(zip(training.nodes, evaluation.nodes, strict=False))
    if len(training.nodes) != len(evaluation.nodes):
        raise CannotSplit(mode_message(next((a for a, b in pairs if a.target != b.target), None)))
    for node, twin in pairs:
        if (node.op, node.target) != (twin.op, twin.target):
            raise CannotSplit(mode_message(node))
        node.args = merge_argument(training, node, node.args, twin.args)
        node.kwargs = merge_argument(training, node, node.kwargs, twin.kwargs)
    return training


def merge_argument(graph: fx.Graph, user: fx.Node, one: Any, other: Any) -> Any:
    """One argument of ``user`` in training mode and in evaluation mode, made one that serves both."""
    if isinstance(one, fx.Node) and isinstance(other, fx.Node) and one.name == other.name:
        return one
    if isinstance(one, tuple | list) and type(one) is type(other) and len(one) == len(other):
        merged = [merge_argument(graph, user, a, b) for a, b in zip(one, other, strict=True)]
        return merged if isinstance(one, list) else tuple(merged)
    if isinstance(one, slice) and isinstance(other, slice):
        ends = ((one.start, other.start), (one.stop, other.stop), (one.step, other.step))
        return slice(*(merge_argument(graph, user, a, b) for a, b in ends))
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return {key: merge_argument(graph, user, one[key], other[key]) for key in one}
    if isinstance(one, bool) and isinstance(other, bool) and one != other:
        with graph.inserting_before(user):
            flag = graph.call_module(FLAG)
            return flag if one else graph.call_function(operator.not_, (flag,))
    if isinstance(one, fx.Node) or isinstance(other, fx.Node) or one != other:
        raise CannotSplit(mode_message(user))
    return one


def mode_message(node: fx.Node | None) -> str:
    where = f"in module {owner(node)!r}" if node is not None and owner(node) else "somewhere"
    return (
        f"the forward pass takes another way in training than in evaluation, {where}, so no "
        "single chain of units stands for both. Switch that part off (such as auxiliary "
        "outputs), or use modules like nn.Dropout that know their own mode."
    )


def owner(node: fx.Node) -> str:
    """Path of the module whose forward pass made this node; the module itself for a leaf."""
    if node.op in ("call_module", "get_attr"):
        return strip_root(str(node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return strip_root(str(stack[-1][0])) if stack else ""


def strip_root(path: str) -> str:
    return path.removeprefix(ROOT).removeprefix(".")
