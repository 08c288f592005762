"""The figures hold the data that they are given."""

import re

import numpy as np
import pytest
from scipy.special import ndtri

from lgl_plugin.metrics.error_rates import eer, operating_points
from lgl_plugin.report import figures

# Machado et al. (2009), severity 1.0: what a reader without one kind of cone
# sees, in linear RGB.
VISIONS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868],
                   [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968],
                     [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779],
                   [-0.078411, 0.930809, 0.147602],
                   [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


def lab(rgb):
    """Linear RGB to CIELAB, D65."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
              [0.0193, 0.1192, 0.9505]]  # fmt: skip
    xyz = rgb @ np.array(to_xyz).T / [0.95047, 1, 1.08883]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = f.T
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_can_be_told_apart(vision):
    """Any two differ by 15 at least; 2.3 is just noticeable."""
    codes = [re.findall("[0-9A-F]{2}", colour) for colour in figures.COLOURS]
    rgb = np.array([[int(code, 16) / 255 for code in c] for c in codes])
    linear = np.where(rgb <= 0.04045, rgb / 12.92,
                      ((rgb + 0.055) / 1.055) ** 2.4)  # fmt: skip
    seen = lab(np.clip(linear @ np.array(VISIONS[vision]).T, 0, 1))
    distances = np.linalg.norm(seen[:, None] - seen, axis=-1)
    assert distances[np.triu_indices(len(seen), 1)].min() > 15


def test_no_two_of_a_figure_look_alike():
    looks = [tuple(figures.style(n).items()) for n in range(28)]
    assert len(set(looks)) == len(looks)
    for key in ("color", "marker"):
        assert len({figures.style(n)[key] for n in range(7)}) == 7


def test_saved_twice_it_is_the_same_file(tmp_path):
    drawn = [figures.cluster_sizes({"a": [3, 2, 1]}) for _ in range(2)]
    first, second = (figures.save(f, tmp_path, "sizes") for f in drawn)
    assert first == second
    assert (tmp_path / "sizes.png").read_bytes() == first[0]
    assert b"<svg" in first[1] and not list(tmp_path.glob(".*"))


def test_det_curve_loses_nothing_that_can_be_seen():
    """100,000 trials in few points; none is far from the curve."""
    rng = np.random.default_rng(0)
    labels = rng.random(100_000) < 0.3
    scores = rng.normal(size=100_000) + 2 * labels
    axes = figures.det({"a": (scores, labels)}).axes[0]
    curve, mark, _ = axes.lines
    rate, _ = eer(scores, labels)
    assert np.allclose(mark.get_xydata(), ndtri(rate))
    drawn = curve.get_xydata()
    assert len(drawn) < 5000
    _, p_miss, p_fa = operating_points(scores, labels)
    true = ndtri(np.clip([p_fa, p_miss], 1e-9, 1 - 1e-9)).T
    inside = (abs(true) < ndtri(0.999)).all(axis=1)
    for point in true[inside][::500]:
        assert abs(drawn - point).max(axis=1).min() < 0.02


def test_error_rate_by_phase_draws_means_baseline_and_gaps():
    baseline, ceiling = {"eer": 30.0}, {"eer": 5.0}
    first = {
        "log-mel statistics": baseline,
        "true labels": ceiling,
        "Stage I": {"eer": 20.0},
        "iteration 1, classifier": {"nmi": 0.8},
        "iteration 1, gated": {"eer": 10.0, "nmi_selected": 0.9},
    }
    second = {**first, "Stage I": {"eer": 22.0}, "iteration 1, gated": {}}
    above, below = figures.error_rate_by_phase({"two": [first, second]}).axes
    *thin, mean, low, high = above.lines
    assert len(thin) == 2
    assert mean.get_xydata().tolist() == [[0, 21], [2, 10]]
    assert (low.get_ydata()[0], high.get_ydata()[0]) == (30, 5)
    assert [line.get_ydata()[0] for line in below.lines[-1:]] == [0.9]
    legend = [text.get_text() for text in below.get_legend().get_texts()]
    assert legend == ["of all utterances", "of those that the gate selects"]
    ticks = [label.get_text() for label in below.get_xticklabels()]
    assert ticks == ["Stage I", "it. 1, classifier", "it. 1, gated"]


def test_error_rates_of_references_alone():
    """The ceiling alone, one run of it not scored yet."""
    rows = [{"true labels": {"eer": 18.0}}, {"true labels": {}}]
    (axes,) = figures.error_rate_by_phase({"a": rows}).axes
    assert axes.lines[-1].get_ydata() == pytest.approx([18, 18])


EPOCHS = [
    {"stage": 0, "phase": "untrained", "eer": 30.0},
    {"stage": 1, "phase": "simclr", "epoch": 1, "loss": 5.0},
    {"stage": 1, "phase": "simclr", "epoch": 2, "loss": None},
    *(
        {"stage": 2, "iteration": n, "phase": "gated", "epoch": 1, "loss": n}
        for n in (1, 2)
    ),
]


def test_epochs_of_the_run_are_counted_through():
    axes = figures.epochs(EPOCHS, {"loss": "x"}, "loss", factor=10).axes[0]
    points = [line.get_xydata().tolist() for line in axes.lines]
    assert points[:3] == [[[1, 50]], [[3, 10]], [[4, 20]]]
    assert [text.get_text() for text in axes.texts] == ["it. 1", "it. 2"]
    (legend,) = axes.figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["simclr", "gated"]


def test_several_figures_of_an_epoch_have_a_line_each():
    records = [{**record, "other": 7} for record in EPOCHS]
    keys = {"loss": "mine", "other": "yours"}
    figure = figures.epochs(records, keys, "loss")
    (legend,) = figure.legends
    assert {t.get_text() for t in legend.get_texts()} == {"mine", "yours"}


def test_courses_end_with_the_training_and_the_best_is_named_first():
    eers = {"slow": [40.0, 35.0, 30.0], "quick": [30.0, 25.0, 20.0]}
    (axes,) = figures.courses(eers, 6.0).axes
    first, second = axes.lines
    assert (first.get_label(), second.get_label()) == ("quick", "slow")
    assert first.get_xdata().tolist() == [2, 4, 6]
    assert first.get_ydata().tolist() == eers["quick"]


def test_histogram_counts_each_loss_once():
    rng = np.random.default_rng(0)
    groups = {"a": rng.gamma(2, 1, 1000), "b": np.append(rng.random(9), np.nan)}
    axes = figures.losses(groups, np.inf).axes[0]
    counts = [patch.get_data().values.sum() for patch in axes.patches]
    assert counts == [1000, 9]
    assert not axes.lines  # no threshold
    assert figures.losses(groups, 2.5).axes[0].lines[0].get_xdata()[0] == 2.5


def test_histogram_of_nothing():
    axes = figures.losses({"a": []}, np.nan).axes[0]
    assert axes.patches[0].get_data().values.sum() == 0


def test_thousands_of_clusters_in_few_points():
    counts = np.random.default_rng(0).integers(1, 900, 6000)
    axes = figures.cluster_sizes({"a": counts}).axes[0]
    points = axes.lines[0].get_xydata()
    assert len(points) <= 400
    assert points[0].tolist() == [1, counts.max()]
    assert points[-1].tolist() == [6000, counts.min()]


def test_map_draws_each_point_once():
    rng = np.random.default_rng(0)
    points, groups = rng.normal(size=(50, 2)), rng.integers(-1, 3, 50)
    axes = figures.embedding_map(points, groups, ["a", "b", "c"]).axes[0]
    drawn = [each.get_offsets() for each in axes.collections]
    assert [len(each) for each in drawn] == np.bincount(groups + 1).tolist()
    assert sorted(map(tuple, np.concatenate(drawn))) == sorted(
        map(tuple, points)
    )
