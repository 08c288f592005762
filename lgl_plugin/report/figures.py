"""Draws the figures of a report: functions from data to matplotlib Figures.

The colours are those of Okabe and Ito (2008), which people of all colour
visions can tell apart, without the yellow, which is too pale for a line. Each
colour has its own marker and line style.
"""

import io
import logging
import os
import pathlib
from collections.abc import Iterable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from scipy.special import ndtri

from lgl_plugin.clustering.number import Estimate
from lgl_plugin.metrics.error_rates import eer, operating_points
from lgl_plugin.runs.metrics_log import LOG_MEL_STATISTICS, TRUE_LABELS
from lgl_plugin.utils.files import atomic_write

# SpeechBrain's log.txt takes DEBUG messages of all loggers. Matplotlib's would
# fill it with a line for each font of the machine.
logging.getLogger("matplotlib").setLevel(logging.WARNING)
COLOURS = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#56B4E9",  # sky blue
    "#E69F00",  # orange
    "#000000",
)
MARKERS = "os^DvPX"
LINES = ("-", "--", "-.", ":")
GREY = "#8C8C8C"
# Rows of the table that are no phase of the pipeline.
REFERENCES = (LOG_MEL_STATISTICS, TRUE_LABELS)
PHASES = ("Stage I", "ssps", "classifier", "gated", "large_margin")
BINS = 60  # of the loss histogram


def style(index: int) -> dict[str, str]:
    """Returns the colour, marker and line style of a figure's index-th line."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        # When colours repeat, the marker differs.
        "marker": MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def save(
    figure: Figure, folder: str | os.PathLike, name: str
) -> tuple[bytes, bytes]:
    """Writes a figure as PNG and SVG, and returns the bytes of these files.

    The same figure gives the same bytes.
    """
    contents = []
    # Texts have names of runs and files, in which "$x_{" is no formula.
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    # A salt, because SVG ids would be random; outlines, so that text looks the
    # same on machines with other fonts.
    settings = {"svg.hashsalt": name, "svg.fonttype": "path"}
    for kind in ("png", "svg"):
        whole = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else None
        with matplotlib.rc_context(settings):
            figure.savefig(whole, format=kind, dpi=150, metadata=metadata)
        contents.append(whole.getvalue())
        with atomic_write(pathlib.Path(folder) / f"{name}.{kind}", "wb") as out:
            out.write(contents[-1])
    return tuple(contents)


def count_figure(estimate: Estimate) -> Figure:
    """Draws the explained sum of squares over the number of clusters."""
    figure, (axes,) = panels(4.8, 3.2)
    n_clusters = np.arange(1, len(estimate.gap) + 1)
    lines = {
        "embeddings": estimate.explained,
        "normal cloud": estimate.by_chance,
        "difference": estimate.gap,
    }
    for colour, (label, line) in zip(COLOURS, lines.items()):
        axes.plot(n_clusters, line, color=colour, label=label)
    label = f"{estimate.n_clusters} clusters"
    axes.axvline(estimate.n_clusters, color="grey", ls="--", label=label)
    axes.set(xscale="log", xlabel="number of clusters")
    axes.set_ylabel("share of the sum of squares")
    # Not as powers: mathematical text is switched off.
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_formatter("")
    axes.legend()
    return figure


def error_rate_by_phase(kinds: dict[str, list[dict]]) -> Figure:
    """Draws EER and NMI over the phases, a line for each kind of runs.

    A kind's runs are a list of their rows from `metrics_log.summarise`; the
    line with markers is their mean. Rows that are no phase of the pipeline,
    such as the baseline, are horizontal dotted lines. Without EER and NMI the
    pseudo-EER is drawn.
    """
    runs = [rows for kind in kinds.values() for rows in kind]
    names = dict.fromkeys(name for rows in runs for name in rows)
    names = [name for name in names if name not in REFERENCES]
    present = {key for rows in runs for row in rows.values() for key in row}
    lines = {"eer": "EER (%)", "nmi": "NMI of the pseudo-labels"}
    lines = {key: label for key, label in lines.items() if key in present}
    lines = lines or {"pseudo_eer": "EER of held-out pseudo-trials (%)"}
    figure, axes = panels(4.8, 0.8 + 2.4 * len(lines), len(lines))
    for panel, (key, label) in zip(axes, lines.items()):
        panel.set_ylabel(label)
        for index, (kind, members) in enumerate(kinds.items()):
            line_style = {**style(index), "label": kind}
            _mean_line(panel, members, names, key, line_style)
    if len(kinds) == 1 and {"nmi", "nmi_selected"} <= present:
        # The last line is the mean: the runs' own thin lines come first.
        axes[-1].lines[-1].set_label("of all utterances")
        line_style |= {"markerfacecolor": "white", "linestyle": ":"}
        line_style["label"] = "of those that the gate selects"
        _mean_line(axes[-1], members, names, "nmi_selected", line_style)
    for name in REFERENCES:
        values = [rows.get(name, {}).get("eer") for rows in runs]
        values = [value for value in values if value is not None]
        if values:
            mark = dict(color=GREY, ls=":", label=name)
            axes[0].axhline(np.mean(values), **mark)
    shown = [name.replace("iteration ", "it. ") for name in names]
    axes[-1].set_xticks(range(len(names)), shown, rotation=40, ha="right")
    axes[-1].set_xlim(-0.3, max(len(names) - 0.7, 0.3))
    for panel in axes:
        panel.legend(fontsize=8)
    return figure


def _mean_line(axes, members, names, key, line_style):
    """Draws several runs' figures as thin lines, their mean with markers."""
    cells = [rows.get(name, {}).get(key) for rows in members for name in names]
    points = np.array(cells, float)  # None becomes nan
    points = points.reshape(len(members), len(names))
    x = np.flatnonzero(~np.isnan(points).all(axis=0))
    if not len(x):
        return  # a kind without the figure is not in the legend
    points = points[:, x]
    if len(members) > 1:
        axes.plot(x, points.T, color=line_style["color"], alpha=0.4, lw=0.8)
    axes.plot(x, np.nanmean(points, axis=0), **line_style)


def epochs(
    records: Iterable[dict],
    keys: dict[str, str],
    label: str,
    factor: float = 1.0,
    bottom: float | None = None,
    top: float | None = None,
) -> Figure:
    """Draws figures of the training over the epochs of all phases.

    `keys` maps the records' keys to names for the legend. With a single key
    each phase has a colour, with several keys each key. `factor` converts the
    values to the unit of `label`.
    """
    figure, (axes,) = panels(4.8, 3.2)
    trained = [r for r in records if r.get("epoch") is not None]
    lines, starts = {}, {}
    for x, record in enumerate(trained, 1):
        phase = record["phase"]
        if record.get("iteration"):
            starts.setdefault(record["iteration"], x - 0.5)
        for index, (key, name) in enumerate(keys.items()):
            if record.get(key) is None:
                continue
            if len(keys) == 1:
                # Stage I's phase has the name of its method.
                index = PHASES.index(phase) if phase in PHASES else 0
                name = phase.replace("_", " ")
            # A line is broken between phases: their losses differ in level.
            line = lines.setdefault((index, name), {})
            part = line.setdefault((record.get("iteration"), phase), [])
            part.append((x, factor * record[key]))
    for (index, name), parts in lines.items():
        for part in parts.values():
            line_style = {**style(index), "ms": 4, "label": name}
            if len(part) > 20:
                line_style["marker"] = None
            axes.plot(*zip(*part), **line_style)
            name = None  # the legend lists a line once, not for each part
    for iteration, start in starts.items():
        axes.axvline(start, color=GREY, lw=0.8)
        # Just above the axes, independent of the values.
        place = axes.get_xaxis_transform()
        axes.text(start, 1.01, f"it. {iteration}", transform=place, fontsize=8)
    axes.set(xlabel="epoch of the run", ylabel=label)
    axes.set_xlim(0.5, max(len(trained), 1) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if bottom is not None:
        # The margin at the top is a share of the range, which must start at
        # `bottom`.
        axes.update_datalim([(1, bottom)])
        axes.autoscale_view()
    axes.set_ylim(bottom, top)
    # Outside: inside the axes the legend could hide points.
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure


def courses(eers: dict[str, Sequence[float]], minutes: float) -> Figure:
    """Draws the EER of methods over `minutes` of training.

    A method's values are at equal intervals, the last at the end. The legend
    has the best method first.
    """
    figure, (axes,) = panels(5.6, 4.0)
    for index, name in enumerate(sorted(eers, key=lambda name: eers[name][-1])):
        values = eers[name]
        times = minutes * np.arange(1, len(values) + 1) / len(values)
        axes.plot(times, values, **style(index), ms=4, label=name)
    axes.set(xlabel="minutes of one core", ylabel="EER (%)")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def losses(groups: dict[str, Sequence[float]], tau: float) -> Figure:
    """Draws histograms of an epoch's losses by group, and the threshold.

    Losses and a threshold that are not finite are left out.
    """
    figure, (axes,) = panels(4.8, 3.2)
    groups = {name: np.asarray(group) for name, group in groups.items()}
    groups = {name: g[np.isfinite(g)] for name, g in groups.items()}
    highest = max((g.max() for g in groups.values() if len(g)), default=1.0)
    edges = np.linspace(0, max(highest, 1e-6), BINS + 1)
    for index, (name, group) in enumerate(groups.items()):
        counts, _ = np.histogram(group, edges)
        fill = matplotlib.colors.to_rgba(COLOURS[index], 0.35)
        look = dict(ec=COLOURS[index], ls=LINES[index], lw=1.5)
        label = f"{name} ({len(group):,})"
        axes.stairs(counts, edges, fill=True, fc=fill, label=label, **look)
    if np.isfinite(tau):
        axes.axvline(tau, color="black", lw=2, label=f"τ = {tau:.2f}")
    axes.set(xlabel="loss", ylabel="utterances", xlim=(0, edges[-1]))
    axes.legend(fontsize=8)
    return figure


def det(systems: dict[str, tuple[Sequence, Sequence]]) -> Figure:
    """Draws detection error trade-off curves from (scores, labels) by name.

    Both error rates have probit axes, where normally distributed scores give a
    straight line (Martin et al., 1997); a marker shows each system's EER.
    Raises ValueError for scores that `error_rates.eer` refuses.
    """
    figure, (axes,) = panels(4.8, 4.7)
    percent = np.array([0.1, 1, 2, 5, 10, 20, 40, 60])
    ticks = ndtri(percent / 100)
    for index, (name, (scores, labels)) in enumerate(systems.items()):
        _, p_miss, p_fa = operating_points(scores, labels)
        rate, _ = eer(scores, labels)
        # ndtri is infinite at 0 and 1: the rates are clipped outside the axes.
        rates = np.clip([p_fa, p_miss], 1e-9, 1 - 1e-9)
        curve, centre = ndtri(rates), ndtri(np.clip(rate, 1e-9, 1 - 1e-9))
        # Half a million trials would make an SVG of megabytes. Only points that
        # differ on a grid of 1/200, which the eye cannot resolve, are kept.
        steps = np.diff(np.round(200 * curve), prepend=np.inf)
        curve = curve[:, steps.any(axis=0)]
        line_style = style(index)
        marker = line_style.pop("marker")
        axes.plot(*curve, **line_style)
        axes.plot(centre, centre, marker, color=line_style["color"])
        axes.plot([], [], marker=marker, label=name, **line_style)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{value:g}" for value in percent])
    ends = (ticks[0], ticks[-1])
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    axes.set(xlabel="false alarms (%)", ylabel="misses (%)")
    axes.legend(fontsize=8)
    return figure


def cluster_sizes(sizes: dict[str, Sequence[int]]) -> Figure:
    """Draws clusterings' cluster sizes, from the largest to the smallest."""
    figure, (axes,) = panels(4.8, 3.2)
    for index, (name, counts) in enumerate(sizes.items()):
        counts = np.sort(counts)[::-1]
        # 400 points look the same as thousands of clusters.
        shown = np.unique(np.linspace(0, len(counts) - 1, 400).astype(int))
        marks = dict(markevery=max(len(shown) // 8, 1), ms=4, **style(index))
        axes.plot(1 + shown, counts[shown], label=name, **marks)
    axes.set(xlabel="cluster, by size", ylabel="utterances")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def embedding_map(
    points: np.ndarray, groups: np.ndarray, names: list[str]
) -> Figure:
    """Draws points (n, 2), some groups in colour, the others grey.

    `groups` holds each point's index into `names`, -1 for none of them; colours
    and markers tell up to seven groups apart.
    """
    figure, (axes,) = panels(4.8, 5.2)
    for index, name in enumerate(["others", *names], -1):
        line_style = dict(s=22, color=COLOURS[index], marker=MARKERS[index])
        if index < 0:
            line_style = dict(s=14, color="#B0B0B0", marker=".")
        x, y = points[groups == index].T
        # Rasterized, or each point would be an element of the SVG.
        axes.scatter(x, y, lw=0, label=name, rasterized=True, **line_style)
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", "datalim")
    axes.spines[:].set_visible(True)
    below = dict(loc="outside lower center", ncols=2, fontsize=8)
    figure.legend(markerscale=1.3, **below)
    return figure


def panels(
    width: float, height: float, number: int = 1
) -> tuple[Figure, np.ndarray]:
    """Makes a figure of a size in inches; returns it and its panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(number, 1, sharex=True, squeeze=False)[:, 0]
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
