"""Thresholds found without labels, against loops over all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.manifest import Manifest, Strings, held_out
from lgl_plugin.inference.calibration import (
    find_threshold,
    pairs_eer,
    threshold_by_halves,
    threshold_by_pseudo_labels,
)
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.metrics.error_rates import eer

vectors = st.lists(
    st.tuples(st.integers(-1, 3), st.booleans(), st.integers(0, 2**32 - 1)),
    min_size=2,
    max_size=12,
)


@given(vectors)
@settings(deadline=None, max_examples=40)
def test_threshold_by_pseudo_labels(rows):
    """Against a loop over all pairs."""
    labels, held_out, seeds = map(np.array, zip(*rows))
    points = np.array(
        [np.random.default_rng(seed).normal(size=4) for seed in seeds]
    )
    scores, same = [], []
    for i in range(len(rows)):
        for j in range(i):
            if min(labels[i], labels[j]) >= 0 and (held_out[i] or held_out[j]):
                lengths = np.linalg.norm(points[i]) * np.linalg.norm(points[j])
                scores.append(points[i] @ points[j] / lengths)
                same.append(labels[i] == labels[j])
    found = threshold_by_pseudo_labels(points, labels, held_out)
    if all(same) or not any(same):
        assert found is None
    else:
        # Equal points score equally but for rounding, which parts them.
        if len({*seeds.tolist()}) == len(seeds):
            assert found == pytest.approx(eer(scores, same)[1], abs=1e-5)


def test_error_and_threshold_of_halves():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 6, 3))
    scores = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        for a in first
        for b in second
    ]
    same = np.eye(6, dtype=bool).ravel()
    found = pairs_eer(first, second)
    assert found == pytest.approx(eer(scores, same), abs=1e-6)


class FakeExtractor:
    """Gives each utterance a direction of its own, each span some noise."""

    def __init__(self, without=()):
        self.asked, self.without = [], without

    def __call__(self, manifest, rows):
        self.asked.append({manifest.ids[row]: manifest[row] for row in rows})
        found = {}
        for name, item in self.asked[-1].items():
            speaker = ord(item["wav"])
            direction = np.random.default_rng(speaker).normal(size=4)
            span = np.random.default_rng(speaker + round(99 * item["offset"]))
            if name not in self.without:
                found[name] = direction + 0.1 * span.normal(size=4)
        if not found:
            raise BadAudio("none could be embedded")
        return Embeddings(Strings(found), np.array([*found.values()])), []


MANIFEST = Manifest.of([(n, n, 1.0, 2.0, "") for n in "abcdefgh"])


def test_without_pseudo_labels_halves_are_compared():
    extract = FakeExtractor()
    (threshold, way), vectors = find_threshold(extract, MANIFEST, 0.5, 0)
    assert way == "halves" and 0 < threshold < 1 and vectors.shape == (8, 4)
    whole, halves = extract.asked
    assert set(whole) == set("abcdefgh")
    _, aside = held_out(8, 0.5, 0)
    spans = {(h["wav"], h["offset"], h["duration"]) for h in halves.values()}
    assert spans == {
        (MANIFEST.ids[row], offset, 1.0) for row in aside for offset in (1, 2)
    }
    extract = FakeExtractor()
    find_threshold(extract, MANIFEST, 0.5, 0, labelled=aside[:2])
    _, halves = extract.asked
    names = {half["wav"] for half in halves.values()}
    assert not names & {MANIFEST.ids[row] for row in aside[:2]}


def test_halves_alone_embed_nothing_else():
    """Whole utterances are not needed then."""
    extract = FakeExtractor()
    found = threshold_by_halves(extract, MANIFEST, 0.5, 0)
    (halves,) = extract.asked
    assert len(halves) == 8 and not {*halves} & {*MANIFEST.ids}
    (expected, _), _ = find_threshold(FakeExtractor(), MANIFEST, 0.5, 0)
    assert found == expected


def test_pseudo_labels_of_one_kind_leave_the_halves():
    pseudo = "abcdefgh", [0] * 8
    found, _ = find_threshold(FakeExtractor(), MANIFEST, 0.5, 0, pseudo)
    assert found == find_threshold(FakeExtractor(), MANIFEST, 0.5, 0)[0]


def test_halves_that_cannot_be_embedded():
    _, aside = held_out(8, 0.5, 0)
    second = [f"1 {row}" for row in aside]
    # An utterance counts with both halves; of fewer than two, none is left.
    for without in (second[1:], second, [*second, *(f"0 {n}" for n in aside)]):
        decision, vectors = find_threshold(
            FakeExtractor(without), MANIFEST, 0.5, 0
        )
        assert decision is None and len(vectors) == 8
    assert find_threshold(FakeExtractor(second[2:]), MANIFEST, 0.5, 0)[0]
