"""Merge the graphs of a network's two modes into one that asks for the mode of its unit."""

from itertools import takewhile
from typing import Any

from torch import fx

from layerwise.core.tracer import FLAG, CannotTrace, caller, callers

SLICE_ENDS = ("start", "stop", "step")


def by_mode(flag: bool, training: Any, evaluation: Any) -> Any:
    """The value of an argument in the mode of the unit."""
    return training if flag else evaluation


def merge_modes(training: fx.Graph, evaluation: fx.Graph) -> fx.Graph:
    """Return the training graph with a flag node for every argument that depends on the mode."""
    pairs = list(zip(training.nodes, evaluation.nodes, strict=False))  # both end in an output
    for number, (node, twin) in enumerate(pairs):
        if (node.op, node.target) != (twin.op, twin.target):
            raise mode_refusal(*where_ways_part(pairs[number - 1][0], node, twin))
    for node, twin in pairs:
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
    if fx.Node in (type(training), type(evaluation)):
        raise mode_refusal(caller(user))
    if same_type and isinstance(training, bool | int | float) and training != evaluation:
        with graph.inserting_before(user):
            flag = graph.call_module(FLAG)
            return graph.call_function(by_mode, (flag, training, evaluation))
    if training != evaluation:
        raise mode_refusal(caller(user))
    return training


def where_ways_part(before: fx.Node, node: fx.Node, twin: fx.Node) -> tuple[str, str]:
    """Path of the module whose forward pass goes on differently in the two modes.

    And that of a module that it calls in one of them: drop path, which computes nothing in
    evaluation, leaves no trace there, so that the way seems to part around it.

    Args:
        before: the last node that both have; node, twin: the next one of each.
    """
    one, other, last = map(callers, (node, twin, before))
    # a way that leads out of the module that the other stays in was taken inside of it
    pairs = (one, other), (one, last), (other, last)
    longest = max((shared_start(*pair) for pair in pairs), key=len)
    called = next(
        (stack for stack in (one, other) if stack[: len(longest)] == longest != stack), []
    )
    return next(reversed(longest), ""), next(iter(called[len(longest) :]), "")


def shared_start(one: list[str], other: list[str]) -> list[str]:
    """What two lists begin with alike."""
    pairs = zip(one, other, strict=False)
    return [name for name, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)]


def mode_refusal(path: str, called: str = "") -> CannotTrace:
    """The refusal of a forward pass that depends on the mode in a module, or in the network's."""
    where = f"in module {path!r}" if path else "in the network itself"
    place = path or called
    whole = f", or keep the module whole inside one unit with leaves=[{place!r}]" if place else ""
    if called and not path:
        whole += f" if it is {called!r} that does so, or else move that part into such a module"
    return CannotTrace(
        "Cannot split the network: its forward pass takes another way in training than in "
        f"evaluation, {where}, so no single chain of units stands for both. Switch that part off, "
        "such as auxiliary outputs, or use modules like nn.Dropout that know their own mode"
        f"{whole or ', or move that part into a module of its own and name it in leaves='}.",
        path,
        called,
    )
