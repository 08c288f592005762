"""Writes the page of `lgl landscape`: how flat the minima of a run are.

It draws the loss around each checkpoint, in directions that are normalised
filter by filter, and between the checkpoints of successive steps. See
`lgl_plugin.nnet.landscape` and `lgl_plugin.report.probes`.
"""

import functools
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from lgl_plugin.nnet.landscape import (
    directions,
    line,
    rises,
    surface,
    top_curvature,
)
from lgl_plugin.report import inside_figures
from lgl_plugin.report.page import Block, Figure, Page, Table
from lgl_plugin.report.probes import START, ProbedRun
from lgl_plugin.utils.device import check_device
from lgl_plugin.utils.files import check_writable, short_names, write_json
from lgl_plugin.utils.progress import tqdm
from lgl_plugin.utils.tables import write_csv

WAYS = 10  # directions over which a rise is averaged
RADII = (0.1, 0.3)
# Points on a line from a step (0) to the next (1), and beyond both.
PLACES = np.linspace(-0.5, 1.5, 17)
LOSSES = ("all utterances", "those that counted")


def draw_landscapes(
    runs: Sequence[str | pathlib.Path],
    output_folder: str | pathlib.Path | None = None,
    only: Sequence[str] | None = None,
    utterances: int = 128,
    points: int = 13,
    radius: float = 0.5,
    batch_norm: str = "running",
    seed: int = 0,
    device: str | None = None,
) -> dict:
    """Draws the loss around the checkpoints of runs and between them.

    The options are those of `lgl landscape`. The output folder gets
    `index.html` with its figures, `surfaces.csv`, `lines.csv` and
    `landscape.json`. The content of the last is returned: the options; and by
    run and step the `loss`, its `rise` at each radius with the deviation over
    the directions, and the `curvature`. Loss and rise are given for all
    utterances and for those that counted.
    """
    # Must come first, while the arguments are the only local variables.
    options = json.loads(json.dumps(locals(), default=str))
    if points < 3 or points % 2 == 0:
        raise ValueError(f"--points={points}: it must be odd, 3 or more")
    if utterances < 2:
        raise ValueError(f"--utterances={utterances}: it must be 2 or more")
    if not 0 < radius < np.inf:
        raise ValueError(f"--radius={radius}: it must be above 0")
    device = check_device(device)
    folders = [pathlib.Path(run) for run in runs]
    opened = {
        name: ProbedRun(folder, utterances, seed)
        for name, folder in zip(short_names(folders), folders)
    }
    wanted = {name: _chosen(run, only) for name, run in opened.items()}
    for name, run in opened.items():
        run.check_counts(wanted[name])
    output = pathlib.Path(output_folder or folders[0] / "report" / "landscape")
    check_writable(output)  # before the long work
    steps: dict[str, dict] = {}
    planes, lines = {}, {}
    axis = np.linspace(-radius, radius, points)
    for name, run in opened.items():
        steps[name] = {}
        before, start = "", None
        for probe in run.probes(wanted[name], device, batch_norm == "batch"):
            key = f"{name}: {probe.name}" if len(opened) > 1 else probe.name
            figures = _probe_figures(probe, key, axis, seed)
            planes[key] = figures.pop("surface")
            steps[name][probe.name] = figures
            state = {k: v.clone() for k, v in probe.model.state_dict().items()}
            if before.split("/")[0] == probe.name.split("/")[0]:
                ends = start, state
                losses = line(probe.figures, probe.model, ends, PLACES)
                lines[key] = before, losses
            before, start = probe.name, state
    facts = {"options": options, "steps": steps}
    _write(output, facts, axis, planes, lines)
    return facts


def _chosen(run, only):
    """Returns the names of a run's steps to probe."""
    names = run.names()
    if not names:
        raise ValueError(f"{run.folder} has no step that can be probed yet")
    for name in only or ():
        if name not in names:
            raise ValueError(
                f"{run.folder} has no step {name}. It has {', '.join(names)}."
            )
    return [name for name in names if not only or name in only]


def _probe_figures(probe, name, axis, seed):
    """Computes all figures of the loss around a checkpoint."""
    parameters = probe.parameters
    ways = directions(parameters, WAYS, seed)

    def bar(work):
        title = f"{name}, {work}"
        return functools.partial(tqdm, desc=title, leave=False, unit="point")

    around = probe.figures, parameters
    plane = surface(*around, ways[:2], axis, bar("surface"))
    rise = rises(*around, ways, RADII, bar("sharpness"))
    curvature = top_curvature(
        probe.parts(), parameters, seed, progress=bar("curvature")
    )
    middle = len(axis) // 2
    figures = {
        "loss": plane[middle, middle].tolist(),
        "chance": probe.chance(),
        "utterances": len(probe.crops),
        "counted": probe.counted,
        "rise": {str(r): mean.tolist() for r, mean in zip(RADII, rise.mean(0))},
        "rise_deviation": {
            str(r): deviation.tolist()
            for r, deviation in zip(RADII, rise.std(0, ddof=1))
        },
        "curvature": curvature,
    }
    print(
        f"{name}: loss {figures['loss'][1]:.3f}, rise "
        + ", ".join(f"{v[1]:.3f} at {r}" for r, v in figures["rise"].items())
        + f", curvature {curvature:.4g}"
    )
    return {**figures, "surface": plane}


