"""K-means against scikit-learn, plain faiss, brute force and each other."""

import copy
import inspect
import pickle
import sys

import numpy as np
import pytest
import torch
from blobs import blobs, unit
from devices import ON_GPU
from hypothesis import given, settings, strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score

from lgl_plugin.clustering import kmeans as kmeans_module, vectors
from lgl_plugin.clustering.average import AverageLinkage
from lgl_plugin.clustering.kmeans import FaissKMeans, TorchKMeans, require_faiss
from lgl_plugin.clustering.two_step import TwoStepKMeans
from lgl_plugin.clustering.vectors import sum_by_label


@pytest.fixture(params=[FaissKMeans, TorchKMeans])
def backend(request):
    """What both backends must do is asked of both."""
    return request.param


def sum_of_squares(points, labels):
    """Within clusters, around their means, in float64."""
    points = unit(points.astype(np.float64))
    return sum(
        ((points[labels == k] - points[labels == k].mean(axis=0)) ** 2).sum()
        for k in np.unique(labels)
    )


def test_labels_are_the_nearest_centroids_by_either_metric(backend):
    points, _ = blobs()
    found = backend(20)(points)
    assert found.labels.dtype == np.int64
    assert found.centroids.dtype == np.float32
    np.testing.assert_allclose(
        np.linalg.norm(found.centroids, axis=1), 1, atol=1e-5
    )
    cosines = unit(points) @ found.centroids.T
    squares = ((unit(points)[:, None] - found.centroids) ** 2).sum(axis=2)
    assert (found.labels == cosines.argmax(axis=1)).all()
    assert (found.labels == squares.argmin(axis=1)).all()


def test_speakers_that_are_apart_are_found(backend):
    points, speakers = blobs(spread=0.05)
    runs = [backend(20, seed=seed)(points) for seed in range(10)]
    found = min(runs, key=lambda run: run.inertia[-1])
    assert normalized_mutual_info_score(speakers, found.labels) > 0.999


@pytest.mark.parametrize("seed", range(3))
def test_inertia_is_near_that_of_scikit_learn(backend, seed):
    points, _ = blobs(spread=0.3, seed=seed)
    ours = min(
        sum_of_squares(points, backend(20, seed=some)(points).labels)
        for some in range(5 * seed, 5 * seed + 5)
    )
    theirs = KMeans(20, n_init=5, random_state=seed).fit(unit(points)).labels_
    assert ours < 1.03 * sum_of_squares(points, theirs)


def test_one_iteration_at_a_time_is_what_faiss_does_at_once():
    points = unit(blobs(spread=0.3)[0])
    kmeans = FaissKMeans(20, n_iterations=5, seed=7)
    at_once = require_faiss().Kmeans(
        16, 20, niter=5, spherical=True, min_points_per_centroid=1
    )
    first = kmeans._first_centroids(points)
    at_once.train(points, init_centroids=first)
    found = kmeans(points)
    np.testing.assert_allclose(found.centroids, at_once.centroids, atol=1e-5)
    np.testing.assert_allclose(
        found.inertia, 2 * (len(points) - at_once.obj), rtol=1e-4
    )


def test_inertia_falls_to_that_of_the_labels(backend):
    points, _ = blobs(spread=0.3)
    found = backend(20, n_iterations=40)(points)
    assert found.inertia.shape == (40,)
    assert (np.diff(found.inertia) < 1e-3).all()
    gaps = unit(points) - found.centroids[found.labels]
    assert found.inertia[-1] == pytest.approx((gaps**2).sum(), rel=1e-3)
    assert found.inertia[0] > 1.05 * found.inertia[-1]


def test_same_seed_same_labels(backend):
    points, _ = blobs(spread=0.3)
    one, same, other = (
        backend(20, seed=s, max_points_per_centroid=30)(points).labels
        for s in (1, 1, 2)
    )
    assert (one == same).all()
    assert (one != other).any()


def test_embedding_length_does_not_matter(backend):
    points, _ = blobs(spread=0.3)
    short = backend(20)(points).labels
    long = backend(20)(unit(points)).labels
    assert (short == long).all()


def test_sample_is_trained_on_and_all_are_labelled(backend, monkeypatch):
    points, speakers = blobs(spread=0.05)
    monkeypatch.setattr(vectors, "CHUNK", 100)
    found = backend(20, max_points_per_centroid=10)(points)
    assert found.points_used == 200
    assert found.labels.shape == (800,)
    assert normalized_mutual_info_score(speakers, found.labels) > 0.95
    assert backend(20)(points).points_used == 800


def test_points_may_be_a_read_only_memory_map(backend, tmp_path):
    points, _ = blobs()
    np.save(tmp_path / "embeddings.npy", points)
    mapped = np.load(tmp_path / "embeddings.npy", mmap_mode="r")
    labels = backend(20)(mapped).labels
    assert (labels == backend(20)(points).labels).all()
    assert (mapped == points).all()


