"""Scores encoders on trial lists: scores, error rates, DET curves.

The first minute of an utterance is embedded. Scores are cosines. With a cohort
there are also cosines of embeddings whitened on the cohort, scores of PLDA
fitted on the cohort's clusters, and cosines normalised by AS-norm.
"""

import json
import os
import pathlib
import time
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from lgl_plugin.adaptation.verdict import count_speakers
from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.cohort import draw_cohort
from lgl_plugin.dataio.folder import refuse_recordings
from lgl_plugin.dataio.trials import (
    Trials,
    join_trials,
    read_trials,
    trial_audio,
)
from lgl_plugin.evaluation.verification import (
    TOP,
    as_norm,
    cosine_scores,
    error_rates,
    rates_at,
    write_scores,
)
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.inference.folder import read_threshold, refuse_foreign
from lgl_plugin.inference.plda import fit_plda
from lgl_plugin.inference.ward_clusters import ward_labels
from lgl_plugin.report.figures import det, save
from lgl_plugin.utils.device import check_device
from lgl_plugin.utils.files import (
    check_writable,
    read_json,
    short_names,
    write_json,
)
from lgl_plugin.utils.tables import markdown_table

AT_THRESHOLD = "FA / FR %"
SCORES, METRICS = "scores.txt", "metrics.json"  # in a list's folder


def verify_encoders(
    encoders: Sequence[str | pathlib.Path],
    audio: str | pathlib.Path,
    trial_lists: Sequence[str | pathlib.Path],
    output_folder: str | pathlib.Path,
    cohort: str | pathlib.Path | None = None,
    top: int | None = None,
    cohort_utterances: int | None = None,
    seed: int = 0,
    channel: int | None = None,
    device: str | None = None,
    num_workers: int | None = None,
) -> dict[str, dict]:
    """Scores trial lists by encoders; writes scores, error rates, DET curves.

    The options are those of `lgl verify`. Each encoder embeds each utterance
    once, even if several lists have it. If there are several lists, each has a
    folder in the output folder; if there are several encoders, each has a
    folder in a list's folder. With a cohort, embeddings are also whitened
    (`inference.backends.Whitening`) and scored by PLDA on the cohort's clusters
    (`inference.plda`). Scores are normalised by AS-norm, and `scores.txt` holds
    these normalised scores. Scores that a cohort does not allow are left out.

    Returns, by list, the content of its `metrics.json`: under "scores" the
    result of `error_rates` for each system, counts, and the options. A system
    is "cosine", "whitened", "PLDA" or "AS-norm", after the encoder's name if
    there are several. The cosine of an encoder with a threshold also has the
    result of `rates_at`.

    Raises ValueError if an utterance cannot be embedded, the cohort is too
    small, or an option of the cohort is given without one. Raises
    FileExistsError if the folder holds recordings, or results of an earlier
    call with other lists or encoders.
    """
    if cohort is None and (top, cohort_utterances) != (None, None):
        raise ValueError(
            "--top and --cohort_utterances are for a cohort: add --cohort, or "
            "leave them out"
        )
    if cohort_utterances is None:
        cohort_utterances = 20000
    # Must come first, while the arguments are the only local variables.
    options = json.loads(json.dumps(locals(), default=str))
    # All checks come before an encoder runs for hours.
    device = check_device(device)
    extractors = {
        name: load_extractor(path, device, num_workers)
        for name, path in zip(short_names(encoders), encoders)
    }
    decisions = dict(zip(extractors, map(read_threshold, encoders)))
    lists = {
        name: read_trials(path, audio)
        for name, path in zip(short_names(trial_lists, ".txt"), trial_lists)
    }
    joined = join_trials([*lists.values()])
    rates = sorted({extract.sample_rate for extract in extractors.values()})
    speech = trial_audio(joined, audio, channel, rates)
    others = None
    if cohort is not None:
        others = draw_cohort(
            *(cohort, trial_lists, audio),
            *(cohort_utterances, seed, channel, rates),
        )
        source = f"{cohort} by --cohort_utterances={cohort_utterances}"
        top = _top(top, len(others), source)
    top = options["top"] = TOP if top is None else top
    output = pathlib.Path(output_folder)
    places = {n: output / n if len(lists) > 1 else output for n in lists}
    refuse_recordings(output, audio)
    refuse_foreign(output, ())
    refuse_others(output, places.values(), extractors)
    check_writable(output)
    bounds = np.cumsum([len(trials) for trials in lists.values()])[:-1]
    systems: dict[str, dict] = {name: {} for name in lists}
    # By system: an encoder's threshold is only for cosines of its embeddings.
    thresholds = {}
    counts: dict[str, Any] = {"utterances_per_second": {}}
    for encoder, extract in extractors.items():
        subfolder = encoder if len(extractors) > 1 else ""
        prefix = f"{subfolder}, " if subfolder else ""
        vectors, speed = _embed(extract, speech, prefix)
        counts["utterances_per_second"][encoder] = speed
        scores = {"cosine": cosine_scores(vectors, joined)}
        thresholds[prefix + "cosine"] = decisions[encoder]
        if others is not None:
            near = _embed_cohort(extract, others)
            counts.setdefault("cohort", {})[encoder] = len(near)
            cosine = scores["cosine"]
            scores |= cohort_scores(cosine, joined, vectors, near, top)
        for kind, values in scores.items():
            for name, part in zip(lists, np.split(values, bounds)):
                systems[name][prefix + kind] = part
        normalised = "AS-norm" if "AS-norm" in scores else "cosine"
        for name, trials in lists.items():
            best = systems[name][prefix + normalised]
            write_scores(places[name] / subfolder / SCORES, trials, best)
    metrics = {}
    for name, trials in lists.items():
        metrics[name] = {
            "scores": _rate(systems[name], trials, thresholds, seed),
            "trials": len(trials),
            "targets": int(trials.labels.sum()),
            "utterances": len(trials.utterances),
            **counts,
            "options": options,
        }
        _draw(systems[name], trials, metrics[name]["scores"], places[name])
        write_json(places[name] / METRICS, metrics[name])
    return metrics


