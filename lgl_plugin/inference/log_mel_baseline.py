"""Log-mel statistics: a baseline, and extra features to cluster by."""

from speechbrain.lobes.features import Fbank

from lgl_plugin.inference.backends import Whitening
from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics

# Chosen for the strongest baseline: on two corpora 0.1 has the lowest EER, 20.7
# and 20.6 %; 0.01 and 0.3 give 22 %, 1 gives 25 %.
SHRINKAGE = 0.1


def log_mel_encoder(sample_rate: int = 16000) -> Encoder:
    """Makes an encoder of `LogMelStatistics` on SpeechBrain's 80 mel bands."""
    # Without mean normalisation: the means are half of the embedding.
    bands = Fbank(sample_rate=sample_rate, n_mels=80)
    return Encoder(bands, LogMelStatistics())


def log_mel_whitening() -> Whitening:
    """Makes the whitening that is part of the baseline."""
    return Whitening(SHRINKAGE)
