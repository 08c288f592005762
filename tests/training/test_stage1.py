"""The figures that Stage I must beat."""

import types

import torch

from lgl_plugin.inference.backends import Whitening
from lgl_plugin.nnet.encoders import LogMelStatistics
from lgl_plugin.training.stage1 import score_baselines


class Corpus:
    """A session that notes what it is to score."""

    def __init__(self):
        self.settings = types.SimpleNamespace(
            new_encoder=self.encoder, sample_rate=8000
        )
        self.run = types.SimpleNamespace(log=self.log)
        self.scored, self.records = {}, []

    def encoder(self):
        torch.rand(1)  # as weights draw
        return "untrained"

    def score(self, encoder, path, whitening):
        self.scored[path.name] = encoder, whitening
        return {"eer": 40.0}

    def log(self, **record):
        self.records.append(record)


def test_the_floor_is_whitened_log_mel_statistics(tmp_path):
    corpus = Corpus()
    torch.manual_seed(3)
    score_baselines(corpus, tmp_path)
    phases = [record["phase"] for record in corpus.records]
    assert phases == ["log-mel statistics", "untrained"]
    floor, whitening = corpus.scored["floor.npz"]
    assert isinstance(floor.network, LogMelStatistics)
    assert floor.features.compute_STFT.sample_rate == 8000
    assert isinstance(whitening, Whitening) and whitening.shrinkage < 1
    assert corpus.scored["untrained.npz"] == ("untrained", None)
    # The floor has drawn nothing: the untrained encoder is the first.
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.rand(1)
    assert torch.equal(after, torch.rand(1))


def test_without_trials_nothing_is_logged(tmp_path):
    corpus = Corpus()
    corpus.score = lambda *_, **__: {}
    score_baselines(corpus, tmp_path)
    assert not corpus.records
