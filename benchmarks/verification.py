#!/usr/bin/env python3
"""Verification at full size: AS-norm, error rates and their interval.

> python benchmarks/verification.py --threads=2 --repeats=1
> python benchmarks/verification.py --threads=1 --repeats=1 --topk
> python benchmarks/verification.py --coverage
> python benchmarks/verification.py --threads=1 --repeats=3 \
    --speechbrain_src=/path/to/speechbrain

The floor, written down before anything ran: the cosines of 150,000 utterances
with a cohort of 20,000 are 2 * 150,000 * 20,000 * 192 = 1.15e12 operations, at
the rate of large float32 products; finding the highest of 3e9 cosines comes on
top. The target is a minute and 4 GiB on two cores. Embeddings are generated,
and the list has 1,251 speakers, as VoxCeleb1-E.

--coverage asks how often a 95 % interval holds the true rate: that of many
generated sets of speakers, of whom some are easier to tell than others.

--speechbrain_src names a copy of SpeechBrain's repository. Its verification
script's own function, and its EER and minDCF, do what they still can, and we
do the same: from the trial list and the embeddings to scores.txt, from scores
to a figure. Each measurement is the first call in a process of its own, in
seconds of the processor: waiting for other jobs on the machine is not counted.
"""

import importlib.util
import multiprocessing
import pathlib
import statistics
import tempfile
import time

import common
import numpy as np
import speechbrain
import torch
from speechbrain.utils.metric_stats import EER, minDCF
from threadpoolctl import threadpool_limits

from lgl_plugin.dataio.trials import Trials, read_trials
from lgl_plugin.evaluation.verification import (
    adaptive_s_norm,
    as_norm,
    bootstrap_eer,
    cohort_statistics,
    cosine_scores,
    write_scores,
)
from lgl_plugin.metrics.error_rates import eer, min_dcf

