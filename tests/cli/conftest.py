"""A tiny folder of audio, and an encoder that tells its speakers apart."""

import numpy as np
import pytest
import soundfile
import torch

from lgl_plugin.runs.run import Run

RATE, SPEAKERS, EACH = 16000, ("ann", "bob", "cat", "dan"), 4


@pytest.fixture(scope="session")
def audio(tmp_path_factory):
    """Four speakers who differ in colour, four files each."""
    folder = tmp_path_factory.mktemp("audio")
    rng = np.random.default_rng(0)
    for speaker in SPEAKERS:
        (folder / speaker).mkdir()
        colour = rng.normal(size=24)
        for n in range(EACH):
            noise = rng.normal(size=int(RATE * rng.uniform(0.5, 1.0)))
            wav = np.convolve(noise, colour + 0.02 * rng.normal(size=24))
            path = folder / speaker / f"{n}.wav"
            soundfile.write(path, 0.05 * wav / wav.std(), RATE)
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """An exported folder; its embedding is the spectrum's mean and spread."""
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "hyperparams.yaml").write_text(
        """
threshold: 0.9
modules:
    compute_features: !new:speechbrain.lobes.features.Fbank {n_mels: 40}
    mean_var_norm: null
    embedding_model: !new:lgl_plugin.nnet.encoders.LogMelStatistics
"""
    )
    torch.save({}, folder / "embedding_model.ckpt")
    return folder


@pytest.fixture
def adapted(tmp_path):
    """A folder of `lgl adapt`, as far as other verbs look at it."""
    run = Run(tmp_path / "adapted", 0, {"made_from": {}})
    run.done["start"] = {}
    run.save()
    for place in ("start", "report", "export/adapted", "training-1"):
        (run.folder / place).mkdir(parents=True)
    (run.folder / "start" / "embedding_model.ckpt").write_bytes(b"weights")
    (run.folder / "report" / "index.html").write_text("the rungs")
    return run.folder
