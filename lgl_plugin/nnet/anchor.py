"""A penalty that holds a network near its initial weights (L2-SP)."""

import torch
from torch import Tensor


class Anchor(torch.nn.Module):
    """Penalises the squared distance to the initial weights.

    Without the penalty a good encoder that trains on little audio forgets what
    it learnt elsewhere (L2-SP, Li et al. 2018). Running statistics of batch
    normalisation are not penalised.

    Arguments
    ---------
    start : dict
        The state dict of the network at its start.
    weight : float
        Factor of the squared distance, which is summed over all weights.
    prefix : str
        Only weights whose name begins with the prefix are penalised; by default
        all.

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
            # Not in checkpoints: a resumed run reads the initial weights again.
            value = start[name].detach().clone()
            self.register_buffer(place, value, persistent=False)

    def forward(self, network: torch.nn.Module) -> Tensor:
        """Returns the penalty, a scalar with a graph, float32.

        Raises KeyError if a penalised weight is not in `start`, and ValueError
        if no penalised weight is trained.
        """
        distances = [
            (parameter - getattr(self, self.places[name])).square().sum()
            for name, parameter in network.named_parameters()
            if name.startswith(self.prefix) and parameter.requires_grad
        ]
        if not distances:
            raise ValueError(
                "anchor has no effect, since none of the weights that it holds "
                "is trained: set anchor to 0"
            )
        return self.weight * torch.stack(distances).sum()
