"""The observer of a training: its only access to true labels."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.trials import Trials, read_trials, trial_audio
from lgl_plugin.evaluation.pseudo_labels import (
    clustering_report,
    hungarian_mapping,
    reliable,
)
from lgl_plugin.evaluation.verification import (
    as_norm,
    cosine_scores,
    figures_of,
)
from lgl_plugin.runs.schema import Settings
from lgl_plugin.utils.files import save_arrays

logger = get_logger(__name__)


class TrueLabels:
    """An observer, which a recipe hands to a training loop for its records.

    Training writes the returned figures to metrics.jsonl and never reads them
    back. Training cannot access the labels.

    Arguments
    ---------
    speakers : array-like, (N,), int64
        True speaker of each row of the manifest, -1 if unknown.
    trials, folder : Trials and str or pathlib.Path, optional
        A labelled trial list, and the folder that its paths are relative to.
    channel : int, optional
        Channel to read of multi-channel audio; by default the mean of all.
    sample_rate : int
        Sampling rate of the encoder in Hz, to which the list's audio is
        converted.

    Example
    -------
    >>> observer = TrueLabels(np.array([0, 0, 1, 1]))
    >>> observer.clusters(np.arange(4), np.array([5, 5, 5, 8]))["purity"]
    0.75
    >>> observer.score_trials(embed=None)  # no trial list, no figures
    {}
    """

    def __init__(
        self,
        speakers: ArrayLike,
        trials: Trials | None = None,
        folder: str | pathlib.Path | None = None,
        channel: int | None = None,
        sample_rate: int = 16000,
    ):
        self._speakers = np.asarray(speakers)
        self._trials = trials
        self._folder = folder
        self._channel = channel
        self._rates = (sample_rate,)

    @functools.cached_property
    def _audio(self):
        """The trial list's utterances, whose headers are read on first use."""
        return trial_audio(
            self._trials, self._folder, self._channel, self._rates
        )

    def score_trials(
        self,
        embed: Callable[[Manifest], np.ndarray],
        path: str | pathlib.Path | None = None,
        backend: Callable[[np.ndarray], np.ndarray] | None = None,
        cohort: np.ndarray | None = None,
    ) -> dict[str, float]:
        """Scores the trial list by `verification.figures_of`; {} without one.

        `embed` takes the list's audio, n utterances, and returns their
        embeddings (n, D). `path` is an npz file for the `scores` (T,) and
        `labels` (T,). A `backend`, which transforms embeddings, adds
        `eer_backend` and `min_dcf_001_backend`. A `cohort` (M, D) of training
        utterances' embeddings adds AS-norm's `eer_as_norm` and
        `min_dcf_001_as_norm`. If all of the cohort scores alike, a warning is
        logged instead.
        """
        trials = self._trials
        if trials is None:
            return {}
        embeddings = embed(self._audio)
        scores = cosine_scores(embeddings, trials)
        if path is not None:
            save_arrays(path, scores=scores, labels=trials.labels)
        figures = figures_of(scores, trials)
        others = {}
        if backend is not None:
            others["backend"] = cosine_scores(backend(embeddings), trials)
        if cohort is not None:
            try:
                others["as_norm"] = as_norm(scores, trials, embeddings, cohort)
            except ValueError as error:  # a collapsed encoder, for example
                logger.warning("No AS-norm for this phase: %s", error)
        for name, system_scores in others.items():
            rates = figures_of(system_scores, trials)
            figures[f"eer_{name}"] = rates["eer"]
            figures[f"min_dcf_001_{name}"] = rates["min_dcf_001"]
        return figures

    def clusters(
        self,
        rows: np.ndarray,
        labels: np.ndarray,
        selected: np.ndarray | None = None,
    ) -> dict:
        """Reports on the pseudo-labels (n,) of manifest rows (n,).

        Returns the figures of `clustering_report`; {} if no row's speaker is
        known.
        """
        true = self._speakers[rows]
        if not (true >= 0).any():
            return {}
        return clustering_report(true, labels, selected)

    def selection(
        self,
        labels: np.ndarray,
        rows: np.ndarray,
        selected: np.ndarray,
        corrected: np.ndarray,
    ) -> dict[str, float]:
        """Measures a gate's selection and its corrected labels.

        `labels` (N,) are the pseudo-labels of all manifest rows, -1 for none.
        `rows` (n,) were trained on. `selected` (n,) marks the rows that the
        gate selected. `corrected` (n,) has the labels that replaced rejected
        labels, -1 for none. Returns the gate's figures of `clustering_report`,
        and `correction_precision`, the share of corrected labels whose cluster
        is mapped to the true speaker. A figure is left out if no speaker is
        known.
        """
        report = self.clusters(rows, labels[rows], selected)
        keys = ("nmi_selected", "ami_selected", "gate_precision", "gate_recall")
        figures = {key: report[key] for key in keys if key in report}
        true, known = self._speakers, labels >= 0
        changed = (corrected >= 0) & (true[rows] >= 0)
        if changed.any():
            speaker_of = hungarian_mapping(true[known], labels[known])
            mapped = [speaker_of.get(n, -1) for n in corrected[changed]]
            precision = np.mean(mapped == true[rows][changed])
            figures["correction_precision"] = float(precision)
        return figures

    def positives(self, rows: np.ndarray, positives: np.ndarray) -> dict:
        """Measures positives that come from other utterances.

        `rows` (n,) are the anchors' and `positives` (n,) the positives'
        manifest rows, -1 if an anchor kept its own crop. Returns
        `same_speaker_share`, the share of replaced positives with the anchor's
        speaker; {} if no such pair's speakers are known.
        """
        one, other = self._speakers[rows], self._speakers[positives]
        known = (positives >= 0) & (one >= 0) & (other >= 0)
        if not known.any():
            return {}
        share = np.mean(one[known] == other[known])
        return {"same_speaker_share": float(share)}

    def epoch_losses(
        self, labels: np.ndarray, rows: np.ndarray, losses: np.ndarray
    ) -> dict[str, float | None]:
        """Measures the losses of reliable and of other labels in an epoch.

        `labels` (N,) are the pseudo-labels of all manifest rows, -1 for none.
        `rows` (n,) and `losses` (n,) are the epoch's. Returns `loss_reliable`
        and `loss_unreliable`, the means of finite losses of known speakers,
        None for an empty group (paper, section 3 and figure 2); {} if no
        labelled row's speaker is known.
        """
        if not (self._speakers[labels >= 0] >= 0).any():
            return {}
        is_reliable = reliable(self._speakers, labels)[rows]
        # One non-finite step must not make the epoch's figure NaN.
        finite = np.isfinite(losses)
        is_unreliable = ~is_reliable & (self._speakers[rows] >= 0)
        groups = {
            "loss_reliable": is_reliable,
            "loss_unreliable": is_unreliable,
        }
        return {
            name: float(np.mean(losses[group & finite]))
            if (group & finite).any()
            else None
            for name, group in groups.items()
        }


