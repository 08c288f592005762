"""Labels by a teacher, against queues in plain Python."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from lgl_plugin.nnet.relabelling import TeacherLabels

LABELS = 4


def teacher_of(labels, **options):
    parts = torch.nn.Linear(2, 2), torch.nn.Linear(2, LABELS)
    return TeacherLabels(*parts, torch.tensor(labels), LABELS, **options)


@settings(max_examples=30)
@given(
    epochs=st.integers(1, 5),
    said=st.lists(
        st.dictionaries(st.integers(0, 2), st.integers(-1, LABELS - 1)),
        max_size=8,
    ),
)
def test_labels_are_those_that_most_epochs_voted_for(epochs, said):
    """An epoch may miss utterances, and the teacher may have no opinion."""
    start = [0, 1, 3, -1]  # the last one is held out
    teacher = teacher_of(start, epochs=epochs)
    labels = list(start)
    queues = [collections.deque([n], maxlen=epochs) for n in start]
    for votes in said:
        rows = np.array(list(votes), dtype=np.int64)
        teacher.end_epoch(rows, np.array([votes[n] for n in rows], int))
        for row, vote in votes.items():
            if vote < 0:
                continue
            queues[row].append(vote)
            counts = collections.Counter(queues[row])
            most = max(counts.values())
            if counts[labels[row]] < most:
                newest = list(queues[row])[::-1]
                labels[row] = next(n for n in newest if counts[n] == most)
        assert teacher.labels.tolist() == labels
        alive = [n in labels for n in range(LABELS)]
        assert teacher.alive.tolist() == alive


def test_nothing_is_near_a_dead_pseudo_speaker():
    teacher = teacher_of([0, 2, 2])
    cosines = torch.tensor([[0.1, 0.9, 0.5, 0.7]], requires_grad=True)
    found = teacher(cosines)
    torch.testing.assert_close(found, torch.tensor([[0.1, -1.0, 0.5, -1.0]]))
    found.sum().backward()
    assert cosines.grad.tolist() == [[1, 0, 1, 0]]


@pytest.mark.parametrize(("done", "keeps"), [(0, 0.9), (0.5, 0.945), (1, 0.99)])
def test_the_teacher_follows_ever_more_slowly(done, keeps):
    teacher = teacher_of([0], momentum=0.9)
    student = torch.nn.Linear(2, 2), torch.nn.Linear(2, LABELS)
    parts = teacher.encoder.copy, teacher.classifier.copy
    expected = [
        keeps * old + (1 - keeps) * new
        for part, module in zip(parts, student)
        for old, new in zip(part.parameters(), module.parameters())
    ]
    expected = [value.detach().clone() for value in expected]
    teacher.follow(*student, done, torch.tensor(1.0))  # a step skipped
    teacher.follow(*student, done, torch.tensor(0.0))
    found = [value for part in parts for value in part.parameters()]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"epochs": 0}])
def test_arguments_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        teacher_of([0], **wrong)