def test_clusters_without_a_member_are_dropped(backend):
    distinct = np.eye(4, dtype=np.float32)
    found = backend(6)(np.repeat(distinct, 5, axis=0))
    assert found.n_clusters <= 4
    assert np.unique(found.labels).tolist() == list(range(found.n_clusters))
    assert len(found.centroids) == found.n_clusters


def test_as_many_clusters_as_points(backend):
    points, _ = blobs(5, 2)
    found = backend(10)(points)
    assert sorted(found.labels) == list(range(10))
    assert (found.inertia == 0).all()
    assert found.inertia.shape == (25,)


def test_progress_is_shown_and_no_warnings(backend, capfd):
    backend(20)(blobs(20, 3)[0])
    captured = capfd.readouterr()
    assert "k-means, K=20" in captured.err
    assert "warning" not in (captured.out + captured.err).lower()


def test_more_clusters_than_utterances_is_an_error_before_any_work(backend):
    kmeans = backend(6000)
    message = "n_clusters=6000 is more than the 948 utterances"
    with pytest.raises(ValueError, match=message):
        kmeans.check(948)
    # Not even the embeddings, all NaN here, are looked at.
    with pytest.raises(ValueError, match=message):
        kmeans(np.full((948, 4), np.nan, dtype=np.float32))


@pytest.mark.parametrize("broken", [np.nan, np.inf, 0.0])
def test_embeddings_without_direction_are_an_error(backend, broken):
    points, _ = blobs()
    points[[7, 300]] = broken
    message = "2 of 800 embeddings are NaN, infinite or zero, .* row 7"
    with pytest.raises(ValueError, match=message):
        backend(20)(points)


def test_missing_faiss_is_reported_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        require_faiss("cpu")
    with pytest.raises(ImportError, match="pip install faiss-gpu"):
        require_faiss("cuda:0")
    with pytest.raises(ImportError, match="clustering needs faiss"):
        FaissKMeans(20)


def test_faiss_without_gpu_support_is_reported(monkeypatch):
    faiss = require_faiss()
    monkeypatch.delattr(faiss, "StandardGpuResources", raising=False)
    with pytest.raises(ImportError, match="GPU .*faiss-gpu"):
        FaissKMeans(20, device="cuda")


def test_gpu_that_faiss_does_not_see_is_reported(monkeypatch):
    faiss = require_faiss()
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    require_faiss("cuda:0")
    with pytest.raises(ValueError, match=r"faiss sees 1 GPU\(s\)"):
        require_faiss("cuda:1")


@pytest.mark.parametrize(
    "name",
    ["n_clusters", "n_iterations", "max_points_per_centroid"],
)
@pytest.mark.parametrize("value", [0, -3, 2.5, float("nan"), float("inf")])
def test_numbers_that_count_nothing_are_an_error(backend, name, value):
    message = f"{name} must be an integer of at least 1, got {value}"
    with pytest.raises(ValueError, match=message):
        backend(**{"n_clusters": 5, name: value})


def test_a_vector_is_not_a_set_of_embeddings(backend):
    with pytest.raises(ValueError, match=r"got shape \(8,\)"):
        backend(2)(np.ones(8, dtype=np.float32))


def test_torch_iterations_are_those_of_faiss(monkeypatch):
    points = unit(blobs(spread=0.3)[0])
    monkeypatch.setitem(kmeans_module.SCORES, "cpu", 4 * 20 * 7)
    faiss_found = FaissKMeans(20, n_iterations=10)(points)
    torch_found = TorchKMeans(20, n_iterations=10)(points)
    assert (torch_found.labels == faiss_found.labels).all()
    np.testing.assert_allclose(
        torch_found.centroids, faiss_found.centroids, atol=1e-5
    )
    np.testing.assert_allclose(
        torch_found.inertia, faiss_found.inertia, rtol=1e-4
    )


def test_an_empty_cluster_takes_from_the_one_with_most_inertia(monkeypatch):
    # A wide speaker of few and a narrow one of many utterances. Of three
    # first centroids two are the same, so one of them gets nothing.
    rng = np.random.default_rng(0)
    points = np.repeat(np.eye(2, 8), [60, 400], axis=0)
    points[:60, 2:] += 0.4 * rng.normal(size=(60, 6))
    points[60:, 2:] += 0.05 * rng.normal(size=(400, 6))
    monkeypatch.setattr(
        TorchKMeans,
        "_first_centroids",
        lambda *_: np.eye(2, 8, dtype=np.float32)[[0, 1, 1]],
    )
    found = TorchKMeans(3)(points)
    assert len(np.unique(found.labels[:60])) == 2
    assert len(np.unique(found.labels[60:])) == 1


