"""Embeds held-out utterances in two views after an epoch, and measures them."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from lgl_plugin.clustering.vectors import normalised
from lgl_plugin.inference.calibration import pairs_eer
from lgl_plugin.nnet.augment import augmented


@contextlib.contextmanager
def separate_generator(device: torch.device | str) -> Iterator[None]:
    """Protects the random numbers of training from those drawn inside."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


class HeldOut:
    """Embeddings of two crops of each held-out utterance, batch by batch."""

    def __init__(self) -> None:
        self.batches = []  # (2, batch, dim)

    def embed(
        self,
        encoder: torch.nn.Module,
        augment: torch.nn.Module,
        crops: torch.Tensor,
        seed: int,
    ) -> None:
        """Embeds crops (batch, 2, samples), augmented alike at every epoch."""
        with separate_generator(crops.device):
            torch.manual_seed(seed)
            views = augmented(crops, augment)
        embeddings = torch.stack([encoder(view) for view in views])
        self.batches.append(embeddings.cpu())

    def measure(self, epoch: int) -> dict[str, float]:
        """Returns figures of the collected embeddings, and discards these.

        Raises ValueError if an embedding is not finite.
        """
        first, second = torch.cat(self.batches, dim=1).numpy()
        self.batches = []
        if not np.isfinite([first, second]).all():
            raise ValueError(
                f"After epoch {epoch} the embeddings of held-out utterances "
                "are not finite, though the steps of training were. Try "
                "--eval_precision=fp32, or a lower lr."
            )
        return {
            **geometry(first, second),
            "pseudo_eer": 100 * float(pairs_eer(first, second)[0]),
            "contrastive_accuracy": contrastive_accuracy(first, second),
        }


def geometry(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Measures the geometry of held-out embeddings, such as a collapse.

    `first` and `second` (n_utterances, dim) are the embeddings of two crops.
    `mean_cosine` is between different utterances, NaN for a single one.
    `effective_dimensions` is the participation ratio (sum of v)^2 / sum of v^2
    of the variances v along the principal axes at unit length, 0 for a single
    point. Two figures are from Wang and Isola 2020. `alignment` is the mean
    squared distance of an utterance's crops. `uniformity` is the log of the
    mean of exp(-2 d^2) over the distances d of two utterances, from -8 to 0;
    lower is more even.
    """
    crops = np.float64([first, second])
    crops /= np.linalg.norm(crops, axis=2, keepdims=True)
    (first, second), n = crops, len(first)
    cosines = first @ second.T
    within = np.trace(cosines)
    between = cosines.sum() - within
    # d^2 = 2 - 2 cos; two crops of one utterance do not count.
    apart = np.exp(4 * (cosines - 1))
    evenness = (apart.sum() - np.trace(apart)) / max(n * (n - 1), 1)
    crops = np.concatenate(crops)
    crops -= crops.mean(axis=0)
    covariance = crops.T @ crops / len(crops)
    variance, squares = np.trace(covariance), np.square(covariance).sum()
    # float32 rounding gives a single point a tiny variance.
    spread = not variance < 1e-12
    return {
        "mean_cosine": float(between / (n * (n - 1))) if n > 1 else np.nan,
        "effective_dimensions": float(variance**2 / squares) if spread else 0.0,
        "alignment": float(2 - 2 * within / n),
        "uniformity": float(np.log(evenness)) if n > 1 else np.nan,
    }


def contrastive_accuracy(first: np.ndarray, second: np.ndarray) -> float:
    """Returns the share of crops whose nearest crop is of the same utterance.

    `first` and `second` are embeddings (n_utterances, dim) of the two crops of
    each utterance.
    """
    crops = normalised(np.concatenate([first, second]))
    scores = crops @ crops.T
    np.fill_diagonal(scores, -np.inf)
    partner = np.roll(np.arange(len(crops)), len(first))
    return float((scores.argmax(axis=1) == partner).mean())
