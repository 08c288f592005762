"""The figures that Stage I must beat."""

import types

import numpy as np
import pytest
import torch
from speechbrain.lobes.features import Fbank

from lgl_plugin.inference.backends import Whitening
from lgl_plugin.nnet.encoders import LogMelStatistics
from lgl_plugin.training import stage1
from lgl_plugin.training.stage1 import score_baselines


class Corpus:
    """A session whose utterances are their own embeddings."""

    def __init__(self, n_utterances):
        rng = np.random.default_rng(0)
        self.vectors = rng.normal(size=(n_utterances, 3)).astype(np.float32)
        self.rows = np.arange(n_utterances)
        self.settings = types.SimpleNamespace(seed=7, new_encoder=self.encoder)
        self.run = types.SimpleNamespace(log=self.log)
        self.asked, self.scored, self.records = [], {}, []

    def encoder(self):
        return types.SimpleNamespace(features=Fbank(n_mels=5))

    def embed(self, encoder, rows=None):
        assert isinstance(encoder.network, LogMelStatistics)
        self.asked.append(rows)
        return types.SimpleNamespace(vectors=self.vectors[rows])

    def score(self, encoder, path, after):
        if after is not None:
            self.scored[path.name] = after(self.vectors[:4])
        return {"eer": 40.0}

    def log(self, **record):
        self.records.append(record)


def test_an_encoder_without_features_has_no_floor(tmp_path):
    corpus = Corpus(20)
    corpus.settings.new_encoder = torch.nn.Identity
    score_baselines(corpus, tmp_path)
    assert [record["phase"] for record in corpus.records] == ["untrained"]
    assert not corpus.asked


@pytest.mark.parametrize("n_utterances", [20, 50, 51, 300])
def test_the_floor_is_whitened_by_a_sample(tmp_path, monkeypatch, n_utterances):
    monkeypatch.setattr(stage1, "SAMPLE", 50)
    corpus, again = Corpus(n_utterances), Corpus(n_utterances)
    state = torch.get_rng_state()
    score_baselines(corpus, tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    score_baselines(again, tmp_path)
    (rows,) = corpus.asked
    assert np.array_equal(rows, again.asked[0])
    assert len(rows) == min(n_utterances, 50) == len(set(rows.tolist()))
    assert (np.diff(rows) > 0).all()  # audio is read forwards
    if n_utterances <= 50:
        assert np.array_equal(rows, corpus.rows)
    whitening = Whitening(stage1.SHRINKAGE).fit(corpus.vectors[rows])
    expected = whitening(corpus.vectors[:4])
    np.testing.assert_array_equal(corpus.scored["floor.npz"], expected)
    phases = [record["phase"] for record in corpus.records]
    assert phases == ["log-mel statistics", "untrained"]
