"""The paper's figures from runs, and the one it does not print. Needs matplotlib; nothing in them is random or dated."""

from pathlib import Path

from layerwise.evidence import Evidence
from layerwise.figures import bars, depth, errors
from layerwise.figures.style import rendered
from layerwise.page import Picture


def draw(evidence: Evidence, folder: Path | None = None) -> list[Picture]:
    """Every figure that the runs give, as the page shows it.

    Args:
        folder: also write ``name.svg`` and ``name.png`` there.
    """
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    drawings = [drawing for module in (bars, errors, depth) for drawing in module.drawings(evidence)]
    return [Picture(drawing.name, drawing.caption, rendered(drawing, folder)) for drawing in drawings]
