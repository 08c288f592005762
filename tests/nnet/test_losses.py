"""Losses against slow float64 versions, SpeechBrain and hand-worked values."""

import datetime
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from pretended_device import NothingReadByTheHost

from lgl_plugin.nnet.losses import (
    AAMSoftmax,
    AugmentationDiscriminator,
    NTXent,
    SubCentreClassifier,
    augmentation_adversarial_loss,
    gated_mean,
    gradient_reversal,
)


def slow_ntxent(anchor, positive, scale):
    """Eq. 1 and 2 as they are written, segment by segment, in float64."""
    segments = torch.cat([anchor, positive]).double()
    n = len(anchor)
    total, hits = 0.0, 0
    for i, segment in enumerate(segments):
        partner = (i + n) % (2 * n)
        cosines = {
            k: F.cosine_similarity(segment, other, dim=0).item()
            for k, other in enumerate(segments)
            if k != i
        }
        denominator = sum(math.exp(scale * c) for c in cosines.values())
        total -= math.log(math.exp(scale * cosines[partner]) / denominator)
        hits += max(cosines, key=cosines.get) == partner
    return total / (2 * n), hits / (2 * n)


@pytest.mark.parametrize("batch, scale", [(2, 10.0), (7, 10.0), (16, 2.5)])
def test_ntxent_is_the_papers_formula(batch, scale):
    generator = torch.Generator().manual_seed(batch)
    anchor = torch.randn(batch, 5, generator=generator)
    positive = anchor + torch.randn(batch, 5, generator=generator)
    loss, accuracy = NTXent(scale_init=scale)(anchor, positive)
    expected, expected_accuracy = slow_ntxent(anchor, positive, scale)
    assert loss.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert accuracy.item() == pytest.approx(expected_accuracy)
    assert loss.dtype == torch.float32


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(0, 3), min_size=12, max_size=12),
    st.integers(0, 99),
)
def test_ntxent_leaves_out_negatives_of_a_group(groups, seed):
    """Against a loop over segments, in float64."""
    generator = torch.Generator().manual_seed(seed)
    anchor, positive = torch.randn(2, 6, 5, generator=generator)
    segments = torch.cat([anchor, positive]).double()
    total, hits = 0.0, 0
    for i, segment in enumerate(segments):
        partner = (i + 6) % 12
        cosines = {
            k: F.cosine_similarity(segment, other, dim=0).item()
            for k, other in enumerate(segments)
            if k == partner
            or (k != i and groups[k] not in {groups[i], groups[partner]})
        }
        denominator = sum(math.exp(10 * c) for c in cosines.values())
        total -= math.log(math.exp(10 * cosines[partner]) / denominator)
        hits += max(cosines, key=cosines.get) == partner
    loss, accuracy = NTXent()(anchor, positive, torch.tensor(groups))
    assert loss.item() == pytest.approx(total / 12, rel=1e-4, abs=1e-5)
    assert accuracy.item() == pytest.approx(hits / 12)


def test_ntxent_without_a_negative_is_0_with_a_gradient():
    anchor = torch.randn(4, 3, requires_grad=True)
    loss, accuracy = NTXent()(anchor, anchor + 1, torch.zeros(8).long())
    loss.backward()
    assert (loss.item(), accuracy.item()) == (0, 1)
    assert not anchor.grad.any()


def test_ntxent_by_hand():
    # Two utterances at right angles, partners identical: each segment sees
    # its partner at cosine 1 and two others at 0.
    loss, accuracy = NTXent(scale_init=10.0)(torch.eye(2), torch.eye(2))
    assert loss.item() == pytest.approx(
        math.log(1 + 2 * math.exp(-10)), abs=1e-6
    )
    assert accuracy.item() == 1.0


def test_ntxent_of_identical_embeddings_is_the_log_of_the_candidates():
    same = torch.ones(8, 4)
    assert NTXent()(same, same)[0].item() == pytest.approx(math.log(15))


def test_ntxent_does_not_depend_on_embedding_length():
    anchor, positive = torch.randn(2, 6, 4)
    loss = NTXent()
    scaled = loss(anchor * 50, positive / 20)[0]
    torch.testing.assert_close(scaled, loss(anchor, positive)[0])


