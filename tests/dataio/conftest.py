"""Audio that several tests of reading share."""

import numpy as np
import pytest
import soundfile


@pytest.fixture
def noise(tmp_path):
    """Two seconds of noise at 16 kHz: its path and its samples."""
    samples = np.random.default_rng(1).uniform(-0.5, 0.5, 32000)
    path = tmp_path / "noise.wav"
    soundfile.write(path, samples, 16000)
    return path, soundfile.read(path, dtype="float32")[0]
