"""The figures that Stage I must beat."""

import types

import pytest
import torch
from speechbrain.lobes.features import Fbank

from lgl_plugin.inference.backends import Whitening
from lgl_plugin.nnet.encoders import LogMelStatistics
from lgl_plugin.nnet.features import Waveform
from lgl_plugin.training.stage1 import SHRINKAGE, score_baselines


class Corpus:
    """A session that notes what it is to score."""

    def __init__(self, features):
        self.features = features
        self.settings = types.SimpleNamespace(new_encoder=self.encoder)
        self.run = types.SimpleNamespace(log=self.log)
        self.scored, self.records = {}, []

    def encoder(self):
        torch.rand(1)  # as weights draw
        return types.SimpleNamespace(**self.features)

    def score(self, encoder, path, whitening):
        self.scored[path.name] = encoder, whitening
        return {"eer": 40.0}

    def log(self, **record):
        self.records.append(record)


@pytest.mark.parametrize("parts", [{}, {"features": Waveform()}])
def test_an_encoder_without_features_has_no_floor(tmp_path, parts):
    corpus = Corpus(parts)
    score_baselines(corpus, tmp_path)
    assert [record["phase"] for record in corpus.records] == ["untrained"]
    assert corpus.scored["untrained.npz"][1] is None


def test_the_floor_is_whitened_log_mel_statistics(tmp_path):
    corpus = Corpus({"features": Fbank(n_mels=5)})
    torch.manual_seed(3)
    score_baselines(corpus, tmp_path)
    phases = [record["phase"] for record in corpus.records]
    assert phases == ["log-mel statistics", "untrained"]
    floor, whitening = corpus.scored["floor.npz"]
    assert isinstance(floor.network, LogMelStatistics)
    assert isinstance(whitening, Whitening)
    assert whitening.shrinkage == SHRINKAGE
    # The floor has drawn nothing: the untrained encoder is the first.
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.rand(1)
    assert torch.equal(after, torch.rand(1))


def test_without_trials_nothing_is_logged(tmp_path):
    corpus = Corpus({"features": Fbank(n_mels=5)})
    corpus.score = lambda *_, **__: {}
    score_baselines(corpus, tmp_path)
    assert not corpus.records
