"""The figures that Stage I must beat."""

import types

import numpy as np
import pytest
import torch

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.nnet.encoders import LogMelStatistics
from lgl_plugin.training import stage1
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


def test_the_baseline_is_whitened_log_mel_statistics(tmp_path):
    corpus = Corpus()
    torch.manual_seed(3)
    score_baselines(corpus, tmp_path)
    phases = [record["phase"] for record in corpus.records]
    assert phases == ["log-mel statistics", "untrained"]
    encoder, whitening = corpus.scored["floor.npz"]
    assert isinstance(encoder.network, LogMelStatistics)
    assert encoder.features.compute_STFT.sample_rate == 8000
    assert isinstance(whitening, Whitening) and whitening.shrinkage < 1
    assert corpus.scored["untrained.npz"] == ("untrained", None)
    # The baseline has drawn nothing: the untrained encoder is the first.
    after = torch.rand(1)
    torch.manual_seed(3)
    torch.rand(1)
    assert torch.equal(after, torch.rand(1))


def test_without_trials_nothing_is_logged(tmp_path):
    corpus = Corpus()
    corpus.score = lambda *_, **__: {}
    score_baselines(corpus, tmp_path)
    assert not corpus.records


@pytest.mark.parametrize("twice", [False, True])
def test_positives_are_of_clusters_as_the_settings_say(monkeypatch, twice):
    told = {}

    def note(vectors, cluster, backend, log_mels, share, twice):
        told.update(cluster=cluster, backend=backend, share=share, twice=twice)
        return types.SimpleNamespace(labels=np.zeros(len(vectors), int)), None

    monkeypatch.setattr(stage1, "pseudo_speakers", note)
    settings = types.SimpleNamespace(
        ssps_cluster=TorchKMeans(2),
        ssps_cluster_twice=twice,
        ssps_backend=None,
        ssps_log_mel_share=0,
        ssps_source="own",
    )
    store = Embeddings(["a", "b"], np.eye(2, dtype=np.float32))
    session = types.SimpleNamespace(
        settings=settings,
        train_rows=np.arange(2),
        device="cpu",
        embed=lambda encoder, rows: store,
        manifest=types.SimpleNamespace(rows=lambda names: np.arange(2)),
    )
    clusters, sources, rows = stage1.grouping(session)(None)
    assert clusters.tolist() == sources.tolist() == [0, 0]
    assert told["twice"] is twice and told["cluster"] is settings.ssps_cluster
