"""Stage I by MoCo: contrastive learning with a queue of negatives."""

import torch.nn.functional as F
from torch import Tensor, nn

from lgl_plugin.methods.method import Loss, Method, Views
from lgl_plugin.nnet.augment import augmented
from lgl_plugin.nnet.losses import momentum_contrast
from lgl_plugin.nnet.momentum import MomentumCopy
from lgl_plugin.nnet.queue import EmbeddingQueue
from lgl_plugin.utils.checks import check_above0, check_from, check_share
from lgl_plugin.utils.distributed import all_gather


class MoCo(Method):
    """Momentum contrast (He et al. 2020; Chen et al. 2020).

    A view must be similar to the teacher's embedding of the utterance's other
    view, and dissimilar to the embeddings of other utterances in a queue. Each
    view is the anchor in turn. There is no projector, as in wespeaker.

    The teacher normalises by running statistics, which follow the encoder's:
    statistics of a batch would reveal which views are in one batch.

    Arguments
    ---------
    encoder, embedding_size, n_utterances
        As for each method.
    queue_size : int
        Number of negatives; 65,536 in wespeaker. The queue is never longer than
        the corpus. Embeddings of the anchor's own utterance are not its
        negatives.
    temperature : float
        Divisor of the cosines.
    teacher_momentum : float
        Share of the teacher's weights that a step keeps, in [0, 1). The source
        has 0.999 for a hundred times the steps of a training on one hour of
        speech.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding_size: int,
        n_utterances: int,
        queue_size: int = 65536,
        temperature: float = 0.07,
        teacher_momentum: float = 0.99,
    ) -> None:
        super().__init__()
        check_from(1, queue_size=queue_size)
        check_above0(temperature=temperature)
        check_share(teacher_momentum=teacher_momentum)
        self.temperature = temperature
        self.teacher_momentum = teacher_momentum
        self.teacher = MomentumCopy(encoder, buffers=True)
        self.queue = EmbeddingQueue(
            min(queue_size, n_utterances), embedding_size
        )

    def momentum(self, done: float) -> float:
        """Returns the share of the teacher that a step keeps, a constant."""
        return self.teacher_momentum

    def views(self, crops: Tensor, augment: nn.Module) -> tuple[Views, Views]:
        """Makes two views, which the encoder and the teacher both embed."""
        views = [augmented(crops, augment)]
        return views, views

    def forward(
        self,
        embeddings: Views,
        teacher_embeddings: Views,
        groups: Tensor,
        done: float,
    ) -> Loss:
        """Returns the loss of both views, and the accuracy."""
        anchors = F.normalize(embeddings[0].float(), dim=-1)
        keys = F.normalize(teacher_embeddings[0].float(), dim=-1).flip(0)
        loss, accuracy = momentum_contrast(
            *(anchors, keys, groups),
            # A copy: the queue changes before the gradient is computed.
            self.queue.vectors.clone(),
            self.queue.groups,
            self.temperature,
        )
        self.queue.add(all_gather(groups[1]), all_gather(keys[0]))
        return loss, {"accuracy": accuracy}
