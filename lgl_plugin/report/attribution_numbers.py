"""Computes means of attributed trials, by band, moment and layer."""

import pathlib

import numpy as np
import scipy.stats

from lgl_plugin.inference.attribution import Explanation, Map
from lgl_plugin.utils.files import write_json
from lgl_plugin.utils.tables import write_csv

MOMENTS = 20  # equal parts of a recording's time
RANGES = (0, 500, 1000, 2000, 4000, 8000, 24000)  # ranges in the table, Hz
KINDS = ("target", "non-target")
HEADER = ("part", "over", *KINDS, "difference")


class Trial:
    """A trial and the sums of its score's attributions.

    Only sums are kept: an explanation takes 8 MB a minute or more, and those of
    thousands of trials would not fit into memory. `drawn` is the trial's map,
    if the trial `is_example`.
    """

    def __init__(
        self,
        kind: str,
        enrolment: str,
        test: str,
        found: Explanation,
        is_example: bool,
    ):
        self.kind = kind
        self.enrolment, self.test = enrolment, test
        self.score, self.layers = found.score, found.layers
        maps = found.maps
        self.drawn: Map | None = None
        if is_example:  # the map over the features, if there is one
            self.drawn = next(iter(maps.values()), None)
        self.hz = {name: part.hz for name, part in maps.items()}
        self.bands = {name: part.values.sum(0) for name, part in maps.items()}
        self.moments = {
            name: _moments(part.values.sum(1)) for name, part in maps.items()
        }
        self.paths, paths = list(found.paths), found.paths.values()
        errors = [path.error for path in paths]
        self.error = max(errors)
        self.cells = [
            kind,
            enrolment,
            test,
            f"{self.score:.3f}",
            *(f"{path.baseline_score:.3f}" for path in paths),
            *(f"{e:.1%} of {p.steps}" for e, p in zip(errors, paths)),
        ]


def by_kind(trials: list[Trial], rows: np.ndarray) -> dict[str, tuple]:
    """Returns means of rows (trials, m), and their standard errors."""
    kinds = np.array([trial.kind for trial in trials])
    parts = {kind: rows[kinds == kind] for kind in KINDS}
    return {
        kind: (part.mean(0), scipy.stats.sem(part))
        for kind, part in parts.items()
    }


class PathMeans:
    """Means of one path's maps over the trials of each kind."""

    def __init__(self, trials: list[Trial], name: str):
        self.name, self.hz = name, trials[0].hz[name]
        self.trials = trials
        self.by_trial = np.array([trial.bands[name] for trial in trials])
        moments = np.array([trial.moments[name] for trial in trials])
        self.bands = by_kind(trials, self.by_trial)
        self.time = by_kind(trials, moments)

    def ranges(self) -> dict[str, dict[str, list[float]]]:
        """Returns what ranges of frequency add, see `means`."""
        masks = {
            f"{low:,} to {high:,} Hz": (self.hz >= low) & (self.hz < high)
            for low, high in zip(RANGES, RANGES[1:])
        }
        masks = {name: bands for name, bands in masks.items() if bands.any()}
        rows = [self.by_trial[:, bands].sum(1) for bands in masks.values()]
        return means(self.trials, list(masks), np.stack(rows, axis=1))


def means(
    trials: list[Trial], names: list[str], rows: np.ndarray
) -> dict[str, dict[str, list[float]]]:
    """Returns columns' mean and standard error, by name and kind of trial.

    `rows`, (trials, m), have a column for each of the `names`.
    """
    kinds = by_kind(trials, rows)
    return {
        name: {
            kind: [float(mean[column]), float(error[column])]
            for kind, (mean, error) in kinds.items()
        }
        for column, name in enumerate(names)
    }


def _moments(values):
    """Sums frames (n,) by parts of the time."""
    parts = np.arange(len(values)) * MOMENTS // len(values)
    return np.bincount(parts, values, MOMENTS)


class Numbers:
    """All means of some trials, and the files of these means.

    `by_path` has a `PathMeans` for each path with a map. `layers` are means and
    standard errors by kind, empty without the path over layers. `facts` are the
    content of `attribution.json`.
    """

    def __init__(self, trials: list[Trial], options: dict, left_out: dict):
        self.trials = trials
        self.by_path = [PathMeans(trials, name) for name in trials[0].hz]
        layers = np.array([trial.layers for trial in trials])
        self.layers = by_kind(trials, layers)
        scores = np.array([trial.score for trial in trials])
        self.facts = {
            "options": options,
            "trials": len(trials),
            "left_out": left_out,
            "targets": sum(trial.kind == KINDS[0] for trial in trials),
            "score": {
                kind: float(mean)
                for kind, (mean, _) in by_kind(trials, scores).items()
            },
            "largest_error": max(trial.error for trial in trials),
            "added": {each.name: each.ranges() for each in self.by_path},
        }
        if layers.shape[1]:
            names = [f"layer {n + 1}" for n in range(layers.shape[1])]
            self.facts["added"]["layers"] = means(trials, names, layers)
        self.header = ["kind", "enrolment", "test", "score"]
        self.header += [f"{name}, baseline" for name in trials[0].paths]
        self.header += [f"{name}, off" for name in trials[0].paths]
        self.rows = [trial.cells for trial in trials]

    def write(self, folder: pathlib.Path) -> None:
        """Writes the tables and the JSON."""
        places = (np.arange(MOMENTS) + 0.5) / MOMENTS
        for each in self.by_path:
            bands, time = (f"{n}_{each.name}.csv" for n in ("bands", "time"))
            _write_means(folder / bands, "hz", each.hz, each.bands)
            _write_means(folder / time, "share", places, each.time)
        write_csv(folder / "trials.csv", [self.header, *self.rows])
        write_json(folder / "attribution.json", self.facts)


def _write_means(path, name, x, kinds):
    """Writes means and standard errors of each kind over an axis."""
    header = [name]
    columns = [x]
    for kind, (mean, error) in kinds.items():
        header += [kind, f"{kind} standard error"]
        columns += [mean, error]
    rows = [[f"{value:.6g}" for value in row] for row in zip(*columns)]
    write_csv(path, [header, *rows])
