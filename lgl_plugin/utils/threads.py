"""The number of threads, and how idle OpenMP threads wait for work."""

import contextlib
import os
from collections.abc import Iterator

# Spins of an idle thread before it sleeps. The default of GNU's OpenMP, which
# torch uses on Linux, is 300,000.
SPINS = "1000"


def spin_briefly() -> None:
    """Lets idle OpenMP threads sleep soon, unless the user has set a policy.

    Call it before torch is loaded.

    If threads spin for long, a step is many times slower on a busy machine. If
    they sleep at once (OMP_WAIT_POLICY=passive), a small step takes nearly
    twice as long on an idle machine (benchmarks/neighbours.py).

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
    """Gives the block all cores if torchrun has given each process one.

    For work that one process does while the others wait.

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
    if hasattr(os, "sched_getaffinity"):  # the job's cores, not the machine's
        cores = len(os.sched_getaffinity(0))
    with threadpool_limits(cores):
        yield
