"""The figures of a report: data in, a matplotlib Figure out.

Colours are those of Okabe and Ito (2008), which people of all colour visions
can tell apart, less the yellow, which is too pale for a line; each comes with
a marker and a line style of its own.
"""

import io
import pathlib

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.special import ndtri

from lgl_plugin.clustering.elbow import SCALES
from lgl_plugin.metrics.error_rates import eer, operating_points
from lgl_plugin.utils.files import atomic_write


def elbow_figure(estimate):
    """Draws the curve, its chord and the elbow.

    Arguments
    ---------
    estimate : Estimate
        What to draw.

    Returns
    -------
    matplotlib.figure.Figure

    Example
    -------
    >>> estimate = Estimate(2, np.array([1, 2, 3]), np.array([9, 2, 1]), "root")
    >>> elbow_figure(estimate).axes[0].get_xlabel()
    'number of clusters'
    """
    from matplotlib.figure import Figure  # slow to import, rarely needed

    grid, inertia = estimate.grid, estimate.inertia
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.add_subplot()
    forward = SCALES[estimate.scale]
    inverse = {"root": np.square, "linear": np.asarray, "log": np.exp}
    # The axis reaches below what there is, where a root has no value.
    axes.set_xscale(
        "function",
        functions=(
            lambda k: forward(np.maximum(k, 1e-9)),
            inverse[estimate.scale],
        ),
    )
    axes.plot(grid, inertia, "o-", ms=3, color=COLOURS[0])
    axes.plot(
        grid[[0, -1]], inertia[[0, -1]], "--", color=COLOURS[1], label="chord"
    )
    axes.axvline(
        estimate.n_clusters,
        color=COLOURS[2],
        label=f"elbow: {estimate.n_clusters} clusters",
    )
    ticks = np.unique(np.linspace(0, len(grid) - 1, 5).round().astype(int))
    axes.set_xticks(grid[ticks], [str(k) for k in grid[ticks]])
    axes.set(
        xlabel="number of clusters",
        ylabel="within-cluster sum of squares",
    )
    axes.legend()
    return figure


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
ASIDE = ("log-mel statistics", "true labels")
PHASES = ("simclr", "classifier", "gated", "large_margin")
BINS = 60  # of the loss histogram


def style(index):
    """Colour, marker and line style of the index-th thing in a figure.

    Example
    -------
    >>> style(1)
    {'color': '#D55E00', 'marker': 's', 'linestyle': '--'}
    """
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": LINES[index % len(LINES)],
    }


def save(figure, folder, name):
    """Writes a figure as PNG and as SVG.

    Arguments
    ---------
    figure : matplotlib.figure.Figure
        From one of the functions below.
    folder : str or pathlib.Path
        Where to; made if it is missing.
    name : str
        Of the files, without extension.

    Returns
    -------
    (bytes, bytes)
        What the PNG and the SVG hold; the same for the same figure.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> png, svg = save(det({"all": ([0.9, 0.1], [1, 0])}), folder, "det")
    >>> png[1:4], (folder / "det.svg").read_bytes() == svg
    (b'PNG', True)
    """
    contents = []
    # Text as outlines: it looks alike wherever the file is opened.
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


def journey(kinds):
    """EER and NMI over the phases.

    What does not take part in the journey, such as the log-mel floor, is a
    dashed line across it.

    Arguments
    ---------
    kinds : dict
        From the name of a kind of runs to a list with what
        `metrics.summarise` gave for each run; their mean is the line with
        markers.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        When no run has an EER or an NMI.

    Example
    -------
    >>> figure = journey({"1": [{"untrained": {"eer": 38.0}}]})
    >>> [axes.get_ylabel() for axes in figure.axes]
    ['EER (%)']
    """
    runs = [rows for kind in kinds.values() for rows in kind]
    known = list(dict.fromkeys(name for rows in runs for name in rows))
    names = [name for name in known if name not in ASIDE]
    present = {key for rows in runs for row in rows.values() for key in row}
    lines = {"eer": "EER (%)", "nmi": "NMI of the pseudo-labels"}
    lines = {key: label for key, label in lines.items() if key in present}
    if not lines:
        raise ValueError("no run has an EER or an NMI to draw")
    figure, axes = _figure(4.8, 0.8 + 2.4 * len(lines), len(lines))
    for panel, (key, label) in zip(axes, lines.items()):
        panel.set_ylabel(label)
        for index, (kind, members) in enumerate(kinds.items()):
            look = {**style(index), "label": kind}
            _mean_line(panel, members, names, key, look)
    if len(kinds) == 1 and "nmi_selected" in present:
        axes[-1].lines[0].set_label("of all utterances")
        look |= {"markerfacecolor": "white", "linestyle": ":"}
        look["label"] = "of those that the gate selects"
        _mean_line(axes[-1], members, names, "nmi_selected", look)
    for name in ASIDE:
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


