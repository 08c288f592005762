"""Several processes: what each has, and what they have together.

What only one process should do, such as writing a file, takes SpeechBrain's
`main_process_only`.
"""

import torch
import torch.distributed as dist


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
    total = torch.stack([torch.as_tensor(values[n]).double() for n in names])
    dist.all_reduce(total)
    return dict(zip(names, total))


def _in_ranks():
    return dist.is_available() and dist.is_initialized()
