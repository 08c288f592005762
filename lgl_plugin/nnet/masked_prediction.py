"""Objectives of masked prediction, which pre-train a speech model.

A model reads frames (batch, time, features), spans of which are masked, and
returns hidden states (batch, time, size). An objective takes the hidden states,
the unmasked frames and the mask, and returns a loss.
"""

import math
from typing import Any

import torch
from speechbrain.lobes.models.wav2vec import W2VTargetQuantiser
from torch import Tensor
from torch.nn.functional import cross_entropy, max_pool1d, normalize

from lgl_plugin.clustering.vectors import exact_matmul
from lgl_plugin.nnet.frame_codes import Maker

Result = tuple[Tensor, dict[str, Tensor]]

# Largest difference in level between two mixed speakers, in dB.
LOUDNESS = 5.0
# Weight of the term of `ContrastivePrediction` that keeps all codes in use.
DIVERSITY = 0.1


def span_mask(batch: int, frames: int, share: float, length: int) -> Tensor:
    """Draws spans of frames to mask; spans may overlap.

    Arguments
    ---------
    batch, frames : int
        Shape of the mask.
    share : float
        Probability that a frame is masked, the same for all, in (0, 1).
    length : int
        Frames of a span.

    Returns
    -------
    torch.Tensor
        Bool (batch, frames), True where masked.

    Example
    -------
    >>> mask = span_mask(64, 100, share=0.5, length=10)
    >>> mask.shape, 0.4 < mask.float().mean() < 0.6
    (torch.Size([64, 100]), tensor(True))
    """
    if not 0 < share < 1:
        raise ValueError(f"share must be in (0, 1), got {share}")
    if not 1 <= length <= frames:
        raise ValueError(f"length must be in [1, {frames}], got {length}")
    starts = 1 - (1 - share) ** (1 / length)
    # Spans may begin before the first frame: otherwise the first frames would
    # be masked less often.
    begun = torch.rand(batch, frames + length - 1) < starts
    return max_pool1d(begun[:, None].float(), length, stride=1)[:, 0] > 0


