"""The estimated number of clusters, of known corpora and of noise."""

import json
import logging

import numpy as np
import pytest
from blobs import blobs

from lgl_plugin.cli.main import main
from lgl_plugin.clustering.kmeans import FaissKMeans, TorchKMeans
from lgl_plugin.clustering.number import estimate
from lgl_plugin.dataio.manifest import Strings
from lgl_plugin.inference.store import Embeddings


@pytest.mark.parametrize("n_speakers, each", [(5, 60), (20, 40), (60, 10)])
def test_known_number_of_speakers(n_speakers, each):
    embeddings, _ = blobs(n_speakers, each, spread=0.05, dimensions=32)
    found = estimate(TorchKMeans(50_000), embeddings)
    assert found.n_clusters == n_speakers
    assert found.gap[n_speakers - 1] == found.gap.max() > 0.1
    assert found.gap[0] == 0


def test_explained_is_the_share_of_the_sum_of_squares():
    """Against sums by scipy's clusters; between N clusters lies all of it."""
    from scipy.cluster.hierarchy import fcluster, linkage

    points = blobs(10, 12, spread=0.3)[0]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    found = estimate(TorchKMeans(500), points)
    tree = linkage(points, "ward")
    for k in (1, 4, 10, 50, 120):
        labels = fcluster(tree, k, "maxclust")
        means = np.array([points[labels == n].mean(0) for n in labels])
        share = (
            1
            - ((points - means) ** 2).sum()
            / ((points - points.mean(0)) ** 2).sum()
        )
        assert found.explained[k - 1] == pytest.approx(share, abs=1e-5)
    assert (np.diff(found.by_chance) > -1e-9).all()


@pytest.mark.parametrize("backend", [FaissKMeans, TorchKMeans])
def test_a_first_step_hardly_matters(backend):
    embeddings, _ = blobs(30, 30, spread=0.1, dimensions=32)
    assert 27 <= estimate(backend(150), embeddings).n_clusters <= 33


def test_a_cloud_without_clusters_is_said_to_be_one(caplog):
    cloud = np.random.default_rng(5).normal(size=(400, 24))
    with caplog.at_level(logging.WARNING):
        found = estimate(TorchKMeans(500), cloud)
        found.warn_of_guess()
    assert found.gap.max() < 0.02
    assert found.n_clusters >= 40  # it was 2
    assert f"so {found.n_clusters} is a guess" in caplog.text


def test_one_recording_of_each_speaker(caplog):
    embeddings, _ = blobs(200, 1, dimensions=32)
    found = estimate(TorchKMeans(500), embeddings)
    found.warn_of_guess()
    assert found.n_clusters == 20
    assert "most speakers have one recording only" in caplog.text
    pairs, _ = blobs(100, 2, spread=0.05, dimensions=32)
    assert 90 <= estimate(TorchKMeans(500), pairs).n_clusters <= 100


@pytest.mark.parametrize(
    "embeddings, message",
    [
        (np.eye(7), "7 utterances.* too few"),
        (np.ones((20, 4)), "all embeddings are equal"),
        (np.zeros((20, 4)), "NaN, infinite or zero"),
        (np.ones(20), "got shape"),
    ],
)
def test_embeddings_without_an_estimate(embeddings, message):
    with pytest.raises(ValueError, match=message):
        estimate(TorchKMeans(500), embeddings)


def test_a_first_step_that_leaves_few_clusters():
    with pytest.raises(ValueError, match="3 utterances, or clusters of the"):
        estimate(TorchKMeans(10), np.repeat(np.eye(3), 20, axis=0))


def test_command(tmp_path, capsys):
    embeddings, _ = blobs(20, 40, spread=0.05)
    names = Strings([f"{n}.wav" for n in range(len(embeddings))])
    store = tmp_path / "iter1" / "embeddings"
    Embeddings(names, embeddings).save(store)
    main(["count", str(store)])
    folder = tmp_path / "iter1" / "embeddings_count"
    facts = json.loads((folder / "count.json").read_text())
    assert facts["n_clusters"] == 20 and facts["beyond_chance"] > 0.1
    assert (folder / "count.png").read_bytes()[1:4] == b"PNG"
    assert b"<svg" in (folder / "count.svg").read_bytes()
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[1] for line in lines if line.startswith("| ")]
    assert shown == ["clusters", "---", "5", "10", "20", "40", "80"]

    main(["count", str(store), f"--output={tmp_path / 'other'}"])
    assert (tmp_path / "other" / "count.json").exists()


def test_two_stores_of_a_folder_do_not_share_results(
    tmp_path, capsys, monkeypatch
):
    embeddings, _ = blobs(4, 10, spread=0.05)
    names = Strings([f"{n}.wav" for n in range(len(embeddings))])
    for store in ("one", "two"):
        Embeddings(names, embeddings).save(tmp_path / "runs" / store)
        main(["count", str(tmp_path / "runs" / store)])
        assert (tmp_path / "runs" / f"{store}_count" / "count.json").exists()
    # Both may be moved, and counted again.
    moved = (tmp_path / "runs").rename(tmp_path / "moved")
    output = f"--output={moved / 'one_count'}"
    main(["count", str(moved / "one"), output])
    before = (moved / "one_count" / "count.json").read_bytes()
    monkeypatch.setattr(Embeddings, "load", pytest.fail)
    with pytest.raises(SystemExit):
        main(["count", str(moved / "two"), output])
    said = capsys.readouterr().err
    assert "the count of another store, ../one from there" in said
    assert (moved / "one_count" / "count.json").read_bytes() == before


def test_command_tries_to_write_before_it_clusters(
    tmp_path, capsys, monkeypatch
):
    Embeddings(Strings("abcd"), np.eye(4, dtype=np.float32)).save(tmp_path)
    (tmp_path / "mine").touch()
    monkeypatch.setattr(Embeddings, "load", pytest.fail)
    with pytest.raises(SystemExit):
        main(["count", str(tmp_path), f"--output={tmp_path / 'mine' / 'out'}"])
    assert "a file is in the folder's place" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, message",
    [("nowhere", "holds no embeddings"), (".", "too few to estimate")],
)
def test_command_in_error(tmp_path, capsys, name, message):
    Embeddings(Strings("abcd"), np.eye(4, dtype=np.float32)).save(tmp_path)
    with pytest.raises(SystemExit):
        main(["count", str(tmp_path / name)])
    assert message in capsys.readouterr().err
