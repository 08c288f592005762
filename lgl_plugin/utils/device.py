"""The device to compute on, and the memory of the process."""

import contextlib
import ctypes
import os
import shutil
import sys
from typing import Any

import speechbrain as sb
import torch


def check_device(device: str | None) -> str:
    """Returns the device to use; raises ValueError for a GPU that is absent."""
    if device is None:
        return sb.utils.distributed.infer_device()
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"--device={device} is no device: give cpu, cuda or cuda:1"
        ) from error
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device={device}: torch {torch.__version__} finds no GPU here. "
            "Check `nvidia-smi` and that torch was installed with CUDA, or "
            "use --device=cpu."
        )
    if wanted.type == "cuda" and wanted.index is not None:
        number = torch.cuda.device_count()
        if wanted.index >= number:
            raise ValueError(
                f"--device={device}: torch finds no GPU of that number: the "
                f"last one here is cuda:{number - 1}"
            )
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        # torch takes "cuda" for the first GPU: all ranks would share that one.
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def check_backend(device: str | None, backend: str) -> None:
    """Refuses processes of torchrun that cannot meet by their backend.

    SpeechBrain says only that it kills a process. Takes the options `device`
    and `distributed_backend`; ValueError names those to give.
    """
    if "LOCAL_RANK" not in os.environ or backend != "nccl":
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    number = torch.cuda.device_count()
    if device == "cpu" or here > number:
        raise ValueError(
            f"--distributed_backend=nccl needs a GPU for each of the {here} "
            f"processes that torchrun started here, and torch finds {number}. "
            "Start as many processes as there are GPUs, or use --device=cpu "
            "--distributed_backend=gloo."
        )


def check_shared_memory(n_bytes: int, folder: str = "/dev/shm") -> None:
    """Refuses loader workers whose batches do not fit into shared memory.

    Such a worker waits for ever, or is killed with "Bus error". Docker gives a
    container 64 MB. Systems without the folder keep batches elsewhere.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if free < n_bytes:
        raise ValueError(
            f"{folder} has {free / 2**20:,.0f} MiB free, and the batches that "
            f"loader workers hold there need up to {n_bytes / 2**20:,.0f} MiB. "
            "Start the container with more, such as docker run --shm-size=8g, "
            "or set a smaller num_workers, or 0, in dataloader_options."
        )


def keep_freed_memory() -> None:
    """Lets glibc reuse the memory of freed tensors for the next tensors.

    The process, and every process that it forks, then holds its peak memory
    until it ends. With another C library nothing changes.
    """
    # By default glibc returns large blocks to the system at once. Every page of
    # the next step's tensors then costs a page fault, and the faults take
    # longer than the arithmetic of a float32 step (benchmarks/step.py).
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)


def peak_bytes(usage: Any) -> int:
    """Returns the peak of what `getrusage` or `os.wait4` reports, in bytes."""
    # macOS counts bytes, Linux and the BSDs kilobytes.
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