def test_scale_starts_where_asked_and_stays_positive():
    for scale in (0.5, 10.0, 64.0, 1000.0):
        assert NTXent(scale).scale.item() == pytest.approx(scale, rel=1e-6)
    loss = NTXent(1.0)
    # Partners opposed to each other push the scale down as far as it goes.
    anchor = torch.eye(4)
    optimiser = torch.optim.SGD(loss.parameters(), lr=5.0)
    for _ in range(50):
        optimiser.zero_grad()
        loss(anchor, -anchor)[0].backward()
        optimiser.step()
    assert loss.raw_scale < 0 < loss.scale < 0.1


def test_ntxent_stays_float32_under_autocast():
    anchor, positive = torch.randn(2, 8, 16)
    loss = NTXent()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(anchor, positive)[0]
    assert torch.equal(inside, loss(anchor, positive)[0])


def test_ntxent_arguments():
    with pytest.raises(ValueError, match="scale_init must be above 0, got 0"):
        NTXent(scale_init=0)
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(2, 3\)"):
        NTXent()(torch.ones(4, 3), torch.ones(2, 3))


@pytest.mark.parametrize("batch", [0, 1])
def test_ntxent_refuses_a_batch_without_negatives(batch):
    with pytest.raises(ValueError, match=f"two or more, got {batch}"):
        NTXent()(torch.ones(batch, 3), torch.ones(batch, 3))


