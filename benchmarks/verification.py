#!/usr/bin/env python3
"""Verification at full size: AS-norm, error rates and their interval.

> python benchmarks/verification.py --threads=2 --repeats=1
> python benchmarks/verification.py --threads=1 --repeats=1 --topk
> python benchmarks/verification.py --coverage

The floor, written down before anything ran: the cosines of 150,000 utterances
with a cohort of 20,000 are 2 * 150,000 * 20,000 * 192 = 1.15e12 operations, at
the rate of large float32 products; finding the highest of 3e9 cosines comes on
top. The target is a minute and 4 GiB on two cores. Embeddings are generated,
and the list has 1,251 speakers, as VoxCeleb1-E.

--coverage asks how often a 95 % interval holds the true rate: that of many
generated sets of speakers, of whom some are easier to tell than others.
"""

import common
import numpy as np
import torch
from threadpoolctl import threadpool_limits

from lgl_plugin.verification import (
    Trials,
    adaptive_s_norm,
    bootstrap_eer,
    cohort_statistics,
    cosine_scores,
    eer,
)


def generated(utterances, trials, speakers, dimensions):
    """Embeddings and a trial list, at least half of it targets."""
    rng = np.random.default_rng(0)
    whose = np.sort(rng.integers(speakers, size=utterances))
    centres = rng.standard_normal((speakers, dimensions), np.float32)
    embeddings = 2 * rng.standard_normal((utterances, dimensions), np.float32)
    embeddings += centres[whose]
    enrolment, test = rng.integers(utterances, size=(2, trials))
    own = whose[enrolment[::2]]
    first = np.searchsorted(whose, own)
    sizes = np.bincount(whose, minlength=speakers)[own]
    test[::2] = first + rng.integers(sizes)
    names = [f"{n:07d}" for n in range(utterances)]
    labels = whose[enrolment] == whose[test]
    return embeddings, Trials(labels, names, enrolment, test)


def by_topk(embeddings, cohort, top):
    """What `cohort_statistics` gives, by torch.topk."""
    cohort = torch.nn.functional.normalize(torch.from_numpy(cohort)).T
    mean, deviation = torch.empty(2, len(embeddings))
    for start in range(0, len(embeddings), 256):
        rows = slice(start, start + 256)
        some = torch.nn.functional.normalize(torch.from_numpy(embeddings[rows]))
        best = (some @ cohort).topk(top, sorted=False).values
        mean[rows], deviation[rows] = best.mean(dim=1), best.std(dim=1)
    return mean.numpy(), deviation.numpy()


def full_size(options):
    """A row for each part: its time and the process's peak."""
    embeddings, trials = generated(
        options.utterances, options.trials, options.speakers, options.dim
    )
    rng = np.random.default_rng(1)
    cohort = rng.standard_normal((options.cohort, options.dim), np.float32)
    kept = {}

    def statistics():
        kept["statistics"] = cohort_statistics(embeddings, cohort, options.top)

    def scores():
        kept["scores"] = cosine_scores(embeddings, trials)

    def as_norm():
        kept["scores"] = adaptive_s_norm(
            kept["scores"], trials, *kept["statistics"]
        )

    calls = {
        "cohort_statistics": statistics,
        "cosine_scores": scores,
        "adaptive_s_norm": as_norm,
        "eer": lambda: eer(kept["scores"], trials.labels),
        "bootstrap_eer": lambda: bootstrap_eer(
            kept["scores"], trials, options.resamples
        ),
    }
    if options.topk:
        calls["cohort_statistics by torch.topk"] = lambda: by_topk(
            embeddings, cohort, options.top
        )
    found = common.measure(calls, options.repeats)
    square = rng.standard_normal((4096, 4096), np.float32)
    product = common.measure({"": lambda: square @ square}, 3)[""]["lowest"]
    operations = 2 * options.utterances * options.cohort * options.dim
    floor = operations * product / (2 * 4096**3)
    found["cohort_statistics"]["floor"] = floor
    rows = [{"seconds of": name, **figures} for name, figures in found.items()]
    common.report(
        rows,
        f"{options.trials} trials of {options.utterances} utterances, the "
        f"{options.top} nearest of a cohort of {options.cohort}, "
        f"{options.resamples} resamples",
        options.json,
    )


def system(speakers, seed, per_speaker=4):
    """All trials over some speakers, each easier or harder than another."""
    rng = np.random.default_rng(seed)
    whose = np.repeat(np.arange(speakers), per_speaker)
    first, second = np.triu_indices(len(whose), 1)
    labels = whose[first] == whose[second]
    ease, alike = rng.normal(size=(2, speakers))
    shift = np.where(
        labels,
        3 + ease[whose[first]],
        alike[whose[first]] + alike[whose[second]],
    )
    names = [str(n) for n in range(len(whose))]
    return rng.normal(shift), Trials(labels, names, first, second)


def coverage(options):
    """A row for each number of speakers: how often the truth was inside."""
    rows = []
    for speakers in (10, 25, 60):
        rates, intervals, by_trials = [], [], []
        for seed in range(200):
            scores, trials = system(speakers, 1000 + seed)
            rates.append(eer(scores, trials.labels)[0])
        for seed in range(200):
            scores, trials = system(speakers, seed)
            intervals.append(bootstrap_eer(scores, trials, 200))
            rng = np.random.default_rng(seed)
            drawn = rng.integers(len(scores), size=(200, len(scores)))
            resampled = [eer(scores[d], trials.labels[d])[0] for d in drawn]
            by_trials.append(np.quantile(resampled, [0.025, 0.975]))
        row = {"speakers": speakers, "true EER": float(np.mean(rates))}
        for unit, ends in (("speakers", intervals), ("trials", by_trials)):
            low, high = np.transpose(ends)
            inside = (low < np.mean(rates)) & (np.mean(rates) < high)
            row[f"{unit} drawn: coverage"] = float(inside.mean())
            row[f"{unit} drawn: width"] = float(np.mean(high - low))
        row["width wanted"] = float(np.ptp(np.quantile(rates, [0.025, 0.975])))
        rows.append(row)
    common.report(rows, "95 % intervals of the EER", options.json)


if __name__ == "__main__":
    parser = common.arguments(__doc__)
    parser.add_argument("--utterances", type=int, default=150_000)
    parser.add_argument("--trials", type=int, default=600_000)
    parser.add_argument("--speakers", type=int, default=1251)
    parser.add_argument("--cohort", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=192)
    parser.add_argument("--top", type=int, default=300)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument(
        "--topk", action="store_true", help="torch.topk for comparison"
    )
    parser.add_argument("--coverage", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        (coverage if options.coverage else full_size)(options)
