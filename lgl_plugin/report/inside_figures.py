"""Draws figures about the inside of an encoder: attributions, loss surfaces."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from lgl_plugin.inference.attribution import Map
from lgl_plugin.report.figures import COLOURS, GREY, panels, style

TICKS = (125, 250, 500, 1000, 2000, 4000, 8000, 16000)  # Hz


def profile(
    x: np.ndarray,
    lines: dict[str, tuple[np.ndarray, np.ndarray | float]],
    xlabel: str,
    ylabel: str,
    hz: bool = False,
) -> Figure:
    """Draws lines (mean, standard error); `hz` means an axis of frequency.

    The band around a line is one standard error wide on each side.
    """
    figure, (axes,) = panels(4.8, 3.2)
    for index, (name, (mean, error)) in enumerate(lines.items()):
        look = style(index)
        axes.fill_between(
            x, mean - error, mean + error, color=look["color"], alpha=0.2, lw=0
        )
        axes.plot(x, mean, label=name, ms=3, **look)
    axes.axhline(0, color=GREY, lw=0.8)
    if hz:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(TICKS))
        axes.xaxis.set_major_formatter("{x:,.0f}")  # mathematical text is off
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(max(x[0], 40), x[-1])
    axes.set(xlabel=xlabel, ylabel=ylabel)
    # Outside: inside the axes the legend would cover the lines.
    figure.legend(loc="outside upper center", fontsize=8)
    return figure


def bars(groups: dict[str, Sequence[float]], ylabel: str) -> Figure:
    """Draws a bar for each layer, those of each group side by side."""
    figure, (axes,) = panels(4.8, 3.2)
    width = 0.8 / len(groups)
    for index, (name, values) in enumerate(groups.items()):
        x = np.arange(1, len(values) + 1) + width * index
        axes.bar(x, values, width, label=name, color=COLOURS[index])
    axes.axhline(0, color=GREY, lw=0.8)
    ticks = np.arange(1, len(values) + 1)
    axes.set_xticks(ticks + width * (len(groups) - 1) / 2, ticks)
    axes.set(xlabel="layer", ylabel=ylabel)
    axes.legend(fontsize=8)
    return figure


def heatmap(part: Map) -> Figure:
    """Draws a recording's log spectrogram, and below it its score's map."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, sharey=True)
    seconds = len(part.values) * part.hop
    place = dict(
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(0, seconds, -0.5, len(part.hz) - 0.5),
    )
    low, high = np.percentile(part.levels, [5, 99.5])
    look = dict(vmin=low, vmax=high, cmap="Greys")
    drawn = above.imshow(part.levels.T, **place, **look)
    figure.colorbar(drawn, ax=above, label="level")
    # The scale ends at a percentile: with a few outliers all other frames would
    # look white.
    limit = np.percentile(np.abs(part.values), 99.5) or 1.0
    look = dict(vmin=-limit, vmax=limit, cmap="PuOr_r")
    drawn = below.imshow(part.values.T, **place, **look)
    figure.colorbar(drawn, ax=below, label="added to the score")
    ticks = [hz for hz in TICKS if part.hz[0] <= hz <= part.hz[-1]]
    bands = np.interp(ticks, part.hz, np.arange(len(part.hz)))
    for axes in (above, below):
        axes.set_yticks(bands, [f"{hz:,}" for hz in ticks])
        axes.set_ylabel("Hz")
    below.set_xlabel("seconds")
    return figure


def contours(
    surfaces: dict[str, np.ndarray], radius: float, label: str
) -> Figure:
    """Draws loss surfaces (points, points), all on one scale of colours."""
    columns = min(3, len(surfaces))
    rows = -(-len(surfaces) // columns)
    size = (1.2 + 2.6 * columns, 0.5 + 2.6 * rows)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    values = np.log10(np.maximum(list(surfaces.values()), 1e-6))
    levels = np.linspace(values.min(), values.max() + 1e-6, 15)
    for panel, (name, surface) in zip(grid, zip(surfaces, values)):
        axis = np.linspace(-radius, radius, len(surface))
        look = dict(levels=levels, cmap="cividis")
        drawn = panel.contourf(axis, axis, surface.T, **look)
        look = dict(colors="k", linewidths=0.3, linestyles="solid")
        panel.contour(axis, axis, surface.T, levels, **look)
        panel.plot(0, 0, "+", color="white", ms=10, mew=2)
        panel.set_title(name, fontsize=9)
        panel.set_aspect("equal")
    for panel in grid[len(surfaces) :]:
        panel.remove()
    bar = figure.colorbar(drawn, ax=list(grid[: len(surfaces)]))
    ticks = np.linspace(levels[0], levels[-1], 6)
    bar.set_ticks(ticks, labels=[f"{10**tick:.2g}" for tick in ticks])
    bar.set_label(label)
    return figure
