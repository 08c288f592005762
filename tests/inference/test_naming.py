"""Who speaks where a few files are labelled, against loops."""

import numpy as np
import pytest
from hypothesis import given as drawn, strategies as st

from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.inference.naming import name_files


@drawn(st.integers(0, 2**20), st.floats(-0.5, 0.9))
def test_files_are_named_as_loops_name_them(seed, threshold):
    rng = np.random.default_rng(seed)
    vectors = normalised(rng.normal(size=(12, 3)))
    given = np.append([0, 1, 2], rng.integers(-1, 3, 9))
    found = name_files(vectors, given, threshold)
    for row, vector in enumerate(vectors):
        medians = {}
        for speaker in range(3):
            same = [n for n in range(12) if given[n] == speaker and n != row]
            if same:
                medians[speaker] = np.median(vectors[same] @ vector)
        nearest = max(medians, key=medians.get)
        if abs(medians[nearest] - threshold) < 1e-5:
            continue  # rounding decides
        heard = nearest if medians[nearest] >= threshold else -1
        assert found.heard[row] == heard
        if given[row] < 0:
            assert found.labels[row] == heard or found.labels[row] >= 3
            if heard < 0:
                assert np.isnan(found.own[row])
            else:
                own = medians.pop(heard)
                assert found.own[row] == pytest.approx(own, abs=1e-5)
            other = max(medians.values())
            assert found.other[row] == pytest.approx(other, abs=1e-5)
            continue
        assert found.labels[row] == given[row]
        alone = given[row] not in medians
        doubted = heard != given[row] and not (alone and heard < 0)
        assert (row in found.wrong) == doubted
        if alone:
            assert np.isnan(found.own[row])
        else:
            own = medians.pop(given[row])
            assert found.own[row] == pytest.approx(own, abs=1e-5)
        other = max(medians.values())
        assert found.other[row] == pytest.approx(other, abs=1e-5)


def test_planted_labels_are_found_the_clearest_first():
    rng = np.random.default_rng(0)
    speakers = np.repeat(np.arange(8), 10)
    voices = rng.normal(size=(8, 32))[speakers]
    vectors = normalised(voices + 0.4 * rng.normal(size=voices.shape))
    given = speakers.copy()
    given[[3, 47]] = 5, 0  # wrong
    given[speakers == 7] = -1
    given[70] = 2  # a stranger's, as another's
    found = name_files(vectors, given, 0.5)
    assert {*found.wrong} == {3, 47, 70}
    margins = found.own[found.wrong] - np.where(
        found.heard[found.wrong] < 0, 0.5, found.other[found.wrong]
    )
    assert (np.diff(margins) >= 0).all()
    assert found.heard[[3, 47, 70]].tolist() == [0, 4, -1]
    # The others of speaker 7 are one stranger.
    assert {*found.labels[71:]} == {7}
