"""A chain of units as a table: what each holds, its auxiliary head, its loss, its parameters."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from layerwise.core.frozen import Entered
from layerwise.core.layers import holds_weights
from layerwise.core.reach import span_text
from layerwise.core.unit import Unit
from layerwise.losses import Output
from layerwise.losses.terms import WithTerms

HEADINGS = ("unit", "name", "layers", "feature", "local loss", "head", "parameters", "in head")
KINDS = 3  # of layers that a cell names


def describe_units(units: Sequence[Unit]) -> list[dict[str, Any]]:
    """One row per unit.

    Returns:
        ``index``, ``name``, ``layers`` (classes of its weighted layers, in the order they are
        called), ``feature`` (its shape without the batch, and where its channels are if not
        first), ``loss``, ``head`` (weighted layers of its auxiliary head), ``parameters`` and
        ``head_parameters``. A layer that derives from one of PyTorch's has that one's name.
    """
    return [
        {
            "index": unit.index,
            "name": unit.name,
            "layers": [name_of_layer(module) for module in called(unit.piece)],
            "feature": str(unit.feature),
            "loss": name_of_loss(unit.loss),
            "head": [name_of_layer(module) for module in leaves(unit.loss)],
            "parameters": count(unit.piece),
            "head_parameters": count(unit.loss),
        }
        for unit in units
    ]


def table_of_units(units: Sequence[Unit], span: int | Sequence[int] = 1) -> str:
    """The rows of ``describe_units`` as text, with sums, and the span of losses unless it is 1."""
    rows = [HEADINGS, *(cells(row) for row in describe_units(units))]
    total = sum(count(unit.piece) for unit in units), sum(count(unit.loss) for unit in units)
    rows.append(("", "all", "", "", "", "", *(f"{number:,}" for number in total)))
    lines = [aligned(rows, right=(0, 6, 7))]
    if not isinstance(span, int):
        lines.append(
            f"span {span_text(span)}: units that the loss of each reaches, its own counted"
        )
    elif span > 1:
        lines.append(f"span {span}: a loss reaches its own unit and {span - 1} before it")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Rows of cells as text, in columns, some of which end at their right edge."""
    columns = range(len(rows[0]))
    widths = [max(len(row[column]) for row in rows) for column in columns]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        str(row["index"]),
        row["name"],
        shortened(row["layers"]),
        row["feature"],
        row["loss"],
        shortened(row["head"]) or "none",
        f"{row['parameters']:,}",
        f"{row['head_parameters']:,}",
    )


def shortened(names: Sequence[str]) -> str:
    """Kinds of layers in the order they appear, with counts; the first ``KINDS`` of more."""
    counts = Counter(names)
    words = [f"{number} × {name}" if number > 1 else name for name, number in counts.items()]
    return ", ".join(words[:KINDS]) + (", …" if len(words) > KINDS else "")


def called(piece: nn.Module) -> list[nn.Module]:
    """The weighted layers that a piece calls, in order; of the first, only those that learn."""
    if isinstance(piece, Entered):
        piece = piece.piece
    if not isinstance(piece, fx.GraphModule):
        return leaves(piece)
    targets = [str(node.target) for node in piece.graph.nodes if node.op == "call_module"]
    modules = [piece.get_submodule(target) for target in dict.fromkeys(targets)]
    return [module for module in modules if holds_weights(module)]


def leaves(module: nn.Module) -> list[nn.Module]:
    """The weighted layers of a module that have no parts, in the order they were made."""
    return [part for part in module.modules() if not list(part.children()) and holds_weights(part)]


def name_of_layer(module: nn.Module) -> str:
    """The name of the PyTorch layer that a module derives from, else that of its own class."""
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.")]
    return next((kind.__name__ for kind in kinds if kind is not nn.Module), type(module).__name__)


def name_of_loss(loss: nn.Module) -> str:
    if isinstance(loss, WithTerms):
        terms = [f"{getattr(loss, name):g} {name}" for name in loss.applied()]
        return " + ".join([name_of_loss(loss.loss), *terms])
    return "cross-entropy" if isinstance(loss, Output) else type(loss).__name__


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
