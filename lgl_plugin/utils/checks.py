"""Checks of arguments' ranges: a ValueError names the argument at fault."""

import math


def check_above0(**values: float) -> None:
    """Raises ValueError for the first value not above 0, or infinite."""
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be above 0, got {value}")


def check_from(least: float, **values: float) -> None:
    """Raises ValueError for the first value under `least`, NaN or infinite."""
    for name, value in values.items():
        if not least <= value < math.inf:
            raise ValueError(f"{name} must be {least} or more, got {value}")


def check_share(**values: float) -> None:
    """Raises ValueError for the first value that is not in [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}")
