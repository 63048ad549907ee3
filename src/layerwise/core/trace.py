"""Trace a network into a graph that evaluates and trains alike.

fx freezes what ``forward`` reads from ``self.training``, so a network is traced twice, in both
modes. Where the two graphs differ in a flag only, the flag becomes a node that asks the unit it
ends up in. Where they differ in more, the network is refused.
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
SLICE_ENDS = ("start", "stop", "step")


class TrainingFlag(nn.Module):
    """The training mode of the unit that this module belongs to."""

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
    """A tracer that goes through the user's own modules and remembers where it is.

    A refusal can then name the place.
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
        choose("path in leaves=", path, [name for name, _ in model.named_modules() if name])
        for path in leaves
    }
    # a root for each, since tracing keeps constant tensors there
    root, twin = SingleInput(model), SingleInput(model)
    with modes_kept(model), buffers_kept(model):
        in_training = trace_in_mode(root, leaves, True)
        in_evaluation = trace_in_mode(twin, leaves, False)
    graph = merge_modes(in_training, in_evaluation)
    refuse_changing_constants(root, twin)
    refuse_lost_changes(root, graph)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    root.training = model.training
    return root, graph


@contextmanager
def modes_kept(*networks: nn.Module) -> Iterator[None]:
    """Give every module its own mode back at the end, since some may have been frozen singly."""
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[None]:
    """Refuse a forward pass that writes to a buffer, and give the buffer its values back.

    A graph does not show such a write.
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
            f"Cannot split the network: its forward pass writes to buffer {changed[0]!r}, and the "
            "units would not do so. Update it outside of forward, or keep its module whole inside "
            "one unit with leaves=."
        )


def refuse_changing_constants(root: nn.Module, twin: nn.Module) -> None:
    """Refuse tensors that forward makes without its input and that differ when it runs again."""
    for name, value in vars(root).items():
        if isinstance(value, Tensor) and not torch.equal(value, vars(twin)[name]):
            raise CannotSplit(
                "Cannot split the network: its forward pass makes a tensor of shape "
                f"{[*value.shape]} that differs each time, such as random noise; in the units it "
                "would always be the same. Make it from the input, such as by torch.randn_like, "
                "or keep its module whole inside one unit with leaves=."
            )


def refuse_lost_changes(root: nn.Module, graph: fx.Graph) -> None:
    """Refuse an operation in place whose result is not used by name.

    A graph does not show who sees the change.
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
                f"Cannot split the network: {node.name!r} {where} changes a tensor in place and "
                "its result is thrown away, so no graph shows who uses the change. Use its "
                "result, such as x = F.relu_(x)."
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
            f"Cannot split the network: {where} cannot be traced: {reason}. Its forward pass "
            "depends on the values or the sizes of its input, or needs more than one tensor, so no "
            "fixed chain of units exists. Rewrite that part without control flow on tensors, "
            f"asserts on shapes included, or {whole}."
        ) from error


def merge_modes(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """Return the training graph with a flag node for every argument that depends on the mode."""
    pairs = list(zip(training.nodes, evaluation.nodes, strict=False))
    if len(training.nodes) != len(evaluation.nodes):
        raise CannotSplit(mode_message(next((a for a, b in pairs if a.target != b.target), None)))
    for node, twin in pairs:
        if (node.op, node.target) != (twin.op, twin.target):
            raise CannotSplit(mode_message(node))
        node.args = merge_argument(training, node, node.args, twin.args)
        node.kwargs = merge_argument(training, node, node.kwargs, twin.kwargs)
    return training


def merge_argument(graph: fx.Graph, user: fx.Node, training: Any, evaluation: Any) -> Any:
    """One argument that serves ``user`` in both modes, from its arguments in each."""
    same_type = type(training) is type(evaluation)
    if isinstance(training, fx.Node) and same_type and training.name == evaluation.name:
        return training
    if isinstance(training, tuple | list) and same_type and len(training) == len(evaluation):
        pairs = zip(training, evaluation, strict=True)
        merged = [merge_argument(graph, user, *pair) for pair in pairs]
        return merged if isinstance(training, list) else tuple(merged)
    if isinstance(training, slice) and same_type:
        ends = [(getattr(training, end), getattr(evaluation, end)) for end in SLICE_ENDS]
        return slice(*(merge_argument(graph, user, *pair) for pair in ends))
    if isinstance(training, dict) and same_type and training.keys() == evaluation.keys():
        keys = training.keys()
        return {key: merge_argument(graph, user, training[key], evaluation[key]) for key in keys}
    if isinstance(training, bool) and same_type and training != evaluation:
        with graph.inserting_before(user):
            flag = graph.call_module(FLAG)
            return flag if training else graph.call_function(operator.not_, (flag,))
    if fx.Node in (type(training), type(evaluation)) or training != evaluation:
        raise CannotSplit(mode_message(user))
    return training


def mode_message(node: fx.Node | None) -> str:
    where = f"in module {owner(node)!r}" if node is not None and owner(node) else "somewhere"
    return (
        "Cannot split the network: its forward pass takes another way in training than in "
        f"evaluation, {where}, so no single chain of units stands for both. Switch that part off, "
        "such as auxiliary outputs, or use modules like nn.Dropout that know their own mode."
    )


def owner(node: fx.Node) -> str:
    """Path of the module whose forward pass made this node, or of the leaf that it calls."""
    if node.op in ("call_module", "get_attr"):
        return strip_root(str(node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return strip_root(str(stack[-1][0])) if stack else ""


def strip_root(path: str) -> str:
    return path.removeprefix(ROOT).removeprefix(".")
