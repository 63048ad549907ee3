"""Trace a network into a graph that evaluates and trains alike.

fx freezes what ``forward`` reads from ``self.training``, so a network is traced twice, in both
modes. Where the two graphs differ in a flag only, the flag becomes a node that asks the unit it
ends up in. Where they differ in more, the network is refused.
"""

import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from layerwise.core.modes import merge_modes
from layerwise.core.outputs import Key, NoSuchOutput, main_output, parts_of_output, take_main
from layerwise.core.settings import Settings, keep_whole, words
from layerwise.core.side_effects import (
    Made,
    attributes_kept,
    buffers_kept,
    generators_kept,
    modes_kept,
    registered_kept,
)
from layerwise.core.sized_tracer import CHECKS, SizedTracer
from layerwise.core.tracer import (
    CannotTrace,
    Tracer,
    caller,
    changes_in_place,
    owner,
    refuse_lazy,
    strip_root,
)
from layerwise.errors import CannotSplit, choose, first_line_of, names_in
from layerwise.utils.options import required_arguments

# methods that leave something with a tensor for the backward pass
# what fx says of a layer or a weight that it finds on no module
NOT_HELD = re.compile("is not installed as a submodule|is not a member of this module")
TENSOR_HOOKS = ("register_hook", "register_post_accumulate_grad_hook", "retain_grad")


class TrainingFlag(nn.Module):
    """The training mode of the unit that this module belongs to."""

    def forward(self) -> bool:
        return self.training


MakeTracer = Callable[[Iterable[str], Settings], Tracer]


class CannotFollow(CannotTrace):
    """A refusal of a forward pass whose way depends on sizes or values that are not known."""


class SingleInput(nn.Module):
    """The user's model called with one tensor, its other arguments at their defaults.

    Attributes:
        output: where its result holds the logits; None: it is the logits.
        parts: keys of the values that its result is made of, if it is made of several.
        recomputes: whether forward changes what is saved for backward, which a graph does not.
    """

    def __init__(self, network: nn.Module, output: Key = None) -> None:
        super().__init__()
        self.network, self.output = network, output
        self.settings = Settings()
        self.parts: list[Key] = []
        self.recomputes = False

    def forward(self, images: Tensor) -> Any:
        result = main_output(self.network(images), self.output)
        parts = parts_of_output(result)
        self.parts = list(parts)
        return tuple(parts.values()) if parts else result


def settings_of(root: nn.Module) -> Settings:
    """What a traced graph relies on, from the root that ``trace_network`` returned."""
    settings = vars(root)["settings"]
    assert isinstance(settings, Settings)
    return settings


def trace_network(
    model: nn.Module,
    leaves: Iterable[str] = (),
    sample: Tensor | None = None,
    output: Key = None,
) -> tuple[SingleInput, fx.Graph]:
    """Trace a model of one tensor into a graph without dead nodes.

    Modules without weights that cannot be traced, such as drop path, are kept whole without being
    asked. Where a network cannot be traced without knowing its sizes, those of the sample are used.

    Args:
        leaves: paths of modules to treat as one operation, without looking inside.
        sample: a batch of images (B, ...), for forward passes that compute with its size.
        output: key, attribute or index of the logits in what the network returns; see ``split``.

    Returns:
        The root in which the graph's targets are found, whose ``settings`` say what the graph
        relies on, and whose ``output`` says what of the network's result the graph computes; and
        the graph.

    Raises:
        CannotSplit: the forward pass cannot be traced, does something that no graph shows, or
            differs between training and evaluation in more than flags.
    """
    whole = {
        choose("path in leaves=", path, [name for name, _ in model.named_modules() if name])
        for path in names_in("leaves", leaves)
    }
    refuse_lazy(model)
    refuse_other_inputs(model)
    try:
        return trace_keeping_whole(model, whole, output, Tracer)
    except CannotFollow:
        if sample is None:
            raise
    return trace_keeping_whole(model, whole, output, partial(SizedTracer, sample=sample))


def refuse_other_inputs(model: nn.Module) -> None:
    """Refuse a network that needs more than images.

    Raises:
        CannotSplit: naming its inputs.
    """
    required = required_arguments(model.forward)
    if len(required) > 1:
        raise CannotSplit(
            f"Cannot split the network: its forward takes {len(required)} inputs "
            f"({', '.join(required)}), and the first unit reads images alone. Give a module of one "
            "input, which makes the others from it."
        )


