"""Losses, gates, clustering and metrics without SpeechBrain and audio."""

import pkgutil
import subprocess
import sys

from lgl_plugin import clustering, metrics

PURE = ["lgl_plugin.nnet.losses", "lgl_plugin.nnet.gates"] + [
    module.name
    for wing in (clustering, metrics)
    for module in pkgutil.walk_packages(wing.__path__, f"{wing.__name__}.")
]
# A None in sys.modules makes the import of that name an ImportError.
IMPORT = """
import importlib, sys
sys.modules.update({"speechbrain": None, "soundfile": None})
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""


def test_every_pure_module_is_found():
    assert "lgl_plugin.clustering.kmeans" in PURE
    assert "lgl_plugin.metrics.error_rates" in PURE


def test_imports_without_speechbrain():
    """And a module that needs it is found out."""
    command = [sys.executable, "-c", IMPORT, *PURE, "lgl_plugin.runs.weights"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("lgl_plugin.runs.weights ")
