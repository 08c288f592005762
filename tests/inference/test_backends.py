"""What is done to embeddings before they are compared."""

import numpy as np
import pytest
from hyperpyyaml import load_hyperpyyaml
from hypothesis import given, strategies as st
from sklearn.decomposition import PCA

from lgl_plugin.inference import backends
from lgl_plugin.inference.backends import (
    Backend,
    Centring,
    Identity,
    Whitening,
    load_backend,
)

ALL = [Identity(), Centring(), Whitening(0.0), Whitening()]


def sample(n_rows, size, seed=0):
    """Embeddings whose directions differ in variance, off the origin."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n_rows, size)) @ rng.normal(size=(size, size)) + 1


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def cosines(vectors):
    return unit(vectors) @ unit(vectors).T


def test_without_shrinkage_it_is_the_whitening_of_scikit_learn():
    vectors, others = sample(400, 6), sample(30, 6, seed=1)
    white = Whitening(shrinkage=0.0).fit(vectors)
    assert white(others).dtype == np.float32
    pca = PCA(whiten=True).fit(unit(vectors))
    expected = pca.transform(unit(others))  # in another order, with other signs
    np.testing.assert_allclose(
        white(others) @ white(others).T, expected @ expected.T, rtol=1e-4
    )
    np.testing.assert_allclose(np.cov(white(vectors).T), np.eye(6), atol=1e-4)


@given(
    n_rows=st.integers(2, 40),
    size=st.integers(1, 12),
    shrinkage=st.floats(0.01, 10),
    seed=st.integers(0, 99),
)
def test_whitening_is_its_formula(n_rows, size, shrinkage, seed):
    """Also where there are fewer embeddings than dimensions."""
    vectors = sample(n_rows, size, seed)
    if size == 1:
        vectors[0] *= -1  # at length 1 they would be equal
        vectors[1] = -vectors[0]
    others = sample(5, size, seed + 1)
    found = Whitening(shrinkage).fit(vectors)(others)
    mean = unit(vectors).mean(axis=0)
    covariance = np.atleast_2d(np.cov(unit(vectors).T))
    shrunk = covariance + shrinkage * np.trace(covariance) / size * np.eye(size)
    apart = unit(others) - mean
    expected = apart @ np.linalg.inv(shrunk) @ apart.T
    largest = np.abs(expected).max()
    np.testing.assert_allclose(
        found @ found.T, expected, rtol=1e-3, atol=1e-5 * largest
    )


@pytest.mark.parametrize("shrinkage", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("n_rows", [2, 3, 20])
def test_fewer_embeddings_than_dimensions_will_do(n_rows, shrinkage):
    white = Whitening(shrinkage).fit(sample(n_rows, 32))(sample(9, 32, seed=1))
    assert np.isfinite(white).all() and white.any()


@pytest.mark.parametrize("backend", ALL, ids=lambda b: type(b).__name__)
def test_the_length_of_an_embedding_does_not_count(backend):
    vectors = sample(50, 4)
    lengths = np.linspace(1e-3, 1e3, 50)[:, None]
    expected = backend.fit_transform(vectors)
    np.testing.assert_allclose(
        backend.fit(vectors * lengths)(vectors / lengths), expected, atol=1e-4
    )


def test_identity_keeps_cosines_and_centring_takes_the_mean():
    vectors = sample(50, 4)
    np.testing.assert_allclose(
        cosines(Identity().fit_transform(vectors)), cosines(vectors), atol=1e-5
    )
    np.testing.assert_allclose(
        Centring().fit_transform(vectors),
        unit(vectors) - unit(vectors).mean(axis=0),
        atol=1e-6,
    )


@pytest.mark.parametrize("backend", ALL, ids=lambda b: type(b).__name__)
def test_blocks_and_a_store_on_disk_change_nothing(
    backend, tmp_path, monkeypatch
):
    vectors = sample(101, 5).astype(np.float16)
    expected = backend.fit(vectors.tolist())(vectors.astype(np.float64))
    np.save(tmp_path / "vectors.npy", vectors)
    stored = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    monkeypatch.setattr(backends, "BLOCK", 7)
    np.testing.assert_allclose(backend.fit(stored)(stored), expected, rtol=1e-5)


@pytest.mark.parametrize("backend", ALL, ids=lambda b: type(b).__name__)
def test_arrays_are_saved_and_read(backend, tmp_path):
    vectors = sample(50, 4)
    backend.fit(vectors).save(tmp_path / "backend.npz")
    again = load_backend(tmp_path / "backend.npz")
    np.testing.assert_array_equal(again(vectors), backend(vectors))
    assert again.fit(vectors + 1) is again  # it has what it needs


def test_a_damaged_file_is_named(tmp_path):
    np.savez(tmp_path / "other.npz", labels=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz holds no back-end"):
        load_backend(tmp_path / "other.npz")
    np.savez(tmp_path / "odd.npz", mean=np.zeros(3), projection=np.eye(2))
    with pytest.raises(ValueError, match=r"odd.npz.*\(3,\) and \(2, 2\)"):
        load_backend(tmp_path / "odd.npz")


def test_a_yaml_makes_them():
    text = "backend: !new:lgl_plugin.inference.backends.Whitening"
    made = load_hyperpyyaml(f"{text}\n    shrinkage: 0.3\n")["backend"]
    assert isinstance(made, Whitening) and made.shrinkage == 0.3
    assert load_hyperpyyaml(text)["backend"].shrinkage == 10.0


@pytest.mark.parametrize("shrinkage", [-1, np.nan, np.inf])
def test_shrinkage_is_from_0(shrinkage):
    with pytest.raises(ValueError, match="shrinkage must be from 0"):
        Whitening(shrinkage)


@pytest.mark.parametrize(
    "vectors", [np.ones((1, 3)), np.ones((9, 3)), np.ones((9, 3), np.float16)]
)
def test_whitening_needs_embeddings_that_differ(vectors):
    with pytest.raises(ValueError, match=f"differ, got {len(vectors)}"):
        Whitening().fit(vectors)


def test_what_cannot_be_transformed():
    with pytest.raises(ValueError, match="Whitening is not fitted yet"):
        Whitening()([[1, 2]])
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        Centring().fit([1, 2, 3])
    with pytest.raises(ValueError, match="not finite"):
        Whitening().fit([[1, 2], [np.nan, 1], [1, 4]])
    with pytest.raises(ValueError, match="not finite"):
        Backend([0, 0], np.eye(2))([[np.inf, 1]])
