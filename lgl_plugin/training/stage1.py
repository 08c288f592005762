"""Figures that Stage I must beat."""

from __future__ import annotations

import pathlib

import numpy as np

from lgl_plugin.inference.backends import Whitening
from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics
from lgl_plugin.training.held_out import separate_generator
from lgl_plugin.training.session import Session

# Utterances that the floor is whitened by: enough for a covariance of 160
# dimensions, where all of VoxCeleb2 would be embedded for hours.
SAMPLE = 20000
# Of the floor's whitening: the least EER on AN4, where 0.01 and 0.3 give 22 %.
SHRINKAGE = 0.1


def score_baselines(session: Session, folder: pathlib.Path) -> None:
    """Logs error rates of the floor and of the untrained encoder.

    The floor are means and deviations of the log-mel bands, whitened by a
    sample of the corpus: a network that does worse has learnt nothing of use.
    Nothing is logged without a trial list, and there is no floor of an encoder
    that has no `features`, such as one that takes waveforms.
    """
    new_encoder, whitening = session.settings.new_encoder, None
    with separate_generator("cpu"):
        features = getattr(new_encoder(), "features", None)

    def floor():
        # Normalising features by their mean would take it from the statistics.
        return Encoder(features, LogMelStatistics())

    def whitened(vectors):
        nonlocal whitening
        if whitening is None:
            rows = session.rows
            if len(rows) > SAMPLE:
                rng = np.random.default_rng(session.settings.seed)
                rows = np.sort(rng.choice(rows, SAMPLE, replace=False))
            sample = session.embed(floor(), rows).vectors
            whitening = Whitening(SHRINKAGE).fit(sample)
        return whitening(vectors)

    rivals = [("untrained", new_encoder, None, "untrained.npz")]
    if features is not None:
        rivals.insert(0, ("log-mel statistics", floor, whitened, "floor.npz"))
    for phase, make, after, name in rivals:
        figures = session.score(make(), folder / name, after)
        if figures:
            session.run.log(stage=0, phase=phase, **figures)
