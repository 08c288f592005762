"""Held-out utterances after an epoch: embedded in two views, measured."""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from lgl_plugin.inference.calibration import pairs_eer
from lgl_plugin.nnet.augment import augmented
from lgl_plugin.training.epoch_selection import contrastive_accuracy
from lgl_plugin.training.health import geometry


@contextlib.contextmanager
def separate_generator(device: torch.device | str) -> Iterator[None]:
    """Lets code draw random numbers without changing what training draws."""
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


class HeldOut:
    """Embeddings of two crops of each held-out utterance, batch by batch."""

    def __init__(self) -> None:
        self.batches = []

    def embed(
        self,
        encoder: torch.nn.Module,
        augment: torch.nn.Module,
        crops: torch.Tensor,
        seed: int,
    ) -> torch.Tensor:
        """Embeds crops (batch, 2, samples), augmented alike at every epoch.

        Returns the embeddings, (2, batch, dim), which are kept.
        """
        with separate_generator(crops.device):
            torch.manual_seed(seed)
            views = augmented(crops, augment)
        embeddings = torch.stack([encoder(view) for view in views])
        self.batches.append(embeddings.cpu())
        return embeddings

    def measure(self, epoch: int) -> dict[str, float]:
        """Returns figures of the embeddings so far, and forgets these.

        ValueError if one is not finite.
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
