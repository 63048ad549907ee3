"""A picture of the memory alive over one training step, a panel for each rule. Needs matplotlib."""

from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.memory.accounting import BACKWARD, FORWARD, FROZEN, UPDATE
from layerwise.utils.files import (
    FIGURE_MARK,
    figure_metadata,
    refuse_foreign,
    refuse_unwritable,
    replacing,
)

KINDS = (".svg", ".png")
# grey levels and hatches, so that phases differ without colour
LOOKS: dict[str, dict[str, Any]] = {
    FROZEN: {"facecolor": "white", "hatch": "...."},
    FORWARD: {"facecolor": "0.85"},
    BACKWARD: {"facecolor": "0.6", "hatch": "////"},
    UPDATE: {"facecolor": "black"},
}
WORDS = {
    FROZEN: "forward, frozen units",
    FORWARD: "forward",
    BACKWARD: "backward",
    UPDATE: "update",
}
LABELLED = 40  # units in a panel that are numbered


def check_figure(path: str, command: str) -> None:
    """Refuse a figure that could not be drawn in the end.

    Args:
        command: whose figure it is, such as ``profile``.

    Raises:
        InvalidInput: its type or folder does not exist, matplotlib is missing, or the path is a
            file that the command did not write.
    """
    if Path(path).suffix not in KINDS:
        raise InvalidInput(
            f"Cannot write --figure {path}: it is of no known type. Give a name that ends in "
            f"{' or '.join(KINDS)}."
        )
    refuse_unwritable("--figure", Path(path))
    refuse_foreign("--figure", Path(path), FIGURE_MARK, command)
    if find_spec("matplotlib") is None:
        raise InvalidInput(
            "Cannot draw --figure: matplotlib is not installed. Install it with pip install "
            "'layerwise[plots]', or leave --figure out."
        )


def draw(path: str, title: str, rules: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Draw the timelines of each rule's steps, one after the other.

    Args:
        rules: by name, what ``profiling.measure.measure`` gives as ``steps``.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(9, 1 + 1.9 * len(rules)), layout="constrained")
    panels = figure.subplots(len(rules), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    shown: set[str] = set()
    for panel, (name, steps) in zip(panels, rules.items(), strict=True):
        begin, highest = 0.0, (0.0, 0.0)
        for step in steps:
            start = step["points"][0][0]
            points = [(begin + (at - start) / 1e6, size / 1e6) for at, size in step["points"]]
            marks = [(begin + (at - start) / 1e6, unit, phase) for at, unit, phase in step["marks"]]
            end = points[-1][0]
            panel.step(*zip(*points, strict=True), where="post", color="black", linewidth=0.8)
            for left, right, phase in stretches(marks, end):
                shown.add(phase)
                inside = [
                    (left, level(points, left)),
                    *[p for p in points if left <= p[0] < right],
                    (right, level(points, right)),
                ]
                panel.fill_between(
                    *zip(*inside, strict=True),
                    step="post",
                    linewidth=0,
                    edgecolor="black",
                    **LOOKS[phase],
                )
            borders = [(at, unit) for at, unit, phase in marks if phase == FORWARD]
            for at, unit in borders:
                panel.axvline(at, color="black", linewidth=0.5, linestyle=":")
                if (
                    sum(len(s["units"]) for s in steps) <= LABELLED
                    and len(step["units"]) + len(steps) > 2
                ):
                    panel.annotate(
                        str(unit), (at, 1), xycoords=("data", "axes fraction"), fontsize=5, va="top"
                    )
            begin, highest = end, max(highest, max((size, at) for at, size in points))
        panel.plot(highest[1], highest[0], marker="v", color="black", markersize=5)
        panel.set_title(f"{name}: {highest[0]:,.1f} MB, {begin:,.0f} ms", loc="left", fontsize=9)
        panel.set_ylabel("alive, MB")
        panel.margins(x=0)
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("time, ms (the profiler included)")
    patches = [
        Patch(edgecolor="black", label=WORDS[phase], **LOOKS[phase])
        for phase in LOOKS
        if phase in shown
    ]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(patches), fontsize=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    kind = Path(path).suffix[1:]
    with replacing(Path(path)) as draft:
        figure.savefig(draft, format=kind, dpi=160, metadata=figure_metadata(kind))


def stretches(
    marks: Sequence[tuple[float, int, str]], end: float
) -> Iterator[tuple[float, float, str]]:
    """Begin, end and phase of every stretch between two marks."""
    for (left, _, phase), (right, _, _) in pairwise([*marks, (end, -1, "")]):
        yield left, right, phase


def level(points: Sequence[tuple[float, float]], time: float) -> float:
    """Memory alive at a time."""
    return next((size for at, size in reversed(points) if at <= time), points[0][1])
