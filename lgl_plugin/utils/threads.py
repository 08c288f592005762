"""The way OpenMP's threads wait; to be set before torch is loaded."""

import os

# Spins of a waiting thread before it sleeps; GNU's OpenMP, which torch has on
# Linux, does 300,000 by itself.
SPINS = "1000"


def spin_briefly() -> None:
    """Lets OpenMP's threads sleep soon, unless the user has said how to wait.

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