def test_gradient_reversal_turns_the_encoder_only():
    torch.manual_seed(0)
    discriminator = AugmentationDiscriminator(embedding_size=4, hidden_size=8)
    plain = torch.randn(3, 6, 4).requires_grad_()
    turned = plain.detach().clone().requires_grad_()
    gradients = []
    for embeddings, weight in ((plain, None), (turned, 3.0)):
        passed = [
            e if weight is None else gradient_reversal(e, weight)
            for e in embeddings
        ]
        discriminator.zero_grad()
        augmentation_adversarial_loss(discriminator, *passed)[0].backward()
        gradients.append(discriminator[2].weight.grad.clone())
    assert plain.grad.abs().max() > 0
    torch.testing.assert_close(turned.grad, -3.0 * plain.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_discriminator_loss_by_hand():
    class Constant(torch.nn.Module):
        def forward(self, pairs):
            # Logit of class 1 above that of class 0 by the last column.
            return torch.stack([0 * pairs[:, -1], pairs[:, -1]], dim=1)

    e1, e2, e3 = torch.zeros(2, 1), torch.ones(2, 1), torch.full((2, 1), -3.0)
    e3[1] = 3.0  # the one that is taken for the same augmentation
    loss, accuracy = augmentation_adversarial_loss(Constant(), e1, e2, e3)
    expected = [math.log1p(math.exp(-1))] * 2
    expected += [math.log1p(math.exp(-3)), math.log1p(math.exp(3))]
    assert loss.item() == pytest.approx(sum(expected) / 4, rel=1e-6)
    assert accuracy.item() == 0.75


def test_discriminator_finds_the_trace_and_the_encoder_hides_it():
    torch.manual_seed(0)
    encoder = torch.nn.Linear(8, 8)
    discriminator = AugmentationDiscriminator(embedding_size=8, hidden_size=32)

    def segments():
        # Speaker in the first half, augmentation in the second.
        speaker = torch.randn(64, 4)
        a, b = torch.randn(2, 64, 4)
        return [torch.cat([speaker, x], dim=1) for x in (a, a, b)]

    optimiser = torch.optim.Adam(discriminator.parameters(), lr=3e-3)
    for _ in range(150):
        loss, found = augmentation_adversarial_loss(
            discriminator, *[encoder(x).detach() for x in segments()]
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert found > 0.75
    assert encoder.weight.grad is None

    # Against the discriminator as it stands, the encoder wins.
    optimiser = torch.optim.Adam(encoder.parameters(), lr=3e-2)
    curve = []
    for _ in range(50):
        embeddings = [gradient_reversal(encoder(x), 3.0) for x in segments()]
        loss, _ = augmentation_adversarial_loss(discriminator, *embeddings)
        curve.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert sum(curve[-10:]) > 1.3 * sum(curve[:10])


@pytest.mark.parametrize("n_centres", [1, 2, 3])
def test_sub_centres_are_the_sources_formula(n_centres):
    torch.manual_seed(n_centres)
    classify = SubCentreClassifier(5, 7, n_centres)
    embeddings = 9 * torch.randn(4, 5)
    cosines = classify(embeddings[:, None])
    assert cosines.shape == (4, 1, 7)
    for row, embedding in zip(cosines[:, 0].tolist(), embeddings.double()):
        for k, cosine in enumerate(row):
            expected = max(
                F.cosine_similarity(embedding, centre[k].double(), dim=0).item()
                for centre in classify.weight
            )
            assert cosine == pytest.approx(expected, abs=1e-6)


def test_one_centre_is_speechbrains_classifier():
    from speechbrain.lobes.models.ECAPA_TDNN import Classifier

    embeddings, upstream = torch.randn(6, 1, 5), torch.randn(6, 1, 7)
    found = []
    for make, options in (
        (Classifier, {}),
        (SubCentreClassifier, {"n_centres": 1}),
    ):
        torch.manual_seed(0)
        classify = make(input_size=5, out_neurons=7, **options)
        inputs = embeddings.clone().requires_grad_()
        cosines = classify(inputs)
        cosines.backward(upstream)
        weight = classify.weight.view(7, 5)
        grad = classify.weight.grad.view(7, 5)
        found.append([cosines, weight, grad, inputs.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_only_the_nearest_centre_learns():
    classify = SubCentreClassifier(8, 5)
    cosines = classify(torch.randn(1, 1, 8))
    cosines[0, 0, 2].backward()
    moved = classify.weight.grad.abs().sum(dim=-1) > 0
    assert moved.sum(dim=0).tolist() == [0, 0, 1, 0, 0]


def test_centres_start_beside_the_centroids_and_apart():
    torch.manual_seed(0)
    centroids = torch.randn(6, 32) * torch.linspace(0.1, 9, 6)[:, None]
    classify = SubCentreClassifier(32, 6)
    classify.start_from(centroids)
    first = classify.weight.detach().clone()
    cosines = F.cosine_similarity(first, centroids, dim=-1)
    assert (cosines > 0.99).all() and (cosines < 0.99999).all()
    apart = F.cosine_similarity(first, first.roll(1, dims=0), dim=-1)
    assert (apart < 0.9999).all()

    torch.manual_seed(0)
    classify.start_from(centroids)
    second = classify.weight.detach().clone()
    torch.manual_seed(0)
    classify.start_from(centroids)
    assert torch.equal(classify.weight, second)


def test_a_single_centre_starts_on_the_centroid():
    centroids = torch.randn(6, 32)
    classify = SubCentreClassifier(32, 6, n_centres=1)
    classify.start_from(centroids)
    assert torch.equal(classify.weight[0], centroids)


def test_two_speakers_in_a_cluster_get_a_centre_each():
    torch.manual_seed(0)
    speakers = F.normalize(torch.randn(4, 16), dim=1)
    truth = torch.arange(4).repeat(64)
    embeddings = speakers[truth] + 0.1 * torch.randn(256, 16)
    labels = truth // 2  # two clusters of two speakers
    centroids = torch.stack([embeddings[labels == k].mean(0) for k in (0, 1)])
    classify = SubCentreClassifier(16, 2)
    classify.start_from(centroids)
    optimiser = torch.optim.Adam(classify.parameters(), lr=0.03)
    aam = AAMSoftmax()
    for _ in range(100):
        optimiser.zero_grad()
        aam(classify(embeddings[:, None])[:, 0], labels).mean().backward()
        optimiser.step()
    nearest = F.linear(
        F.normalize(speakers, dim=1), F.normalize(classify.weight[:, 0], dim=1)
    ).argmax(dim=1)
    assert nearest[0] != nearest[1]


def test_sub_centres_stay_float32_under_autocast():
    classify = SubCentreClassifier(16, 5)
    embeddings = torch.randn(8, 1, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = classify(embeddings)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, classify(embeddings.float()))


def test_sub_centre_arguments():
    with pytest.raises(ValueError, match="n_centres must be 1 or more, got 0"):
        SubCentreClassifier(4, 3, n_centres=0)
    with pytest.raises(ValueError, match=r"must be \(3, 4\).*got \(4, 3\)"):
        SubCentreClassifier(4, 3).start_from(torch.ones(4, 3))


def random_cosines(seed, batch=64, classes=10):
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(batch, classes, generator=generator) * 2 - 1
    labels = torch.randint(classes, (batch,), generator=generator)
    # Some targets where theta + margin passes pi, some at the very ends.
    rows = torch.arange(8)
    cosines[rows, labels[:8]] = torch.tensor(
        [-1.0, -0.999, -0.985, -0.98, -0.9, 0.99, 0.99999, 1.0]
    )
    return cosines, labels


@pytest.mark.parametrize("margin, scale", [(0.2, 30.0), (0.5, 64.0), (0, 1)])
def test_aam_agrees_with_speechbrain(margin, scale):
    # Here, as the processes started below import this module anew.
    from speechbrain.nnet.losses import AdditiveAngularMargin

    cosines, labels = random_cosines(0)
    ours = cosines.clone().requires_grad_()
    theirs = cosines.clone().requires_grad_()
    losses = AAMSoftmax(margin, scale)(ours, labels)
    logits = AdditiveAngularMargin(margin, scale)(
        theirs, F.one_hot(labels, 10).float()
    )
    expected = F.cross_entropy(logits, labels, reduction="none")
    assert losses.shape == (64,)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-3)
    losses.sum().backward()
    expected.sum().backward()
    assert ours.grad.isfinite().all()
    # Beside cosine 1 the slope of the sine is rounding in float32.
    inner = cosines.abs() < 0.9999
    torch.testing.assert_close(
        ours.grad[inner], theirs.grad[inner], rtol=1e-3, atol=1e-3
    )


def test_aam_against_angles_in_float64():
    margin, scale = 0.2, 30.0
    cosines, labels = random_cosines(1)
    losses = AAMSoftmax(margin, scale)(cosines, labels)
    for row, label, loss in zip(
        cosines.tolist(), labels.tolist(), losses.tolist(), strict=True
    ):
        theta = math.acos(row[label])
        logits = [scale * c for c in row]
        if theta + margin < math.pi:
            logits[label] = scale * math.cos(theta + margin)
        else:
            cosine = row[label] - margin * math.sin(math.pi - margin)
            logits[label] = scale * cosine
        top = max(logits)
        expected = (
            top
            + math.log(sum(math.exp(x - top) for x in logits))
            - logits[label]
        )
        assert loss == pytest.approx(expected, rel=1e-4, abs=5e-3)


def test_aam_falls_as_the_target_gets_closer():
    closer = torch.linspace(-1, 1, 2001)[:, None]
    cosines = torch.cat([closer, torch.zeros(2001, 1)], dim=1)
    losses = AAMSoftmax(0.2, 5.0)(cosines, torch.zeros(2001, dtype=torch.long))
    assert (losses.diff() < 1e-6).all()


def test_aam_losses_are_float32_of_half_precision_cosines():
    cosines, labels = random_cosines(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = AAMSoftmax()(cosines.bfloat16(), labels)
    assert losses.dtype == torch.float32
    expected = AAMSoftmax()(cosines.bfloat16().float(), labels)
    assert torch.equal(losses, expected)


@pytest.mark.parametrize("value", [1.2, -1.2, 40.0, math.inf])
def test_aam_refuses_logits_that_are_no_cosines(value):
    cosines, labels = random_cosines(3)
    cosines[5, 2], cosines[7, 1] = value, math.nan
    aam = AAMSoftmax()
    for values in (cosines, cosines.half()):
        with pytest.raises(ValueError, match="takes cosines, from -1 to 1, go"):
            aam(values, labels)


def test_aam_takes_what_rounding_makes_of_cosines():
    torch.manual_seed(0)
    unit = F.normalize(torch.randn(200, 192), dim=1).bfloat16()
    cosines = unit @ unit.T
    cosines[7, 7] = torch.finfo(torch.bfloat16).eps + 1
    assert AAMSoftmax()(cosines, torch.arange(200)).isfinite().all()
    broken = cosines.clone()
    broken[0] = math.nan
    assert AAMSoftmax()(broken, torch.arange(200))[1:].isfinite().all()


def test_aam_reads_the_first_batch_only():
    """At each step, the host of a GPU would wait for the answer."""
    aam, (cosines, labels) = AAMSoftmax(), random_cosines(4)
    aam(cosines[:0], labels[:0])
    with NothingReadByTheHost(), pytest.raises(AssertionError, match="host"):
        aam(cosines, labels)
    aam(cosines, labels)
    with NothingReadByTheHost():
        aam(cosines, labels)


@pytest.mark.parametrize(
    "module, shown",
    [
        (NTXent(10.0), "NTXent(scale=10)"),
        (AAMSoftmax(0.2, 30.0), "AAMSoftmax(margin=0.2, scale=30.0)"),
        (
            SubCentreClassifier(4, 7, 2),
            "SubCentreClassifier(input_size=4, out_neurons=7, n_centres=2)",
        ),
    ],
)
def test_losses_show_their_settings(module, shown):
    assert repr(module) == shown


def test_aam_arguments():
    with pytest.raises(ValueError, match="margin must be in .* got -0.1"):
        AAMSoftmax(margin=-0.1)
    with pytest.raises(ValueError, match="scale must be above 0, got 0"):
        AAMSoftmax(scale=0)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 100, width=32), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_gated_mean_is_the_mean_of_the_selected(pairs):
    losses = torch.tensor([loss for loss, _ in pairs], requires_grad=True)
    mask = torch.tensor([chosen for _, chosen in pairs])
    value = gated_mean(losses, mask)
    value.backward()
    chosen = [loss for loss, keep in pairs if keep]
    expected = sum(chosen) / len(chosen) if chosen else 0.0
    assert value.item() == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(losses.grad, mask.float() / max(1, len(chosen)))


@pytest.mark.parametrize("kept", [[], [0]])
def test_rejected_losses_leave_no_trace(kept):
    losses = torch.tensor([2.0, math.inf, math.nan, -math.inf])
    losses.requires_grad_()
    mask = torch.zeros(4, dtype=torch.bool)
    mask[kept] = True
    value = gated_mean(losses, mask)
    value.backward()
    assert value.item() == 2.0 * len(kept)
    assert torch.equal(losses.grad, mask.float())


@pytest.mark.parametrize("factor", [1.0, 1e-6, 0.0])
def test_gated_mean_by_weights_is_numpys_average(factor):
    rng = np.random.default_rng(3)
    values, weights = rng.uniform(0, 9, 20), factor * rng.uniform(0, 1, 20)
    weights[4] = 0.0
    losses = torch.tensor(values)
    losses[4] = math.nan
    losses.requires_grad_()
    value = gated_mean(losses, torch.tensor(weights))
    value.backward()
    expected = np.average(values, weights=weights) if factor else 0.0
    assert value.item() == pytest.approx(expected)
    total = weights.sum() or 1.0
    np.testing.assert_allclose(losses.grad, weights / total)


def test_gated_mean_arguments():
    with pytest.raises(ValueError, match="mask must be bool or floating"):
        gated_mean(torch.ones(3), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"floating, \(3,\), got .* \(2,\)"):
        gated_mean(torch.ones(3), torch.ones(2, dtype=torch.bool))


class Step(torch.nn.Module):
    """An encoder with both losses behind it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(6, 5)
        self.contrast = NTXent()

    def forward(self, anchor, positive):
        losses = self.losses(anchor, positive)
        loss, _ = self.contrast(self.encoder(anchor), self.encoder(positive))
        for tau in TAUS:
            loss = loss + gated_mean(losses, losses <= tau)
        return loss

    def losses(self, anchor, positive):
        gap = self.encoder(anchor) - self.encoder(positive)
        return gap.square().sum(dim=1)


# Of the halves of the batch below, these let through 3 and 0, then 3 and 1.
TAUS = (0.5, 10.0)


def pairs():
    generator = torch.Generator().manual_seed(1)
    anchor = torch.randn(8, 6, generator=generator)
    gap = torch.tensor([0.1, 0.1, 0.1, 9, 1, 9, 9, 9])[:, None]
    return anchor, anchor + gap * torch.randn(8, 6, generator=generator)


def one_rank(rank, folder):
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=1),
    )
    step = Step()
    half = slice(4 * rank, 4 * rank + 4)
    step(*(segments[half] for segments in pairs())).backward()
    # The mean of gradients, as DDP takes it. Not by DDP itself: when it is
    # the last to hold a gloo group, its end can wait for the lock that a
    # worker thread has, which waits for Python's.
    for parameter in step.parameters():
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= 2
    gradients = {n: p.grad for n, p in step.named_parameters()}
    torch.save(gradients, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_take_the_step_of_one(tmp_path):
    step = Step()
    step(*pairs()).backward()
    losses = step.losses(*pairs())
    counts = [(losses <= tau).view(2, 4).sum(dim=1).tolist() for tau in TAUS]
    assert counts == [[3, 0], [3, 1]]
    torch.multiprocessing.spawn(one_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pt")
        for name, parameter in step.named_parameters():
            torch.testing.assert_close(
                gradients[name], parameter.grad, rtol=1e-4, atol=1e-6
            )
