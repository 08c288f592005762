"""The map of embeddings: who is in it, and where."""

import numpy as np
import pytest

from lgl_plugin.report.projection import POINTS, project, sample


def test_map_of_many_draws_from_the_groups_in_colour():
    """Half of it at most, the same each time, nobody twice."""
    labels = np.random.default_rng(0).integers(3000, size=100_000)
    labels[:5000] = 7
    chosen = sample(labels, [7, 8])
    assert (chosen == sample(labels, [7, 8])).all()
    assert len(np.unique(chosen)) == len(chosen) == POINTS
    assert (labels[chosen] == 7).sum() == POINTS // 4
    assert (labels[chosen] == 8).sum() == (labels == 8).sum()


@pytest.mark.parametrize("n", [5, 40])
def test_map_keeps_groups_together(n):
    """Where there are enough of them, neighbours are kin."""
    groups = np.arange(n) % 4
    rng = np.random.default_rng(0)
    vectors = np.eye(16)[groups] + 0.05 * rng.normal(size=(n, 16))
    points, spread = project(vectors)
    assert points.shape == (n, 2) and np.isfinite(points).all()
    assert 0.99 < spread <= 1.001
    if n == 40:
        distances = np.linalg.norm(points[:, None] - points, axis=-1)
        nearest = (distances + 1e9 * np.eye(n)).argmin(axis=1)
        assert (groups[nearest] == groups).all()
