"""Views of the same utterances, joined."""

import numpy as np
import pytest
from blobs import unit

from lgl_plugin.clustering.vectors import joined


@pytest.mark.parametrize("share", [0, 0.33, 1])
def test_the_cosine_of_joined_views_is_their_weighted_mean(share):
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=(6, 4)), 9 * rng.normal(size=(6, 7))
    both = joined(one, other, share)
    assert both.shape == (6, 11) and both.dtype == np.float32
    one, other = unit(one), unit(other)
    expected = (1 - share) * one @ one.T + share * other @ other.T
    np.testing.assert_allclose(both @ both.T, expected, atol=1e-6)
