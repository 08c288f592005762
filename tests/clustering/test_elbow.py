"""The elbow against geometry, and the number of clusters of known corpora."""

import json

import numpy as np
import pytest
from blobs import blobs
from hypothesis import given, settings, strategies as st
from sklearn.metrics import adjusted_rand_score

from lgl_plugin.cli.main import main
from lgl_plugin.clustering.elbow import (
    SCALES,
    ElbowKMeans,
    Estimate,
    below_chord,
    default_grid,
    elbow,
    estimate_k,
)
from lgl_plugin.clustering.kmeans import FaissKMeans, TorchKMeans
from lgl_plugin.dataio.manifest import Strings
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.report.figures import elbow_figure


@st.composite
def some_curves(draw):
    """Grids with sums of squares that may rise in places."""
    n = draw(st.integers(3, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grid = np.cumsum(rng.integers(1, 50, n))
    inertia = np.sort(rng.random(n))[::-1] * 1e4
    inertia[1:-1] *= rng.uniform(0.9, 1.1, n - 2)
    return grid, inertia


@pytest.mark.parametrize("scale", SCALES)
@given(case=some_curves())
@settings(deadline=None)
def test_elbow_is_the_farthest_point_from_the_line(scale, case):
    grid, inertia = case
    fall = np.minimum.accumulate(inertia)
    x, y = SCALES[scale](grid), fall
    points = np.column_stack(
        [(x - x[0]) / (x[-1] - x[0]), (y - y[-1]) / (y[0] - y[-1])]
    )
    line = points[-1] - points[0]
    # By the cross product: perpendicular, positive below.
    far = -(line[0] * points[:, 1] - line[1] * points[:, 0] - line[0])
    far /= np.hypot(*line)
    distances = below_chord(grid, inertia, scale)
    np.testing.assert_allclose(distances, far * 2**0.5, atol=1e-9)
    if far.max() < 1e-6:
        return
    found = elbow(grid, inertia, scale)
    assert found in grid[1:-1]
    assert far[list(grid).index(found)] == pytest.approx(far.max(), abs=1e-8)


@pytest.mark.parametrize("factor, shift", [(7.0, 0.0), (1e-6, 0.0), (1, 500)])
def test_units_do_not_matter(factor, shift):
    grid, inertia = [2, 5, 9, 20, 50], np.array([90.0, 40, 20, 15, 12])
    assert elbow(grid, factor * inertia + shift) == elbow(grid, inertia)


def test_the_scale_matters():
    grid = 2 ** np.arange(9)
    inertia = 1000 * grid**-0.5
    found = [elbow(grid, inertia, scale) for scale in ("log", "root", "linear")]
    # Where the slope is the chord's, by hand: 8.7, 16 and 26.4.
    assert found == [8, 16, 32]


def test_lowest_of_ties():
    assert elbow([1, 2, 3, 4], [4.0, 2.0, 1.0, 1.0], "linear") == 2


def test_a_rise_does_not_count():
    # A poor local optimum at 3 is as low as 2; the elbow stays where it was.
    assert elbow([1, 2, 3, 4, 5], [9.0, 3.0, 4.0, 2.0, 1.0], "linear") == 2
    distances = below_chord([1, 2, 3], [9.0, 1.0, 2.0], "linear")
    assert distances.tolist() == [0, 0.5, 0]


@pytest.mark.parametrize(
    "grid, inertia, message",
    [
        ([1, 2], [2.0, 1.0], "at least three"),
        ([1, 2, 3], [2.0, 1.0], r"\(2,\) and \(3,\)"),
        ([1, 3, 2], [3.0, 2.0, 1.0], "must ascend"),
        ([1, 2, 2], [3.0, 2.0, 1.0], "must ascend"),
        ([0, 1, 2], [3.0, 2.0, 1.0], "must ascend from at least 1"),
        ([1, 2, 3], [1.0, 1.0, 1.0], "does not fall"),
        ([1, 2, 3], [1.0, 2.0, 3.0], "does not fall"),
        ([1, 2, 3], [3.0, np.nan, 1.0], "does not fall"),
        ([1, 2, 3], [3.0, 2.0, 1.0], "no elbow"),
        ([1, 2, 3], [3.0, 2.9, 1.0], "no elbow"),
    ],
)
def test_no_elbow(grid, inertia, message):
    with pytest.raises(ValueError, match=message):
        elbow(grid, inertia, "linear")


def test_unknown_scale():
    with pytest.raises(ValueError, match="one of .*'root'.* got cubic"):
        elbow([1, 2, 3], [3.0, 1.0, 0.5], "cubic")


@given(st.integers(8, 10**7))
def test_default_grid(n):
    grid = default_grid(n)
    assert 3 <= len(grid) <= 24
    assert (np.diff(grid) > 0).all()
    assert grid[0] == 2 and grid[-1] == n // 2


def test_too_few_for_a_default_grid():
    with pytest.raises(ValueError, match="7 utterances are too few"):
        default_grid(7)


@pytest.mark.parametrize("backend", [FaissKMeans, TorchKMeans])
@pytest.mark.parametrize("scale", ["root", "linear"])
def test_known_number_of_speakers(backend, scale):
    embeddings, speakers = blobs(20, 40, spread=0.05)
    grid = [60, 5, 10, 20, 30, 120, 20]  # as a yaml might have it
    kmeans = backend(n_clusters=7, n_redo=3)
    found = estimate_k(kmeans, embeddings, grid, scale)
    assert found.n_clusters == 20
    assert found.grid.tolist() == [5, 10, 20, 30, 60, 120]
    assert found.inertia.shape == (6,)

    cluster = ElbowKMeans(kmeans, grid, scale)
    clustering = cluster(embeddings)
    assert cluster.estimate.n_clusters == clustering.n_clusters == 20
    assert adjusted_rand_score(speakers, clustering.labels) > 0.99
    assert kmeans.n_clusters == 7


def test_known_number_of_speakers_with_the_default_grid():
    embeddings, _ = blobs(30, 20, spread=0.05, dimensions=32)
    found = estimate_k(TorchKMeans(1), embeddings)
    near = np.abs(found.grid - 30).argmin()
    assert abs(found.grid.tolist().index(found.n_clusters) - near) <= 1


def test_the_grid_is_checked_before_any_work():
    kmeans = TorchKMeans(1)
    with pytest.raises(ValueError, match="at least three"):
        ElbowKMeans(kmeans, [4, 8])
    with pytest.raises(ValueError, match="from at least 1"):
        ElbowKMeans(kmeans, [0, 4, 8])
    with pytest.raises(ValueError, match="must be one of"):
        ElbowKMeans(kmeans, scale="cubic")
    with pytest.raises(ValueError, match="200 clusters are more than the 150"):
        ElbowKMeans(kmeans, [50, 200, 100]).check(150)
    with pytest.raises(ValueError, match="too few"):
        ElbowKMeans(kmeans).check(5)
    ElbowKMeans(kmeans, [50, 200, 100]).check(200)


def test_a_yaml_can_name_it():
    from hyperpyyaml import load_hyperpyyaml

    cluster = load_hyperpyyaml(
        "cluster: !new:lgl_plugin.clustering.elbow.ElbowKMeans\n"
        "    kmeans: !new:lgl_plugin.clustering.kmeans.TorchKMeans\n"
        "        n_clusters: 1\n"
        "    grid: [5, 10, 20, 40]\n"
    )["cluster"]
    cluster.check(800)
    assert cluster(blobs(spread=0.05)[0]).n_clusters in (10, 20)


def test_figure_shows_the_chord_as_a_line():
    grid = np.array([1, 4, 9, 16])
    for scale in SCALES:
        figure = elbow_figure(
            Estimate(4, grid, np.array([9.0, 3.0, 2.0, 1.0]), scale)
        )
        figure.canvas.draw()
        axes = figure.axes[0]
        ends = axes.transData.transform([(1, 9.0), (4, 3.0), (16, 1.0)])
        share = (ends[1] - ends[0]) / (ends[2] - ends[0])
        x = SCALES[scale](grid)
        assert share[0] == pytest.approx((x[1] - x[0]) / (x[3] - x[0]))
        assert share[1] == pytest.approx(6 / 8)


def test_command(tmp_path, capsys):
    embeddings, _ = blobs(20, 40, spread=0.05)
    names = Strings([f"{n}.wav" for n in range(len(embeddings))])
    store = tmp_path / "iter1" / "embeddings"
    Embeddings(names, embeddings).save(store)
    main(["elbow", str(store), "--grid=5,10,20,40,80"])
    folder = tmp_path / "iter1" / "elbow"
    facts = json.loads((folder / "elbow.json").read_text())
    assert facts["n_clusters"] == 20
    assert facts["grid"] == [5, 10, 20, 40, 80]
    assert len(facts["inertia"]) == 5
    assert (folder / "elbow.png").read_bytes()[1:4] == b"PNG"
    assert b"<svg" in (folder / "elbow.svg").read_bytes()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "elbow**" in line][0].startswith("| 20 |")

    main(
        [
            "elbow",
            str(store),
            "--grid=5,10,20",
            f"--output={tmp_path / 'other'}",
        ]
    )
    assert (tmp_path / "other" / "elbow.json").exists()


@pytest.mark.parametrize(
    "options, message",
    [(["nowhere"], "holds no embeddings"), (["--grid=3,4"], "at least three")],
)
def test_command_in_error(tmp_path, capsys, options, message):
    Embeddings(Strings("abcd"), np.eye(4, dtype=np.float32)).save(tmp_path)
    if options[0].startswith("--"):
        options = [str(tmp_path), *options]
    with pytest.raises(SystemExit):
        main(["elbow", *options])
    assert message in capsys.readouterr().err
