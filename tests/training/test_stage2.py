"""A round: its clusters, its classifier and gate, its large margin."""

import json
import pathlib
import types

import numpy as np
import pytest
import torch
import train_lgl  # the recipe
from blobs import blobs, recordings, unit
from sklearn.metrics import adjusted_rand_score
from speechbrain.lobes.models.ECAPA_TDNN import Classifier

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.two_step import TwoStepKMeans
from lgl_plugin.dataio.given import GivenLabels
from lgl_plugin.dataio.labels import labelled_rows, read_labels
from lgl_plugin.dataio.manifest import Strings
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.metrics.agreement import ami
from lgl_plugin.nnet.gates import DynamicGate
from lgl_plugin.nnet.losses import SubCentreClassifier
from lgl_plugin.training.stage2 import LOG_MELS, Round, start_from


class Stretched:
    """A back-end that undoes what `stretched` does to the embeddings."""

    def fit(self, embeddings):
        self.scale = embeddings.std(axis=0)
        return self

    def __call__(self, embeddings):
        return embeddings / self.scale


@pytest.fixture
def cluster(tmp_path):
    """Clusters embeddings in a round without run; returns what it leaves."""

    def work(
        embeddings,
        clusterer,
        backend=None,
        least=1,
        twice=False,
        given=None,
        log_mels=None,
        share=0,
    ):
        this = Round.__new__(Round)
        this.folder, this.number, this.given = tmp_path / "iter2", 1, given
        this.source = tmp_path / "encoder"
        this.source.touch()
        this.settings = types.SimpleNamespace(
            seed=0,
            cluster=clusterer,
            cluster_backend=backend,
            log_mel_share=share,
            cluster_twice=twice,
            min_cluster_size=least,
        )
        logged = {}
        this.log = logged.update
        this.session = types.SimpleNamespace(
            manifest=types.SimpleNamespace(
                rows=lambda n: [int(x) for x in n],
                ids=[str(n) for n in range(len(embeddings))],
            ),
            observer=types.SimpleNamespace(clusters=lambda rows, labels: {}),
        )
        names = Strings(str(n) for n in range(len(embeddings)))
        Embeddings(names, embeddings).save(this.folder / "embeddings")
        if log_mels is not None:  # of the first round, and other utterances
            names = Strings(["bad", *names][: len(log_mels) + 1])
            log_mels = np.vstack([np.ones_like(log_mels[:1]), log_mels])
            store = tmp_path / "iter1" / "embeddings" / LOG_MELS
            Embeddings(names, log_mels).save(store)
        facts = this.cluster(tmp_path)
        names, labels = read_labels(tmp_path / "labels.csv")
        by_row = np.full(len(embeddings), -1)
        by_row[[int(name) for name in names]] = labels
        left = json.loads((tmp_path / "labels.json").read_text())
        assert left["inertia"]
        assert left.get("speakers") == (given and [*given.speakers])
        rows = labelled_rows(tmp_path, this.session.manifest)
        known = np.full(len(embeddings), -1) if given is None else given.by_row
        assert rows == np.flatnonzero(known >= 0).tolist()
        centroids = np.load(pathlib.Path(tmp_path) / "centroids.npy")
        assert facts["n_clusters"] == logged["n_clusters"] == len(centroids)
        return by_row, centroids, logged

    return work


def check_centroids(centroids, embeddings, labels):
    means = [unit(embeddings)[labels == k].mean(0) for k in set(labels) - {-1}]
    np.testing.assert_allclose(centroids, unit(np.array(means)), atol=1e-5)


def test_a_backend_is_for_the_clustering_alone(cluster):
    """Its clusters are better; the centroids stay in the encoder's space."""
    points, speakers = blobs(12, 20, spread=0.03)
    points = unit(points).astype(np.float32)
    points[:, 0] += 20 * np.random.default_rng(0).normal(size=len(points))
    clusterer = TwoStepKMeans(TorchKMeans(500), 12)
    without, _, _ = cluster(points, clusterer)
    labels, centroids, _ = cluster(points, clusterer, Stretched())
    assert adjusted_rand_score(speakers, without) < 0.5
    assert adjusted_rand_score(speakers, labels) > 0.99
    check_centroids(centroids, points, labels)


def test_clusters_are_made_twice_where_the_setting_says_so(cluster):
    speakers, points = recordings()
    clusterer = TwoStepKMeans(TorchKMeans(500), 24)
    once, _, _ = cluster(points, clusterer)
    labels, centroids, _ = cluster(points, clusterer, twice=True)
    assert ami(speakers, labels) > ami(speakers, once) + 0.02
    check_centroids(centroids, points, labels)


def test_small_clusters_are_left_out(cluster):
    points, speakers = blobs(5, 20, spread=0.03)
    few = (speakers >= 2) | (np.cumsum(speakers < 2) <= 3)
    points, speakers = points[few], speakers[few]
    clusterer = TwoStepKMeans(TorchKMeans(500), len(set(speakers)))
    labels, centroids, logged = cluster(points, clusterer, least=4)
    assert set(labels) == {-1, 0, 1, 2} and len(centroids) == 3
    assert (labels[speakers < 2] == -1).all()
    assert adjusted_rand_score(speakers[labels >= 0], labels[labels >= 0]) == 1
    assert logged["labelled_share"] == pytest.approx(60 / 63)
    assert logged["largest_share"] == pytest.approx(20 / 60)
    check_centroids(centroids, points, labels)