def trace_keeping_whole(
    model: nn.Module, leaves: Iterable[str], output: Key, make_tracer: MakeTracer
) -> tuple[SingleInput, fx.Graph]:
    """``trace_network`` by one tracer."""
    whole = set(leaves)
    while True:
        try:
            return trace_in_both_modes(model, whole, output, make_tracer)
        except CannotTrace as refusal:
            places = refusal.called, refusal.path
            alike = set[str]().union(*(without_weights_like(model, place) for place in places))
            alike -= whole
            if not alike:
                raise naming_all(model, refusal) from refusal.__cause__
            whole |= alike  # such as drop path: nothing inside would be a unit


def without_weights_like(model: nn.Module, path: str) -> set[str]:
    """Paths of a module and those of its class, if it is a part of the network without weights."""
    if not path or any(True for _ in model.get_submodule(path).parameters()):
        return set()
    kind = type(model.get_submodule(path))
    return {
        name
        for name, module in model.named_modules()
        if type(module) is kind and not any(True for _ in module.parameters())
    }


def naming_all(model: nn.Module, refusal: CannotTrace) -> CannotTrace:
    """A refusal whose remedy names all modules of the class that it is about."""
    kind = type(model.get_submodule(refusal.path)) if refusal.path else nn.Module
    if not kind.__module__.startswith("torch."):
        alike = [name for name, module in model.named_modules() if type(module) is kind]
        words_before, words_now = f"leaves=[{refusal.path!r}]", f"leaves={alike}"
        refusal.args = (str(refusal).replace(words_before, words_now),)
    return refusal


def trace_in_both_modes(
    model: nn.Module, leaves: Iterable[str], output: Key, make_tracer: MakeTracer
) -> tuple[SingleInput, fx.Graph]:
    """``trace_network`` with the modules that are kept whole."""
    # a root for each, since tracing keeps constant tensors there
    root, twin, again = (SingleInput(model, output) for _ in range(3))
    with modes_kept(model), outside_autocast(False):
        in_training = trace_in_mode(root, make_tracer(leaves, root.settings), True)
        in_evaluation = trace_in_mode(twin, make_tracer(leaves, twin.settings), False)
        # also for a context that changes nothing unless mixed precision is on
        with outside_autocast(True):
            repeated = trace_in_mode(again, make_tracer(leaves, again.settings), True)
    refuse_other_way(in_training, repeated)
    if root.parts and not twin.parts:
        refuse_lost_changes(root, in_training)
        root.output = take_main(in_training, in_evaluation, root.parts)
        for mode in (in_training, in_evaluation):
            without_dead_nodes(mode)
        # names were numbered with those of the auxiliary outputs
        for node, alike in zip(in_training.nodes, in_evaluation.nodes, strict=False):
            node.name = alike.name
    graph = merge_modes(in_training, in_evaluation)
    refuse_changing_constants(root, twin)
    refuse_changing_constants(root, again)
    refuse_lost_changes(root, graph)
    without_dead_nodes(graph)
    for read in (twin.settings, again.settings):
        root.settings.include(read)
    root.training = model.training
    return root, graph


def without_dead_nodes(graph: fx.Graph) -> None:
    graph.eliminate_dead_code(
        lambda node: node.op in ("placeholder", "output") or node.target in CHECKS
    )


def outside_autocast(enabled: bool) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


def trace_in_mode(root: SingleInput, tracer: Tracer, training: bool) -> fx.Graph:
    """Trace in a mode, and refuse what forward does beside computing its result."""
    for module in root.modules():
        module.training = training
    network, made = root.network, Made()
    try:
        with (
            generators_kept(),
            registered_kept(network) as made,
            attributes_kept(network) as attributes,
            buffers_kept(network) as written,
        ):
            graph = traced(tracer, root)
            root.recomputes = tracer.recomputes
            changed = attributes.changed()
    finally:
        refuse_made(made)  # what the pass failed at, where it did
    for path, name in (*made.buffers, *written):
        raise CannotTrace(buffer_message(path, name), path)
    if tracer.drawn:
        whose, path = tracer.drawn
        raise CannotTrace(
            f"Cannot split the network: the forward pass of {words(path)} draws random numbers "
            f"from {whose} without its input, or sets a seed, which the units would not do anew. "
            f"Draw from the input, such as by torch.randn_like. Or: {keep_whole(path)}.",
            path,
        )
    if changed:
        path, name = changed
        raise CannotTrace(
            f"Cannot split the network: its forward pass changes attribute {name!r} of "
            f"{words(path)}, and the units would not do so. {keep_whole(path)}, or change it "
            "outside of forward, such as in a hook of a layer.",
            path,
        )
    return graph


