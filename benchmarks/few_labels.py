#!/usr/bin/env python3
"""Measures what labels of a few speakers are worth to Stage II.

> python benchmarks/few_labels.py results/lgl/1/export/stage1 an4_sessions \
    --speakers 0 5 10 20 --utterances 2 10 --lr=0.0003

A corpus is a folder with `train/<speaker>/…`, `test` and `trials.txt`. For each
number of speakers, and of utterances of each, a csv of labels is drawn from the
folders' names, as a user would give it, and a round of `hparams/adapt.yaml`
trains on it from the encoder. Test speakers are others. Further options are
settings of that yaml. The same command goes on where it was interrupted.
"""

import csv
import pathlib
import random

import common

from lgl_plugin.cli.recipe import RECIPE, load_recipe
from lgl_plugin.dataio.folder import find_audio
from lgl_plugin.runs.arguments import parse_arguments
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.run import fork
from lgl_plugin.runs.settings import settings_of


def main():
    """Prints the equal error rate of each cell."""
    parser = common.arguments(__doc__, repeats=False)
    parser.add_argument("encoder", type=pathlib.Path)
    parser.add_argument("corpus", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, default="results/labels")
    parser.add_argument(
        "--speakers", type=int, nargs="+", default=[0, 5, 10, 20]
    )
    parser.add_argument("--utterances", type=int, nargs="+", default=[2, 10])
    options, settings = parser.parse_known_args()
    # A mistyped option shows here, and not after labels were written.
    settings_of(words(options, options.work, settings, None))
    first, rows = None, []
    for n_speakers in options.speakers:
        for number in options.utterances if n_speakers else [0]:
            folder = options.work / f"{n_speakers}x{number}"
            if first:  # the embeddings are the same for all
                fork(first, folder, ["iter1/embeddings"])
            labels = write_labels(options, folder, n_speakers, number)
            given = words(options, folder, settings, labels)
            load_recipe().train(*parse_arguments(given))
            first = first or folder
            rows.append(
                {
                    "labelled speakers": n_speakers,
                    "utterances each": number,
                    **figures(folder),
                }
            )
            common.report(rows, "few labels", options.json, options.device)


def write_labels(options, folder, n_speakers, number):
    """Writes labels of the first speakers of one order, the same for all."""
    if not n_speakers:
        return None
    found = [
        n for n, fault in find_audio(options.corpus / "train") if not fault
    ]
    random.Random(0).shuffle(found)
    by_speaker = {}
    for name in found:
        by_speaker.setdefault(name.split("/")[0], []).append(name)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "given.csv", "w", newline="", encoding="utf-8") as out:
        writer = csv.writer(out)
        writer.writerow(["utterance", "speaker"])
        for speaker in list(by_speaker)[:n_speakers]:
            for name in by_speaker[speaker][:number]:
                writer.writerow([name, speaker])
    return folder / "given.csv"


def words(options, folder, settings, labels):
    """The recipe's command line for a round in a folder."""
    corpus = options.corpus.absolute()
    return [
        str(RECIPE / "hparams" / "adapt.yaml"),
        f"--data_folder={corpus / 'train'}",
        f"--train_folder={corpus / 'train'}",
        f"--verification_file={corpus / 'trials.txt'}",
        f"--trial_folder={corpus}",
        f"--output_folder={folder}",
        f"--pretrained_encoder={options.encoder}",
        f"--labels_file={labels or 'null'}",
        f"--device={options.device}",
        *settings,
    ]


def figures(folder):
    """The error rate at the end, and how good the classes were."""
    of = {record["phase"]: record for record in read_metrics(folder)}
    last = [phase for phase in of if phase.startswith("after ")][-1]
    return {
        "EER %": of[last]["eer"],
        "classes": of["clusters"]["n_clusters"],
        "AMI": of["clusters"].get("ami"),
    }


if __name__ == "__main__":
    main()