def _top(top, number, source):
    """Returns how many of the nearest files of a cohort count in AS-norm.

    The cohort has `number` files. By default `TOP` count, or all if fewer.
    """
    if number < 2:
        raise ValueError(
            f"{number} files could be drawn from {source}, and 2 are needed: "
            "give more audio"
        )
    if top is None:
        top = min(TOP, number)
        if top < TOP:
            print(f"The cohort has {top} files, fewer than {TOP}: all count")
    if not 2 <= top <= number:
        raise ValueError(
            f"--top={top} must be from 2 to the {number} files drawn from "
            f"{source}: give more audio or a smaller --top"
        )
    return top


def refuse_others(
    output: pathlib.Path,
    places: Iterable[pathlib.Path],
    encoders: Collection[str],
) -> None:
    """Refuses a folder where results of an earlier call would stay.

    Scores of other lists or encoders would look like results of this call.
    Results in the lists' `places` are replaced, but not a metrics.json of
    another program.
    """

    def scores(place, names):
        return [place / (n if len(names) > 1 else "") / SCORES for n in names]

    places = list(places)
    for record in (place / METRICS for place in places):
        if record.exists() and "options" not in read_json(record):
            raise FileExistsError(
                f"{record} is no result of `lgl verify`, and would be "
                "replaced: name another folder"
            )
    ours = {path for place in places for path in scores(place, encoders)}
    for record in (output / METRICS, *sorted(output.glob(f"*/{METRICS}"))):
        before = read_json(record)
        into = before.get("options", {}).get("output_folder")
        if into is None or os.path.abspath(into) != os.path.abspath(output):
            continue  # of a call with another output folder
        names = before.get("utterances_per_second", {})
        for path in scores(record.parent, names):
            if path.exists() and path not in ours:
                raise FileExistsError(
                    f"{output} holds {path.relative_to(output)} of an earlier "
                    "call with other lists or encoders, which would pass for "
                    "this call's: name another folder, or delete that one"
                )


def _embed(extract, speech, prefix):
    """Embeds the trials' utterances; returns vectors, utterances a second."""
    started = time.perf_counter()
    vectors = extract.embed_all(speech)
    speed = len(speech) / (time.perf_counter() - started)
    print(f"{prefix}{len(speech)} utterances embedded, {speed:.1f} a second")
    return vectors, speed


