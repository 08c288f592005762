"""Running statistics after a training step gone wrong."""

import torch

from lgl_plugin.nnet.batch_norm import finite_statistics


def test_a_nan_activation_leaves_all_running_statistics_as_they_were():
    model = torch.nn.Sequential(
        torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)
    )
    with finite_statistics(model):
        model(torch.tensor([[1.0, 2.0], [3.0, 5.0]]))
    before = [buffer.clone() for buffer in model.buffers()]
    assert before[0].tolist() != [0.0, 0.0]  # a good step counts
    with finite_statistics(model):
        model(torch.tensor([[1.0, 2.0], [3.0, torch.nan]]))
    for index, buffer in enumerate(model.buffers()):
        if buffer.is_floating_point():
            assert torch.equal(buffer, before[index])


def test_a_model_without_batch_norm_is_left_alone():
    with finite_statistics(torch.nn.Linear(2, 3)):
        pass
