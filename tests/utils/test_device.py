"""The device, and the memory that a run needs beside it."""

import collections
import shutil
import sys
import types

import pytest
import torch

from lgl_plugin.training.estimate import peak_memory
from lgl_plugin.utils.device import (
    check_backend,
    check_device,
    check_shared_memory,
    peak_bytes,
)


def test_each_rank_takes_its_own_gpu(monkeypatch):
    """torch takes "cuda" for the first GPU, on every rank."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert check_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert check_device("cuda") == "cuda:3"
    assert check_device("cuda:1") == "cuda:1"
    assert check_device("cpu") == "cpu"


@pytest.mark.parametrize(
    "device, problem",
    [
        ("gpu", "gpu is no device: give cpu, cuda or cuda:1"),
        ("cuda:2", "the last one here is cuda:1"),
    ],
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, device, problem):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=problem):
        check_device(device)


@pytest.mark.parametrize(
    "device, gpus, here, message",
    [
        (None, 2, 2, None),
        (None, 0, 2, "each of the 2 processes .* and torch finds 0. "),
        ("cuda", 2, 3, "each of the 3 processes .* and torch finds 2. "),
        ("cpu", 2, 2, "or use --device=cpu --distributed_backend=gloo.$"),
    ],
)
def test_processes_without_a_gpu_each_are_refused(
    monkeypatch, device, gpus, here, message
):
    """SpeechBrain says "Killing process" alone."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    check_backend(device, "nccl")  # no torchrun
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    check_backend(device, "gloo")
    if message is None:
        check_backend(device, "nccl")
        return
    with pytest.raises(ValueError, match=message):
        check_backend(device, "nccl")


def test_a_container_without_shared_memory_is_refused(monkeypatch):
    """Its loader workers would wait for ever."""
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(
        shutil, "disk_usage", lambda folder: usage(2**26, 0, 2**26)
    )
    check_shared_memory(2**26)
    with pytest.raises(ValueError, match="64 MiB free.*--shm-size"):
        check_shared_memory(2**26 + 1)


def test_a_system_without_that_folder_is_left_alone(tmp_path):
    check_shared_memory(2**60, str(tmp_path / "missing"))


@pytest.mark.parametrize("system, unit", [("linux", 1024), ("darwin", 1)])
def test_peaks_are_bytes_on_each_system(monkeypatch, system, unit):
    monkeypatch.setattr(sys, "platform", system)
    assert peak_bytes(types.SimpleNamespace(ru_maxrss=7)) == 7 * unit


def test_without_the_module_the_peak_is_unknown(monkeypatch):
    """On Windows; the machine's other figures still come."""
    assert peak_memory("cpu")[0] > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory("cpu") == (None, 0)
