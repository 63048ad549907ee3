"""What a network returns, and where in it the logits are.

A network can return its logits in a dictionary, a tuple or an object, beside other values. While it
trains it can return auxiliary outputs beside those that it returns in evaluation.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from layerwise.errors import CannotSplit, InvalidInput

Key = str | int | None
LOGITS = "logits"  # what the networks of Hugging Face call them


class NoSuchOutput(InvalidInput):
    """An ``output=`` that a network's result does not have."""


def parts_of_output(result: Any) -> dict[Key, Any]:
    """The values that a result is made of, by key, attribute or index; empty if it is one value."""
    if isinstance(result, Tensor | fx.Proxy):
        return {}
    if isinstance(result, Mapping):
        parts = dict(result)
    elif isinstance(result, tuple | list):
        parts = dict(zip(getattr(result, "_fields", range(len(result))), result, strict=True))
    elif dataclasses.is_dataclass(result):
        parts = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    else:
        parts = getattr(result, "__dict__", {})
    return {key: value for key, value in parts.items() if value is not None}


def main_output(result: Any, output: Key) -> Any:
    """The logits in what a network returns; the result itself where it is one value.

    Args:
        output: key, attribute or index; None: it is not looked into.

    Raises:
        NoSuchOutput: the result has no such part; the message names those that it has.
    """
    parts = parts_of_output(result)
    if output is None or not parts:
        return result
    if isinstance(output, int) and -len(parts) <= output < len(parts):
        return list(parts.values())[output]
    if output not in parts:
        raise NoSuchOutput(
            f"Cannot use output={output!r}: what the network returns has no such part, but "
            f"{', '.join(map(repr, parts))}. Give one of them."
        )
    return parts[output]


def logits_of(result: Any) -> Any:
    """The logits in what a network returns in evaluation: the result, or its part ``logits``."""
    return main_output(result, LOGITS)


def take_main(training: fx.Graph, evaluation: fx.Graph, keys: Sequence[Key]) -> Key:
    """Let a graph return only that of its outputs which the network has in evaluation too.

    Args:
        training: graph whose output is a tuple: the main output and auxiliary ones.
        evaluation: graph whose output is one value.
        keys: where the network's result holds the values of the tuple.

    Returns:
        The key of the main output.

    Raises:
        CannotSplit: none of the outputs is computed as in evaluation.
    """
    last = training.output_node()
    values: Any = last.args[0]
    expected = leading_to(evaluation.output_node())[:-1]
    for key, value in zip(keys, values, strict=True):
        nodes = leading_to(value) if isinstance(value, fx.Node) else []
        if [node.target for node in nodes] == [node.target for node in expected]:
            last.args = (value,)
            return key
    raise CannotSplit(
        "Cannot split the network: in training it returns several values, and none of them is "
        "computed like its output in evaluation. Say which holds the logits with output=, such as "
        f"output={keys[0]!r}."
    )


def leading_to(node: fx.Node) -> list[fx.Node]:
    """The nodes that a node depends on, itself included, in order."""
    needed = {node}
    for each in reversed(node.graph.nodes):
        if each in needed:
            needed.update(each.all_input_nodes)
    return [each for each in node.graph.nodes if each in needed]
