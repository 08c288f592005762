"""Tries some files of a manifest, and warns of several bandwidths."""

import numpy as np
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import BadAudio, decode_span, open_audio
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.storage import patient

logger = get_logger(__name__)

# Utterances of a user's manifest that are tried, in a second or two. Two of
# them are 1 %, the smallest share that is warned of.
N_TRIED = 200


def try_some(
    manifest: Manifest, sample_rate: int
) -> tuple[list[tuple[str, str]], list[int]]:
    """Reads a little of some utterances, as training will read them.

    Returns (ID, reason) of those that cannot be used, and the sample rates in
    Hz of the others. This is for a user's own manifest: for a folder, the scan
    has tried every file.
    """
    bad, rates = [], []
    number = len(manifest)
    rng = np.random.default_rng(0)
    for row in rng.permutation(number)[:N_TRIED]:
        try:
            rates.append(_rate(sample_rate, **manifest[row]))
        except BadAudio as error:
            bad.append((manifest.ids[row], str(error)))
    return bad, rates


@patient
def _rate(sample_rate, wav, offset, duration, place, channel):
    """Decodes the middle of an utterance; returns the file's sample rate."""
    with open_audio(wav, place) as audio:
        middle = offset + duration / 2
        decode_span(audio, middle, 0.05, sample_rate, channel)
        return audio.samplerate


def warn_of_bandwidths(
    narrow: int,
    number: int,
    lowest: int,
    sample_rate: int,
    files: str,
    to_train: bool = True,
) -> None:
    """Warns if some files, but not all, are below the rate of training.

    The warning names settings that help only if an encoder is to be trained.
    """
    if not 0.01 <= narrow / max(number, 1) <= 0.99:
        return
    message = (
        f"{narrow} of {number} {files} are below "
        f"{sample_rate} Hz and have nothing above half of "
        "their own rate, so that clusters may follow the telephone line or "
        "the recorder rather than the speaker."
    )
    if to_train:
        message += (
            f" Against that `lgl train` takes --sample_rate={lowest}, their "
            "lowest, --log_mel_share=0 and --cluster_twice=False, and where "
            "ssps_epochs is above 0 --ssps_log_mel_share=0 and "
            "--ssps_cluster_twice=False."
        )
    logger.warning(message)
