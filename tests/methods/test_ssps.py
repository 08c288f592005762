"""Stage I's Brain with positives of other utterances, on a tiny encoder."""

import numpy as np
import pytest
import speechbrain as sb
import torch
from tiny_brains import (
    BATCH,
    DIM,
    batch,
    begin,
    make_brain,
    run_epoch,
    tiny_encoder,
)

from lgl_plugin.methods.moco import MoCo

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


def paired(partners):
    """A batch with these partners."""
    given = batch(2)
    given.partner = torch.tensor(partners)
    return given


def test_crops_of_one_cluster_are_of_one_group(ssps):
    begin(ssps)
    anchors, others = ssps.groups(paired([3, 4, 5, 0, 1, 2])).tolist()
    assert anchors == [anchors[0]] * 3 + [anchors[3]] * 3
    assert others == anchors[3:] + anchors[:3]
    assert anchors[0] != anchors[3]
    assert min(anchors) >= len(ssps.partners.clusters)  # no row's number


def test_utterances_without_a_cluster_are_groups_of_their_own(tmp_path):
    nothing = (np.zeros(0, int), np.zeros(0, int), np.zeros(0, int))
    ssps = make_brain("ssps", tmp_path, group=lambda encoder: nothing)
    begin(ssps)
    rows = list(range(BATCH))
    assert ssps.groups(batch(2)).tolist() == [rows, rows]
    run_epoch(ssps, 1, batch(2))
    assert ssps.records[0]["alike_share"] == 0
    assert ssps.records[0]["substituted_share"] == 0


def test_new_clusters_empty_the_queue_of_a_method(tmp_path):
    """Its embeddings have the numbers of the clusters before."""
    encoder = tiny_encoder()
    method = MoCo(encoder, DIM, BATCH)
    method.queue.add(torch.arange(BATCH), torch.randn(BATCH, DIM))
    ssps = make_brain(
        "ssps",
        tmp_path,
        {"method": method},
        encoder=encoder,
        group=lambda encoder: HALVES,
    )
    begin(ssps)
    assert (method.queue.groups == -1).all()
    loss = ssps.fit_batch(batch(2))
    assert loss.isfinite() and (method.queue.groups > 0).all()


def test_figures_of_an_epoch(ssps, monkeypatch):
    partners = [3, 4, 2, 0, 1, 5]
    monkeypatch.setattr("tiny_brains.batch", lambda *_: paired(partners))
    run_epoch(begin(ssps), 1, batch(2, seed=9))
    (record,) = ssps.records
    assert record["substituted_share"] == pytest.approx(4 / 6)
    # Of 30 ordered pairs of utterances 12 are of one half.
    assert record["alike_share"] == pytest.approx(12 / 30)
    last = ssps.tally.last
    assert last["rows"].tolist() == list(range(BATCH))
    assert last["positives"].tolist() == [3, 4, -1, 0, 1, -1]


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
