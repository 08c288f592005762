"""What is done to embeddings before they are compared."""

import numpy as np
import pytest

from lgl_plugin.inference.backends import whiten


def test_whitening_gives_identity_covariance():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) + 3 * np.eye(6)
    sample = rng.normal(size=(4000, 6)) @ mixing + 7
    white = whiten(sample, sample)
    assert white.dtype == np.float32
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(white.T), np.eye(6), atol=1e-3)


def test_whitening_takes_its_statistics_from_the_reference():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(500, 3)) * [1, 2, 3] + [4, 5, 6]
    others = rng.normal(size=(20, 3)) * 10
    white = whiten(reference, others)
    # Mahalanobis distances to the reference's mean are the new lengths.
    inverse = np.linalg.inv(np.cov(reference.T))
    apart = others - reference.mean(0)
    expected = np.einsum("ij,jk,ik->i", apart, inverse, apart)
    np.testing.assert_allclose((white**2).sum(1), expected, rtol=1e-4)


def test_whitening_does_not_blow_up_a_constant_band():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(100, 3)) * [1.0, 1.0, 0.0]
    others = sample + [0, 0, 1e-3]
    assert np.abs(whiten(sample, others)).max() < 10


def test_whitening_of_one_dimension():
    sample = np.array([[1.0], [3.0], [8.0]])
    white = whiten(sample, sample)
    assert white.std(ddof=1) == pytest.approx(1) and abs(white.mean()) < 1e-6


@pytest.mark.parametrize("reference", [np.ones((1, 3)), np.ones((9, 3))])
def test_whitening_needs_vectors_that_differ(reference):
    with pytest.raises(ValueError, match=f"differ, got {len(reference)}"):
        whiten(reference, np.eye(3))


def test_whitening_takes_lists_and_half_precision():
    rng = np.random.default_rng(0)
    sample = (rng.normal(size=(2000, 3)) - 50).astype(np.float16)
    expected = whiten(sample.astype(np.float32), sample)
    np.testing.assert_allclose(whiten(sample, sample), expected, atol=1e-6)
    rows = sample.tolist()
    np.testing.assert_allclose(whiten(rows, rows), expected, atol=1e-3)
