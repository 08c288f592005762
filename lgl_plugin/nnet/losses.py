"""Losses of both stages, computed in float32 under autocast too.

Stage I: NT-Xent over pairs of segments, and augmentation adversarial training
(a discriminator after a gradient reversal). Stage II: a classifier with several
centres per class, additive angular margin softmax with one loss per utterance,
and its mean over the utterances that the gate selects.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from lgl_plugin.utils.checks import check_above0, check_from
from lgl_plugin.utils.distributed import (
    all_gather,
    all_gather_with_grad,
    rank,
    world_size,
)


class NTXent(nn.Module):
    """A normalised temperature-scaled cross entropy (paper, eq. 1 and 2).

    Maps embeddings (B, D) of two segments of B utterances to the loss and the
    accuracy, float32 scalars. Each of the 2B segments is the anchor in turn:
    its logits are w * cosine to every other segment, and its class is the
    other segment of its utterance. The negatives come from all processes,
    whose batches must be of one size.

    Arguments
    ---------
    scale_init : float
        Initial value of the learnable scale w, above 0.

    Raises
    ------
    ValueError
        If `scale_init` is not positive, the embeddings of a batch are not
        matrices of one shape, or one utterance alone has no negatives.

    Example
    -------
    >>> loss = NTXent(scale_init=10.0)
    >>> anchor = torch.eye(3)
    >>> value, accuracy = loss(anchor, anchor)
    >>> round(value.item(), 4), accuracy.item()
    (0.0002, 1.0)
    """

    # The released code adds a learnable offset b = -5 to every logit. The
    # offset cancels in the softmax. Its only gradient would be rounding noise,
    # which Adam scales up to full steps. Without the offset nothing else
    # changes.

    def __init__(self, scale_init: float = 10.0) -> None:
        super().__init__()
        check_above0(scale_init=scale_init)
        # The released code clamps w and drops the result, so w can become
        # negative. softplus cannot. Near 10 its slope is 1, so the scale moves
        # at the learning rate, as a plain parameter would.
        raw = scale_init + math.log(-math.expm1(-scale_init))
        self.raw_scale = nn.Parameter(torch.tensor(raw))

    @property
    def scale(self) -> Tensor:
        """Returns the scale w: a float32 scalar with a graph, above 0."""
        return F.softplus(self.raw_scale)

    def extra_repr(self) -> str:
        """Returns the setting that repr shows."""
        return f"scale={self.scale.item():.4g}"

    def forward(
        self, anchor: Tensor, positive: Tensor, groups: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Returns the mean loss of the process's 2B segments, and accuracy.

        `groups` (2B,), int64, anchors first, are the groups of the segments. A
        segment's negatives exclude its own group and its positive's group,
        which may hold the same utterance.
        """
        if anchor.ndim != 2 or anchor.shape != positive.shape:
            raise ValueError(
                "anchor and positive must both be (batch, dimension), got "
                f"{tuple(anchor.shape)} and {tuple(positive.shape)}"
            )
        with torch.autocast(anchor.device.type, enabled=False):
            segments = torch.cat([anchor, positive]).float()
            segments = F.normalize(segments, dim=1)
            candidates, others, first = segments, groups, 0
            if world_size() > 1:
                candidates = all_gather_with_grad(segments)
                first = rank() * len(segments)
                if groups is not None:
                    others = all_gather(groups)
            if len(candidates) < 4:
                raise ValueError(
                    "NT-Xent contrasts an utterance with others: a batch needs "
                    f"two or more, got {len(candidates) // 2}"
                )
            itself = first + torch.arange(len(segments), device=segments.device)
            partner = itself.roll(len(anchor))
            logits = self.scale * segments @ candidates.T
            if groups is not None and others is not None:
                both = torch.stack([groups, groups.roll(len(anchor))])
                excluded = (both[..., None] == others).any(0)
                excluded.scatter_(1, partner[:, None], False)
                logits = logits.masked_fill(excluded, -math.inf)
            logits = logits.scatter(1, itself[:, None], -math.inf)
            loss = F.cross_entropy(logits, partner)
        accuracy = (logits.detach().argmax(dim=1) == partner).float().mean()
        return loss, accuracy


