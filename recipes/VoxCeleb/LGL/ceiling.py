#!/usr/bin/env python3
"""Trains on the true labels from Stage II's start: the ceiling of a run.

> python ceiling.py hparams/small_stage2.yaml --data_folder=/path/to/corpus \
    --pretrained_encoder=results/mine/ssps --output_folder=results/ceiling

The script takes Stage II's yaml and all its overrides, and the encoder that
Stage II would start from. It trains for as many steps as all rounds together,
with one learning-rate schedule. Only `paper.py study` calls it: the recipe's
own trainings use no true labels.
"""

from train_lgl import main

from lgl_plugin.dataio.manifest import run_manifest
from lgl_plugin.runs.metrics_log import TRUE_LABELS
from lgl_plugin.runs.run import SCORES
from lgl_plugin.runs.state import digest
from lgl_plugin.runs.weights import BACKEND, ENCODER, load_weights, save_weights
from lgl_plugin.training.fit import fit
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.training.stage2 import stage2_modules
from lgl_plugin.training.start import check_trials, find_encoder
from lgl_plugin.utils.files import checksum


def train_ceiling(session):
    """Trains on the true labels, as a step of the run; all must be known."""
    settings = session.settings
    # Read again, because the session's manifest has no speakers.
    speakers = run_manifest(session.run.folder, dict(settings)).speakers
    if not (speakers >= 0).all():
        raise ValueError(
            "ceiling: the manifest must name each utterance's speaker, set "
            "--speaker_folder=True"
        )
    first = find_encoder(session)
    check_trials(session, first)
    epochs = settings.classifier_epochs + settings.gated_epochs

    def ceiling(folder):
        session.seed(10)  # that of the first round's first step
        encoder = settings.new_encoder()
        load_weights(encoder.network, first)
        n_speakers = int(speakers.max()) + 1
        classifier = settings.new_classifier(out_neurons=n_speakers)
        fit(
            session,
            LossGatedBrain,
            stage2_modules(settings, encoder, classifier),
            folder,
            settings.n_iterations * epochs,
            labels=speakers,
            stage=0,
            phase=TRUE_LABELS,
        )
        save_weights(encoder.network, folder / ENCODER)
        figures = session.score(encoder, folder / SCORES, folder / BACKEND)
        session.log(stage=0, phase=f"after {TRUE_LABELS}", **figures)

    # The ceiling is no step of a stage, so that changed settings are not
    # refused. Their digest is part of the source, so that changed settings redo
    # the ceiling.
    made_from = digest([session.run.identity(), checksum(first)])
    session.run.step("ceiling", ceiling, made_from)


if __name__ == "__main__":
    main({2: train_ceiling})