def test_low_precision_of_the_caller_is_put_aside_and_back(
    backend, monkeypatch
):
    seen = []
    iterate = backend._iterate

    def watched(*arguments):
        seen.append(torch.get_float32_matmul_precision())
        return iterate(*arguments)

    monkeypatch.setattr(backend, "_iterate", watched)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        backend(5, n_iterations=1)(blobs()[0])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen == ["highest"]


@pytest.mark.skipif(
    not hasattr(torch.backends.mkldnn, "matmul"), reason="since torch 2.9"
)
def test_clustering_leaves_the_products_of_the_cpu_as_they_were(backend):
    """SpeechBrain allows TF32 on GPUs; the CPU must not come to it so."""
    before = torch.backends.cuda.matmul.allow_tf32
    on_cpu = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        backend(5, n_iterations=1)(blobs()[0])
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.mkldnn.matmul.fp32_precision == on_cpu
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def test_sums_by_label():
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(50, 3)), rng.integers(0, 4, size=50)
    expected = [values[labels == k].sum(axis=0) for k in range(5)]
    found = sum_by_label(torch.from_numpy(values), torch.from_numpy(labels), 5)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_gpu_that_torch_does_not_see_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert TorchKMeans(2, device="cuda").device == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert TorchKMeans(2, device="auto").device == "cuda"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert TorchKMeans(2, device="auto").device == "cpu"
    with pytest.raises(ValueError, match=r"torch sees 1 GPU\(s\)"):
        TorchKMeans(2, device="cuda:1")


@ON_GPU
def test_gpu_finds_what_the_cpu_finds_and_the_same_again():
    points, _ = blobs(spread=0.3)
    cpu = TorchKMeans(20)(points)
    gpu, again = (TorchKMeans(20, device="cuda")(points) for _ in range(2))
    assert (gpu.labels == cpu.labels).all()
    assert (gpu.centroids == again.centroids).all()
    assert (gpu.inertia == again.inertia).all()


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))],
)
@pytest.mark.parametrize("used", [False, True])
def test_a_clusterer_can_be_copied_and_pickled(backend, duplicate, used):
    points, _ = blobs()
    kmeans = backend(20, seed=3)
    joined = AverageLinkage(kmeans, 0.3)
    for cluster in (kmeans, TwoStepKMeans(kmeans, "auto"), joined):
        if used:
            cluster(points)
        labels = duplicate(cluster)(points).labels
        assert (labels == cluster(points).labels).all()


def test_a_clusterer_shows_its_settings(backend):
    kmeans = backend(20, device="cpu")
    parameters = inspect.signature(backend).parameters
    assert list(parameters)[:2] == ["n_clusters", "n_iterations"]
    assert all(f"{name}=" in repr(kmeans) for name in parameters)
    assert "n_clusters=20, n_iterations=25" in repr(kmeans)
    assert repr(kmeans) in repr(TwoStepKMeans(kmeans, 5))


def test_a_list_is_as_good_as_an_array(backend):
    points, _ = blobs(5, 6)
    kmeans, rows = backend(5), points.tolist()
    joined = AverageLinkage(kmeans, 0.3)
    for cluster in (kmeans, TwoStepKMeans(kmeans, 3), joined):
        assert (cluster(rows).labels == cluster(points).labels).all()


def test_one_cluster_and_one_utterance(backend):
    points, _ = blobs()
    found = backend(1, max_points_per_centroid=800)(points)
    assert (found.labels == 0).all() and found.n_clusters == 1
    mean = unit(unit(points).mean(axis=0, keepdims=True))
    np.testing.assert_allclose(found.centroids, mean, atol=1e-5)
    alone = backend(1)(points[:1])
    assert alone.labels.tolist() == [0]
    np.testing.assert_allclose(alone.centroids, unit(points[:1]), atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(*[st.integers(-2, 2)] * 3).filter(any),
        min_size=1,
        max_size=12,
    ),
    st.data(),
)
@pytest.mark.parametrize("backend", [FaissKMeans, TorchKMeans])
def test_any_points_are_partitioned(backend, rows, data):
    """Few distinct directions: ties, copies and opposites are common."""
    n_clusters = data.draw(st.integers(1, len(rows)))
    points = np.array(rows, np.float32)
    found = backend(n_clusters, n_iterations=4)(points)
    assert found.n_clusters <= n_clusters
    assert np.unique(found.labels).tolist() == list(range(found.n_clusters))
    assert np.isfinite(found.centroids).all()
    assert np.isfinite(found.inertia).all() and (found.inertia >= -1e-5).all()
    cosines = unit(points) @ found.centroids.T
    of_label = cosines[np.arange(len(rows)), found.labels]
    np.testing.assert_allclose(of_label, cosines.max(axis=1), atol=1e-5)
