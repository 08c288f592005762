"""Sizes that no training can do with, before any work."""

import logging
import types

import pytest

from lgl_plugin.clustering.average import AverageLinkage
from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.training import sizes
from lgl_plugin.training.sizes import (
    check_clusters,
    check_twice,
    split_rows,
    warn_of_short,
)


def settings(batch_size=2, **given):
    usual = {"steps_per_epoch": None, "grad_accumulation_factor": None}
    usual |= {"held_out_share": 0.1, "seed": 1}
    loader = types.SimpleNamespace(batch_size=batch_size)
    return types.SimpleNamespace(dataloader_options=loader, **usual | given)


def test_what_fills_a_batch_is_taken():
    rows, held = split_rows(settings(18), 20)
    assert len(rows) == 18 and len(held) == 2
    split_rows(settings(5, grad_accumulation_factor=4), 22)


@pytest.mark.parametrize(
    "given, size, number, said",
    [
        ({}, 19, 20, "batch_size: 19 is more than the 18 .*Lower batch"),
        ({}, 2, 3, "3 usable utterances are too few"),
        ({"grad_accumulation_factor": 4}, 6, 22, "the 3 steps of an"),
    ],
)
def test_what_fills_no_batch_names_the_setting(given, size, number, said):
    with pytest.raises(ValueError, match=said):
        split_rows(settings(size, **given), number)


def test_clusters_that_utterances_cannot_make():
    made = settings(
        cluster=TorchKMeans(8), cluster_twice=True, min_cluster_size=9
    )
    check_clusters(made, 9)
    with pytest.raises(ValueError, match="min_cluster_size: 9 is more than"):
        check_clusters(made, 8)
    with pytest.raises(ValueError, match="n_clusters=8 is more than the 7"):
        check_clusters(made, 7)


def test_a_threshold_does_not_fit_a_second_clustering():
    average = AverageLinkage(TorchKMeans(50), threshold=0.5)
    once = {"ssps_cluster": average, "ssps_cluster_twice": False}
    check_twice(settings(**once), "ssps_")
    with pytest.raises(ValueError, match="ssps_cluster_twice to False"):
        check_twice(settings(**once | {"ssps_cluster_twice": True}), "ssps_")
    twice = settings(cluster=average, cluster_twice=True, min_cluster_size=1)
    with pytest.raises(ValueError, match="cluster_twice: AverageLinkage"):
        check_clusters(twice, 9)


@pytest.mark.parametrize(
    "crop, said", [(1.0, False), (1.5, False), (1.6, True)]
)
def test_crops_longer_than_most_utterances_are_warned_of(
    crop, said, caplog, monkeypatch
):
    """They would be one utterance repeated, which nobody asked for."""
    monkeypatch.setattr(sizes, "logger", logging.getLogger("t"))
    manifest = Manifest.of((f"{d}", "a.wav", 0.0, d, "") for d in (1, 1.5, 2))
    warn_of_short(settings(crop_seconds=crop), manifest)
    assert ("2 of 3 utterances" in caplog.text) == said
    assert ("median is 1.5 s" in caplog.text) == said