def mix_utterances(log_mels: Tensor, share: float) -> Tensor:
    """Mixes parts of other utterances of the batch into some utterances.

    WavLM's utterance mixing: the targets stay those of the first speaker, so
    the model learns to tell speakers apart. The powers of mel bands are added,
    as the powers of waveforms are on average.

    Arguments
    ---------
    log_mels : torch.Tensor
        Natural logarithms of powers, (batch, time, bands), at least 2 x 2.
    share : float
        Probability that an utterance is mixed; 0.2 in WavLM.

    Returns
    -------
    torch.Tensor
        Like `log_mels`; at most half of an utterance is mixed.

    Example
    -------
    >>> log_mels = torch.randn(8, 100, 80)
    >>> mixed = mix_utterances(log_mels, share=1.0)
    >>> bool((mixed >= log_mels).all()), bool((mixed == log_mels).any())
    (True, True)
    """
    batch, frames, _ = log_mels.shape
    other = log_mels.roll(int(torch.randint(1, batch, ())), dims=0)
    loudness = log_mels.logsumexp((1, 2)) - other.logsumexp((1, 2))
    ratio = LOUDNESS * (2 * torch.rand(batch) - 1) * math.log(10) / 10
    other = other + (loudness - ratio.to(other))[:, None, None]
    length = torch.randint(1, frames // 2 + 1, (batch, 1))
    start = (torch.rand(batch, 1) * (frames - length + 1)).long()
    place = torch.arange(frames)
    mixed = (start <= place) & (place < start + length)
    mixed &= torch.rand(batch, 1) < share
    mixed = mixed.to(log_mels.device)[..., None]
    return torch.where(mixed, torch.logaddexp(log_mels, other), log_mels)


class MaskedPrediction(torch.nn.Module):
    """Predicts the codes of masked frames: HuBERT's and BEST-RQ's objective.

    The quantiser, which is not trained, decides between the two.

    Arguments
    ---------
    hidden_size : int
        Size of the model's hidden states.
    quantiser : callable
        Makes a module that maps frames (batch, time, features) to codes (batch,
        time), int64, in [0, cb_vocab): SpeechBrain's
        `RandomProjectionQuantizer` (BEST-RQ) or `KMeansQuantiser` (HuBERT), by
        a yaml's `!name:`.

    Example
    -------
    >>> from lgl_plugin.nnet.frame_codes import Cepstra, KMeansQuantiser
    >>> objective = MaskedPrediction(32, lambda: KMeansQuantiser(Cepstra, 26))
    >>> objective.quantiser.fit(torch.randn(10, 20, 160))
    >>> mask = span_mask(4, 20, 0.5, 5)
    >>> hidden, frames = torch.randn(4, 20, 32), torch.randn(4, 20, 160)
    >>> loss, figures = objective(hidden, frames, mask)
    >>> loss.shape, sorted(figures)
    (torch.Size([]), ['accuracy', 'codes'])
    """

    def __init__(self, hidden_size: int, quantiser: Maker):
        super().__init__()
        module: Any = quantiser()
        self.quantiser = module
        self.predict = torch.nn.Linear(hidden_size, module.cb_vocab)

    def forward(self, hidden: Tensor, frames: Tensor, mask: Tensor) -> Result:
        """Returns the mean cross-entropy over masked frames, and figures.

        The figures are `accuracy` over masked frames, and `codes`, the number
        of codes in use (the exponential of their entropy).
        """
        # In 16 bits some frames would get a neighbour's code.
        with torch.no_grad(), torch.autocast(frames.device.type, enabled=False):
            codes = self.quantiser(frames)
        logits, wanted = self.predict(hidden[mask]).float(), codes[mask]
        shares = codes.flatten().bincount() / codes.numel()
        figures = {
            "accuracy": (logits.detach().argmax(1) == wanted).float().mean(),
            "codes": torch.special.entr(shares).sum().exp(),
        }
        return cross_entropy(logits, wanted), figures


class ContrastivePrediction(torch.nn.Module):
    """Identifies each frame's own quantised target: wav2vec 2.0's objective.

    The quantiser is SpeechBrain's, of two groups, and is trained with the
    model. Negatives are all masked frames of the utterance with other codes.
    wav2vec 2.0 draws 100 of them.

    Arguments
    ---------
    hidden_size : int
        Size of the model's hidden states.
    frame_size : int
        Features per frame.
    size : int
        Dimensions in which states and quantised frames are compared.
    n_codes : int
        Codes per group.

    Example
    -------
    >>> objective = ContrastivePrediction(32, 160)
    >>> mask = span_mask(4, 20, 0.5, 5)
    >>> hidden, frames = torch.randn(4, 20, 32), torch.randn(4, 20, 160)
    >>> loss, figures = objective(hidden, frames, mask)
    >>> loss.shape, sorted(figures)
    (torch.Size([]), ['accuracy', 'codes'])
    """

    def __init__(
        self,
        hidden_size: int,
        frame_size: int,
        size: int = 64,
        n_codes: int = 32,
    ):
        super().__init__()
        # The temperature stays at 2, where wav2vec 2.0 begins a fall over
        # 400,000 steps.
        self.quantiser = W2VTargetQuantiser(
            frame_size, size, num_vars=n_codes, temperature_decay=(2, 2, 1)
        )
        self.predict = torch.nn.Linear(hidden_size, size)

    def forward(self, hidden: Tensor, frames: Tensor, mask: Tensor) -> Result:
        """Returns the loss, and the figures of `MaskedPrediction`.

        `codes` is the sum over both groups.
        """
        targets, meta = self.quantiser(frames)
        loss, accuracy = contrastive_loss(self.predict(hidden), targets, mask)
        figures = {"accuracy": accuracy, "codes": meta["code_perplex"]}
        return loss + DIVERSITY * meta["diversity_loss"], figures


def contrastive_loss(
    predicted: Tensor, targets: Tensor, mask: Tensor, temperature: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Returns loss and accuracy of finding each masked frame's own target.

    `predicted` and `targets` (batch, time, size) are compared in float32, under
    autocast too. Negatives of a frame are the masked frames of its utterance
    with another target. `mask` is bool (batch, time).
    """
    # In 16 bits no cosine of equal targets would reach the limit of `same`.
    with torch.autocast(predicted.device.type, enabled=False):
        targets = normalize(targets.float(), dim=-1)
        cosines = normalize(predicted.float(), dim=-1) @ targets.mT
        with torch.no_grad():
            # Neither would it in TF32, which SpeechBrain allows on a GPU.
            with exact_matmul():
                same = targets @ targets.mT > 1 - 1e-5
            allowed = mask[:, None] & ~same
            allowed |= torch.eye(
                mask.shape[1], dtype=torch.bool, device=mask.device
            )
        logits = (cosines / temperature).masked_fill(~allowed, -math.inf)
        logits, own = logits[mask], mask.nonzero()[:, 1]
        accuracy = (logits.detach().argmax(1) == own).float().mean()
        return cross_entropy(logits, own), accuracy