def momentum_contrast(
    anchors: Tensor,
    keys: Tensor,
    groups: Tensor,
    negatives: Tensor,
    negative_groups: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Returns MoCo's loss, the mean over anchors, and its accuracy.

    Anchors and keys (n_views, batch, dim) and negatives (n, dim) have unit
    length. Groups are int64, (n_views, batch) and (n,). A negative is left out
    if its group is -1, or that of one of the utterance's views.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        own = (anchors * keys).sum(-1, keepdim=True)
        others = anchors @ negatives.T
    alike = (negative_groups == groups[..., None]).any(0)
    unfit = alike | (negative_groups < 0)
    others = others.masked_fill(unfit, -math.inf)
    logits = torch.cat([own, others], -1).flatten(0, 1) / temperature
    first = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    loss = F.cross_entropy(logits, first)
    return loss, (logits.detach().argmax(1) == 0).float().mean()


def gradient_reversal(x: Tensor, weight: float = 1.0) -> Tensor:
    """Returns x, and multiplies its gradient by -weight on the way back.

    Arguments
    ---------
    x : torch.Tensor
        Any floating-point tensor.
    weight : float
        Factor of the reversed gradient; 3 in augmentation adversarial
        training (Huh et al. 2020, paper reference 21).

    Example
    -------
    >>> x = torch.ones(2, requires_grad=True)
    >>> gradient_reversal(x, weight=3.0).sum().backward()
    >>> x.grad
    tensor([-3., -3.])
    """
    passed = x.view_as(x)
    if passed.requires_grad:
        passed.register_hook(lambda gradient: -weight * gradient)
    return passed


class AugmentationDiscriminator(nn.Sequential):
    """A network that tells if two embeddings had the same augmentation.

    The discriminator of augmentation adversarial training (Huh et al. 2020):
    BN - ReLU - Linear - BN - ReLU - Linear, from concatenated pairs
    (batch, 2 * embedding_size) to two logits (batch, 2).

    Arguments
    ---------
    embedding_size, hidden_size : int
        Sizes of one embedding and of the hidden layer.

    Example
    -------
    >>> discriminator = AugmentationDiscriminator(embedding_size=192)
    >>> discriminator(torch.randn(4, 384)).shape
    torch.Size([4, 2])
    """

    def __init__(
        self, embedding_size: int = 192, hidden_size: int = 512
    ) -> None:
        pair = 2 * embedding_size
        super().__init__(
            nn.BatchNorm1d(pair),
            nn.ReLU(),
            nn.Linear(pair, hidden_size),
            nn.BatchNorm1d(hidden_size),
            nn.ReLU(),
            nn.Linear(hidden_size, 2),
        )


def augmentation_adversarial_loss(
    discriminator: nn.Module, e1: Tensor, e2: Tensor, e3: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the loss of telling [e1, e2] (class 1) from [e1, e3] (class 0).

    Call it twice per step (Huh et al. 2020): on detached embeddings for the
    discriminator's own optimiser, then on embeddings that went through
    `gradient_reversal` for the encoder's. The second call leaves gradients
    in the discriminator too: clear them before its next step.

    Arguments
    ---------
    discriminator : torch.nn.Module
        Maps concatenated pairs (2B, 2D) to logits (2B, 2).
    e1, e2, e3 : torch.Tensor
        Embeddings (B, D) of segments of the same utterances. The first two have
        the same augmentation, the third another.

    Returns
    -------
    loss, accuracy : torch.Tensor
        Scalars, float32; ln 2 and 0.5 if augmentations leave no trace.

    Example
    -------
    >>> embeddings = torch.randn(3, 8, 192)
    >>> turned = gradient_reversal(embeddings, weight=3.0)
    >>> loss, accuracy = augmentation_adversarial_loss(
    ...     AugmentationDiscriminator(), *turned
    ... )
    """
    # Both classes go through one pass: in two passes the statistics of batch
    # normalisation would differ by class and reveal the answer.
    same = torch.cat([e1, e2], dim=1)
    other = torch.cat([e1, e3], dim=1)
    logits = discriminator(torch.cat([same, other])).float()
    target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    target[: len(e1)] = 1
    loss = F.cross_entropy(logits, target)
    accuracy = (logits.detach().argmax(dim=1) == target).float().mean()
    return loss, accuracy


class SubCentreClassifier(nn.Module):
    """A classifier with several centres per class.

    Sub-centre ArcFace (Deng et al. 2020, eq. 3) maps embeddings (B, 1, D) to
    cosines (B, 1, K), float32, to the nearest centre of each class. Utterances
    that a cluster took from another speaker can gather at a centre of their
    own. With one centre it equals SpeechBrain's `ECAPA_TDNN.Classifier`.

    Arguments
    ---------
    input_size, out_neurons : int
        Size of an embedding, D, and number of classes, K.
    n_centres : int
        Centres of each class, at least 1; 3 in the source.

    Example
    -------
    >>> classify = SubCentreClassifier(input_size=192, out_neurons=10)
    >>> classify(torch.randn(4, 1, 192)).shape
    torch.Size([4, 1, 10])
    """

    # Length of the offset of a centre from its centroid, in centroid lengths:
    # the centres of a class are then about 0.14 apart in angle, each at a
    # cosine of 0.995 to the centroid.
    OFFSET = 0.1

    def __init__(
        self, input_size: int, out_neurons: int, n_centres: int = 3
    ) -> None:
        super().__init__()
        check_from(1, n_centres=n_centres)
        # The first axis is the centre: the maximum is then over whole rows of
        # classes, and each centre starts like SpeechBrain's single one.
        self.weight = nn.Parameter(
            torch.empty(n_centres, out_neurons, input_size)
        )
        for centre in self.weight:
            nn.init.xavier_uniform_(centre)

    def extra_repr(self) -> str:
        """Returns the settings that repr shows."""
        centres, neurons, size = self.weight.shape
        return f"input_size={size}, out_neurons={neurons}, n_centres={centres}"

    @torch.no_grad()
    def start_from(self, centroids: Tensor) -> None:
        """Puts the centres of each class near its centroid, a row of (K, D).

        The offsets are drawn from torch's generator. A single centre lies on
        the centroid.
        """
        if centroids.shape != self.weight.shape[1:]:
            raise ValueError(
                f"centroids must be {tuple(self.weight.shape[1:])}: classes, "
                f"dimensions; got {tuple(centroids.shape)}"
            )
        self.weight.copy_(centroids)
        # Equal centres have equal cosines, and the maximum would give every
        # gradient to the first of them.
        if len(self.weight) > 1:
            lengths = self.weight.norm(dim=-1, keepdim=True)
            offsets = F.normalize(torch.randn_like(self.weight), dim=-1)
            self.weight.add_(self.OFFSET * lengths * offsets)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Returns the cosines (B, 1, K), float32, of embeddings (B, 1, D)."""
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = F.normalize(embeddings.float(), dim=-1)
            centres = F.normalize(self.weight, dim=-1)
            cosines = F.linear(embeddings, centres.flatten(0, 1))
        return cosines.unflatten(-1, centres.shape[:2]).max(dim=-2).values


class AAMSoftmax(nn.Module):
    """An additive angular margin softmax with one loss per utterance.

    ArcFace (paper, reference 26) maps cosines (B, K) and classes (B,), int64,
    to losses (B,), float32. The target's cos(theta) becomes cos(theta +
    margin), all cosines are multiplied by `scale`, and the loss is the cross
    entropy. If theta + margin would pass pi, where the cosine rises again, the
    target is cos(theta) - margin * sin(margin) instead.

    The first batch is refused if its logits are no cosines. Later batches are
    not checked, because each check makes the host wait for the GPU.

    Arguments
    ---------
    margin, scale : float
        Angular margin in radians, in [0, pi), and factor of the cosines,
        above 0.

    Raises
    ------
    ValueError
        If an argument is out of its range, or the first batch holds a value
        well beyond [-1, 1].

    Example
    -------
    >>> loss = AAMSoftmax(margin=0.2, scale=30.0)
    >>> cosines = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    >>> loss(cosines, torch.tensor([0, 1])) < 1.0
    tensor([ True, False])
    """

    def __init__(self, margin: float = 0.2, scale: float = 30.0) -> None:
        super().__init__()
        if not 0 <= margin < math.pi:
            raise ValueError(f"margin must be in [0, pi), got {margin}")
        check_above0(scale=scale)
        self.margin = margin
        self.scale = scale
        self._is_checked = False

    def extra_repr(self) -> str:
        """Returns the settings that repr shows."""
        return f"margin={self.margin}, scale={self.scale}"

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        """Returns the losses (B,) of cosines (B, K) and classes (B,)."""
        cosines = cosines.float()
        if not self._is_checked and len(cosines):
            self._check(cosines)
        labels = labels[:, None]
        # Rounding can push a cosine past 1, where the sine is NaN, and at 1
        # the gradient of the square root is infinite.
        cosine = cosines.gather(1, labels).clamp(-1 + 1e-7, 1 - 1e-7)
        sine = ((1 - cosine) * (1 + cosine)).sqrt()
        shifted = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        target = torch.where(
            cosine > -math.cos(self.margin),
            shifted,
            cosine - self.margin * math.sin(self.margin),
        )
        logits = self.scale * cosines.scatter(1, labels, target)
        return F.cross_entropy(logits, labels[:, 0], reduction="none")

    def _check(self, cosines):
        """Raises ValueError for logits that cannot be cosines."""
        # A NaN passes, because the step that meets it reports the diverged
        # encoder. Half precision rounds a cosine to as much as 1.008.
        largest = float(cosines.detach().abs().nan_to_num(nan=0.0).max())
        if largest > 1.05:
            raise ValueError(
                f"AAMSoftmax takes cosines, from -1 to 1, got {largest:.3g}: "
                "normalise embeddings and weights, as "
                "lgl_plugin.nnet.losses.SubCentreClassifier and SpeechBrain's "
                "ECAPA_TDNN.Classifier do"
            )
        self._is_checked = True


def gated_mean(losses: Tensor, mask: Tensor) -> Tensor:
    """Returns the gated loss: the mean over the selected (paper, eq. 3).

    With weights instead of a mask the loss is the weighted mean.

    An empty mask gives an exact zero that still has a graph, so that a process
    with nothing selected runs the same backward as the others. With several
    processes all must call this function: the divisor is the count over all
    processes, and the step equals that of one process with the whole batch.

    Arguments
    ---------
    losses, mask : torch.Tensor
        Losses (B,), and the selected among them (B,), bool, or weights from 0
        on, floating. Rejected losses may be infinite or NaN: neither they nor
        their gradients count.

    Returns
    -------
    torch.Tensor
        A scalar of the type of `losses`.

    Example
    -------
    >>> losses = torch.tensor([1.0, 2.0, float("inf")])
    >>> gated_mean(losses, losses <= 5.0)
    tensor(1.5000)
    >>> gated_mean(losses, losses < 0.0)
    tensor(0.)
    """
    is_valid = mask.dtype == torch.bool or mask.is_floating_point()
    if not is_valid or mask.shape != losses.shape:
        raise ValueError(
            f"mask must be bool or floating, {tuple(losses.shape)}, got "
            f"{mask.dtype} of shape {tuple(mask.shape)}"
        )
    total = mask.sum()
    processes = world_size()  # a factor, as DDP takes the mean of gradients
    if processes > 1:
        dist.all_reduce(total)
    # losses * mask would turn a rejected infinity into NaN.
    kept = torch.where(mask > 0, losses, torch.zeros_like(losses)) * mask
    return kept.sum() * processes / torch.where(total > 0, total, 1)
