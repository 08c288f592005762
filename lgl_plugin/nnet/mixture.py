"""Fits two Gaussians to numbers, and finds where their densities meet."""

import math
import warnings
from collections.abc import Sequence

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture

# Limits of a fit. A longer fit moves the crossing by less than 0.01.
TOLERANCE, MAX_ITERATIONS = 1e-7, 500


def fit_mixture(
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits two Gaussians to finite numbers (N,), N at least 2.

    Returns weights, means and variances, each (2,), float64, the component
    with the lower mean first. The fit does not depend on the order of values.
    """
    x = np.sort(np.asarray(values, dtype=np.float64))
    # More numbers would take longer, and would move tau by less than tau moves
    # from epoch to epoch. Evenly spaced order statistics represent them.
    if len(x) > 65536:
        x = x[np.linspace(0, len(x) - 1, 65536).round().astype(np.int64)]
    floor = 1e-6  # of a variance: equal losses would make it 0
    mixture = GaussianMixture(
        2,
        covariance_type="spherical",
        reg_covar=floor,
        tol=TOLERANCE,
        max_iter=MAX_ITERATIONS,
        # With all three given, scikit-learn skips its random k-means start.
        weights_init=[0.5, 0.5],
        means_init=np.quantile(x, [0.25, 0.75])[:, None],
        precisions_init=np.full(2, 1 / (x.var() + floor)),
    )
    with warnings.catch_warnings():
        # A warning in each epoch would hide other warnings.
        warnings.simplefilter("ignore", ConvergenceWarning)
        mixture.fit(x[:, None])
    means = mixture.means_[:, 0]
    order = np.argsort(means, kind="stable")
    return mixture.weights_[order], means[order], mixture.covariances_[order]


def density_crossing(
    weights: Sequence[float] | np.ndarray,
    means: Sequence[float] | np.ndarray,
    variances: Sequence[float] | np.ndarray,
) -> float | None:
    """Returns where two weighted Gaussian densities meet between their means.

    Each argument holds two numbers, the lower mean first. Returns None if one
    density is above the other at both means.
    """
    # The log of the ratio of the densities at t above the lower mean is a t^2 +
    # b t + c. Its slope is negative at both means, hence between them. So there
    # is one root at most, and there is one if and only if the sign changes. The
    # root with negative slope is computed in the form that does not divide by
    # a.
    (v1, v2), gap = variances, means[1] - means[0]
    log_ratio = math.log(weights[0] / weights[1]) - math.log(v1 / v2) / 2
    a = 1 / (2 * v2) - 1 / (2 * v1)
    b = -gap / v2
    c = log_ratio + gap**2 / (2 * v2)
    at_upper_mean = log_ratio - gap**2 / (2 * v1)
    if not (c > 0 > at_upper_mean):
        return None
    return float(means[0] + 2 * c / (math.sqrt(b * b - 4 * a * c) - b))
