"""Chooses the device and keeps its memory."""

import contextlib
import ctypes

import speechbrain as sb
import torch
from speechbrain.utils.logger import get_logger

logger = get_logger(__name__)


def check_device(device):
    """The device to use, or a ValueError if it is not there.

    Example
    -------
    >>> check_device("cpu")
    'cpu'
    """
    if device is None:
        return sb.utils.distributed.infer_device()
    if "cuda" in device and not torch.cuda.is_available():
        raise ValueError(
            f"--device={device}: torch {torch.__version__} finds no GPU here. "
            "Check `nvidia-smi` and that torch was installed with CUDA, or "
            "use --device=cpu."
        )
    return device


def keep_freed_memory():
    """Keeps the memory of freed tensors for the next ones.

    glibc hands large blocks back to the system at once, and every page of the
    next step's tensors then costs a fault: more than the arithmetic of a
    float32 step (benchmarks/step.py). The process keeps its peak until it
    ends, and so do those that it forks. Other C libraries are left as they
    are.

    Example
    -------
    >>> keep_freed_memory()
    """
    trim_threshold, mmap_max = -1, -4  # of malloc.h
    with contextlib.suppress(AttributeError, OSError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, -1)
        libc.mallopt(mmap_max, 0)
