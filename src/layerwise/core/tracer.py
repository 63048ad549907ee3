"""A tracer that keeps what fx by itself loses, or names the module where it cannot.

Buffers are read when the units compute, not when they are made. What forward computes without a
gradient has none in the units either. Attributes that it reads are remembered as settings.
"""

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from layerwise.core.settings import Settings, has_hooks, hook_message, keep_whole, reads_observed
from layerwise.core.settings import words as in_words
from layerwise.core.side_effects import drawn_from
from layerwise.errors import CannotSplit
from layerwise.ops.batch_norm import Normalisation
from layerwise.ops.small_conv import Convolution

ROOT = "network"  # path of the user's model inside the traced wrapper
FLAG = "training_flag"  # path of the mode flag in every unit

# a norm also writes to its buffers, which only a whole module does
KEPT_WHOLE = (nn.modules.batchnorm._NormBase, Normalisation, Convolution)

# fx replaces functions of PyTorch for the whole process while it traces
TRACING = threading.RLock()

INPLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "setitem"}


class CannotTrace(CannotSplit):
    """A refusal of something that no graph shows.

    Attributes:
        path: module whose forward pass does it; empty: the network itself.
        called: module that it calls there in one mode, which may do it instead and leave no trace
            in the other; mostly empty.
    """

    def __init__(self, message: str, path: str, called: str = "") -> None:
        super().__init__(message)
        self.path, self.called = path, called


class StoredTensor(fx.Proxy):
    """A buffer, or a tensor that is a module's attribute, whose shape does not change."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, value: Tensor) -> None:
        super().__init__(node, tracer)
        self.shape, self.ndim, self.dtype = value.shape, value.dim(), value.dtype
        self.device = value.device

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim

    def numel(self) -> int:
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]


class Tracer(fx.Tracer):
    """A tracer that goes through the user's own modules and remembers where it is.

    A refusal can then name the place.

    Attributes:
        settings: receives what forward reads.
        path: modules that are being traced, from the outermost.
        entries: path of each, and whether autocast was as outside when it was called.
        generators: states of the shared generators when each was called.
        drawn: whose generator forward drew from, and the module that did; None: from no shared one.
        recomputes: whether forward changes what is saved for backward, such as by checkpointing.
    """

    def __init__(self, leaves: Iterable[str], settings: Settings) -> None:
        super().__init__()
        self.leaves = {f"{ROOT}.{path}" for path in leaves}
        self.settings = settings
        self.path: list[str] = []
        self.entries: list[tuple[str, Any]] = []
        self.generators: list[dict[str, Any]] = []
        self.drawn: tuple[str, str] | None = None
        self.recomputes = False

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        with TRACING:
            return self.traced(root, concrete_args)

    def traced(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """``trace``, while no other thread traces."""
        self.thread = threading.get_ident()
        self.paths = {id(module): path for path, module in root.named_modules()}
        self.buffers = {id(buffer): path for path, buffer in root.named_buffers()}
        self.outside, self.hooks_outside = context(), saving_hooks()
        with torch.enable_grad(), reads_observed(self.observe), self.own_backwards_refused():
            graph = super().trace(root, concrete_args)
        detach_constants(graph)
        return graph

    @contextmanager
    def own_backwards_refused(self) -> Iterator[None]:
        """Refuse functions with a backward pass of their own, which a graph does not show."""
        apply = vars(torch.autograd.Function)["apply"]

        def refuse(cls: Any, *args: Any, **kwargs: Any) -> Any:
            if not any(isinstance(value, fx.Proxy) for value in (*args, *kwargs.values())):
                return apply.__get__(None, cls)(*args, **kwargs)
            path = strip_root(self.path[-1])
            raise CannotTrace(
                f"Cannot split the network: {in_words(path)} calls {cls.__name__}, an autograd "
                "function, whose backward pass would be lost in the units (of torch.utils."
                f"checkpoint only use_reentrant=False can be traced). {keep_whole(path)}.",
                path,
            )

        torch.autograd.Function.apply = classmethod(refuse)  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.autograd.Function.apply = apply  # type: ignore[method-assign]

    def observe(self, module: nn.Module, name: str, value: Any) -> Any:
        """Remember what forward reads; a tensor is read when the units compute."""
        path = self.paths.get(id(module))
        if not self.path or path is None or self.is_elsewhere():
            return value
        self.settings.read(strip_root(path), module, name, value, strip_root(self.path[-1]))
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return self.stored(f"{path}.{name}", value)
        return value

    def is_elsewhere(self) -> bool:
        """Whether another thread runs: while one traces, fx sees the calls of all."""
        return threading.get_ident() != self.thread

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self.is_elsewhere():
            return attr_val
        if isinstance(attr_val, Tensor) and id(attr_val) in self.buffers:
            return self.stored(self.buffers[id(attr_val)], attr_val)
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_arg(self, a: Any) -> Any:
        """NumPy's numbers as Python's, since generated code knows no NumPy."""
        return super().create_arg(a.item() if isinstance(a, np.generic) else a)

    def stored(self, path: str, value: Tensor) -> fx.Proxy:
        """A node for each use, so that each unit reads the tensor itself."""
        return self.create_proxy(
            "get_attr", path, (), {}, proxy_factory_fn=lambda node: StoredTensor(self, node, value)
        )

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == ROOT:
            return False
        if module_qualified_name in self.leaves or isinstance(m, KEPT_WHOLE):
            return True
        if has_hooks(m) and weighted_layers(m) <= 1:
            return True  # the same units, and its hooks run
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.is_elsewhere():
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        if self.is_leaf_module(m, path):
            return super().call_module(m, forward, args, kwargs)
        refuse_opaque(m, strip_root(path))
        self.note_draws()
        self.settings.look_through(strip_root(path), m)
        self.path.append(path)
        self.entries.append((path, context()))
        self.generators.append(drawn_from())
        # not by a call: hooks, also those of all modules, would be given stand-ins
        result = super().call_module(m, m.forward, args, kwargs)
        self.note_draws()
        self.generators.pop()
        self.entries.pop()
        self.path.pop()  # not reached when tracing fails inside: the path then names the place
        return result

    def note_draws(self) -> None:
        """Remember the innermost module that draws, or sets a seed if only for some lines."""
        if self.drawn is None and self.generators:
            states = self.generators[-1]
            drawn = [name for name, state in drawn_from().items() if state != states[name]]
            if drawn:
                self.drawn = drawn[0], strip_root(self.path[-1])

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        if kind in ("call_module", "call_method", "call_function"):
            self.note_draws()
            node.meta["constant"] = not torch.is_grad_enabled()
            self.recomputes |= saving_hooks() != self.hooks_outside
            if context() != self.outside:
                raise self.refused_context("switches autocast")
            if node.meta["constant"] and changes_in_place(self.root, node):
                raise self.refused_context("changes a tensor in place without gradients")
        return node

    def refused_context(self, what: str) -> CannotTrace:
        """The refusal of a context, which the innermost module opened that was called outside."""
        outside = [path for path, state in self.entries if state == self.outside]
        path = strip_root(outside[-1] if outside else ROOT)
        return CannotTrace(
            f"Cannot split the network: {in_words(path)} {what} inside its forward pass, and the "
            f"units would not do so. {keep_whole(path)}.",
            path,
        )


def context() -> Any:
    """Whether autocast is on, and in which type, by kind of device."""
    kinds = ("cpu", "cuda")
    return [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds]


def saving_hooks() -> Any:
    """The hooks that tensors saved for backward pass, such as those of ``torch.utils.checkpoint``.

    PyTorch has no public name for them; without its private one, none are seen.
    """
    innermost = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return innermost(False) if innermost is not None else None


def without_gradient(value: Any) -> Any:
    """A value as a constant of the gradient, as ``torch.no_grad`` makes it."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple | list):
        return type(value)(without_gradient(item) for item in value)
    return value


