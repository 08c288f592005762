"""Figures that Stage I must beat."""

from __future__ import annotations

import pathlib

from lgl_plugin.inference.backends import Whitening
from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics
from lgl_plugin.training.held_out import separate_generator
from lgl_plugin.training.session import Session

# Of the floor's whitening, which no network should find easy to beat: the least
# EER on two corpora, 20.7 and 20.6 %, where 0.01 and 0.3 give 22, 1 gives 25.
SHRINKAGE = 0.1


def score_baselines(session: Session, folder: pathlib.Path) -> None:
    """Logs error rates of the floor and of the untrained encoder.

    The floor are means and deviations of the log-mel bands, whitened by a
    sample of the corpus: a network that does worse has learnt nothing of use.
    That whitening is part of it, as weights are of a network; the run's
    back-end comes on top, as for a network. Nothing is logged without a trial
    list, and there is no floor of an encoder that has no `features`, such as
    one that takes waveforms.
    """
    new_encoder = session.settings.new_encoder
    with separate_generator("cpu"):
        features = getattr(new_encoder(), "features", None)

    def floor():
        # Normalising features by their mean would take it from the statistics.
        return Encoder(features, LogMelStatistics())

    rivals = [("untrained", new_encoder, None, "untrained.npz")]
    if features is not None:
        own = Whitening(SHRINKAGE)
        rivals.insert(0, ("log-mel statistics", floor, own, "floor.npz"))
    for phase, make, whitening, name in rivals:
        path = folder / name
        figures = session.score(make(), path, whitening=whitening)
        if figures:
            session.run.log(stage=0, phase=phase, **figures)