def _write(folder, facts, axis, planes, lines):
    """Writes numbers and page."""
    header = ["step", "along first", "along second", *LOSSES]
    rows = [
        [name, f"{a:.4g}", f"{b:.4g}", *(f"{v:.6g}" for v in plane[i, j])]
        for name, plane in planes.items()
        for (i, a), (j, b) in itertools.product(enumerate(axis), repeat=2)
    ]
    write_csv(folder / "surfaces.csv", [header, *rows])
    rows = [
        [source, name, f"{place:.4g}", *(f"{v:.6g}" for v in values)]
        for name, (source, found) in lines.items()
        for place, values in zip(PLACES, found)
    ]
    write_csv(folder / "lines.csv", [["from", "to", "place", *LOSSES], *rows])
    write_json(folder / "landscape.json", facts)
    names = ", ".join(facts["steps"])
    page = Page(folder, f"Loss landscape of {names}")
    introduction = page.collect(_introduction, facts)
    sections = {
        "How sharp": page.collect(_sharpness, facts),
        "Around each step": page.collect(_surfaces, planes, axis),
        "From step to step": page.collect(_lines, lines),
        "How to read this": page.collect(_reading, facts),
    }
    path = page.write(introduction, sections, "lgl landscape")
    print(f"Page: {path}, with csv and json")


def _introduction(facts) -> Iterator[Block]:
    """Yields the facts."""
    options = facts["options"]
    first = next(iter(next(iter(facts["steps"].values())).values()))
    yield {
        "runs": ", ".join(facts["steps"]),
        "utterances": str(first["utterances"]),
        "batch normalisation": f"{options['batch_norm']} statistics",
        "directions": f"{WAYS}, seed {options['seed']}",
    }


def _sharpness(facts) -> Iterator[Block]:
    """Yields the table of figures."""
    losses = ["loss", *(f"rise at {radius}" for radius in RADII)]
    header = ["step", "chance", "counted", *losses, "curvature", *losses]
    rows = []
    for run, steps in facts["steps"].items():
        for name, found in steps.items():
            chance = found["chance"]
            row = [f"{run}: {name}", "" if chance is None else f"{chance:.1f}"]
            row.append(found["counted"])
            for which in (1, 0):
                row.append(f"{found['loss'][which]:.2f}")
                row += [
                    f"{found['rise'][r][which]:.2f} "
                    f"± {found['rise_deviation'][r][which]:.2f}"
                    for r in found["rise"]
                ]
                if which:
                    row.append(f"{found['curvature']:.3g}")
            rows.append(row)
    groups = {"": 1, "those that counted": 5, "all utterances": 3}
    yield Table("Loss and sharpness of each step", header, rows, groups)
    yield (
        "A rise is the mean over the directions, each way and back, with the "
        "deviation over them. Chance is the loss of an embedding at right "
        "angles to all classes. The curvature is the largest eigenvalue of the "
        "Hessian, where each filter has length one."
    )


def _surfaces(planes, axis) -> Iterator[Block]:
    """Yields the contours."""
    for which in (1, 0):
        yield Figure(
            f"surface_{'all' if which == 0 else 'counted'}",
            inside_figures.contours(
                {name: plane[..., which] for name, plane in planes.items()},
                float(axis[-1]),
                f"loss, {LOSSES[which]}",
            ),
            "Contours of the loss over a plane of two random directions "
            "around each step; the numbers are in surfaces.csv.",
            f"Loss of {LOSSES[which]} around each step (cross), in lengths of "
            "the filters along two random directions; one scale of colours, "
            "evenly spaced in the logarithm.",
            raster=True,
        )


def _lines(lines) -> Iterator[Block]:
    """Yields the loss on the line from each step to the next."""
    for which in (1, 0):
        if lines:
            yield Figure(
                f"lines_{'all' if which == 0 else 'counted'}",
                inside_figures.profile(
                    PLACES,
                    {
                        f"{source} to {name}": (found[:, which], 0.0)
                        for name, (source, found) in lines.items()
                    },
                    "0: the one, 1: the other",
                    f"loss, {LOSSES[which]}",
                ),
                "Loss on the straight line from the weights of a step to "
                "those of the next; the numbers are in lines.csv.",
                f"Loss of {LOSSES[which]} between two steps and beyond: "
                "encoder, classifier and running statistics lie on a "
                "straight line.",
            )


def _reading(facts) -> Iterator[Block]:
    """Yields how to read the figures."""
    yield [
        "The loss of a round is AAM-softmax on its own pseudo-labels, "
        "without augmentation. Those that counted are utterances that the gate "
        "let through in the last epoch, or gave another label. Without a gate "
        "all utterances count.",
        f"{START} is the encoder whose embeddings were clustered (of round 1 "
        "that of Stage I), with the means of its clusters as the classifier. "
        "It was not trained by this loss, and is no minimum of it.",
        "stage1 has the loss of Stage I's method, on two crops of each "
        "utterance as one batch, without augmentation. It grows with the "
        "batch and differs by the method: compare it with no round.",
        "The encoder alone moves around a step; the classifier stays. Biases "
        "and the weights of normalisation stay, too.",
        "A gate keeps easy utterances, so its own loss is low for that alone. "
        "Compare runs by the loss of all utterances, and only where their "
        "labels are the same: in round 1, if both began from one Stage I.",
        "A flat minimum is not proof of a better encoder. Error rates are.",
    ]