def _mean_line(axes, members, names, key, look):
    """Several runs' figures as thin lines, their mean with markers."""
    points = [[rows.get(name, {}).get(key) for name in names]
              for rows in members]  # fmt: skip
    points = np.array(points, float)  # None becomes nan
    x = np.flatnonzero(~np.isnan(points).all(axis=0))
    points = points[:, x]
    if len(members) > 1:
        axes.plot(x, points.T, color=look["color"], alpha=0.4, lw=0.8)
    axes.plot(x, np.nanmean(points, axis=0) if len(x) else x, **look)


def epochs(records, keys, label, factor=1.0, bottom=None, top=None):
    """A figure of the training, epoch after epoch through all phases.

    Arguments
    ---------
    records : list of dict
        From `metrics.read_metrics`.
    keys : dict
        Which of their figures, each with its name. A single one has the
        phases in colours of their own; several are told apart by colour.
    label : str
        Of the axis, with the unit.
    factor : float
        Brings the figures to that unit.
    bottom, top : float, optional
        Limits of the axis.

    Returns
    -------
    matplotlib.figure.Figure

    Example
    -------
    >>> record = {"stage": 1, "phase": "simclr", "epoch": 1, "loss": 4.5}
    >>> axes = epochs([record], {"loss": "loss"}, "loss").axes[0]
    >>> axes.lines[0].get_ydata().tolist()
    [4.5]
    """
    figure, (axes,) = _figure(4.8, 3.2)
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
                index, name = PHASES.index(phase), phase.replace("_", " ")
            line = lines.setdefault((index, name), {})
            part = line.setdefault((record.get("iteration"), phase), [])
            part.append((x, factor * record[key]))
    for (index, name), parts in lines.items():
        for part in parts.values():
            look = {**style(index), "ms": 4, "label": name}
            if len(part) > 20:
                look["marker"] = None
            axes.plot(*zip(*part), **look)
            name = None  # once in the legend
    for iteration, start in starts.items():
        axes.axvline(start, color=GREY, lw=0.8)
        axes.annotate(
            f"it. {iteration}",
            (start, 1),
            (0, 2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(xlabel="epoch of the run", ylabel=label)
    axes.set_xlim(0.5, max(len(trained), 1) + 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if bottom is not None:  # which the margin at the top then counts from
        axes.update_datalim([(1, bottom)])
        axes.autoscale_view()
    axes.set_ylim(bottom, top)
    # Above the lines, which may go anywhere.
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)
    return figure


def losses(groups, tau):
    """A histogram of an epoch's losses with the gate's threshold.

    Arguments
    ---------
    groups : dict
        From a group's name to its losses, float (n,); those that are not
        finite are left out.
    tau : float
        The threshold; no line where it is not finite.

    Returns
    -------
    matplotlib.figure.Figure

    Example
    -------
    >>> axes = losses({"all": [0.5, 1.5, np.nan]}, tau=1.0).axes[0]
    >>> axes.patches[0].get_data().values.sum().item()
    2
    """
    figure, (axes,) = _figure(4.8, 3.2)
    groups = {name: np.asarray(group) for name, group in groups.items()}
    groups = {name: g[np.isfinite(g)] for name, g in groups.items()}
    highest = max((g.max() for g in groups.values() if len(g)), default=1.0)
    edges = np.linspace(0, max(highest, 1e-6), BINS + 1)
    for index, (name, group) in enumerate(groups.items()):
        counts, _ = np.histogram(group, edges)
        colour = COLOURS[index]
        axes.stairs(
            counts,
            edges,
            fill=True,
            facecolor=matplotlib.colors.to_rgba(colour, 0.35),
            edgecolor=colour,
            linestyle=LINES[index],
            lw=1.5,
            label=f"{name} ({len(group):,})",
        )
    if np.isfinite(tau):
        axes.axvline(tau, color="black", lw=2, label=f"τ = {tau:.2f}")
    axes.set(xlabel="loss", ylabel="utterances", xlim=(0, edges[-1]))
    axes.legend(fontsize=8)
    return figure


def det(systems):
    """Detection error trade-off curves.

    Both error rates on probit axes, where normally distributed scores give a
    straight line (Martin et al., 1997); a marker shows each system's EER.

    Arguments
    ---------
    systems : dict
        For each name in the legend its (scores, labels), as
        `verification.eer` takes them.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        When a score is not finite, a class is missing or lengths differ.

    Example
    -------
    >>> scores, labels = [0.9, 0.4, 0.7, 0.1], [True, True, False, False]
    >>> axes = det({"Stage I": (scores, labels)}).axes[0]
    >>> axes.get_legend().get_texts()[0].get_text()
    'Stage I, 50.0 %'
    """
    figure, (axes,) = _figure(4.8, 4.7)
    percent = np.array([0.1, 1, 2, 5, 10, 20, 40, 60])
    ticks = ndtri(percent / 100)
    for index, (name, (scores, labels)) in enumerate(systems.items()):
        _, p_miss, p_fa = operating_points(scores, labels)
        rate, _ = eer(scores, labels)
        # The ends, 0 and 1, lie at infinity and are clipped far outside.
        rates = np.clip([p_fa, p_miss], 1e-9, 1 - 1e-9)
        curve, centre = ndtri(rates), ndtri(np.clip(rate, 1e-9, 1 - 1e-9))
        # Half a million trials in steps of what can be seen.
        steps = np.diff(np.round(200 * curve), prepend=np.inf)
        curve = curve[:, steps.any(axis=0)]
        look = style(index)
        marker = look.pop("marker")
        axes.plot(*curve, **look)
        axes.plot(centre, centre, marker, color=look["color"])
        label = f"{name}, {100 * rate:.1f} %"
        axes.plot([], [], marker=marker, label=label, **look)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{value:g}" for value in percent])
    axes.set(
        xlim=(ticks[0], ticks[-1]),
        ylim=(ticks[0], ticks[-1]),
        xlabel="false alarms (%)",
        ylabel="misses (%)",
        aspect="equal",
    )
    axes.legend(title="EER", fontsize=8)
    return figure


def cluster_sizes(sizes):
    """The sizes of clusters, from the largest to the smallest.

    Arguments
    ---------
    sizes : dict
        From the name of a clustering to the sizes of its clusters, int (K,).

    Returns
    -------
    matplotlib.figure.Figure

    Example
    -------
    >>> axes = cluster_sizes({"iteration 1": [3, 1, 2]}).axes[0]
    >>> axes.lines[0].get_ydata().tolist()
    [3, 2, 1]
    """
    figure, (axes,) = _figure(4.8, 3.2)
    for index, (name, counts) in enumerate(sizes.items()):
        counts = np.sort(counts)[::-1]
        # Thousands of clusters: no more points than can be seen.
        shown = np.unique(np.linspace(0, len(counts) - 1, 400).astype(int))
        look = style(index)
        every = max(len(shown) // 8, 1)
        axes.plot(
            1 + shown, counts[shown], label=name, markevery=every, ms=4, **look
        )
    axes.set(xlabel="cluster, by size", ylabel="utterances")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def embedding_map(points, groups, names):
    """A map of embeddings, some groups in colour, the others grey.

    Arguments
    ---------
    points : numpy.ndarray, (n, 2), float
        Where the utterances lie.
    groups : numpy.ndarray, (n,), int
        Each utterance's group as an index into `names`, -1 for none of them.
    names : list of str
        Of the groups; colours and markers tell up to seven apart.

    Returns
    -------
    matplotlib.figure.Figure

    Example
    -------
    >>> points = np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> axes = embedding_map(points, np.array([0, -1]), ["ann"]).axes[0]
    >>> [text.get_text() for text in axes.figure.legends[0].get_texts()]
    ['others', 'ann']
    """
    figure, (axes,) = _figure(4.8, 5.2)
    for index, name in enumerate(["others", *names], -1):
        look = dict(s=22, color=COLOURS[index], marker=MARKERS[index])
        if index < 0:
            look = dict(s=14, color="#B0B0B0", marker=".")
        x, y = points[groups == index].T
        # As pixels within the SVG, where each would be an element.
        axes.scatter(x, y, lw=0, label=name, rasterized=True, **look)
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", "datalim")
    axes.spines[:].set_visible(True)
    figure.legend(
        loc="outside lower center", ncols=2, fontsize=8, markerscale=1.3
    )
    return figure


def _figure(width, height, panels=1):
    """A figure of a width and a height in inches, and its panels."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for panel in axes:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes
