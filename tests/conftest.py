"""Settings of the whole test run; the doctests' too."""

import logging
import os

# One thread a process, as two run side by side. Set before torch is imported;
# the recipes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import pytest  # noqa: E402
from speechbrain.utils.importutils import LazyModule  # noqa: E402

from lgl_plugin.utils.progress import tqdm  # noqa: E402

# A busy machine is no failure.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

# Hypothesis reads __file__ of all modules, upon which SpeechBrain's lazy ones
# import k2 and other absent packages and fail (SpeechBrain issue 2995).
LazyModule.__file__ = None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol():
    """Takes back what a run in a test's process does to logging and bars.

    SpeechBrain sets logging up for a whole process: all later tests would go
    on writing into that run's log.txt. --noprogressbar silences a process.
    """
    tqdm.silent, root = False, logging.getLogger()
    level, handlers = root.level, [*root.handlers]
    try:
        return (yield)
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers
