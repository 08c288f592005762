"""Threads of a process that works alone among several."""

import torch

from lgl_plugin.utils.threads import all_cores


def test_work_of_one_process_gets_all_cores(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1, 5})
    before = torch.get_num_threads()
    with all_cores():  # not among several: the user's own choice holds
        assert torch.get_num_threads() == before
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    with all_cores():  # nor where torchrun left the threads to the user
        assert torch.get_num_threads() == before
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with all_cores():
        assert torch.get_num_threads() == 3
    assert torch.get_num_threads() == before
