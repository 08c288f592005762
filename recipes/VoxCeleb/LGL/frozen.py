"""The back-end that judges frozen speech models in pretraining_study.py.

The back-end is a weighted sum of the layers' statistics and one linear map. It
is trained by AAM-softmax on true labels, or on pseudo-labels in Stage II's
rounds, with the gate. The speech model is frozen, so statistics are computed
once and a training takes seconds.
"""

import torch
from speechbrain.lobes.models.ECAPA_TDNN import Classifier

from lgl_plugin.inference.ward_clusters import ward_labels
from lgl_plugin.nnet.features import model_inputs
from lgl_plugin.nnet.gates import DynamicGate
from lgl_plugin.nnet.losses import AAMSoftmax, gated_mean

EMBEDDING_SIZE, BATCH_SIZE, LR = 128, 128, 0.002
WEIGHTS_LR = 0.05  # layers' weights; a smaller rate leaves them equal
# Training on true labels also takes EPOCHS + GATED_EPOCHS.
EPOCHS, GATED_EPOCHS, ROUNDS = 12, 8, 2


@torch.no_grad()
def statistics(model, log_mels):
    """Returns means and deviations over time, (batch, layers, 2 size).

    Without a model they are those of the log-mel frames.
    """
    if model is None:
        states = [log_mels]
    else:
        frames = model_inputs(log_mels)
        states = model(frames, output_hidden_states=True).hidden_states
    pairs = [torch.std_mean(state, dim=1)[::-1] for state in states]
    return torch.stack([torch.cat(pair, dim=1) for pair in pairs], dim=1)


class Head(torch.nn.Module):
    """Maps statistics (batch, layers, size) to embeddings; weights layers."""

    def __init__(self, statistics):
        super().__init__()
        layers, size = statistics.shape[-2:]
        self.weights = torch.nn.Parameter(torch.zeros(layers))
        self.linear = torch.nn.Linear(size, EMBEDDING_SIZE)
        deviation, mean = torch.std_mean(statistics.flatten(0, -3), dim=0)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation.clamp(min=1e-5))

    def summed(self, statistics):
        """Sums the layers, whose statistics are scaled to variance 1."""
        scaled = (statistics - self.mean) / self.deviation
        return (self.weights.softmax(0)[:, None] * scaled).sum(-2)

    def forward(self, statistics):
        """Embeds statistics."""
        return self.linear(self.summed(statistics))


def train_head(views, labels, seed, gated):
    """Trains a head on statistics (N, views, layers, size) and labels (N,).

    Each step draws one view of an utterance. With `gated`, the later epochs use
    only utterances that the gate selects.
    """
    torch.manual_seed(seed)
    head = Head(views)
    classifier = Classifier(EMBEDDING_SIZE, out_neurons=int(labels.max()) + 1)
    aam, gate = AAMSoftmax(), DynamicGate()
    maps = [*head.linear.parameters(), *classifier.parameters()]
    optimizer = torch.optim.Adam([{"params": maps}, {"params": [head.weights]}])
    batch = min(BATCH_SIZE, len(views))
    steps = len(views) // batch
    epochs = EPOCHS + GATED_EPOCHS
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        [LR, WEIGHTS_LR],
        total_steps=epochs * steps,
        pct_start=0.1,
    )
    for epoch in range(epochs):
        seen = []
        order = torch.randperm(len(views))[: steps * batch]
        for rows in order.split(batch):
            drawn = torch.randint(views.shape[1], rows.shape)
            cosines = classifier(head(views[rows, drawn])[:, None])[:, 0]
            losses = aam(cosines, labels[rows])
            seen.append(losses.detach())
            optimizer.zero_grad()
            gated_mean(losses, gate(losses)).backward()
            optimizer.step()
            schedule.step()
        if gated and epoch + 1 >= EPOCHS:
            gate.end_epoch(torch.cat(seen))
    return head.eval()


@torch.no_grad()
def first_labels(views):
    """Makes pseudo-labels from the statistics, before any training."""
    return ward_labels(Head(views).summed(views[:, 0]).numpy())


def label_free(views, labels, seed):
    """Trains heads in Stage II's rounds; returns the last and its labels."""
    for number in range(1, ROUNDS + 1):
        head = train_head(views, torch.from_numpy(labels), seed, gated=True)
        if number < ROUNDS:
            with torch.no_grad():
                labels = ward_labels(head(views[:, 0]).numpy())
    return head, labels