def detach_constants(graph: fx.Graph) -> None:
    """Give what forward computed under ``torch.no_grad`` no gradient, node by node."""
    for node in list(graph.nodes):
        if not node.meta.get("constant"):
            continue
        with graph.inserting_after(node):
            constant = graph.call_function(without_gradient, (node,))
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant, lambda user, constant=constant: user is not constant)


def changes_in_place(root: nn.Module, node: fx.Node) -> bool:
    """Whether a node changes its first input."""
    if node.op == "call_module":
        if node.target == FLAG:
            return False
        module = root.get_submodule(str(node.target))
        return getattr(module, "inplace", False) is True
    name = operation_name(node)
    if node.kwargs.get("inplace", False) is True:
        return True
    return (name.endswith("_") and not name.endswith("__")) or name in INPLACE_OPERATORS


def operation_name(node: fx.Node) -> str:
    """Name of the method or function that a node calls."""
    return str(node.target if node.op == "call_method" else getattr(node.target, "__name__", ""))


def weighted_layers(module: nn.Module) -> int:
    """Modules inside that have a weight matrix or kernel of their own."""
    return sum(
        any(parameter.dim() > 1 for parameter in inner.parameters(recurse=False))
        for inner in module.modules()
    )


def refuse_lazy(model: nn.Module) -> None:
    """Refuse layers whose weights have no shape before their first batch."""
    for path, module in model.named_modules():
        own = [*module._parameters.values(), *module._buffers.values()]
        if isinstance(module, LazyModuleMixin) and any(map(is_lazy, own)):
            raise CannotSplit(
                f"Cannot split the network: module {path!r} ({type(module).__name__}) has no "
                "weights before its first batch. Call the network once on a batch, such as "
                "model(sample), and make its units and optimizers after that."
            )


def refuse_opaque(module: nn.Module, path: str) -> None:
    """Refuse a module that cannot be looked into: scripted, exported, compiled, or with hooks."""
    whole = f", or keep it whole inside one unit with leaves=[{path!r}]" if path else ""
    if isinstance(module, torch.jit.ScriptModule):
        raise CannotSplit(
            f"Cannot split the network: {in_words(path)} is scripted or traced by torch.jit, which "
            f"hides its forward pass. Give the module that it was made from{whole}."
        )
    if isinstance(module, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes
    ):
        raise CannotSplit(
            f"Cannot split the network: {in_words(path)} is exported, so its mode is fixed and its "
            "layers are operations. Give the module that it was made from."
        )
    if hasattr(module, "_orig_mod"):
        raise CannotSplit(
            f"Cannot split the network: {in_words(path)} is compiled by torch.compile, which hides "
            f"its forward pass. Give the module that it was made from{whole}."
        )
    if has_hooks(module):
        raise CannotSplit(hook_message("split the network", path))


def strip_root(path: str) -> str:
    return path.removeprefix(ROOT).removeprefix(".")


def owner(node: fx.Node) -> str:
    """Path of the module whose forward pass made this node, or of the leaf that it calls."""
    if node.op in ("call_module", "get_attr"):
        return strip_root(str(node.target))
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return strip_root(str(stack[-1][0])) if stack else ""


def callers(node: fx.Node) -> list[str]:
    """Paths of the modules whose forward passes made this node, the outermost first.

    A leaf that it calls is not among them.
    """
    stack = [strip_root(str(path)) for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
    if node.op == "call_module" and stack and stack[-1] == owner(node):
        stack.pop()
    return stack


def caller(node: fx.Node) -> str:
    """Path of the innermost of ``callers``; empty for the network itself."""
    return next(reversed(callers(node)), "")