def _rate(systems, trials, thresholds, seed):
    """Returns the error rates of each system on a list."""
    rates = {}
    for system, values in systems.items():
        rates[system] = error_rates(values, trials, seed)
        if (threshold := thresholds.get(system)) is not None:
            rates[system] |= rates_at(threshold, values, trials.labels)
    return rates


def _draw(systems, trials, rates, folder):
    """Draws the DET curves of a list."""
    curves = {
        f"{system}: EER {rates[system]['eer']:.1f} %": (values, trials.labels)
        for system, values in systems.items()
    }
    save(det(curves), folder, "det")


def _embed_cohort(extract, others):
    """Embeds the cohort, without files that cannot be read."""
    try:
        embeddings, bad = extract(others, np.arange(len(others)))
    except BadAudio as error:
        print(f"No file of the cohort can be used: {error}")
        return np.zeros((0, 1))
    if bad:
        print(
            f"{len(bad)} files of the cohort cannot be embedded and are left "
            f"out; the first: {' '.join(bad[0])}"
        )
    return embeddings.vectors


def cohort_scores(
    cosine: np.ndarray,
    trials: Trials,
    vectors: np.ndarray,
    cohort: np.ndarray,
    top: int,
) -> dict[str, np.ndarray]:
    """Scores trials (T,) with the help of a cohort's embeddings (M, D).

    Takes the trials' cosines (T,) and their utterances' embeddings (U, D). A
    kind of score that the cohort does not allow, for example because its files
    are copies, is left out with a printed line. It raises no error, because the
    embeddings may have taken hours.
    """

    def whitened():
        return cosine_scores(Whitening().fit(cohort)(vectors), trials)

    def plda():
        labels = ward_labels(cohort, count_speakers(cohort))
        fitted = fit_plda(cohort, labels)
        return fitted.ratios(vectors, trials.enrolment, trials.test)

    def normalised():
        return as_norm(cosine, trials, vectors, cohort, top)

    if len(cohort) < top:
        print(f"--top={top}: the cohort has {len(cohort)}, which all count")
    scores = {}
    kinds = {"whitened": whitened, "PLDA": plda, "AS-norm": normalised}
    for kind, score in kinds.items() if len(cohort) else ():
        try:
            scores[kind] = score()
        except ValueError as error:
            print(f"No {kind} by the cohort: {error}")
    return scores


def table(metrics: dict[str, dict]) -> str:
    """Returns a Markdown table of the error rates from `verify_encoders`.

    If an encoder has a threshold, a column has the error rates at it.
    """
    header = ["scores", "EER % (95 %)"]
    decided = has_thresholds(metrics)
    header += [AT_THRESHOLD] if decided else []
    header += ["minDCF 0.01", "minDCF 0.05", "threshold"]
    several = len(metrics) > 1
    rows = []
    for trials, of_list in metrics.items():
        for name, rates in of_list["scores"].items():
            rate = f"{rates['eer']:.2f}"
            if rates["eer_interval"]:
                rate += " ({:.2f}-{:.2f})".format(*rates["eer_interval"])
            others = ("min_dcf_001", "min_dcf_005", "threshold")
            row = [name, rate]
            if decided:
                row.append(_at_threshold(rates))
            row += [f"{rates[key]:.3f}" for key in others]
            rows.append([trials, *row] if several else row)
    return markdown_table(["trials", *header] if several else header, rows)


def has_thresholds(metrics: dict[str, dict]) -> bool:
    """Tells whether any encoder has a threshold of its own."""
    return any(
        "encoder_threshold" in rates
        for of_list in metrics.values()
        for rates in of_list["scores"].values()
    )


def _at_threshold(rates):
    """Returns the cell of the rates at an encoder's threshold, "" for none."""
    if "encoder_threshold" not in rates:
        return ""
    accepted, rejected = rates["false_acceptance"], rates["false_rejection"]
    at = rates["encoder_threshold"]
    return f"{accepted:.2f} / {rejected:.2f} (at {at:.3f})"
