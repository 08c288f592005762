#!/usr/bin/env python3
"""The ceiling: the same encoder, data and loss with the true labels.

> python benchmarks/supervised_ceiling.py hparams/small_stage2.yaml \
    --data_folder=/path/to/an4_sessions --output_folder=results/ceiling

It takes Stage II's yaml and all its overrides; `classifier_epochs` says how
long it trains, from random weights. It is no part of the recipe: true labels
are what the recipe does without.
"""

import sys

import speechbrain as sb
from hyperpyyaml import load_hyperpyyaml, resolve_references

from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.training.session import Training

if __name__ == "__main__":
    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    with open(hparams_file, encoding="utf-8") as fin:
        settings = resolve_references(fin, overrides).getvalue()
    hparams = load_hyperpyyaml(settings)
    training = Training(hparams, run_opts, settings)

    labels = training.manifest.speakers
    n_speakers = labels.max().item() + 1

    def train(folder):
        """Trains on the true labels and scores the trial list."""
        training.seed(1)
        modules = {
            "embedding_model": hparams["new_encoder"](),
            "classifier": hparams["new_classifier"](out_neurons=n_speakers),
            "aam": hparams["aam"],
            "gate": hparams["no_gate"],
            "memory": hparams["new_memory"](len(labels)),
        }
        name = "true labels"
        training.fit(
            LossGatedBrain,
            modules,
            folder,
            hparams["classifier_epochs"],
            labels,
            stage=0,
            phase=name,
        )
        figures = training.verify(modules["embedding_model"])
        training.run.log(stage=0, phase=f"after {name}", **figures)

    training.run.step("supervised", train)
