"""The most memory that a process has held."""

import sys
from typing import Any


def peak_bytes(usage: Any) -> int:
    """Returns the peak of what `getrusage` or `os.wait4` reports, in bytes."""
    # macOS counts bytes, Linux and the BSDs kilobytes.
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
