"""The sampling of SSPS against lists and loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from pretended_device import NothingReadByTheHost

from lgl_plugin.nnet import pseudo_positives
from lgl_plugin.nnet.pseudo_positives import PseudoPositives, nearest_clusters
from lgl_plugin.nnet.queue import EmbeddingQueue

N, DIM = 12, 3
whole = st.integers(0, 3)
labels = st.lists(st.integers(-1, 3), min_size=N, max_size=N)


def filled(clusters, sources, added, capacity=5):
    """Positives with clusters of all rows, and a queue of what was added."""
    positives = PseudoPositives(N, DIM)
    positives.queue = EmbeddingQueue(capacity, DIM)
    positives.regroup(np.array(clusters), np.array(sources), np.arange(N))
    for number, row in enumerate(added):
        vector = torch.full((1, DIM), float(number))
        positives.queue.add(torch.tensor([row]), vector)
    return positives


@settings(deadline=None, max_examples=60)
@given(
    labels,
    labels,
    st.lists(st.integers(0, N - 1), max_size=9),
    st.integers(0, 2**31),
)
def test_draws_are_those_of_a_loop(clusters, sources, added, seed):
    positives = filled(clusters, sources, added)
    # The queue's places, as they are overwritten in turn.
    queue = [(-1, None)] * 5
    for number, row in enumerate(added):
        queue[number % 5] = (row, number)
    rows = torch.arange(N)
    torch.manual_seed(seed)
    chosen, vectors = positives(rows)
    torch.manual_seed(seed)
    draws = torch.rand(N)
    for anchor in range(N):
        fits = [
            place
            for place, (row, _) in enumerate(queue)
            if row not in (-1, anchor) and clusters[row] == sources[anchor] >= 0
        ]
        if not fits:
            assert chosen[anchor] == -1
            continue
        row, number = queue[fits[int(draws[anchor] * len(fits))]]
        assert chosen[anchor] == row
        assert vectors[anchor].tolist() == [number] * DIM


def test_each_of_those_that_fit_is_as_likely():
    positives = filled([0] + [1] * 11, [1] + [0] * 11, range(1, 6))
    chosen, _ = positives(torch.zeros(10000, dtype=torch.int64))
    counts = np.bincount(chosen, minlength=N)
    assert counts[1:6].sum() == 10000
    # Four deviations of a binomial count.
    assert np.abs(counts[1:6] - 2000).max() < 4 * np.sqrt(1600)


def test_an_empty_queue_or_no_clusters_gives_no_positive():
    empty = filled([0, 1] * 6, [1, 0] * 6, [])
    assert (empty(torch.arange(N))[0] == -1).all()
    unknown = PseudoPositives(N, DIM)
    unknown.queue.add(torch.arange(N), torch.randn(N, DIM))
    assert (unknown(torch.arange(N))[0] == -1).all()


def test_rows_without_an_embedding_have_no_cluster_any_more():
    positives = filled([0, 1] * 6, [1, 0] * 6, range(N), capacity=N)
    some = np.arange(4)
    positives.regroup(np.array([0, 0, 1, 1]), np.array([1, 1, 0, 0]), some)
    chosen, _ = positives(torch.arange(N))
    assert set(chosen[:2].tolist()) <= {2, 3}
    assert set(chosen[2:4].tolist()) <= {0, 1}
    assert (chosen[4:] == -1).all()


def test_an_embedding_that_is_not_finite_is_never_drawn():
    positives = filled([0, 1] * 6, [1, 0] * 6, [])
    vectors = torch.ones(4, DIM)
    vectors[1, 2] = torch.nan
    positives.queue.add(torch.arange(4), vectors)
    chosen, found = positives(torch.zeros(200, dtype=torch.int64))
    assert (chosen == 3).all() and found.isfinite().all()


def test_the_queue_is_no_longer_than_the_utterances_are_many():
    assert PseudoPositives(N, DIM).queue.vectors.shape == (N, DIM)
    assert len(PseudoPositives(30000, DIM).queue.vectors) == 25000


def test_a_checkpoint_holds_queue_and_clusters():
    before = filled([0, 1] * 6, [1, 0] * 6, range(7))
    after = filled([-1] * N, [-1] * N, [])
    after.load_state_dict(before.state_dict())
    for positives in (before, after):
        torch.manual_seed(3)
        positives.draws = positives(torch.arange(N))
        positives.queue.add(torch.tensor([9]), torch.ones(1, DIM))
    assert torch.equal(before.draws[0], after.draws[0])
    assert torch.equal(before.draws[1], after.draws[1])
    assert torch.equal(before.queue.rows, after.queue.rows)


def test_the_host_waits_for_nothing_and_no_gradient_is_kept():
    positives = filled([0, 1] * 6, [1, 0] * 6, range(7))
    rows = torch.arange(4)
    vectors = torch.randn(4, DIM, dtype=torch.bfloat16, requires_grad=True)
    with NothingReadByTheHost():
        chosen, found = positives(rows)
        positives.queue.add(rows, vectors)
    assert found.dtype == torch.float32 and chosen.dtype == torch.int64
    assert not positives.queue.vectors.requires_grad


@pytest.mark.parametrize("chunk", [2, 1024])
def test_the_nearest_centroid_is_another_one(chunk, monkeypatch):
    monkeypatch.setattr(pseudo_positives, "CHUNK", chunk)
    centroids = np.random.default_rng(1).normal(size=(7, 5))
    cosines = centroids @ centroids.T
    np.fill_diagonal(cosines, -np.inf)
    assert np.array_equal(nearest_clusters(centroids), cosines.argmax(1))
