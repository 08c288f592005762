"""The figures that a training loop may ask of true labels."""

import functools
import logging
import types

import numpy as np
import pytest
import soundfile

from lgl_plugin.dataio.trials import Trials
from lgl_plugin.evaluation.observer import TrueLabels, observer_of
from lgl_plugin.evaluation.pseudo_labels import clustering_report
from lgl_plugin.evaluation.verification import (
    adaptive_s_norm,
    cohort_statistics,
    cosine_scores,
    figures_of,
)
from lgl_plugin.inference.backends import Whitening
from lgl_plugin.metrics.error_rates import eer

# Row 5 has no speaker, row 6 no pseudo-label.
SPEAKERS = np.array([0, 0, 0, 1, 1, -1, 1])
LABELS = np.array([5, 5, 8, 8, 8, 8, -1])
UNKNOWN = TrueLabels(np.full(7, -1))


def test_clusters_are_reported_by_manifest_row():
    rows = np.array([5, 4, 2, 0])
    found = TrueLabels(SPEAKERS.tolist()).clusters(rows, LABELS[rows])
    assert found == clustering_report([-1, 1, 0, 0], [8, 8, 8, 5])
    assert found["unlabelled"] == 1
    assert UNKNOWN.clusters(rows, LABELS[rows]) == {}


def test_selection_and_corrected_labels():
    # Clusters 5 and 8 are mapped to speakers 0 and 1: rows 0, 1, 3, 4 are
    # reliable. Row 2's correction is right and row 3's wrong; row 5's cannot
    # be judged.
    rows = np.array([0, 2, 3, 4, 5])
    selected = np.array([True, False, False, True, True])
    corrected = np.array([-1, 5, 5, -1, 5])
    found = TrueLabels(SPEAKERS).selection(LABELS, rows, selected, corrected)
    report = clustering_report(SPEAKERS[rows], LABELS[rows], selected)
    names = ["nmi_selected", "ami_selected", "gate_precision", "gate_recall"]
    assert [*found] == [*names, "correction_precision"]
    assert {name: found[name] for name in names} == {
        name: report[name] for name in names
    }
    assert found["correction_precision"] == 0.5
    assert type(found["correction_precision"]) is float
    assert UNKNOWN.selection(LABELS, rows, selected, corrected) == {}


def test_no_correction_has_no_precision():
    found = TrueLabels(SPEAKERS).selection(
        LABELS, np.arange(5), np.ones(5, bool), np.full(5, -1)
    )
    assert "correction_precision" not in found


def test_epoch_losses_of_reliable_and_other_labels():
    rows, losses = np.array([4, 2, 0, 5]), np.float32([1.0, 4.0, 2.0, 8.0])
    found = TrueLabels(SPEAKERS).epoch_losses(LABELS, rows, losses)
    # Row 5 is of neither group: nobody knows whether its label is right.
    assert found == {"loss_reliable": 1.5, "loss_unreliable": 4.0}
    first = TrueLabels(SPEAKERS).epoch_losses(LABELS, rows[:1], losses[:1])
    assert first == {"loss_reliable": 1.0, "loss_unreliable": None}
    assert UNKNOWN.epoch_losses(LABELS, rows, losses) == {}
    # A speaker who is known only where there is no pseudo-label is no use.
    alone = np.array([-1] * 6 + [1])
    assert TrueLabels(alone).epoch_losses(LABELS, rows, losses) == {}


def test_trials_are_read_by_channel_and_rate_of_the_settings(tmp_path):
    """Else training would hear one speaker of a call, and the trials both."""
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.full((8000, 2), 0.5), 44101)
    (tmp_path / "list").write_text("1 a.wav a.wav\n0 a.wav b.wav\n")
    settings = types.SimpleNamespace(
        verification_file=tmp_path / "list",
        trial_folder=tmp_path,
        allow_outside_data_folder=False,
        channel=1,
        sample_rate=44101,  # which no rate but itself can be converted to
    )
    observer = observer_of(settings)(types.SimpleNamespace(speakers=SPEAKERS))
    heard = []

    def embed(manifest):
        heard.extend(row["channel"] for row in manifest)
        return np.eye(2)

    observer.score_trials(embed)
    assert heard == [1, 1]


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_takes_no_figure(broken):
    means = functools.partial(TrueLabels(SPEAKERS).epoch_losses, LABELS)
    rows = np.flatnonzero(LABELS >= 0)
    losses = np.linspace(1, 3, len(rows)).astype(np.float32)
    known = losses.copy()
    known[0] = broken
    found = means(rows, known)
    assert found == means(rows[1:], losses[1:])
    assert None not in found.values()
    assert set(means(rows, known * np.nan).values()) == {None}


def test_trials_are_scored_and_kept(tmp_path, monkeypatch, caplog):
    # SpeechBrain's loggers hand nothing on to pytest's.
    name = "lgl_plugin.evaluation.observer.logger"
    monkeypatch.setattr(name, logging.getLogger("t"))
    names = ["a.wav", "b.wav", "c.wav"]
    for name in names:
        soundfile.write(tmp_path / name, np.full(8000, 0.1), 16000)
    labels = np.array([True, False])
    trials = Trials(labels, names, *np.array([[0, 0], [1, 2]]))
    vectors = np.array([[1, 0], [2, 1], [0, 3]], np.float32)
    observer = TrueLabels(SPEAKERS, trials, tmp_path)
    asked = []

    def embed(audio):
        asked.append(audio)
        return vectors

    path = tmp_path / "scores.npz"
    figures = figures_of(cosine_scores(vectors, trials), trials)
    assert observer.score_trials(embed) == figures
    assert observer.score_trials(embed, path) == figures
    with np.load(path) as kept:
        assert kept["labels"].tolist() == [True, False]
        expected = cosine_scores(vectors, trials)
        np.testing.assert_array_equal(kept["scores"], expected)
    backend = Whitening().fit(vectors)
    more = observer.score_trials(embed, path, backend, vectors)
    under = figures_of(cosine_scores(backend(vectors), trials), trials)
    assert more["eer_backend"] == under["eer"]
    assert more["min_dcf_001_backend"] == under["min_dcf_001"]
    statistics = cohort_statistics(vectors, vectors, 3)
    normed = adaptive_s_norm(expected, trials, *statistics)
    assert more["eer_as_norm"] == 100 * eer(normed, labels)[0]
    assert figures.items() <= more.items() and len(more) == len(figures) + 4
    # Of a collapsed encoder all of the cohort scores alike.
    for size in (9, 1):
        cohort = np.ones((size, 2), np.float32)
        assert observer.score_trials(embed, cohort=cohort) == figures
        assert caplog.messages[-1].startswith("No AS-norm for this phase: ")
    first, again, *_ = asked
    assert first is again  # the headers are read once
    assert list(first.ids) == names and first.durations.tolist() == [0.5] * 3
    assert first[1]["wav"] == str(tmp_path / "b.wav")


def test_without_a_trial_list_nothing_is_embedded(tmp_path):
    path = tmp_path / "scores.npz"
    assert TrueLabels(SPEAKERS).score_trials(None, path) == {}
    assert not path.exists()


def test_positives_of_the_same_speaker():
    observer = TrueLabels(np.array([0, 0, 1, 1, -1]))
    rows = np.array([0, 1, 2, 3, 4, 0, 0])
    positives = np.array([1, 0, 3, 0, 0, 4, -1])
    # Known on both sides and replaced are the first four.
    assert observer.positives(rows, positives) == {"same_speaker_share": 0.75}
    assert observer.positives(np.array([0, 4]), np.array([-1, 1])) == {}
