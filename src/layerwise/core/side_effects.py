"""Side effects of a forward pass: draws of random numbers, and what it writes to its modules."""

import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import _disable_current_modes

# attributes of every module that are PyTorch's own bookkeeping; `training` is looked after apart
BOOKKEEPING = frozenset(vars(nn.Module())) | {"_forward_hooks_always_called"}
PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
DEEPEST, LARGEST = 8, 1000  # containers beyond are compared by identity


class Reference:
    """A value that is equal only to itself."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Reference) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def picture(value: Any, depth: int = 0) -> Any:
    """A copy of a value that can be compared with a later picture of it.

    Numbers, strings and containers of them are compared by value, generators by their state, all
    else by identity.
    """
    if isinstance(value, PLAIN):
        return type(value), value
    state = generator_state(value)
    if state is not None:
        return state
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, set | frozenset | bytearray):
        return type(value), type(value)(value)
    if depth == DEEPEST or isinstance(value, Tensor | nn.Module | fx.Proxy | type):
        return Reference(value)
    if isinstance(value, list | tuple | deque | dict) and len(value) <= LARGEST:
        items = [*value.items()] if isinstance(value, dict) else value
        return type(value), [picture(item, depth + 1) for item in items]
    if type(value).__module__ != "builtins" and hasattr(value, "__dict__"):
        return Reference(value), picture(vars(value), depth + 1)
    slots = [name for kind in type(value).__mro__ for name in vars(kind).get("__slots__", ())]
    if slots and type(value).__module__ != "builtins":
        return Reference(value), [picture(getattr(value, s, None), depth + 1) for s in slots]
    return Reference(value)


def generator_state(value: Any) -> Any:
    """The state of a generator of random numbers, or of the one whose method this is."""
    if isinstance(value, types.MethodType | types.BuiltinMethodType):
        value = value.__self__
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return repr(value.get_state()[1:]), value.get_state()[1].tobytes()  # type: ignore[index]
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    return None


def state_setter(value: Any) -> Callable[[], object]:
    """A function that gives a generator the state that it has now; of all else, one of no effect.

    Like ``generator_state`` it takes a method for its generator.
    """
    if isinstance(value, types.MethodType | types.BuiltinMethodType):
        value = value.__self__
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    return lambda: None


def global_states() -> dict[str, Any]:
    """States of the generators that Python, NumPy and PyTorch share, by whose they are."""
    with _disable_current_modes():  # the states are real tensors also where others are fake
        states: dict[str, Any] = {
            "Python's random": random.getstate(),
            "NumPy": np.random.get_state(),
            "PyTorch": torch.get_rng_state(),
        }
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            states["CUDA"] = torch.cuda.get_rng_state_all()
        return states


def set_global_states(states: dict[str, Any]) -> None:
    random.setstate(states["Python's random"])
    np.random.set_state(states["NumPy"])
    with _disable_current_modes():
        torch.set_rng_state(states["PyTorch"])
        if "CUDA" in states:
            torch.cuda.set_rng_state_all(states["CUDA"])


def drawn_from() -> dict[str, Any]:
    """Pictures of the shared generators; one that differs later has been drawn from."""
    states = global_states()
    numpy = states["NumPy"]
    devices = (states["PyTorch"], *states.get("CUDA", ()))
    with _disable_current_modes():
        return {
            "Python's random": states["Python's random"],
            "NumPy": (numpy[1].tobytes(), numpy[2:]),
            "PyTorch": [state.numpy().tobytes() for state in devices],
        }


@contextmanager
def generators_kept() -> Iterator[None]:
    """Give the generators that Python, NumPy and PyTorch share their states back at the end."""
    states = global_states()
    try:
        yield
    finally:
        set_global_states(states)


@contextmanager
def modes_kept(*networks: nn.Module) -> Iterator[None]:
    """Give every module its own mode back at the end, since some may have been frozen singly."""
    modes = {module: module.training for network in networks for module in network.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@dataclass
class Made:
    """What a forward pass registered with modules when it first ran, by path.

    Attributes:
        learned: paths of layers and weights. buffers: paths of modules and names of their buffers.
    """

    learned: list[str] = field(default_factory=list)
    buffers: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def registered_kept(network: nn.Module) -> Iterator[Made]:
    """Give every module its parameters, buffers and submodules back; say which were made."""
    made = Made()
    modules = [
        (path, module)
        for path, module in network.named_modules()
        if not isinstance(module, torch.jit.ScriptModule)  # it has no such dictionaries
    ]
    before = [
        (path, kind, held, dict(held))
        for path, module in modules
        for kind, held in registered(module).items()
    ]
    passing = [module._non_persistent_buffers_set for _, module in modules]
    names = [set(names) for names in passing]
    try:
        yield made
    finally:
        for path, kind, held, earlier in before:
            new = [name for name in held if held[name] is not None and earlier.get(name) is None]
            if kind == "buffers":
                made.buffers += [(path, name) for name in new]
            else:
                made.learned += [f"{path}.{name}".strip(".") for name in new]
            if [*map(id, held.values())] != [*map(id, earlier.values())]:
                held.clear()
                held.update(earlier)
        for now, then in zip(passing, names, strict=True):
            now.clear()
            now.update(then)


def registered(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The dictionaries of what a module registers, by kind."""
    return {
        "parameters": module._parameters,
        "buffers": module._buffers,
        "modules": module._modules,
    }