def test_no_cluster_is_large_enough(cluster):
    points, _ = blobs(5, 20, spread=0.03)
    with pytest.raises(ValueError, match="no cluster has 50 .* has 20; lower"):
        cluster(points, TwoStepKMeans(TorchKMeans(500), 5), least=50)


def test_the_number_of_clusters_may_be_estimated(cluster):
    points, _ = blobs(20, 20, spread=0.05, dimensions=32)
    _, _, logged = cluster(points, TwoStepKMeans(TorchKMeans(500), "auto"))
    assert logged["n_clusters"] == 20


def test_log_mel_statistics_improve_labels_but_do_not_count(cluster):
    """They tell apart four sessions of each speaker, more than speakers."""
    points, speakers = blobs(20, 40, spread=0.2, dimensions=32)
    rng = np.random.default_rng(0)
    session = 4 * speakers + rng.integers(4, size=len(speakers))
    log_mels = rng.normal(size=(20, 160))[speakers]
    log_mels += rng.normal(size=(80, 160))[session]
    log_mels += 0.5 * rng.normal(size=log_mels.shape)
    log_mels = log_mels.astype(np.float32)
    clusterer = TwoStepKMeans(TorchKMeans(1000), "auto")
    without, _, logged = cluster(points, clusterer)
    n_clusters = logged["n_clusters"]
    assert clusterer(log_mels).n_clusters > 2 * n_clusters
    labels, centroids, logged = cluster(
        points, clusterer, log_mels=log_mels, share=0.33
    )
    assert logged["n_clusters"] == n_clusters
    assert clusterer.n_clusters == "auto"  # for the round after
    assert adjusted_rand_score(speakers, without) < 0.92
    assert adjusted_rand_score(speakers, labels) > 0.98
    check_centroids(centroids, points, labels)
    # Three that could not be read in the first round are with most of theirs.
    labels, _, _ = cluster(
        points, clusterer, log_mels=log_mels[:-3], share=0.33
    )
    assert len(set(labels[speakers == speakers[-1]])) == 1


def test_given_labels_are_the_first_clusters(cluster):
    """However small, and wherever their utterances were put."""
    points, speakers = blobs(6, 20, spread=0.03)
    by_row = np.full(len(points), -1)
    by_row[np.flatnonzero(speakers == 4)[:2]] = 0
    far = np.flatnonzero(speakers == 5)
    by_row[far[0]] = 1
    few = ~np.isin(np.arange(len(points)), far[1:])  # too small a cluster
    points, by_row, speakers = points[few], by_row[few], speakers[few]
    given = GivenLabels(("ann", "bob"), by_row)
    clusterer = TwoStepKMeans(TorchKMeans(500), 6)
    plain, _, _ = cluster(points, clusterer, least=4)
    assert plain[by_row == 1].tolist() == [-1]
    labels, centroids, logged = cluster(points, clusterer, least=4, given=given)
    assert (labels[speakers == 4] == 0).all() and (labels == 1).sum() == 1
    assert (labels[by_row >= 0] == by_row[by_row >= 0]).all()
    assert len(centroids) == 6 and logged["labelled_share"] == 1
    assert adjusted_rand_score(speakers, labels) == 1
    check_centroids(centroids, points, labels)


def make_round(session, number=1):
    """A round whose folder is there."""
    this = Round.__new__(Round)
    this.session, this.settings = session, session.settings
    this.number, this.name = number, f"iter{number}"
    this.folder = session.run.folder / this.name
    (this.folder / "gated").mkdir(parents=True)
    this.is_last, this.made_from = True, None
    return this


def test_too_few_for_the_large_margin_leave_the_round_as_it_is(session, caplog):
    """An error would lose the round, whose settings cannot be changed."""
    this = make_round(session)
    path = this.folder / "gated" / "gate.npz"
    np.savez(path, passed=np.arange(7))
    session.settings.large_margin_epochs = 1
    session.settings.classifier_epochs = session.settings.gated_epochs = 1
    this.load = this.fit = pytest.fail
    session.publish = lambda name, made_from: None

    def step(name, work):
        if name == "large_margin":
            work(this.folder / name)

    this.step = step
    train_lgl.train_round(this)
    (message,) = caplog.messages
    assert message.startswith("iteration 1, large_margin: nothing is trained")
    assert "7 utterances" in message and "no batch of 8" in message


def test_the_gate_begins_with_the_last_epoch_of_the_classifier(session):
    """Losses fall: of several epochs it would part early from late."""
    this, rng = make_round(session), np.random.default_rng(0)
    right, wrong = rng.normal(-2, 0.3, 300), rng.normal(0, 0.3, 200)
    (this.folder / "classifier").mkdir()
    path = this.folder / "classifier" / "gate.npz"
    np.savez(path, losses=np.exp(np.append(right, wrong)))
    session.settings.gate = DynamicGate()
    tau = this.primed_gate().tau.item()
    assert np.log(tau) == pytest.approx(-1, abs=0.3)


@pytest.mark.parametrize("new", [Classifier, SubCentreClassifier])
def test_a_classifier_can_start_from_centroids(new):
    """Each centroid is then nearest to its own class."""
    centroids = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    classifier = new(16, out_neurons=5)
    start_from(classifier, centroids)
    cosines = classifier(centroids[:, None])[:, 0]
    assert cosines.argmax(1).tolist() == list(range(5))
    # Sub-centres lie a little apart, so that they can part in training.
    apart = 0.01 if new is SubCentreClassifier else 1e-6
    assert cosines.diagonal().min() > 1 - apart
    assert all(p.requires_grad for p in classifier.parameters())
