"""The only object through which a training loop meets true labels."""

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
    """An observer that a recipe hands to a training loop, for its records.

    Training writes the returned figures to metrics.jsonl and never reads them
    back. It cannot get at the labels.

    Arguments
    ---------
    speakers : array-like, (N,), int64
        True speaker of each row of the manifest, -1 where not known.
    trials, folder : Trials and str or pathlib.Path, optional
        A trial list with its labels, and where its paths begin.
    channel : int, optional
        The one to read of audio that has several; by default the mean.
    sample_rate : int
        The encoder's, in Hz, which the list's audio is converted to.

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
        """The trial list's utterances; their headers are read when needed."""
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
        embeddings (n, D).
        `path` is an npz file to keep the `scores` (T,) and `labels` (T,) in.
        A `backend`, which transforms embeddings, adds `eer_backend` and
        `min_dcf_001_backend`; a `cohort` (M, D) of training utterances'
        embeddings adds AS-norm's `eer_as_norm` and `min_dcf_001_as_norm`, or,
        where all of it scores alike, a warning.
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
            except ValueError as error:  # such as of a collapsed encoder
                logger.warning("No AS-norm for this phase: %s", error)
        for name, found in others.items():
            rates = figures_of(found, trials)
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

        Returns what `clustering_report` does; {} where no row's speaker is
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
        gate let through. `corrected` (n,) holds the labels that replaced
        refused labels, -1 for none. Returns the gate's figures of
        `clustering_report`, and `correction_precision`, the share of
        corrected labels whose cluster is mapped to the true speaker. A figure
        is left out where no speaker is known.
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

        Takes the anchors' `rows` (n,) and those of their `positives` (n,), -1
        where an anchor kept its own. Returns `same_speaker_share`, the share
        of replaced positives with the anchor's speaker; {} if no such pair's
        speakers are known.
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

        `labels` (N,) are the pseudo-labels of all manifest rows, -1 for none,
        `rows` (n,) and `losses` (n,) the epoch's. Returns `loss_reliable` and
        `loss_unreliable`, means of finite losses of known speakers, None for a
        group without any (paper, section 3 and figure 2); {} where no labelled
        row's speaker is known.
        """
        if not (self._speakers[labels >= 0] >= 0).any():
            return {}
        good = reliable(self._speakers, labels)[rows]
        # One step that went wrong must not take the epoch's figure.
        finite = np.isfinite(losses)
        other = ~good & (self._speakers[rows] >= 0)
        groups = {"loss_reliable": good, "loss_unreliable": other}
        return {
            name: float(np.mean(losses[group & finite]))
            if (group & finite).any()
            else None
            for name, group in groups.items()
        }


def observer_of(settings: Settings) -> Callable[[Manifest], TrueLabels]:
    """Makes what a `Session` takes: the observer of a manifest's audio.

    The trial list is read at once, so that a wrong path or line shows before
    any training; its audio is read when it is scored.

    Arguments
    ---------
    settings : lgl_plugin.runs.schema.Settings
        Those of a stage: verification_file, trial_folder, channel,
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
