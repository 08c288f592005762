#!/usr/bin/env python3
"""Measures what `lgl adapt --train` gained, where speakers are known.

> python benchmarks/trained_rung.py campplus_cn_en_common.pt an4_sessions \
    results/cam --threads=1

The run adapted the encoder to `<corpus>/train`, which has a folder for each
speaker and in there one for each session. Two sets of speakers that it did not
train on tell: those of the corpus's `trials.txt`, and those whose recordings
its split kept out. For the latter all pairs of two sessions are trials, but of
speakers of whom it trained on a quarter of the recordings or more: clusters
are not quite speakers.
"""

import pathlib

import common
import numpy as np

from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.dataio.trials import Trials, read_trials, trial_audio
from lgl_plugin.evaluation.verification import cosine_scores, figures_of
from lgl_plugin.inference.backends import load_backend
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.runs.weights import BACKEND
from lgl_plugin.utils.files import load_arrays

MOST_TRAINED = 0.25  # of a speaker's recordings


def main():
    """Prints the error rates before and after, for both sets of speakers."""
    parser = common.arguments(__doc__, repeats=False)
    for name in ("encoder", "corpus", "run"):
        parser.add_argument(name, type=pathlib.Path)
    options = parser.parse_args()
    run, corpus = options.run, options.corpus
    trainings = [*run.glob("training*")]
    if len(trainings) != 1:
        parser.error(f"{run} holds {len(trainings)} trainings, not one")
    rounds = trainings[0].glob("export/iter*")
    trained = max(rounds, key=lambda path: int(path.name[4:]))
    trials = read_trials(corpus / "trials.txt", corpus)
    manifest = load_manifest(run / "manifest.csv", corpus / "train")
    rows, kept_out = strangers(manifest, run)
    sets = {
        "trial list": (trials, trial_audio(trials, corpus), None),
        "kept out": (kept_out, manifest, rows),
    }
    found = []
    for what, source, steps in (
        ("as it came", options.encoder, ["centring", "whitening"]),
        ("trained, and the back-end kept before", trained, ["loss_gate"]),
    ):
        extract = load_extractor(source, options.device)
        backends = {"cosine": np.asarray}  # as it is
        for step in steps:
            if (run / step / BACKEND).exists():
                backends[step] = load_backend(run / step / BACKEND)
        vectors = {
            name: extract.embed_all(audio, chosen)
            for name, (_, audio, chosen) in sets.items()
        }
        for title, backend in backends.items():
            row = {"encoder": what, "scores": title}
            for name, (listed, *_) in sets.items():
                scores = cosine_scores(backend(vectors[name]), listed)
                rate = figures_of(scores, listed)["eer"]
                row[f"EER %, {name}"] = rate
            found.append(row)
    n_speakers = len({manifest.ids[row].split("/")[0] for row in rows})
    title = (
        f"{len(rows)} recordings of {n_speakers} speakers that were kept out, "
        f"{int(kept_out.labels.sum()):,} target trials"
    )
    common.report(found, title, options.json)


def strangers(manifest, run):
    """Returns rows of speakers that were not trained on, and their trials."""
    places = [manifest.ids[n].split("/") for n in range(len(manifest))]
    speakers = np.array([speaker for speaker, *_ in places])
    sessions = np.array(["/".join(place[:2]) for place in places])
    trained = np.ones(len(manifest))
    trained[load_arrays(run / "split" / "rows.npz")["kept_out"]] = 0
    names, speaker = np.unique(speakers, return_inverse=True)
    share = np.bincount(speaker, trained) / np.bincount(speaker)
    rows = np.flatnonzero((trained == 0) & (share[speaker] < MOST_TRAINED))
    first, second = np.triu_indices(len(rows), 1)
    across = sessions[rows[first]] != sessions[rows[second]]
    first, second = first[across], second[across]
    labels = speaker[rows[first]] == speaker[rows[second]]
    return rows, Trials(
        labels, [manifest.ids[row] for row in rows], first, second
    )


if __name__ == "__main__":
    main()