SCRIPT = "recipes/VoxCeleb/SpeakerRec/speaker_verification_cosine.py"
# Trials and cohort, and trials, that SpeechBrain still does in a minute.
SCORED = ((500, 5000), (2000, 5000), (500, 20000))
JUDGED = (1000, 4000, 16000)


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
    """Returns what `cohort_statistics` does, by torch.topk."""
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

    def normalised():
        kept["scores"] = adaptive_s_norm(
            kept["scores"], trials, *kept["statistics"]
        )

    calls = {
        "cohort_statistics": statistics,
        "cosine_scores": scores,
        "adaptive_s_norm": normalised,
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


def against_speechbrain(options):
    """A row for each task that both do."""
    tasks = [(norm, *size) for norm in ("s-norm", "AS-norm") for size in SCORED]
    tasks += [(name, n, None) for name in ("EER", "minDCF") for n in JUDGED]
    kept = {(task, who): [] for task in tasks for who in ("theirs", "ours")}
    spawned = multiprocessing.get_context("spawn")
    # A process is left after a task, so that each has a peak of its own.
    with spawned.Pool(1, maxtasksperchild=1) as pool:
        for _ in range(options.repeats):
            for (task, who), found in kept.items():
                found.append(pool.apply(measure_one, (options, task, who)))
    rows = []
    for task in tasks:
        row = dict(zip(("what", "trials", "cohort"), task))
        row["cohort"] = row["cohort"] or ""
        for who, name in (("theirs", "SpeechBrain"), ("ours", "ours")):
            seconds, mib, _ = zip(*kept[task, who])
            row[f"{name} s"] = statistics.median(seconds)
            row[f"{name} MiB"] = max(mib)
        pairs = list(zip(kept[task, "theirs"], kept[task, "ours"]))
        times = [theirs[0] / ours[0] for theirs, ours in pairs]
        row["times"] = statistics.median(times)
        row["lowest"], row["highest"] = min(times), max(times)
        row["largest difference"] = max(
            float(np.abs(theirs[2] - ours[2]).max()) for theirs, ours in pairs
        )
        # A threshold that is one of the scores is off by a trial at most.
        near = 2 / task[1] if task[0] == "EER" else 1e-4
        assert row["largest difference"] <= near, row
        rows.append(row)
    common.report(
        rows,
        f"SpeechBrain {speechbrain.__version__} against ours, 4 trials an "
        f"utterance, {options.dim} dimensions, the {options.top} nearest for "
        "AS-norm; seconds of the processor, MiB beyond what was held before",
        options.json,
    )


def measure_one(options, task, who):
    """Seconds of the processor, MiB and what came out, of one task."""
    torch.set_num_threads(options.threads)
    name, trials, cohort = task
    with (
        threadpool_limits(options.threads),
        tempfile.TemporaryDirectory() as folder,
    ):
        if cohort is None:
            call = judge_call(name, trials, who)
        else:
            given = options, name == "s-norm", trials, cohort
            ready = their_scoring if who == "theirs" else our_scoring
            call = ready(*given, pathlib.Path(folder))
        common.reset_peaks()
        before = common.peaks()["host_mib"]
        started = time.process_time()
        result = call()
        seconds = time.process_time() - started
        mib = common.peaks()["host_mib"] - before
        if cohort is not None:
            result = np.loadtxt(f"{folder}/scores.txt", usecols=3)
        return seconds, mib, np.asarray(result)


def prepared(options, n_trials, cohort, folder):
    """Embeddings, those of the cohort, and a list with as many trials."""
    embeddings, trials = generated(n_trials // 4, n_trials, 40, options.dim)
    rng = np.random.default_rng(1)
    cohort = rng.standard_normal((cohort, options.dim), np.float32)
    names = np.array(trials.utterances)
    sides = names[trials.enrolment], names[trials.test]
    lines = [f"{same:d} {a} {b}" for same, a, b in zip(trials.labels, *sides)]
    (folder / "trials.txt").write_text("\n".join(lines) + "\n")
    return embeddings, cohort, names, lines


def their_scoring(options, whole, n_trials, cohort, folder):
    """The script's own function, with what it finds in its module."""
    embeddings, cohort, names, lines = prepared(
        options, n_trials, cohort, folder
    )
    path = pathlib.Path(options.speechbrain_src) / SCRIPT
    spec = importlib.util.spec_from_file_location("script", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.params = {"output_folder": folder, "score_norm": "s-norm"}
    if not whole:
        script.params["cohort_size"] = options.top
    vectors = torch.from_numpy(embeddings)[:, None]
    script.enrol_dict = script.test_dict = dict(zip(names.tolist(), vectors))
    script.train_dict = dict(enumerate(torch.from_numpy(cohort)[:, None]))
    return lambda: script.get_verification_scores(lines)


def our_scoring(options, whole, n_trials, cohort, folder):
    """The same in ours."""
    embeddings, cohort, names, _ = prepared(options, n_trials, cohort, folder)
    used = read_trials(folder / "trials.txt").utterances
    embeddings = embeddings[np.isin(names, used)]
    top = len(cohort) if whole else options.top

    def score():
        trials = read_trials(folder / "trials.txt")
        scores = cosine_scores(embeddings, trials)
        scores = as_norm(scores, trials, embeddings, cohort, top)
        write_scores(folder / "scores.txt", trials, scores)

    return score


def judge_call(name, n_trials, who):
    """An error rate of generated scores, half of them targets'."""
    rng = np.random.default_rng(2)
    labels = np.arange(n_trials) % 2 == 0
    scores = rng.normal(2.0 * labels).astype(np.float32)
    pair = [torch.from_numpy(scores[chosen]) for chosen in (labels, ~labels)]
    return {
        ("EER", "theirs"): lambda: EER(*pair)[0],
        ("EER", "ours"): lambda: eer(scores, labels)[0],
        ("minDCF", "theirs"): lambda: minDCF(*pair)[0] / 0.01,
        ("minDCF", "ours"): lambda: min_dcf(scores, labels, 0.01),
    }[name, who]


if __name__ == "__main__":
    parser = common.arguments(__doc__, device=False)
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
    parser.add_argument("--speechbrain_src", help="a copy of its repository")
    options = parser.parse_args()
    if options.speechbrain_src:
        task = against_speechbrain
    else:
        task = coverage if options.coverage else full_size
    with threadpool_limits(options.threads):
        task(options)
