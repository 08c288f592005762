"""Several processes: what each has, and what they have together.

What only one process should do, such as writing a file, takes SpeechBrain's
`main_process_only`.
"""

import os
import shlex
import sys

import torch
import torch.distributed as dist


def command():
    """The command that started this process, as one types it.

    Example
    -------
    >>> command().startswith("python")
    True
    """
    words = shlex.join(sys.argv)
    if world_size() == 1:
        return f"python {words}"
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    launch = f"torchrun --nproc_per_node={here}"
    if here < world_size():
        launch += f" --nnodes={world_size() // here}"
    return f"{launch} {words}"


def world_size():
    """The number of training processes; 1 outside torch.distributed.

    Returns
    -------
    int

    Example
    -------
    >>> world_size()
    1
    """
    return dist.get_world_size() if _in_ranks() else 1


def rank():
    """This process's number; 0 outside torch.distributed.

    Returns
    -------
    int

    Example
    -------
    >>> rank()
    0
    """
    return dist.get_rank() if _in_ranks() else 0


def gather(value):
    """What each process has; waits until all are here.

    Arguments
    ---------
    value : object
        Anything that can be pickled.

    Returns
    -------
    list
        The values in the order of the processes.

    Example
    -------
    >>> gather("mine")
    ['mine']
    """
    if not _in_ranks():
        return [value]
    found = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def broadcast(value):
    """Returns, in every process, the value that the first one passes.

    Arguments
    ---------
    value : object
        Anything that can be pickled; those of other processes are ignored.

    Example
    -------
    >>> broadcast("first")
    'first'
    """
    if not _in_ranks():
        return value
    box = [value]
    dist.broadcast_object_list(box)
    return box[0]


def from_main(work, *arguments):
    """What the first process returns or raises, in all.

    Without it the others would wait for one that has raised.

    Arguments
    ---------
    work : callable
        Called in the first process; the others wait.
    *arguments
        Its arguments.

    Returns
    -------
    object
        What can be pickled.

    Example
    -------
    >>> from_main(max, 1, 2)
    2
    """
    value = error = None
    if rank() == 0:
        try:
            value = work(*arguments)
        except Exception as raised:
            error = raised
    value, error = broadcast((value, error))
    if error is not None:
        raise error
    return value


def sum_over_ranks(values):
    """Sums numbers over the processes.

    Arguments
    ---------
    values : dict of torch.Tensor
        Scalars, with the same keys in each process.

    Returns
    -------
    dict of torch.Tensor

    Example
    -------
    >>> sum_over_ranks({"utterances": torch.tensor(8)})
    {'utterances': tensor(8)}
    """
    if world_size() == 1 or not values:
        return values
    names = sorted(values)
    # Some lie on the GPU and some do not; NCCL sums what does.
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = torch.stack(
        [torch.as_tensor(values[n]).to(device).double() for n in names]
    )
    dist.all_reduce(total)
    return dict(zip(names, total))


def _in_ranks():
    return dist.is_available() and dist.is_initialized()
