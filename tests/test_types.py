"""A type checker sees a user's mistakes before a training does."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

RIGHT = """
import numpy as np
import torch

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.evaluation.pseudo_labels import clustering_report
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.gates import FixedGate, ScheduleGate
from lgl_plugin.nnet.losses import AAMSoftmax, gated_mean


def pseudo_labels(embeddings: Embeddings, n: int) -> np.ndarray:
    return TorchKMeans(n_clusters=n, seed=1)(embeddings.vectors).labels


def extractor(features: torch.nn.Module, net: torch.nn.Module) -> Extractor:
    return Extractor(Encoder(features, net), device="cuda", num_workers=4)


gate = ScheduleGate(taus=[1, 3, 3, 5, 6])
gate.start_iteration(1)
losses = AAMSoftmax(margin=0.2, scale=30)(torch.eye(3), torch.arange(3))
mean: torch.Tensor = gated_mean(losses, FixedGate(tau=3.0)(losses))
nmi: float = clustering_report(["ann", "bob"], [0, 1])["nmi"]
"""

WRONG = """
from lgl_plugin.clustering.kmeans import FaissKMeans
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.nnet.gates import FixedGate
from lgl_plugin.nnet.losses import AAMSoftmax

FixedGate(tou=3.0)
AAMSoftmax(margin="0.2")
FaissKMeans("6000")
load_manifest("manifest.csv")
"""

EXPECTED = [
    'Unexpected keyword argument "tou" for "FixedGate"',
    'Argument "margin" to "AAMSoftmax" has incompatible type "str"',
    'Argument 1 to "FaissKMeans" has incompatible type "str"',
    'Missing positional argument "data_root" in call to "load_manifest"',
]


def check(folder):
    """Runs mypy as `make lint` does, on a folder; its errors by file."""
    # With the configuration, so the cache, of `make lint`: without it mypy
    # would read torch anew, for half a minute.
    done = subprocess.run(
        [sys.executable, "-m", "mypy", folder],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode in (0, 1), done.stderr
    lines = [line for line in done.stdout.splitlines() if ": error: " in line]
    return [
        [line for line in lines if name in line]
        for name in ("right.py", "wrong.py")
    ]


def test_mistakes_of_a_script_are_found_and_nothing_else(tmp_path):
    (tmp_path / "right.py").write_text(RIGHT)
    (tmp_path / "wrong.py").write_text(WRONG)
    right, wrong = check(tmp_path)
    assert not right
    for line, words in zip(wrong, EXPECTED, strict=True):
        assert words in line
