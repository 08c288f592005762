"""Stage I by SimSiam, for comparison only: it hardly works for speakers."""

from torch import Tensor, nn

from lgl_plugin.methods.method import Loss, Method, Views, embedded
from lgl_plugin.nnet.heads import projector
from lgl_plugin.nnet.redundancy import negative_cosine
from lgl_plugin.utils.checks import check_from


class SimSiam(Method):
    """A view predicts the other view's projection (Chen and He 2021).

    SimSiam has neither negatives nor a teacher. Only the stopped gradient of
    the predicted projection prevents a collapse. In sslsv it scored 28.9 % on
    Vox1-O, where SimCLR scored 9.1 %: use another method. As in sslsv, the
    projector has three layers, and the last one's normalisation has no weights.
    Unlike there, the predictor's learning rate is not constant.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    hidden_size, predictor_size : int
        Sizes of the projector and of the predictor's hidden layer; 2,048 and
        512 in sslsv, for VoxCeleb2.
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
        """Returns the mean loss of both directions."""
        projected = embedded(self.projector, embeddings[0])
        predicted = embedded(self.predictor, projected)
        pairs = predicted.flatten(0, 1), projected.flip(0).flatten(0, 1)
        return negative_cosine(*pairs), {}
