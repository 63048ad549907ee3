"""Modules that an expert would name as a network's units: the children of its lists of modules."""

from collections.abc import Iterator

from torch import nn

from layerwise.core.tracer import weighted_layers

LISTS = (nn.Sequential, nn.ModuleList)


def ends_of_lists(
    module: nn.Module, path: str = "", nested: bool = False
) -> Iterator[tuple[str, bool]]:
    """Paths of the children of a network's Sequentials and ModuleLists, in order.

    A list inside a list is looked into if it holds blocks, and so is a stage: a module with a list
    of blocks of one kind. A block is not looked into, whatever lists it is made of. A module of
    several layers that is in no list counts as if it were in one.

    Yields:
        path; and whether it is nested in such a module or stage, where a unit may end only if one
        tensor leaves it, since lists there may be of parallel branches.
    """
    in_list = isinstance(module, LISTS)
    for name, child in module.named_children():
        below = f"{path}.{name}".lstrip(".")
        is_list = isinstance(child, LISTS)
        if not in_list or (holds_blocks(child) if is_list else is_stage(child)):
            yield from ends_of_lists(child, below, nested or not is_list)
        if in_list or weighted_layers(child) > 1:
            yield below, nested


def holds_blocks(module: nn.Module) -> bool:
    """Whether a list holds modules that are made of others."""
    return any(True for child in module.children() for _ in child.children())


def is_stage(module: nn.Module) -> bool:
    """Whether a module has a list of several blocks of one kind."""
    for child in module.children():
        blocks = list(child.children()) if isinstance(child, LISTS) else []
        alike = len(blocks) > 1 and len({type(block) for block in blocks}) == 1
        if alike and not isinstance(blocks[0], LISTS) and any(True for _ in blocks[0].children()):
            return True
    return False


def ends_of_children(module: nn.Module, path: str = "") -> Iterator[tuple[str, bool]]:
    """Paths of the children of a network without lists, or of the only module that it holds."""
    children = list(module.named_children())
    if len(children) == 1:
        name, child = children[0]
        yield from ends_of_children(child, f"{path}.{name}".lstrip("."))
    for name, _ in children if len(children) > 1 else ():
        yield f"{path}.{name}".lstrip("."), False
