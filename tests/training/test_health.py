"""What goes wrong is found and said once; what goes well is left alone.

That training which goes wrong leaves such records is tested
beside the Brains.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from made_run import make_run

from lgl_plugin.clustering.vectors import cluster_sizes
from lgl_plugin.metrics.agreement import ami
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.training.health import findings
from lgl_plugin.training.held_out import geometry

GATED = {"stage": 2, "iteration": 1, "phase": "gated"}
CLUSTERS = {"stage": 2, "iteration": 2, "phase": "clusters"}


def phase(*epochs, **place):
    """The records of a phase."""
    place = place or GATED
    return [{**place, "epoch": n, **r} for n, r in enumerate(epochs, 1)]


def said(records):
    """What is found, as one text."""
    return "\n".join(words for _, words in findings(records))


@given(st.integers(0, 999), st.integers(2, 9), st.integers(2, 5))
def test_geometry_is_that_of_all_pairs_and_of_the_spectrum(seed, n, dim):
    rng = np.random.default_rng(seed)
    first, second = rng.normal(1, 1, (2, n, dim)).astype(np.float32)
    unit = [
        crops / np.linalg.norm(crops, axis=1, keepdims=True)
        for crops in (first, second)
    ]
    cosines = unit[0] @ unit[1].T
    variances = np.linalg.eigvalsh(np.cov(np.concatenate(unit).T))
    expected = variances.sum() ** 2 / np.square(variances).sum()
    found = geometry(first, second)
    others = ~np.eye(n, dtype=bool)
    between = cosines[others].mean()
    distances = np.linalg.norm(unit[0][:, None] - unit[1], axis=2)
    spread = np.log(np.exp(-2 * distances[others] ** 2).mean())
    alignment = np.mean(distances[~others] ** 2)
    assert found["mean_cosine"] == pytest.approx(between, abs=1e-5)
    assert found["effective_dimensions"] == pytest.approx(expected, rel=1e-4)
    assert found["alignment"] == pytest.approx(alignment, abs=1e-4)
    assert found["uniformity"] == pytest.approx(spread, abs=1e-4)


def test_geometry_of_a_single_utterance():
    found = geometry(np.ones((1, 3)), np.eye(3)[:1])
    assert math.isnan(found["mean_cosine"])
    assert found["effective_dimensions"] == pytest.approx(1)


@given(st.lists(st.integers(0, 6), min_size=1))
def test_cluster_sizes_are_counted(labels):
    counts = [labels.count(cluster) for cluster in range(7)]
    assert cluster_sizes(torch.tensor(labels), 7) == {
        "largest_share": max(counts) / len(labels),
        "empty_clusters": counts.count(0),
        "single_clusters": counts.count(1),
    }


@pytest.mark.parametrize("n_clusters", [2, 5, 80, 6000])
def test_clusters_of_one_size_are_no_finding(n_clusters):
    labels = np.arange(20 * n_clusters) % n_clusters
    sizes = cluster_sizes(labels, n_clusters)
    assert not findings([{**CLUSTERS, "n_clusters": n_clusters, **sizes}])


@pytest.mark.parametrize("n_clusters", [2, 5, 80, 6000])
def test_a_giant_cluster(n_clusters):
    """All but one or two utterances of each cluster have gone into one."""
    labels = np.zeros(40 * n_clusters, int)
    labels[: 2 * n_clusters] = np.arange(2 * n_clusters) % n_clusters
    sizes = cluster_sizes(labels, n_clusters)
    text = said([{**CLUSTERS, "n_clusters": n_clusters, **sizes}])
    share = f"{100 * np.mean(labels == 0):.0f} % of the utterances"
    assert text.startswith("iteration 2, clusters: one of the ")
    assert share in text and "largest_share" in text and "\n" not in text


def test_empty_and_single_clusters():
    labels = [*(20 * [0]), *(20 * [1]), *(20 * [2]), 3]
    sizes = cluster_sizes(labels, 6)
    text = said([{**CLUSTERS, "n_clusters": 6, **sizes}])
    assert "of the 6 clusters 2 are empty and 1 have one utterance" in text
    assert "n_clusters" in text


def test_a_phase_with_too_few_utterances():
    place = {**CLUSTERS, "phase": "large_margin", "batch_size": 8}
    text = said([{**place, "utterances": 7}])
    assert text.startswith("iteration 2, large_margin: nothing is trained")
    assert "7 utterances" in text and "no batch of 8" in text
    assert not findings([{**place, "utterances": 8}])


def test_labels_that_no_longer_change():
    labels = np.arange(200) % 10
    changed = np.where(np.arange(200) % 4 == 0, labels // 2, labels)
    same, other = ami(labels, labels), ami(labels, changed)
    assert "n_iterations" in said([{**CLUSTERS, "agreement": same}])
    for agreement in (None, other):
        assert not findings([{**CLUSTERS, "agreement": agreement}])
    # That of `selection: agreement` is between epochs, and should rise to 1.
    assert not findings(phase({"agreement": 1.0}))


def speeds(*values, seconds=60.0):
    return phase(
        *({"utterances_per_second": v, "seconds": seconds} for v in values)
    )


def test_throughput_that_fell_by_half():
    text = said(speeds(20, 100, 110, 90, 47, 40))
    assert text.startswith("iteration 1, gated, epoch 5: training has slowed")
    assert "47 utterances per second from 95" in text and "\n" not in text
    assert not findings(speeds(20, 100, 110, 90, 51, 60))
    assert not findings(speeds(100, 100, 10))  # no median to speak of
    assert not findings(speeds(100, 100, 100, 10, seconds=1.0))
    # Another phase has other crops: its own epochs are what counts.
    other = [{**r, "phase": "classifier"} for r in speeds(300, 300, 300)]
    assert not findings([*other, *speeds(100, 100)])


@pytest.mark.parametrize("dimensions, warned", [(1.6, True), (2.3, False)])
def test_embeddings_of_few_dimensions(dimensions, warned):
    """SimSiam at chance had 1.6; three held-out utterances make 2.3."""
    record = {"stage": 1, "phase": "simsiam", "epoch": 2}
    record["effective_dimensions"] = dimensions
    texts = [text for _, text in findings([record])]
    assert any("collapsed" in text for text in texts) == warned


def test_the_discriminator_must_win_for_epochs():
    place = {"stage": 1, "phase": "simclr"}
    rates = [{"discriminator_accuracy": rate} for rate in (0.5, 0.97, 0.99)]
    assert not findings(phase(*rates, **place))
    text = said(phase(*rates, {"discriminator_accuracy": 0.96}, **place))
    assert text.startswith("Stage I, epoch 4: the discriminator has won")
    assert "96 % or more" in text and "adversarial_weight" in text


def test_the_gate_is_judged_where_it_gates():
    for share, tau in ((0.5, 1.0), (0.02, 1.0), (0.98, 1.0), (1.0, None)):
        assert not findings(phase({"selected_share": share, "tau": tau}))
    for share in (0.0, 0.009, 0.991, 1.0):
        wrong = phase({"selected_share": share, "tau": 1.0})
        assert "(selected_share) at tau 1:" in said(wrong)
        assert not findings([{**r, "phase": "classifier"} for r in wrong])


def test_each_thing_is_said_once_in_a_phase():
    records = phase(*(3 * [{"lr": 0.0, "skipped_steps": 2}]))
    again = [{**record, "iteration": 2} for record in records]
    found = findings([*records, *again])
    assert [(r["iteration"], r["epoch"]) for r, _ in found] == [
        (1, 1), (1, 1), (2, 1), (2, 1),
    ]  # fmt: skip
    assert len({words for _, words in found}) == 4


def test_a_run_that_went_well_has_no_finding(tmp_path):
    assert not findings(read_metrics(make_run(tmp_path / "1")))
