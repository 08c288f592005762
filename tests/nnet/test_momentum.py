"""The teacher follows; it takes no gradient and is in the checkpoint."""

import copy

import pytest
import torch

from lgl_plugin.nnet.momentum import MomentumCopy, cosine_ramp


@pytest.fixture
def student():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))


@pytest.mark.parametrize("buffers", [False, True])
def test_it_keeps_its_share_and_takes_the_rest(student, buffers):
    teacher = MomentumCopy(student, buffers)
    before = copy.deepcopy(teacher.copy.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter))
    student(torch.randn(5, 3))  # moves the running statistics
    teacher.follow(student, 0.9, torch.tensor(1.0))
    for name, held in teacher.copy.state_dict().items():
        if held.is_floating_point():
            assert torch.equal(held, before[name])  # the step was skipped
    teacher.follow(student, 0.9, torch.tensor(0.0))
    for name, new in student.state_dict().items():
        follows = buffers or name.split(".")[1] in ("weight", "bias")
        expected = before[name]
        if follows and new.is_floating_point():
            expected = 0.9 * before[name] + 0.1 * new
        elif follows:
            expected = new  # the number of batches
        torch.testing.assert_close(teacher.copy.state_dict()[name], expected)


def test_it_takes_no_gradient(student):
    teacher = MomentumCopy(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())


def test_statistics_of_the_batch_or_those_that_follow(student):
    wavs = 5 + torch.randn(4, 3)
    own, following = MomentumCopy(student), MomentumCopy(student, buffers=True)
    for teacher in (own, following):
        teacher.train()
    torch.testing.assert_close(own(wavs), student.train()(wavs))
    with torch.no_grad():
        expected = copy.deepcopy(following.copy).eval()(wavs)
    torch.testing.assert_close(following(wavs), expected)


def test_the_ramp_goes_from_start_to_end():
    values = [cosine_ramp(0.99, 1.0, done) for done in (0, 0.5, 1, 1.1)]
    assert values == pytest.approx([0.99, 0.995, 1, 1])
