#!/usr/bin/env python3
"""The ceiling: Stage II's training on the true labels, from the same start.

> python ceiling.py hparams/small_stage2.yaml --data_folder=/path/to/corpus \
    --pretrained_encoder=results/mine/ssps --output_folder=results/ceiling

It takes Stage II's yaml and all its overrides, and the encoder that Stage II
would start from. It trains for as many steps as all rounds together, in one
course of the learning rate. No training of the recipe calls it: true labels
are what that does without. `paper.py study` does.
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
    """Trains on the true labels, as a step of the run; those must be known."""
    settings = session.settings
    # Its own manifest: the session's names no speakers.
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
        session.seed(10)  # as the first step of the first round
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

    # The ceiling is not a step of a stage, so that changed settings are not
    # refused: with them in its source it is done again.
    made_from = digest([session.run.identity(), checksum(first)])
    session.run.step("ceiling", ceiling, made_from)


if __name__ == "__main__":
    main({2: train_ceiling})
