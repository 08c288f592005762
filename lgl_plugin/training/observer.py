"""The figures that a training loop logs of true labels and never reads.

A recipe hands in an observer; `lgl_plugin.evaluation.observer.TrueLabels` is
one. Training imports nothing that reads true labels: import-linter holds that.
"""

import pathlib
from collections.abc import Callable

import numpy as np


class Observer:
    """An observer that knows no labels: every record stays as it is."""

    def score_trials(
        self,
        embed: Callable,
        path: str | pathlib.Path | None = None,
        backend: Callable | None = None,
        cohort: np.ndarray | None = None,
    ) -> dict:
        """Returns error rates of an encoder; `embed` maps audio to vectors.

        `backend` transforms these for further figures, and `cohort` (M, D)
        normalises scores.
        """
        return {}

    def clusters(self, rows: np.ndarray, labels: np.ndarray) -> dict:
        """Returns how pseudo-labels of rows agree with the speakers."""
        return {}

    def selection(
        self,
        labels: np.ndarray,
        rows: np.ndarray,
        selected: np.ndarray,
        corrected: np.ndarray,
    ) -> dict:
        """Returns how well a gate and a label correction did."""
        return {}

    def positives(self, rows: np.ndarray, positives: np.ndarray) -> dict:
        """Returns how often a contrastive pair was of one speaker."""
        return {}

    def epoch_losses(self, labels: np.ndarray) -> Callable | None:
        """Returns what makes figures of an epoch's rows and losses."""
        return None
