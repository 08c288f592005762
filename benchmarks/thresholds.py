#!/usr/bin/env python3
"""How far thresholds found without labels are from the labelled trials' own.

> python benchmarks/thresholds.py results/an4/[123] results/embedded/[123]

For each trained phase that was scored on a trial list (`scores.npz`): how far
a way's threshold is off the one at which misses and false alarms of the trials
are equally frequent, and what that costs: the mean of both error rates at the
threshold, less the equal error rate. Nothing but this table reads the labels.

Ways: pairs with a held-out utterance by pseudo-label, and halves of held-out
utterances (`inference.calibration`); a share of false alarms among pairs of
drawn utterances, nearly all of which are of two speakers; SpeechBrain's 0.25.
"""

import pathlib

import common
import numpy as np

from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.inference.calibration import find_threshold
from lgl_plugin.inference.export import read_trained_step
from lgl_plugin.metrics.error_rates import eer


def ways(step, device):
    """Each way's threshold for a step's encoder."""
    extract = step.model.extractor(device)
    embedded = {}

    def once(manifest, rows):
        key = tuple(manifest.ids[row] for row in rows)
        if key not in embedded:
            embedded[key] = extract(manifest, rows)
        return embedded[key]

    chosen = step.model.settings
    share, seed = chosen["held_out_share"], chosen["seed"]
    found = {}
    for pseudo in (step.pseudo, None):
        decision, vectors = find_threshold(
            once, step.manifest, share, seed, pseudo, step.labelled
        )
        found[decision[1]] = decision[0]
    unit = normalised(vectors)
    scores = (unit @ unit.T)[np.triu_indices(len(unit), 1)]
    for rate in (0.01, 0.05, 0.10):
        name = f"{100 * rate:.0f} % false alarms"
        found[name] = float(np.quantile(scores, 1 - rate))
    return {**found, "0.25": 0.25}


def main():
    """Prints the table."""
    parser = common.arguments(__doc__, repeats=False)
    parser.add_argument("runs", nargs="+", type=pathlib.Path)
    options = parser.parse_args()
    errors = {}
    for run in options.runs:
        for path in sorted(run.glob("[si]*/**/scores.npz")):
            name = path.parent.relative_to(run).as_posix()
            with np.load(path) as trials:
                scores, labels = trials["scores"], trials["labels"]
            rate, best = eer(scores, labels)
            stage = "Stage II" if name.startswith("iter") else "Stage I"
            for way, cut in ways(
                read_trained_step(run, name), options.device
            ).items():
                miss = np.mean(scores[labels] <= cut)
                false_alarm = np.mean(scores[~labels] > cut)
                cost = 100 * ((miss + false_alarm) / 2 - rate)
                errors.setdefault((stage, way), []).append((cut - best, cost))
    rows = [row(*key, found) for key, found in sorted(errors.items())]
    common.report(rows, "thresholds found without labels", options.json)


def row(stage, way, found):
    """A line of the table."""
    off, cost = np.array(found).T
    return {
        "stage": stage,
        "way": way,
        "encoders": len(found),
        "off, mean": float(off.mean()),
        "off, mean size": float(np.abs(off).mean()),
        "off, largest": float(np.abs(off).max()),
        "costs %, mean": float(cost.mean()),
        "costs %, most": float(cost.max()),
    }


if __name__ == "__main__":
    main()
