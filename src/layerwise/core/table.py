"""A chain of units as a table: what each holds, its auxiliary head, its loss, its parameters."""

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from layerwise.core.unit import Unit
from layerwise.losses import Output

HEADINGS = ("unit", "name", "layers", "local loss", "head", "parameters", "head parameters")


def describe_units(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One row per unit.

    Returns:
        ``index``, ``name``, ``layers`` (classes of its modules, in the order they are called),
        ``loss``, ``head`` (modules of its auxiliary head), ``parameters`` and ``head_parameters``.
    """
    return [
        {
            "index": unit.index,
            "name": unit.name,
            "layers": [type(module).__name__ for module in called(unit.piece)],
            "loss": name_of_loss(unit.loss),
            "head": [type(module).__name__ for module in leaves(unit.loss)],
            "parameters": count(unit.piece),
            "head_parameters": count(unit.loss),
        }
        for unit in units
    ]


def table_of_units(units: Sequence[Unit]) -> str:
    """The rows of ``describe_units`` as text, with sums."""
    rows = [HEADINGS, *(cells(row) for row in describe_units(units))]
    total = sum(count(unit.piece) for unit in units), sum(count(unit.loss) for unit in units)
    rows.append(("", "all", "", "", "", *(f"{number:,}" for number in total)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    right = (0, 5, 6)
    lines = [
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["index"]),
        row["name"],
        shortened(row["layers"]),
        row["loss"],
        shortened(row["head"]) or "the network's own output",
        f"{row['parameters']:,}",
        f"{row['head_parameters']:,}",
    )


def shortened(names: Sequence[str], most: int = 4) -> str:
    """Names in order, neighbours of one kind counted; of many the first few."""
    runs: list[list[Any]] = []
    for name in names:
        if runs and runs[-1][0] == name:
            runs[-1][1] += 1
        else:
            runs.append([name, 1])
    words = [f"{number} × {name}" if number > 1 else name for name, number in runs]
    return ", ".join(words[:most]) + (", …" if len(words) > most else "")


def called(piece: nn.Module) -> list[nn.Module]:
    """The modules with parameters, or of no parts, that a piece calls, in order."""
    if not isinstance(piece, fx.GraphModule):
        return leaves(piece)
    targets = [str(node.target) for node in piece.graph.nodes if node.op == "call_module"]
    modules = [piece.get_submodule(target) for target in targets]
    return [module for module in modules if any(True for _ in module.parameters())]


def leaves(module: nn.Module) -> list[nn.Module]:
    """Modules without parts that hold parameters."""
    return [
        part
        for part in module.modules()
        if not list(part.children()) and any(True for _ in part.parameters())
    ]


def name_of_loss(loss: nn.Module) -> str:
    return "cross-entropy" if isinstance(loss, Output) else type(loss).__name__


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
