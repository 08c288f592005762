"""The unit of the peak memory that systems report."""

import sys
import types

import pytest

from lgl_plugin.training.estimate import peak_memory
from lgl_plugin.utils.memory import peak_bytes


@pytest.mark.parametrize("system, unit", [("linux", 1024), ("darwin", 1)])
def test_peaks_are_bytes_on_each_system(monkeypatch, system, unit):
    monkeypatch.setattr(sys, "platform", system)
    assert peak_bytes(types.SimpleNamespace(ru_maxrss=7)) == 7 * unit


def test_without_the_module_the_peak_is_unknown(monkeypatch):
    """On Windows; the machine's other figures still come."""
    assert peak_memory("cpu")[0] > 2**20
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory("cpu") == (None, 0)
