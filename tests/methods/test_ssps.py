"""Stage I's Brain with positives of other utterances, on a tiny encoder."""

import numpy as np
import pytest
import speechbrain as sb
import torch
from tiny_brains import BATCH, DIM, batch, begin, make_brain, run_epoch

# Rows 0 to 2 are of one cluster, the others of its neighbour.
HALVES = (
    np.array([0, 0, 0, 1, 1, 1]),
    np.array([1, 1, 1, 0, 0, 0]),
    np.arange(BATCH),
)


@pytest.fixture
def ssps(tmp_path):
    torch.manual_seed(1)
    return make_brain("ssps", tmp_path, group=lambda encoder: HALVES)


def objectives(brain, views):
    """The loss of views of one batch."""
    brain.done = 0.0
    return brain.compute_objectives(([views], []), batch(2), sb.Stage.TRAIN)


def contrast(brain, views):
    """The contrastive loss alone, and its accuracy."""
    given = brain.substitutes([views], batch(2).row)
    positive, clusters = given["positive"], given["clusters"]
    return brain.method.contrastive(views[0], positive, clusters)


def contrasted(brain, monkeypatch):
    """Notes what the contrastive loss is called with."""
    contrastive = brain.method.contrastive
    calls, forward = [], contrastive.forward

    def spy(*args):
        calls.append(args)
        return forward(*args)

    monkeypatch.setattr(contrastive, "forward", spy)
    return calls


def test_an_anchor_keeps_its_own_positive_until_one_is_held(ssps, monkeypatch):
    begin(ssps)
    calls = contrasted(ssps, monkeypatch)
    views = torch.randn(3, BATCH, DIM)
    objectives(ssps, views)
    anchor, positive, groups = calls[0]
    assert torch.equal(anchor, views[0]) and torch.equal(positive, views[2])
    assert groups.tolist() == 2 * HALVES[0].tolist()
    later = torch.randn(3, BATCH, DIM)
    objectives(ssps, later)
    _, positive, groups = calls[1]
    # The positives of the step before, of the other half.
    rows = [
        [row for row in range(BATCH) if torch.equal(views[2][row], one)]
        for one in positive
    ]
    assert all(len(found) == 1 for found in rows)
    assert [row >= 3 for (row,) in rows] == [True] * 3 + [False] * 3
    assert groups.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]


def test_the_adversarial_part_has_the_utterances_own_views(ssps, monkeypatch):
    begin(ssps)
    objectives(ssps, torch.randn(3, BATCH, DIM))
    seen = []
    monkeypatch.setattr(ssps, "train_adversary", seen.append)
    views = torch.randn(3, BATCH, DIM)
    objectives(ssps, views)
    assert torch.equal(seen[0][0], views)


def test_a_held_embedding_takes_no_gradient_and_gives_one(tmp_path):
    # Of two clusters, both an anchor's own and its positive's, all would be
    # left out of the negatives.
    thirds = np.array([0, 0, 1, 1, 2, 2])
    group = thirds, np.roll(thirds, -2), np.arange(BATCH)
    ssps = make_brain("ssps", tmp_path, group=lambda encoder: group)
    begin(ssps)
    first = torch.randn(3, BATCH, DIM, requires_grad=True)
    objectives(ssps, first)
    second = torch.randn(3, BATCH, DIM, requires_grad=True)
    contrast(ssps, second)[0].backward()
    assert first.grad is None
    assert second.grad[0].abs().sum() > 0
    assert not second.grad[1:].any()


def test_figures_of_an_epoch(ssps):
    begin(ssps)
    for number in (1, 2):
        run_epoch(ssps, number, batch(2, seed=9))
    first, second = ssps.records
    assert (first["substituted_share"], second["substituted_share"]) == (0, 1)
    # Of 30 ordered pairs of utterances 12 are of one half.
    assert second["alike_share"] == pytest.approx(12 / 30)
    last = ssps.tally.last
    assert last["rows"].tolist() == list(range(BATCH))
    others = HALVES[0][last["positives"]]
    assert others.tolist() == [1, 1, 1, 0, 0, 0]


def test_utterances_without_a_cluster_are_contrasted_as_ever(tmp_path):
    torch.manual_seed(1)
    nothing = (np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))
    ssps = make_brain("ssps", tmp_path / "a", group=lambda encoder: nothing)
    begin(ssps)
    views = torch.randn(3, BATCH, DIM)
    for _ in range(2):
        loss, _ = contrast(ssps, views)
    expected, _ = ssps.method.contrastive(views[0], views[2])
    assert torch.equal(loss, expected)
    run_epoch(ssps, 1, batch(2))
    assert ssps.records[0]["alike_share"] == 0


def test_utterances_are_clustered_at_an_epochs_start_alone(tmp_path):
    """An epoch that goes on has its clusters from the checkpoint."""
    calls = []

    def group(encoder):
        calls.append(encoder)
        return HALVES

    ssps = make_brain("ssps", tmp_path, group=group)
    ssps.on_fit_start()
    ssps.step = 3
    ssps.on_stage_start(sb.Stage.TRAIN, 1)
    ssps.on_stage_start(sb.Stage.VALID, 1)
    assert not calls
    ssps.step = 0
    ssps.on_stage_start(sb.Stage.TRAIN, 2)
    assert calls == [ssps.modules.encoder]


def test_clusters_hold_for_as_many_epochs_as_they_are_to(tmp_path):
    calls = []

    def group(encoder):
        calls.append(encoder)
        return HALVES

    ssps = make_brain("ssps", tmp_path, group=group, cluster_epochs=2)
    ssps.on_fit_start()
    for epoch in (1, 2, 3, 4, 5):
        ssps.on_stage_start(sb.Stage.TRAIN, epoch)
    assert len(calls) == 3
