"""Classes that a user may name in a yaml and that cannot be trained."""

import torch

from lgl_plugin.methods.simsiam import SimSiam
from lgl_plugin.nnet.gates import Gate


class HoldsEncoder(SimSiam):
    """Its weights are the encoder's, too, and would be trained twice."""

    def __init__(self, encoder, *given):
        super().__init__(encoder, *given)
        self.encoder = encoder


class TakenFigure(SimSiam):
    """Its figure would replace the epoch's loss on record."""

    def forward(self, *given):
        """Returns a figure of a name that is taken."""
        loss, _ = super().forward(*given)
        return loss, {"loss": loss.detach()}


class NoGraph(SimSiam):
    """Its loss follows from no weight."""

    def forward(self, *given):
        """Returns a loss that nothing can be trained by."""
        loss, figures = super().forward(*given)
        return loss.detach(), figures


class ALossEach(SimSiam):
    """Its loss is no scalar."""

    def forward(self, *given):
        """Returns a loss of each utterance."""
        loss, figures = super().forward(*given)
        return loss.expand(8), figures


class ScalarGate(Gate):
    """It answers once for a batch."""

    def __init__(self):
        super().__init__(1.0)

    def forward(self, losses):
        """Returns a scalar."""
        return (losses <= self.tau).all()


class SteepGate(Gate):
    """Its weights have a gradient."""

    def __init__(self):
        super().__init__(1.0)

    def forward(self, losses):
        """Returns weights that a loss could lower by another way."""
        return torch.sigmoid(self.tau - losses)
