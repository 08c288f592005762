"""An anchor that holds a network near the weights that it began with."""

import torch
from torch import Tensor


class Anchor(torch.nn.Module):
    """Penalises the squared distance to the weights at the start.

    A good encoder that trains on little audio would forget what it learnt
    elsewhere (L2-SP, Li et al. 2018). Statistics of batch normalisation are
    no weights and are free.

    Arguments
    ---------
    start : dict
        The state dict of the network at its start.
    weight : float
        By which the squared distance, over all weights, is multiplied.
    prefix : str
        Of the names of those weights that are held; all are by default.

    Example
    -------
    >>> network = torch.nn.Linear(1, 1)
    >>> anchor = Anchor(network.state_dict(), weight=0.5)
    >>> _ = torch.nn.init.constant_(network.bias, network.bias.item() + 2)
    >>> round(anchor(network).item(), 4)
    2.0
    """

    def __init__(
        self, start: dict[str, Tensor], weight: float, prefix: str = ""
    ):
        super().__init__()
        self.weight, self.prefix = weight, prefix
        held = (name for name in start if name.startswith(prefix))
        self.places = {name: f"start{n}" for n, name in enumerate(held)}
        for name, place in self.places.items():
            # In no checkpoint: a resumed run reads the same file again.
            value = start[name].detach().clone()
            self.register_buffer(place, value, persistent=False)

    def forward(self, network: torch.nn.Module) -> Tensor:
        """Returns the penalty, a scalar with a graph, float32.

        Raises KeyError if the network has a weight that had no start, and
        ValueError if none that is held is trained.
        """
        distances = [
            (parameter - getattr(self, self.places[name])).square().sum()
            for name, parameter in network.named_parameters()
            if name.startswith(self.prefix) and parameter.requires_grad
        ]
        if not distances:
            raise ValueError(
                "anchor holds nothing, as none of the weights that it is for "
                "is trained: set anchor to 0"
            )
        return self.weight * torch.stack(distances).sum()
