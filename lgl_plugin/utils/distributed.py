"""Several processes (ranks): values that they share, and sums over them.

Work for one process only, such as writing a file, takes SpeechBrain's
`main_process_only`. Outside torch.distributed there is one process, rank 0.
"""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional


def launch_command() -> str:
    """Returns the command that started this process, as a user types it."""
    words, command = shlex.join(sys.argv), "python"
    if by_lgl():
        words, command = shlex.join(sys.argv[1:]), "lgl"
    if world_size() == 1:
        return f"{command} {words}"
    if command == "lgl":
        words = f"-m lgl_plugin {words}"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    launch = f"torchrun --nproc_per_node={per_node}"
    if per_node < world_size():
        launch += f" --nnodes={world_size() // per_node}"
    return f"{launch} {words}"


def by_lgl() -> bool:
    """Says whether the command `lgl` started this process, not a script."""
    return os.path.basename(sys.argv[0]) in ("lgl", "__main__.py")


def world_size() -> int:
    """Returns the number of training processes."""
    return dist.get_world_size() if _in_ranks() else 1


def rank() -> int:
    """Returns this process's number."""
    return dist.get_rank() if _in_ranks() else 0


def gather_objects(value: Any) -> list:
    """Returns every rank's value, in order; waits until all ranks call it."""
    if not _in_ranks():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates all ranks' tensors, of one shape, without gradients."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_with_grad(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates all ranks' tensors, of one shape, with their gradients.

    The backward pass sums the gradients of all ranks, and data parallelism
    then averages them. The result is the gradient of a loss over the whole
    batch.
    """
    if world_size() == 1:
        return tensor
    return torch.cat(dist.nn.functional.all_gather(tensor.contiguous()))


def broadcast(value: Any) -> Any:
    """Returns, on every rank, the value that rank 0 passes."""
    if not _in_ranks():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_main(work: Callable, *arguments: Any) -> Any:
    """Calls a function on rank 0; returns or raises its outcome on all.

    The function must not wait for the other ranks, as `save_weights` does. An
    error that it raises gets the attribute `on_all_ranks`.
    """
    value = error = None
    if rank() == 0:
        try:
            value = work(*arguments)
        except Exception as raised:
            # Raised here at once, it would leave the other ranks waiting in
            # the broadcast below until its timeout.
            error = raised
    value, error = broadcast((value, error))
    if error is not None:
        vars(error)["on_all_ranks"] = True
        raise error
    return value


def sum_over_ranks(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Sums scalars over the ranks; each rank passes the same keys."""
    if world_size() == 1 or not values:
        return values
    names = sorted(values)
    # Losses lie on the GPU and counts on the host; NCCL sums GPU tensors only.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.stack(
        [torch.as_tensor(values[n]).to(device).double() for n in names]
    )
    dist.all_reduce(total)
    return dict(zip(names, total))


def average_gradients(module: torch.nn.Module) -> None:
    """Averages a module's gradients over ranks.

    For a module that DistributedDataParallel does not wrap: without the
    average, the copies on the ranks would drift apart.
    """
    if world_size() == 1:
        return
    for parameter in module.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad.div_(world_size())


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Returns the module that DistributedDataParallel wraps."""
    if isinstance(module, torch.nn.parallel.DistributedDataParallel):
        module = module.module
    return module


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Makes the functions of this module act as if there were one process.

    For work on the CPU that each process does by itself: NCCL cannot gather
    tensors of the CPU.
    """
    _blocks_alone.append(None)
    try:
        yield
    finally:
        _blocks_alone.pop()


_blocks_alone: list[None] = []  # an entry for each block of `alone` in force


def _in_ranks() -> bool:
    if _blocks_alone:
        return False
    return dist.is_available() and dist.is_initialized()
