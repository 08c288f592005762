"""Stage I by VICReg and Barlow Twins, which decorrelate dimensions."""

import torch
from torch import Tensor, nn

from lgl_plugin.methods.method import Loss, Method, Views, embedded
from lgl_plugin.nnet.heads import projector
from lgl_plugin.nnet.redundancy import barlow_twins_loss, vicreg_terms
from lgl_plugin.utils.checks import check_above0, check_from


class VICReg(Method):
    """Variance, invariance and covariance (Bardes et al. 2022).

    Projections of an utterance's two views must be similar. Each dimension must
    vary over the batch, and no two dimensions may correlate.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    hidden_size, output_size : int
        Sizes of the projector; 2,048 and 512 in sslsv, for VoxCeleb2.
    invariance, variance, covariance : float
        Weights of the terms, as in sslsv.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding_size: int,
        n_utterances: int,
        hidden_size: int = 512,
        output_size: int = 512,
        invariance: float = 1.0,
        variance: float = 1.0,
        covariance: float = 0.1,
    ) -> None:
        super().__init__()
        check_from(1, hidden_size=hidden_size, output_size=output_size)
        check_from(0, invariance=invariance, variance=variance)
        check_from(0, covariance=covariance)
        if not invariance + variance + covariance:
            raise ValueError("one weight at least must be above 0")
        sizes = hidden_size, hidden_size, output_size
        self.projector = projector(embedding_size, *sizes)
        self.weights = invariance, variance, covariance

    def forward(
        self,
        embeddings: Views,
        teacher_embeddings: Views,
        groups: Tensor,
        done: float,
    ) -> Loss:
        """Returns the weighted sum of the terms, and the unweighted terms."""
        terms = vicreg_terms(*embedded(self.projector, embeddings[0]))
        weighted = [w * term for w, term in zip(self.weights, terms)]
        loss = torch.stack(weighted).sum()
        names = ("invariance", "variance", "covariance")
        return loss, {name: term.detach() for name, term in zip(names, terms)}


class BarlowTwins(Method):
    """Barlow Twins (Zbontar et al. 2021).

    The cross-correlation of the two views' projections over the batch must be
    the identity: each dimension is equal in both views, and no two dimensions
    correlate.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    hidden_size, output_size : int
        Sizes of the projector; 2,048 and 512 in sslsv, for VoxCeleb2.
    redundancy, weight : float
        Weight of the correlations between two dimensions, and of the whole
        loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding_size: int,
        n_utterances: int,
        hidden_size: int = 512,
        output_size: int = 512,
        redundancy: float = 0.005,
        weight: float = 0.025,
    ) -> None:
        super().__init__()
        check_from(1, hidden_size=hidden_size, output_size=output_size)
        check_from(0, redundancy=redundancy)
        check_above0(weight=weight)
        sizes = hidden_size, hidden_size, output_size
        self.projector = projector(embedding_size, *sizes)
        self.redundancy = redundancy
        self.weight = weight

    def forward(
        self,
        embeddings: Views,
        teacher_embeddings: Views,
        groups: Tensor,
        done: float,
    ) -> Loss:
        """Returns the weighted loss."""
        first, second = embedded(self.projector, embeddings[0])
        loss = barlow_twins_loss(first, second, self.redundancy)
        return self.weight * loss, {}
