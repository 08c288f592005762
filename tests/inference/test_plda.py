"""PLDA: directions that tell clusters apart, and scores by these."""

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st
from scipy.stats import multivariate_normal

from lgl_plugin.inference import backends, plda
from lgl_plugin.inference.plda import fit_plda


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def speech(n_speakers, size, seed=0, least=1, most=9):
    """Speakers of different numbers of utterances, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(
        np.arange(n_speakers), rng.integers(least, most, size=n_speakers)
    )
    voices = rng.normal(size=(n_speakers, size)) @ rng.normal(size=(size, size))
    noise = rng.normal(size=(len(labels), size)) @ rng.normal(size=(size, size))
    return voices[labels] + 0.5 * noise + 3, labels


def covariances(vectors, labels):
    """Within and between clusters, by their definitions, one at a time."""
    points = unit(vectors)
    sizes = np.bincount(labels)
    means = [points[labels == k].mean(0) for k in range(len(sizes))]
    apart = points - np.array(means)[labels]
    within = sum(np.outer(a, a) for a in apart) / (len(points) - len(sizes))
    mean = points.mean(0)
    between = sum(
        n * np.outer(m - mean, m - mean) for n, m in zip(sizes, means)
    ) / (len(sizes) - 1)
    size = (len(points) - (sizes**2).sum() / len(points)) / (len(sizes) - 1)
    return mean, within, (between - within) / size


@given(seed=st.integers(0, 99), size=st.integers(2, 4))
def test_ratios_are_those_of_normal_densities(seed, size):
    vectors, labels = speech(60, size, seed)
    mean, within, between = covariances(vectors, labels)
    within += plda.SHRINKAGE * np.trace(within) / size * np.eye(size)
    # A direction without speakers would be left out.
    assume(np.linalg.eigvalsh(between).min() > 1e-6)
    one = within + between
    both = np.block([[one, between], [between, one]])
    of_one = multivariate_normal(mean, one)
    of_both = multivariate_normal(np.append(mean, mean), both)
    others, _ = speech(3, size, seed + 1)
    first, second = np.triu_indices(len(others))
    x, y = unit(others)[first], unit(others)[second]
    expected = of_both.logpdf(np.hstack([x, y]))
    expected -= of_one.logpdf(x) + of_one.logpdf(y)
    found = fit_plda(vectors, labels)
    np.testing.assert_allclose(
        found.ratios(others, first, second), expected, rtol=1e-3, atol=1e-3
    )
    # The joint term changes its sign where one of them is turned about.
    turned = of_both.logpdf(np.hstack([x, 2 * mean - y]))
    turned = (of_both.logpdf(np.hstack([x, y])) - turned) / 2
    points = found.projection(others)
    np.testing.assert_allclose(
        (points[first] * points[second]).sum(1), turned, rtol=1e-3, atol=1e-3
    )


def test_directions_that_know_channels_count_less():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(60), 8)
    voices = rng.normal(size=(60, 3))[labels]
    channels = 2 * rng.normal(size=(len(labels), 3))
    found = fit_plda(np.hstack([voices, channels]), labels).projection
    voice, channel = np.split(np.linalg.norm(found.projection, axis=1), 2)
    assert voice.min() > 3 * channel.max()


def test_blocks_change_nothing_and_lengths_do_not_count(monkeypatch):
    vectors, labels = speech(20, 5)
    pairs = np.triu_indices(len(vectors))
    expected = fit_plda(vectors, labels).ratios(vectors, *pairs)
    lengths = np.linspace(1e-2, 1e2, len(vectors))[:, None]
    monkeypatch.setattr(backends, "BLOCK", 7)
    monkeypatch.setattr(plda, "PAIRS", 5)
    found = fit_plda(vectors * lengths, labels).ratios(vectors, *pairs)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_fewer_embeddings_than_dimensions_will_do():
    vectors, labels = speech(5, 40)
    found = fit_plda(vectors, labels)
    assert found.axes.shape[1] <= 4  # means of five have no more directions
    assert np.isfinite(found.ratios(vectors, [0, 1], [1, 2])).all()
    assert found.projection(vectors).any()


@pytest.mark.parametrize(
    "labels, problem",
    [
        (np.zeros(12, int), "from 2 to 11 clusters of 12 embeddings, got 1"),
        (np.arange(12), "got 12"),
        (np.repeat(np.arange(6), 2), "do not vary"),
        (np.arange(12) % 2, "in no direction more"),
    ],
)
def test_clusters_that_nothing_is_learnt_from_are_refused(labels, problem):
    vectors = np.repeat(np.random.default_rng(0).normal(size=(6, 4)), 2, axis=0)
    with pytest.raises(plda.PldaError, match=problem):
        fit_plda(vectors, labels)
