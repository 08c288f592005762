"""SpeechBrain's Fbank without copies to the GPU at each call.

Its window and its filters are plain tensors on the CPU, which every call sends
from memory that is not pinned: the host waits for the GPU, twice a forward
pass. Here both are buffers, which move with the module.
"""

import torch
from speechbrain.processing.features import STFT, Filterbank


class ResidentFilterbank(Filterbank):
    """A filter bank that makes its filters once; as a class, for copies."""

    def _create_fbank_matrix(self, f_central_mat, band_mat):
        return self.filters


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
            filters = _filters(module)
            module.register_buffer("filters", filters, persistent=False)
            module.__class__ = ResidentFilterbank


def _filters(bank):
    """Returns the filters (bins, bands) that a filter bank makes at a call."""
    size = bank.all_freqs_mat.shape
    return bank._create_fbank_matrix(
        bank.f_central[:, None].expand(size), bank.band[:, None].expand(size)
    )
