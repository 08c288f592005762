#!/usr/bin/env python3
"""Pseudo-labels for a folder of audio, from a pretrained encoder.

Embeds each file, clusters the embeddings, and writes train.csv and dev.csv
with the cluster as spk_id: what SpeechBrain's speaker recipe trains on.

> python pseudo_label.py pseudo_label.yaml --data_folder=/path/to/audio \
    --n_clusters=1000
"""

import csv
import pathlib
import sys

import numpy as np
import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml
from speechbrain.inference.speaker import EncoderClassifier

from lgl_plugin.dataio.manifest import held_out, load_manifest
from lgl_plugin.dataio.prepare import prepare_manifest
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.runs.arguments import parse_arguments


def write_annotation(path, manifest, labels):
    """Copies rows of a manifest with pseudo-labels in place of speakers.

    Arguments
    ---------
    path : pathlib.Path
        The csv to write.
    manifest : pathlib.Path
        The csv to read.
    labels : dict
        From utterance ID to label; rows of other utterances are left out.
    """
    with (
        open(manifest, newline="", encoding="utf-8") as source,
        open(path, "w", newline="", encoding="utf-8") as target,
    ):
        rows = csv.DictReader(source)
        writer = csv.DictWriter(target, rows.fieldnames)
        writer.writeheader()
        for row in rows:
            if row["ID"] in labels:
                writer.writerow({**row, "spk_id": f"c{labels[row['ID']]}"})


def split(labels, dev_share, seed):
    """Rows to train on and rows to validate on.

    A cluster that would lie in the second alone is moved to the first: the
    recipe knows the speakers of its training set.
    """
    train, dev = held_out(len(labels), dev_share, seed)
    alone = ~np.isin(labels[dev], labels[train])
    return np.append(train, dev[alone]), dev[~alone]


if __name__ == "__main__":
    hparams_file, run_opts, overrides = parse_arguments(sys.argv[1:])
    with open(hparams_file, encoding="utf-8") as fin:
        hparams = load_hyperpyyaml(fin, overrides)
    folder = pathlib.Path(hparams["output_folder"])
    sb.create_experiment_directory(folder, hparams_file, overrides)

    listed = folder / "manifest.csv"
    prepare_manifest(hparams["data_folder"], listed, speaker_folder=False)
    manifest = load_manifest(listed, hparams["data_folder"])
    # SpeechBrain's recipe cuts chunks of this length at random.
    rows = np.flatnonzero(manifest.durations >= hparams["min_seconds"])

    encoder = EncoderClassifier.from_hparams(
        source=hparams["encoder_source"],
        savedir=folder / "encoder",
        run_opts=run_opts,
    )
    extract = hparams["new_extractor"](
        Encoder(
            features=encoder.mods.compute_features,
            network=encoder.mods.embedding_model,
            normalise=encoder.mods.mean_var_norm,
        ),
        device=encoder.device,
    )
    embeddings, bad = extract(manifest, rows)
    clusters = hparams["cluster"](embeddings.vectors)

    names = list(embeddings.utterances)
    parts = split(clusters.labels, hparams["dev_share"], hparams["seed"])
    for name, part in zip(("train", "dev"), parts):
        labels = {names[row]: clusters.labels[row] for row in part}
        write_annotation(folder / f"{name}.csv", listed, labels)
    print(
        f"{clusters.n_clusters} clusters of {len(names)} utterances in "
        f"{folder}/train.csv and {folder}/dev.csv; {len(bad)} could not be "
        f"used, {len(manifest) - len(rows)} are shorter than "
        f"{hparams['min_seconds']} s.\nTrain on them with "
        f"--out_n_neurons={clusters.n_clusters}."
    )
