#!/usr/bin/env python3
"""The ceiling: the same encoder, data and loss with the true labels.

> python benchmarks/supervised_ceiling.py hparams/small_stage2.yaml \
    --data_folder=/path/to/an4_sessions --output_folder=results/ceiling

It takes Stage II's yaml and all its overrides; `classifier_epochs` says how
long it trains, from random weights. It is no part of the recipe: true labels
are what the recipe does without.
"""

import pathlib
import sys

import speechbrain as sb

from lgl_plugin.runs.settings import load_settings
from lgl_plugin.training.fit import fit
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.training.session import Session

RECIPE = pathlib.Path(__file__).parents[1] / "recipes" / "VoxCeleb" / "LGL"

if __name__ == "__main__":
    sys.path.append(str(RECIPE))
    from train_lgl import observer_of

    hparams_file, run_opts, overrides = sb.parse_arguments(sys.argv[1:])
    settings, text = load_settings(hparams_file, overrides, run_opts)
    session = Session(settings, text, run_opts, observer_of)
    labels = session.manifest.speakers
    n_speakers = labels.max().item() + 1

    def train(folder):
        """Trains on the true labels and scores the trial list."""
        session.seed(1)
        modules = {
            "encoder": settings.new_encoder(),
            "classifier": settings.new_classifier(out_neurons=n_speakers),
            "aam": settings.aam,
            "gate": settings.no_gate,
            "memory": settings.new_memory(len(labels)),
        }
        fit(
            session,
            LossGatedBrain,
            modules,
            folder,
            settings.classifier_epochs,
            labels=labels,
            stage=0,
            phase="true labels",
        )
        figures = session.score(modules["encoder"])
        session.run.log(stage=0, phase="after true labels", **figures)

    session.run.step("supervised", train)
