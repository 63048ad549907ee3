"""A tracer that knows the sample's sizes, for forward passes that compute with them.

Each stand-in has two examples beside it: the fake tensors, or the numbers, that it stands for when
the network is given two batches of different size. A number that is the same in both is a plain
number to forward; all others, such as the batch's size, stay open and are nodes of the graph. Where
forward decides something by an open number, the graph checks that later batches decide alike.
"""

import logging
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from layerwise.core.settings import Settings
from layerwise.core.side_effects import attributes_kept, generators_kept
from layerwise.core.tracer import Tracer
from layerwise.errors import InvalidInput

BATCHES = (6, 10)  # neither divides the other; seldom equal to a size inside a network
# functions that make a tensor from sizes, and that take no stand-ins by themselves
FACTORIES = ("zeros", "ones", "full", "empty", "arange", "rand", "randn", "eye", "linspace")
NUMBERS = (int, float)


class Sized(fx.Proxy):
    """A stand-in with the values that it stands for in two batches."""

    @property
    def examples(self) -> tuple[Any, Any]:
        return self.tracer.examples[self.node]  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or not hasattr(self.examples[0], name):
            raise AttributeError(name)
        if self.node.op == "get_attr" and name in ("dtype", "device"):
            return getattr(self.examples[0], name)  # a node would bring the weight where it is read
        if callable(getattr(self.examples[0], name)):
            return fx.proxy.Attribute(self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def same(self, convert: Callable[[Any], Any]) -> Any:
        """What both examples are when converted.

        Raises:
            TypeError: they differ, or depend on the values of a tensor.
        """
        try:
            first, second = map(convert, self.examples)
        except Exception as error:  # fake tensors have many ways to say that they have no values
            raise TypeError("it depends on the values of a tensor") from error
        if first != second:
            raise TypeError("it depends on the number of images in the batch")
        return first

    def __bool__(self) -> bool:
        value = self.same(bool)
        self.tracer.create_proxy("call_function", refuse_other_decision, (self, value), {})
        return bool(value)

    def __len__(self) -> int:
        return int(self.same(len))

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))  # type: ignore[index]

    def __int__(self) -> int:
        return int(self.same(int))

    def __index__(self) -> int:
        return int(self.same(operator.index))

    def __float__(self) -> float:
        return float(self.same(float))


class SizedTracer(Tracer):
    """A tracer whose stand-ins know their sizes, but for the number of images in a batch.

    Args:
        sample: a batch of images (B, ...); of it only size, type and device are used.
    """

    def __init__(self, leaves: Iterable[str], settings: Settings, sample: Tensor) -> None:
        super().__init__(leaves, settings)
        self.sample = sample
        self.examples: dict[fx.Node, tuple[Any, Any]] = {}
        self.computing = False

    def traced(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        with self.factories_traced(), unlogged("torch._subclasses.fake_tensor"):
            graph = super().traced(root, concrete_args)
        images = next(iter(graph.nodes))
        with graph.inserting_after(images):
            graph.call_function(refuse_other_size, (images, tuple(self.sample.shape[1:])))
        return graph

    @contextmanager
    def factories_traced(self) -> Iterator[None]:
        """Let functions that make tensors take stand-ins for sizes, types and devices."""
        originals = {name: getattr(torch, name) for name in FACTORIES}

        def traced(original: Any) -> Any:
            def make(*args: Any, **kwargs: Any) -> Any:
                if any(isinstance(value, fx.Proxy) for value in tree_leaves((args, kwargs))):
                    return self.create_proxy("call_function", original, args, kwargs)
                return original(*args, **kwargs)

            return make

        try:
            for name, original in originals.items():
                setattr(torch, name, traced(original))
            yield
        finally:
            for name, original in originals.items():
                setattr(torch, name, original)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *names: Any, **named: Any
    ) -> Any:
        named.pop("proxy_factory_fn", None)
        node = super().create_proxy(kind, target, args, kwargs, *names[:2], **named).node
        self.examples[node] = (self.example(node, 0), self.example(node, 1))
        return self.known(node)

    def known(self, node: fx.Node) -> Any:
        """Plain numbers where both examples agree; a stand-in for all else."""
        first, second = self.examples[node]
        if type(first) in NUMBERS and first == second:
            return first
        if type(first) in (list, tuple) and set(map(type, first)) <= {int} and first == second:
            return first
        if type(first) is torch.Size:
            return tuple(
                one
                if one == other
                else self.create_proxy(
                    "call_function", operator.getitem, (fx.Proxy(node, self), place), {}
                )
                for place, (one, other) in enumerate(zip(first, second, strict=True))
            )
        return Sized(node, self)

    def example(self, node: fx.Node, which: int) -> Any:
        """What a node computes in one of the two batches."""
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda source: self.examples[source][which]
        )
        self.computing = True
        try:
            with self.fake:
                return self.compute(node, args, kwargs, BATCHES[which])
        finally:
            self.computing = False

    def compute(self, node: fx.Node, args: Any, kwargs: Any, batch: int) -> Any:
        if node.op == "placeholder":
            kind, device = self.sample.dtype, self.sample.device
            return torch.empty((batch, *self.sample.shape[1:]), dtype=kind, device=device)
        if node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            return getattr(self.root.get_submodule(path), name)
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
            with generators_kept(), attributes_kept(module):
                if buffers:  # a normalisation counts batches in its own
                    return torch.func.functional_call(module, buffers, args, kwargs)
                return module.forward(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def create_arg(self, a: Any) -> Any:
        node = a.node if isinstance(a, fx.Proxy) else super().create_arg(a)
        if isinstance(node, fx.Node) and node not in self.examples:  # a constant tensor
            self.examples[node] = (self.example(node, 0), self.example(node, 1))
        return node

    def observe(self, module: nn.Module, name: str, value: Any) -> Any:
        return value if self.computing else super().observe(module, name, value)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return (
            attr_val if self.computing else super().getattr(attr, attr_val, parameter_proxy_cache)
        )

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.computing:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


@contextmanager
def unlogged(name: str) -> Iterator[None]:
    """Leave out what is logged of errors, which are raised too and then refused in words."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def refuse_other_decision(decision: Any, expected: bool) -> None:
    """Refuse a batch for which forward would decide otherwise than when it was traced.

    Raises:
        InvalidInput: see above.
    """
    if bool(decision) != expected:
        raise InvalidInput(
            "Cannot compute with the units: for such a batch the network's forward pass takes "
            "another way than the one that they were made of. Give batches like the sample in "
            "number type and device, of 2 images or more; or keep the module that decides whole "
            "with leaves=[…]."
        )


def refuse_other_size(images: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse images of another size than the sample's, which the units compute with.

    Raises:
        InvalidInput: naming both.
    """
    if tuple(images.shape[1:]) != shape:
        raise InvalidInput(
            f"Cannot compute with the units: images have shape {tuple(images.shape[1:])}, and the "
            f"network's forward pass computes with the sizes of its sample, {shape}. Give images "
            "of that shape, or make units from a sample of this one."
        )


# nodes that have no result, and yet are no dead code
CHECKS = (refuse_other_decision, refuse_other_size)
