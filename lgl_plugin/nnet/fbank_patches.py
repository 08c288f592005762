"""SpeechBrain's Fbank without copies to the GPU at each call.

Its window and its filters are plain tensors on the CPU, which every call sends
from memory that is not pinned: the host waits for the GPU, twice a forward
pass. Here both are buffers, which move with the module.
"""

import torch
from speechbrain.processing.features import STFT, Filterbank

from lgl_plugin.utils.speechbrain_internals import ResidentFilterbank


def keep_on_device(features: torch.nn.Module) -> None:
    """Turns windows and fixed filters of SpeechBrain's features into buffers.

    The values are SpeechBrain's. Features that are not SpeechBrain's, and
    filters that are learnt or drawn anew at each call, stay as they are.
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
