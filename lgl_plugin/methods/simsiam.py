"""Stage I by SimSiam, to compare with: it hardly works for speakers."""

from torch import Tensor, nn

from lgl_plugin.methods.method import Loss, Method, Views, embedded
from lgl_plugin.nnet.heads import projector
from lgl_plugin.nnet.redundancy import negative_cosine
from lgl_plugin.utils.checks import check_from


class SimSiam(Method):
    """A view predicts the other view's projection (Chen and He 2021).

    Neither negatives nor a teacher keep it from collapse, only that the
    predicted projection takes no gradient. Elsewhere it scored 28.9 % on
    Vox1-O where SimCLR scored 9.1 %: use another method, and SimSiam
    to compare. As there, the projector is of three layers, the last one's
    normalisation without weights; the predictor's learning rate is not held
    constant here.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    hidden_size, predictor_size : int
        Of the projector and of the predictor's hidden layer; 2,048 and 512 in
        sslsv, for VoxCeleb2.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding_size: int,
        n_utterances: int,
        hidden_size: int = 512,
        predictor_size: int = 128,
    ) -> None:
        super().__init__()
        check_from(1, hidden_size=hidden_size, predictor_size=predictor_size)
        sizes = 3 * (hidden_size,)
        self.projector = projector(embedding_size, *sizes, last_norm=True)
        self.predictor = projector(hidden_size, predictor_size, hidden_size)

    def forward(
        self,
        embeddings: Views,
        teacher_embeddings: Views,
        groups: Tensor,
        done: float,
    ) -> Loss:
        """Returns the mean of both directions."""
        projected = embedded(self.projector, embeddings[0])
        predicted = embedded(self.predictor, projected)
        pairs = predicted.flatten(0, 1), projected.flip(0).flatten(0, 1)
        return negative_cosine(*pairs), {}
