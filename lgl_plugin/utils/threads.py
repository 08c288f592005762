"""How many threads compute, and how OpenMP's wait for work."""

import contextlib
import os
from collections.abc import Iterator

# Spins of a waiting thread before it sleeps; GNU's OpenMP, which torch has on
# Linux, does 300,000 by itself.
SPINS = "1000"


def spin_briefly() -> None:
    """Lets OpenMP's threads sleep soon, unless the user has said how to wait.

    To be called before torch is loaded.

    Threads that spin make a step many times slower beside other busy
    processes; threads that sleep at once (OMP_WAIT_POLICY=passive) make a
    small step nearly twice as slow on an idle machine
    (benchmarks/neighbours.py).

    Example
    -------
    >>> spin_briefly()
    >>> "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    True
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


@contextlib.contextmanager
def all_cores() -> Iterator[None]:
    """Gives the block all cores, where torchrun left one to each process.

    For what one process computes while the others wait for it.

    Example
    -------
    >>> with all_cores():
    ...     pass
    """
    one_each = os.environ.get("OMP_NUM_THREADS") == "1"  # torchrun's choice
    if not (one_each and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1):
        yield
        return
    from threadpoolctl import threadpool_limits

    cores = os.cpu_count()
    if hasattr(os, "sched_getaffinity"):  # of the job, not of the machine
        cores = len(os.sched_getaffinity(0))
    with threadpool_limits(cores):
        yield
