"""Settings: attributes that forward read while it was traced, and on which the units rely.

A graph keeps their values of that moment. Units therefore look, each time they compute, whether
they are as they were, and refuse to go on with values that the network no longer has.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from layerwise.core.side_effects import BOOKKEEPING, PLAIN, picture
from layerwise.errors import CannotSplit

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    return any(vars(module).get(name) for name in HOOKS)


@dataclass
class Settings:
    """Modules that tracing looked through, and what their forward passes read.

    Attributes:
        modules: looked through, by path.
        parts: what each of them held: submodules, parameters and buffers, see ``parts_of``.
        values: pictures of attributes, by the path of their module and their name.
        readers: path of the module whose forward pass read an attribute.
        owners: modules whose attributes were read, by path.
    """

    modules: dict[str, nn.Module] = field(default_factory=dict)
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    values: dict[tuple[str, str], Any] = field(default_factory=dict)
    readers: dict[tuple[str, str], str] = field(default_factory=dict)
    owners: dict[str, nn.Module] = field(default_factory=dict)

    def read(self, path: str, module: nn.Module, name: str, value: Any, reader: str) -> None:
        if name in BOOKKEEPING or isinstance(value, nn.Module):
            return
        if name in vars(module) or isinstance(value, PLAIN):
            self.owners[path] = module
            self.values[path, name] = picture(value)
            self.readers[path, name] = reader

    def look_through(self, path: str, module: nn.Module) -> None:
        self.modules[path], self.parts[path] = module, parts_of(module)

    def include(self, other: "Settings") -> None:
        """Add what another trace of the same network read."""
        self.modules |= other.modules
        self.parts |= other.parts
        self.values |= other.values
        self.readers |= other.readers
        self.owners |= other.owners

    def of(self, paths: Iterable[str]) -> "Settings":
        """The part that concerns the forward passes of some modules."""
        paths = set(paths)
        readers = {key: reader for key, reader in self.readers.items() if reader in paths}
        modules = {path: module for path, module in self.modules.items() if path in paths}
        return Settings(
            modules,
            {path: self.parts[path] for path in modules},
            {key: self.values[key] for key in readers},
            readers,
            {path: self.owners[path] for path, _ in readers},
        )

    def __bool__(self) -> bool:
        return bool(self.modules or self.values)

    def refuse_changes(self) -> None:
        """Refuse attributes and parts that are not as they were, and hooks that would not run.

        Raises:
            CannotSplit: naming the module.
        """
        for key, value in self.values.items():
            path, name = key
            if picture(getattr(self.owners[path], name, None)) != value:
                raise CannotSplit(
                    f"Cannot go on with the units: attribute {name!r} of {words(path)} has changed "
                    "since they were made, and they would compute with its old value. "
                    f"{keep_whole(self.readers[key])} to change it between steps, or make the "
                    "units after the change."
                )
        for path, module in self.modules.items():
            if has_hooks(module):
                raise CannotSplit(hook_message("go on with the units", path))
            parts = parts_of(module)
            if any(map(differ, map(parts.get, self.parts[path]), self.parts[path].values())):
                raise CannotSplit(
                    f"Cannot go on with the units: a part of {words(path)}, such as a layer, a "
                    "parameter or its forward, has been replaced or added since they were made, "
                    "and they would compute without it. Change its values in place, such as by "
                    "load_state_dict or copy_, or make the units after the replacement."
                )


def parts_of(module: nn.Module) -> dict[str, Any]:
    """Submodules, parameters and buffers that a module holds, by name, and how many its lists hold.

    Also its class, and the forward that it has of its own.
    What is added to a module is not called by itself, but what is added to a list of modules is.
    """
    parts: dict[str, Any] = {"class": type(module), "forward": vars(module).get("forward")}
    for table in (module._modules, module._parameters, module._buffers):
        parts.update(table)
    if isinstance(module, LISTS):
        parts["len"] = len(module)
    for name, child in module._modules.items():
        if isinstance(child, LISTS) and not isinstance(child, nn.Sequential):  # called by itself
            parts |= {f"{name}.{part}": value for part, value in parts_of(child).items()}
    return parts


def differ(one: Any, other: Any) -> bool:
    """Whether two parts are not the same object; numbers are compared by value."""
    return one is not other and not (isinstance(one, int) and one == other)


def refuse_changes(pieces: Iterable[nn.Module]) -> None:
    """Refuse to go on once the settings of some units have changed.

    Raises:
        CannotSplit: see ``Settings.refuse_changes``.
    """
    for piece in pieces:
        for child in piece.children():
            if isinstance(child, Check):
                child()


class Check(nn.Module):
    """Refuses to compute once the settings of a unit have changed.

    It holds modules of the network without being their parent.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings

    def forward(self) -> None:
        self.settings.refuse_changes()


def hook_message(action: str, path: str) -> str:
    remedy = (
        f"{keep_whole(path)}, where its hooks run, or register them on its layers"
        if path
        else "Register them on the modules that it holds"
    )
    return (
        f"Cannot {action}: hooks are registered on {words(path)}, whose parts units call by "
        f"themselves, so the hooks would not run. {remedy}, or remove them while units compute."
    )


def words(path: str) -> str:
    return f"module {path!r}" if path else "the network itself"


def keep_whole(path: str) -> str:
    """The remedy for what a graph cannot show of a module's forward pass."""
    if path:
        return f"Keep the module whole inside one unit with leaves=[{path!r}]"
    return "Move these lines into a module of their own and name its path in leaves=[…]"


@contextmanager
def reads_observed(observe: Any) -> Iterator[None]:
    """Call ``observe(module, name, value)`` for every attribute that a module's code reads.

    What it returns is read in place of the value. Parameters, buffers and submodules are left out:
    fx observes them itself.
    """

    def read(module: nn.Module, name: str) -> Any:
        value = object.__getattribute__(module, name)
        return value if name.startswith("__") else observe(module, name, value)

    nn.Module.__getattribute__ = read  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        del nn.Module.__getattribute__
