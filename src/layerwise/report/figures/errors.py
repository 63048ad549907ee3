"""Figures 4 and 5: test error over epochs of published networks and accelerated forms."""

from textwrap import wrap

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from layerwise.report.figure_data import Errors
from layerwise.report.figures.style import faint_grid, line
from layerwise.utils.words import counted


def draw(errors: Errors) -> Figure:
    figure = Figure(figsize=(5.2, 3.4))
    figure.subplots_adjust(left=0.11, right=0.985, top=0.9, bottom=0.13)
    axes = figure.subplots()
    for look, name, curve in errors.lines:
        line(axes, curve, look, f"{name}, {counted(curve.seeds, 'seed')}")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.set_ylabel("test error, %")
    axes.set_title("\n".join(wrap(errors.title, 72)))
    axes.margins(x=0.02)
    axes.legend()
    faint_grid(axes)
    return figure