def observer_of(settings: Settings) -> Callable[[Manifest], TrueLabels]:
    """Returns a function from a manifest to its observer, for a `Session`.

    The trial list is read at once, so that a wrong path or line shows before
    training. Its audio is read when it is scored.

    Arguments
    ---------
    settings : lgl_plugin.runs.schema.Settings
        Settings of a stage: verification_file, trial_folder, channel,
        sample_rate and allow_outside_data_folder are read.

    Returns
    -------
    callable
        Takes a manifest and returns its `TrueLabels`.

    Raises
    ------
    ValueError, FileNotFoundError
        As `lgl_plugin.dataio.trials.read_trials` does.

    Example
    -------
    >>> from types import SimpleNamespace
    >>> settings = SimpleNamespace(
    ...     verification_file=None,
    ...     trial_folder=".",
    ...     channel=None,
    ...     sample_rate=16000,
    ... )
    >>> observe = observer_of(settings)
    >>> observe(SimpleNamespace(speakers=np.array([0, 0, 1])))
    <lgl_plugin.evaluation.observer.TrueLabels object at ...>
    """
    trials, folder = None, settings.trial_folder
    if settings.verification_file:
        outside = settings.allow_outside_data_folder
        trials = read_trials(settings.verification_file, folder, outside)
    where = trials, folder, settings.channel, settings.sample_rate
    return lambda manifest: TrueLabels(manifest.speakers, *where)