def traced(tracer: Tracer, root: SingleInput) -> fx.Graph:
    try:
        return tracer.trace(root)
    except (CannotSplit, NoSuchOutput):
        raise
    except Exception as error:  # the user's forward runs here: anything can be raised
        buffer = re.search(r"to buffer '(\w+)'", str(error))
        if buffer and isinstance(error, TypeError):
            path = strip_root(tracer.path[-1]) if tracer.path else ""
            raise CannotTrace(buffer_message(path, buffer[1]), path) from error
        place = strip_root(tracer.path[-1]) if tracer.path else ""
        if NOT_HELD.search(str(error)):
            raise CannotSplit(
                f"Cannot split the network: the forward pass of {words(place)} uses a layer or a "
                "weight that no module holds, such as one in a Python list, so no optimizer would "
                "be given it. Hold layers in nn.ModuleList, weights in nn.ParameterList."
            ) from error
        if "does not support item assignment" in str(error):
            raise CannotTrace(
                f"Cannot split the network: the forward pass of {words(place)} assigns to elements "
                "of a tensor, which no graph shows. Make a new one, such as by torch.where or "
                f"torch.cat. Or: {keep_whole(place)}.",
                place,
            ) from error
        where = (
            f"module {place!r} ({type(root.network.get_submodule(place)).__name__})"
            if place
            else "the network itself"
        )
        reason = first_line_of(error)
        whole = (
            f"keep it whole inside one unit with leaves=[{place!r}]"
            if place
            else "move it into a module named in leaves="
        )
        raise CannotFollow(
            f"Cannot split the network: {where} cannot be traced: {reason}. Its forward pass "
            "depends on the values or the sizes of its input, or needs more than one tensor, so no "
            "fixed chain of units exists. Rewrite that part without control flow on tensors, "
            f"asserts on shapes included, or {whole}.",
            place,
        ) from error


def buffer_message(path: str, name: str) -> str:
    return (
        f"Cannot split the network: its forward pass writes to buffer {name!r} of {words(path)}, "
        f"and the units would not do so. {keep_whole(path)}, or update it outside of forward."
    )


def refuse_made(made: Made) -> None:
    """Refuse a forward pass that makes layers or weights.

    Raises:
        CannotSplit: naming one.
    """
    if made.learned:
        raise CannotSplit(
            f"Cannot split the network: its forward pass makes {made.learned[0]!r} when it first "
            "runs. Call the network once on a batch, such as model(sample), and make its units "
            "and optimizers after that."
        )


def refuse_other_way(graph: fx.Graph, repeated: fx.Graph) -> None:
    """Refuse a forward pass that takes another way when it runs again."""
    nodes, others = list(graph.nodes), list(repeated.nodes)
    if len(nodes) == len(others) and str(graph) == str(repeated):
        return
    pairs = zip(nodes, others, strict=False)
    differing = (a for a, b in pairs if a.format_node() != b.format_node())
    path = caller(next(differing, nodes[-1]))
    raise CannotTrace(
        f"Cannot split the network: the forward pass of {words(path)} takes another way each time "
        "that it runs, such as by chance, and in the units one way would stand for ever. "
        f"{keep_whole(path)}.",
        path,
    )


def refuse_changing_constants(root: nn.Module, twin: nn.Module) -> None:
    """Refuse tensors that forward makes without its input and that differ when it runs again."""
    for name, value in vars(root).items():
        repeated = vars(twin).get(name)
        if (
            isinstance(value, Tensor)
            and isinstance(repeated, Tensor)
            and value.dtype == repeated.dtype
            and not torch.equal(value, repeated)
        ):
            raise CannotSplit(
                "Cannot split the network: its forward pass makes a tensor of shape "
                f"{[*value.shape]} that differs each time, such as random noise; in the units it "
                "would always be the same. Make it from the input, such as by torch.randn_like, "
                "or keep its module whole inside one unit with leaves=."
            )


def refuse_lost_changes(root: nn.Module, graph: fx.Graph) -> None:
    """Refuse an operation in place on a buffer, or whose result is not used by name.

    A graph does not show who sees the change.
    """
    for node in graph.nodes:
        if node.op not in ("call_module", "call_method", "call_function"):
            continue
        where = f"in module {owner(node)!r}" if owner(node) else "in the network itself"
        if node.target in TENSOR_HOOKS:
            raise CannotTrace(
                f"Cannot split the network: {node.name!r} {where} leaves a hook with a tensor, and "
                f"the units would not do so. {keep_whole(owner(node))}.",
                owner(node),
            )
        if not changes_in_place(root, node):
            continue
        written = node.all_input_nodes[0] if node.all_input_nodes else node
        if written.op == "get_attr":
            path, _, name = strip_root(str(written.target)).rpartition(".")
            raise CannotTrace(buffer_message(path, name), owner(node))
        if not node.users:
            raise CannotTrace(
                f"Cannot split the network: {node.name!r} {where} changes a tensor in place and "
                "its result is thrown away, so no graph shows who uses the change. Use its "
                "result, such as x = F.relu_(x).",
                owner(node),
            )
