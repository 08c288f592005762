"""Label-free choice of an epoch."""

import typing

import numpy as np
import pytest
from sklearn.metrics import roc_curve
from sklearn.neighbors import NearestNeighbors
from speechbrain.utils.checkpoints import Checkpointer

from lgl_plugin.inference.calibration import pairs_eer
from lgl_plugin.runs.schema import Settings
from lgl_plugin.training.epoch_selection import (
    CRITERIA,
    ClusterFigures,
    criterion,
)
from lgl_plugin.training.held_out import contrastive_accuracy


def test_equal_error_rate_of_all_pairs():
    rng = np.random.default_rng(0)
    voices = rng.normal(size=(40, 6))
    first, second = voices + rng.normal(size=(2, 40, 6))
    scores, same = [], []
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            scores.append(a @ b / np.sqrt((a @ a) * (b @ b)))
            same.append(i == j)
    p_fa, p_hit, _ = roc_curve(same, scores, drop_intermediate=False)
    p_miss = 1 - p_hit
    at = np.argmin(np.abs(p_fa - p_miss))
    expected = (p_fa[at] + p_miss[at]) / 2
    found = pairs_eer(first, second)[0]
    assert found == pytest.approx(expected, abs=1 / 40)
    assert 0.1 < found < 0.4


def test_loudness_of_embeddings_does_not_matter():
    rng = np.random.default_rng(1)
    first, second = rng.normal(size=(2, 30, 5)) + rng.normal(size=(30, 5))
    scaled = first * rng.uniform(0.1, 10, (30, 1))
    expected = pairs_eer(first, second)[0]
    assert pairs_eer(scaled, 3 * second)[0] == pytest.approx(expected)


def test_better_embeddings_have_a_lower_error():
    rng = np.random.default_rng(2)
    voices = rng.normal(size=(100, 8))
    rates = [
        pairs_eer(*(voices + level * rng.normal(size=(2, 100, 8))))[0]
        for level in (0.2, 1.0, 5.0)
    ]
    assert rates == sorted(rates) and rates[0] < 0.02 and rates[2] > 0.4


def test_opposite_embeddings_are_always_wrong():
    assert pairs_eer(np.eye(4), -np.eye(4))[0] == 1.0


def test_criteria_are_those_of_the_settings_and_need_no_label():
    annotation = Settings.model_fields["selection"].annotation
    choices = typing.get_args(annotation)
    assert set(CRITERIA) == set(choices)
    assert "eer" not in {figure for figure, _ in CRITERIA.values()}


def test_contrastive_accuracy_is_that_of_nearest_neighbours():
    rng = np.random.default_rng(3)
    voices = rng.normal(size=(50, 6))
    first, second = voices + 0.8 * rng.normal(size=(2, 50, 6))
    crops = np.concatenate([first, second])
    search = NearestNeighbors(n_neighbors=2, metric="cosine").fit(crops)
    nearest = search.kneighbors(crops, return_distance=False)[:, 1]
    expected = np.mean(nearest == (np.arange(100) + 50) % 100)
    assert 0.1 < expected < 0.95
    assert contrastive_accuracy(first, second) == pytest.approx(expected)


def test_cluster_figures_tell_clusters_from_noise():
    rng = np.random.default_rng(4)
    speakers = np.repeat(rng.normal(size=(10, 16)), 10, axis=0)
    clear = speakers + 0.1 * rng.normal(size=speakers.shape)
    blurred = speakers + 3.0 * rng.normal(size=speakers.shape)
    figures = ClusterFigures()
    first, again, worse = (figures(v) for v in (clear, clear, blurred))
    assert first["agreement"] is None
    assert again["agreement"] == pytest.approx(1.0)
    assert first["silhouette"] > 0.8 > 0.4 > worse["silhouette"]
    assert worse["agreement"] < 0.5


def test_agreement_is_adjusted_for_chance():
    rng = np.random.default_rng(5)
    first, second = rng.normal(size=(2, 200, 8))
    figures = ClusterFigures()
    figures(first)
    agreement = figures(second)["agreement"]
    assert abs(agreement) < 0.15


@pytest.mark.parametrize("name", CRITERIA)
def test_lower_is_better_for_all_criteria(name):
    good = {
        "pseudo_eer": 1.0,
        "contrastive_accuracy": 0.9,
        "loss": 1.0,
        "silhouette": 0.5,
        "agreement": 0.9,
        "epoch": 7,
    }
    bad = {
        "pseudo_eer": 9.0,
        "contrastive_accuracy": 0.1,
        "loss": 5.0,
        "silhouette": 0.1,
        "agreement": 0.2,
        "epoch": 1,
    }
    assert criterion(good, name) < criterion(bad, name)
    assert criterion({}, name) == np.inf
    figure, _ = CRITERIA[name]
    assert criterion({figure: float("nan")}, name) == np.inf


def test_clusters_of_the_epoch_before_outlast_a_restart(tmp_path):
    rng = np.random.default_rng(3)
    first, second = rng.normal(size=(2, 60, 8))
    whole = ClusterFigures()
    whole(first)
    Checkpointer(tmp_path, {"clusters": whole}).save_checkpoint()
    again = ClusterFigures()
    Checkpointer(tmp_path, {"clusters": again}).recover_if_possible()
    assert again(second) == whole(second)
    assert again(second)["agreement"] == pytest.approx(1.0)


def test_restart_before_any_clusters(tmp_path):
    Checkpointer(tmp_path, {"clusters": ClusterFigures()}).save_checkpoint()
    again = ClusterFigures()
    Checkpointer(tmp_path, {"clusters": again}).recover_if_possible()
    vectors = np.random.default_rng(3).normal(size=(60, 8))
    assert again(vectors)["agreement"] is None