@contextmanager
def buffers_kept(network: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Give every buffer its values back at the end, and list those that were written to.

    They are listed by the path of their module and their name.
    """
    changed: list[tuple[str, str]] = []
    before = [
        (path, module, name, buffer, buffer._version, buffer.clone())
        for path, module in network.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()
    ]
    try:
        yield changed
    finally:
        with torch.no_grad():
            for path, module, name, buffer, version, values in before:
                if module._buffers.get(name) is not buffer or buffer._version != version:
                    changed.append((path, name))
                # batch normalisation writes without counting a version
                module._buffers[name] = buffer.copy_(values)


class Attributes:
    """Attributes of a network's modules at one moment.

    Attributes:
        network: the network that they are compared with and given back to.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.values = {module: own_attributes(module) for module in network.modules()}
        self.pictures = {
            module: {name: picture(value) for name, value in values.items()}
            for module, values in self.values.items()
        }
        self.contents = [
            (value, value.copy())
            for values in self.values.values()
            for value in values.values()
            if isinstance(value, list | dict | set)
        ]
        self.generators = [
            state_setter(value) for values in self.values.values() for value in values.values()
        ]

    def changed(self) -> tuple[str, str] | None:
        """Path of a module and name of its attribute that differ by now, if one does."""
        for path, module in self.network.named_modules():
            before, now = self.pictures.get(module, {}), own_attributes(module)
            for name in before.keys() | now.keys():
                if name not in before or name not in now or before[name] != picture(now[name]):
                    return path, name
        return None

    def restore(self) -> None:
        for module, values in self.values.items():
            for name in own_attributes(module).keys() - values.keys():
                del vars(module)[name]
            vars(module).update(values)
        for container, content in self.contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)
        for set_state in self.generators:
            set_state()


@contextmanager
def attributes_kept(network: nn.Module) -> Iterator[Attributes]:
    """Give every module's attributes their values back at the end."""
    attributes = Attributes(network)
    try:
        yield attributes
    finally:
        attributes.restore()


@contextmanager
def states_kept(network: nn.Module) -> Iterator[Made]:
    """Leave generators, also those of modules, and all that modules hold as they were."""
    with (
        generators_kept(),
        registered_kept(network) as made,
        buffers_kept(network),
        attributes_kept(network),
    ):
        yield made


def own_attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside parameters, buffers, submodules and PyTorch's bookkeeping."""
    if isinstance(module, torch.jit.ScriptModule):  # its attributes are not Python's
        return {}
    return {name: value for name, value in vars(module).items() if name not in BOOKKEEPING}
