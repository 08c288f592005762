#!/usr/bin/env python3
"""An encoder that this package does not know: an LSTM's d-vectors.

Wan et al., "Generalized End-to-End Loss for Speaker Verification", ICASSP 2018,
as the public weights of Resemblyzer have it:

> pip install --no-deps --target=resemblyzer resemblyzer
> python dvector.py resemblyzer/resemblyzer/pretrained.pt dvector

(On nine utterances its embeddings were those of resemblyzer 0.1.4 within 1e-4,
which would cut out silence first.) That writes the folder `dvector`, which
every verb of `lgl` then takes:

> PYTHONPATH=. lgl adapt dvector /my/calls --output_folder=calls --labelled
"""

import math
import pathlib
import shutil
import sys

import torch
from torch import Tensor
from torchaudio.transforms import MelSpectrogram

HERE = pathlib.Path(__file__).parent


class Mels(torch.nn.Module):
    """Waveforms (batch, samples) to mel energies (batch, frames, n_mels).

    Waveforms that are quieter than `level` dB are made as loud as that.
    """

    def __init__(self, sample_rate: int, n_mels: int = 40, level: float = -30):
        super().__init__()
        self.rms = 10 ** (level / 20)
        self.mels = MelSpectrogram(
            sample_rate,
            n_fft=sample_rate // 40,
            hop_length=sample_rate // 100,
            n_mels=n_mels,
            norm="slaney",
            mel_scale="slaney",
            pad_mode="constant",
        )

    def forward(self, waveforms: Tensor) -> Tensor:
        """Returns energies, not their logarithms."""
        rms = waveforms.square().mean(dim=1, keepdim=True).sqrt()
        louder = (self.rms / rms.clamp(min=1e-8)).clamp(min=1)
        return self.mels(waveforms * louder).transpose(1, 2)


class DVector(torch.nn.Module):
    """Mel energies (batch, frames, n_mels) to embeddings (batch, dim).

    The mean over windows of 1.6 s, each the last state of an LSTM. A window
    less than three quarters full at the end is left out.
    """

    def __init__(
        self,
        n_mels: int = 40,
        dim: int = 256,
        n_layers: int = 3,
        window: int = 160,
        step: int = 77,
    ):
        super().__init__()
        self.window, self.step = window, step
        self.lstm = torch.nn.LSTM(n_mels, dim, n_layers, batch_first=True)
        self.linear = torch.nn.Linear(dim, dim)

    def forward(self, mels: Tensor) -> Tensor:
        """Embeds; the length of an embedding is at most 1."""
        frames, window, step = mels.shape[1], self.window, self.step
        number = 1 + max(0, math.ceil((frames - window) / step))
        if number > 1 and frames - 1 - (number - 1) * step < 0.75 * window:
            number -= 1
        end = (number - 1) * step + window
        mels = torch.nn.functional.pad(mels, (0, 0, 0, max(0, end - frames)))
        windows = mels.unfold(1, window, step)[:, :number].transpose(2, 3)
        _, (states, _) = self.lstm(windows.flatten(0, 1))
        found = self.linear(states[-1]).relu()
        found = torch.nn.functional.normalize(found, dim=1)
        return found.unflatten(0, (-1, number)).mean(dim=1)


def main() -> None:
    """Writes an encoder's folder from Resemblyzer's weights."""
    source, folder = map(pathlib.Path, sys.argv[1:])
    weights = torch.load(source, map_location="cpu", weights_only=True)
    # Beside the network's the file has two weights of the training's loss.
    network = DVector()
    state = weights["model_state"]
    state = {name: state[name] for name in network.state_dict()}
    network.load_state_dict(state)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / "embedding_model.ckpt")
    shutil.copy(HERE / "hyperparams.yaml", folder)


if __name__ == "__main__":
    main()
