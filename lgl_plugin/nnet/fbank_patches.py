"""Keeps the constants of SpeechBrain's Fbank on the GPU.

SpeechBrain keeps window and filters as plain tensors on the CPU. Each call
copies them from memory that is not pinned, so the host waits for the GPU twice
per forward pass. `keep_on_device` turns both into buffers, which move with the
module.
"""

import torch
from speechbrain.processing.features import STFT, Filterbank

from lgl_plugin.utils.speechbrain_internals import ResidentFilterbank


def keep_on_device(features: torch.nn.Module) -> None:
    """Turns windows and fixed filters of SpeechBrain's features into buffers.

    The values stay SpeechBrain's. Features of other packages, and filters that
    are learnt or drawn at random at each call, stay as they are.
    """
    for module in features.modules():
        if isinstance(module, STFT) and "window" in vars(module):
            window = vars(module).pop("window")
            module.register_buffer("window", window, persistent=False)
        elif (
            type(module) is Filterbank
            and module.freeze
            and not module.param_rand_factor
        ):
            ResidentFilterbank.replace(module)
