"""The queue holds the latest, by Python's own."""

import collections

import torch
from hypothesis import given, strategies as st

from lgl_plugin.nnet.queue import EmbeddingQueue


@given(st.integers(1, 9), st.lists(st.integers(1, 12), max_size=8))
def test_it_holds_what_a_deque_holds(capacity, sizes):
    queue, expected = EmbeddingQueue(capacity, 1), collections.deque([])
    number = 0
    for size in sizes:
        groups = torch.arange(number, number + size)
        queue.add(groups, groups[:, None] / 2)
        expected.extend(groups.tolist())
        number += size
    expected = collections.deque(expected, capacity)
    held = queue.groups[queue.groups >= 0]
    assert sorted(held.tolist()) == sorted(expected)
    vectors = queue.vectors[queue.groups >= 0, 0]
    assert torch.equal(vectors, held / 2)


def test_an_embedding_that_is_not_finite_is_not_held():
    queue = EmbeddingQueue(3, 2)
    vectors = torch.ones(2, 2)
    vectors[0, 1] = torch.nan
    queue.add(torch.tensor([4, 5]), vectors)
    assert queue.groups.tolist() == [-1, 5, -1]
    assert queue.vectors.tolist() == [[0, 0], [1, 1], [0, 0]]
