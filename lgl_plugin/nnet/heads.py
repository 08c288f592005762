"""Projectors and prototypes that follow an encoder in training only."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def projector(*sizes: int, last_norm: bool = False) -> nn.Sequential:
    """Makes linear layers with batch normalisation and ReLU between them.

    `sizes` are those of the input, of each hidden layer and of the output. With
    `last_norm` a batch normalisation without weights follows the last layer.
    """
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes[:-1]):
        layers += [
            nn.Linear(before, after, bias=False),
            nn.BatchNorm1d(after),
            nn.ReLU(),
        ]
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    if last_norm:
        layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
    return nn.Sequential(*layers)


class DistillationHead(nn.Sequential):
    """The projection of DINO and SDPN, to vectors of unit length.

    Two hidden layers with batch normalisation and GELU precede a linear layer.
    Without batch normalisation DINO's loss rises again during training
    (3D-Speaker, issue 23).
    """

    def __init__(
        self, input_size: int, hidden_size: int = 2048, output_size: int = 256
    ) -> None:
        super().__init__(
            nn.Linear(input_size, hidden_size),
            nn.BatchNorm1d(hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
            nn.BatchNorm1d(hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, output_size),
        )
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Maps embeddings (..., input_size) to (..., output_size), float32."""
        projected = super().forward(embeddings.flatten(0, -2)).float()
        projected = F.normalize(projected, dim=-1)
        return projected.unflatten(0, embeddings.shape[:-1])


class Prototypes(nn.Module):
    """Learnt directions that vectors of unit length are compared with."""

    def __init__(self, size: int, n_prototypes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_prototypes, size))
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def forward(self, vectors: Tensor, frozen: bool = False) -> Tensor:
        """Returns cosines (..., n_prototypes), float32, of unit vectors.

        `frozen` prototypes get a gradient of zero: if they got none, data
        parallelism would wait for one.
        """
        weight = self.weight
        if frozen:
            weight = weight.detach() + 0 * weight
        # In 16 bits the rounding error is as large as the difference that
        # separates two prototypes at a temperature of 0.025.
        with torch.autocast(vectors.device.type, enabled=False):
            return F.linear(vectors.float(), F.normalize(weight, dim=-1))
