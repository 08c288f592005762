"""Partners against lists and loops, and what crops are made of them."""

import random

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings, strategies as st

from lgl_plugin.dataio.dataset import crop_dataset
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.partners import Partners

N = 12
labels = st.lists(st.integers(-1, 3), min_size=N, max_size=N)


def grouped(clusters, sources, rows=None):
    """Partners with clusters of all rows."""
    partners = Partners(N)
    rows = np.arange(N) if rows is None else rows
    partners.regroup(np.array(clusters), np.array(sources), rows)
    return partners


def drawn(partners, row, n=200):
    """The rows of many draws."""
    rng = random.Random(row)
    return [partners.draw(rng, row) for _ in range(n)]


@settings(deadline=None, max_examples=60)
@given(labels, labels)
def test_all_others_of_the_source_are_drawn_and_nothing_else(clusters, sources):
    partners = grouped(clusters, sources)
    for row in range(N):
        fits = {
            other
            for other in range(N)
            if other != row and clusters[other] == sources[row] >= 0
        }
        assert set(drawn(partners, row)) == (fits or {row})


@pytest.mark.parametrize("source", [0, 1])
def test_each_of_those_that_fit_is_as_likely(source):
    partners = grouped([0] * 6 + [1] * 6, [source] * N)
    counts = np.bincount(drawn(partners, 2, 10000), minlength=N)
    fits = np.delete(np.arange(6 * source, 6 + 6 * source), [2][source:])
    assert counts[fits].sum() == 10000
    # Four deviations of a binomial count.
    share = 1 / len(fits)
    limit = 4 * np.sqrt(10000 * share * (1 - share))
    assert np.abs(counts[fits] - 10000 * share).max() < limit


def test_new_clusters_leave_nothing_of_the_old_ones():
    partners = grouped([0, 1] * 6, [1, 0] * 6)
    new = np.array([0, 0, 1, 1])
    partners.regroup(new, new, np.array([0, 2, 5, 7]))
    found = [set(drawn(partners, row)) for row in range(N)]
    pairs = {0: {2}, 2: {0}, 5: {7}, 7: {5}}
    assert found == [pairs.get(row, {row}) for row in range(N)]


def test_a_checkpoint_has_the_clusters(tmp_path):
    before, after = grouped([0, 1, -1] * 4, [1, 0, 0] * 4), Partners(N)
    before.save(tmp_path / "partners.ckpt")
    after.load(tmp_path / "partners.ckpt")
    for row in range(N):
        assert drawn(before, row) == drawn(after, row)


@pytest.fixture
def tones(tmp_path):
    """Utterances of a constant amplitude, which tells which one a crop is of.

    Shorter than two crops; the last is no audio.
    """
    paths = []
    for row in range(4):
        paths.append(str(tmp_path / f"{row}.wav"))
        soundfile.write(paths[-1], np.full(6000, 0.1 + 0.1 * row), 16000)
    (tmp_path / "3.wav").write_bytes(b"no audio")
    return Manifest.of(
        [(str(row), path, 0.0, 0.375, "") for row, path in enumerate(paths)]
    )


def test_the_second_crop_is_of_the_partner_and_neither_is_cut_short(tones):
    partners = Partners(4)
    clusters = np.array([0, 0, 1])
    partners.regroup(clusters, clusters, np.arange(3))
    data = crop_dataset(tones, np.arange(3), 0.25, n_crops=2, partners=partners)
    for row, partner in ((0, 1), (1, 0), (2, 2)):
        item = data[row]
        assert item["partner"] == partner
        expected = [[0.1 + 0.1 * row], [0.1 + 0.1 * partner]]
        assert item["sig"].shape == (2, 4000)
        expected = torch.tensor(expected).expand(2, 4000)
        torch.testing.assert_close(item["sig"], expected, atol=1e-4, rtol=0)


def test_loader_processes_see_new_clusters(tones):
    partners = Partners(4)
    data = crop_dataset(tones, np.arange(3), 0.25, n_crops=2, partners=partners)
    loader = torch.utils.data.DataLoader(
        data, None, num_workers=1, persistent_workers=True
    )
    assert [item["partner"] for item in loader] == [0, 1, 2]
    clusters = np.array([0, 1, 0])
    partners.regroup(clusters, clusters, np.arange(3))
    assert [item["partner"] for item in loader] == [2, 1, 0]


def test_a_partner_that_cannot_be_read_is_not_the_utterances_fault(tones):
    partners = Partners(4)
    clusters = np.array([0, 1, 1, 0])
    partners.regroup(clusters, clusters, np.arange(4))
    data = crop_dataset(tones, np.arange(4), 0.25, n_crops=2, partners=partners)
    item = data[0]  # whose partner is no audio
    assert item["id"] == "0" and item["bad"] == "" and item["partner"] == 0
    expected = torch.full((2, 4000), 0.1)
    torch.testing.assert_close(item["sig"], expected, atol=1e-4, rtol=0)
    assert data[3]["bad"].startswith("3\t")  # in its own turn
