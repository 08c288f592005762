"""The two trainers, on a tiny encoder and synthetic batches."""

import copy
import functools
import math
import os
import signal

import numpy as np
import pytest
import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.losses import AdditiveAngularMargin, LogSoftmaxWrapper
from speechbrain.nnet.schedulers import StepScheduler
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.checkpoints import Checkpointer
from torch.utils._python_dispatch import TorchDispatchMode

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.methods.simclr import SimCLRBrain
from lgl_plugin.nnet.augment import Augmenter
from lgl_plugin.nnet.gates import (
    DynamicGate,
    FixedGate,
    Gate,
    LabelCorrection,
    LossMemory,
    NoGate,
)
from lgl_plugin.nnet.losses import AAMSoftmax, AugmentationDiscriminator, NTXent
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.run import Run
from lgl_plugin.training.brain import STEPS_PER_LOOK
from lgl_plugin.training.health import findings
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.utils import signals
from lgl_plugin.utils.signals import stop

BATCH, TIME, DIM, CLASSES = 6, 800, 8, 4


class Frames(torch.nn.Module):
    """Frames of 20 samples, in the place of features."""

    def forward(self, wavs):
        return wavs.unflatten(1, (-1, 20))


class Encoder(torch.nn.Module):
    """The interface of SpeechBrain's ECAPA_TDNN, in two layers."""

    def __init__(self):
        super().__init__()
        self.frame = torch.nn.Linear(20, 16)
        self.utterance = torch.nn.Linear(16, DIM)

    def forward(self, features, lengths=None):
        hidden = self.frame(features).tanh()
        return self.utterance(hidden.square().mean(1))[:, None]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(1)


@pytest.fixture
def make(tmp_path):
    """Makes a brain that is ready for its first batch."""

    def make(
        brain_class, selection="last", run_opts=None, fused=True, **modules
    ):
        modules = {
            "compute_features": Frames(),
            "mean_var_norm": InputNormalization(
                norm_type="sentence", std_norm=False
            ),
            "augment": Augmenter(),
            "embedding_model": Encoder(),
            **modules,
        }
        brain = brain_class(
            modules,
            functools.partial(torch.optim.Adam, lr=0.01, fused=fused),
            {
                "selection": selection,
                "adversarial_weight": 3.0,
                "lr_annealing": StepScheduler(0.01, 0.5, 1),
            },
            {"device": "cpu", **(run_opts or {})},
            Checkpointer(tmp_path / "checkpoints"),
        )
        brain.bad_files = BadFiles(tmp_path / "bad_files.txt", 1)
        brain.records = []
        brain.log = brain.records.append
        brain.on_fit_start()
        brain.on_stage_start(sb.Stage.TRAIN, 1)
        brain.modules.train()
        return brain

    return make


@pytest.fixture
def simclr(make):
    return make(
        SimCLRBrain,
        contrastive=NTXent(),
        discriminator=AugmentationDiscriminator(DIM, 16),
    )


@pytest.fixture
def gated(make):
    def gated(gate, **options):
        classifier = Classifier(input_size=DIM, out_neurons=CLASSES)
        return make(
            LossGatedBrain,
            classifier=classifier,
            aam=AAMSoftmax(0.2, 30.0),
            gate=gate,
            **{"memory": LossMemory(BATCH, 0.0), **options},
        )

    return gated


def batch(n_crops, seed=0, bad=""):
    """A batch as SpeechBrain's loader collates it."""
    generator = torch.Generator().manual_seed(seed)
    sig = torch.randn(BATCH, n_crops, TIME, generator=generator)
    return PaddedBatch(
        [
            {
                "id": f"utterance {i}",
                "sig": sig[i],
                "label": i % CLASSES,
                "row": i,
                "bad": bad if i == 2 else "",
            }
            for i in range(BATCH)
        ]
    )


def broken(n_crops):
    """A batch whose loss is not finite."""
    given = batch(n_crops)
    given.sig.data[0, 0, 0] = math.nan
    return given


def normalise(brain):
    """Gives the encoder batch normalisation."""
    encoder = brain.modules.embedding_model
    encoder.norm, whole = torch.nn.BatchNorm1d(DIM), encoder.forward
    encoder.forward = lambda x: encoder.norm(whole(x)[:, 0])[:, None]


def weights(brain):
    """A copy of all parameters by module."""
    return {
        name: copy.deepcopy(list(module.parameters()))
        for name, module in brain.modules.items()
    }


def changed(brain, before):
    """The modules of which a parameter is another than before."""
    return {
        name
        for name, module in brain.modules.items()
        if any(
            not torch.equal(a, b)
            for a, b in zip(module.parameters(), before[name])
        )
    }


class Among(Gate):
    """Selects the first of a batch."""

    def __init__(self, n):
        super().__init__(1.0)
        self.n = n

    def forward(self, losses):
        return torch.arange(len(losses)) < self.n


# Stage I


def test_discriminator_step_changes_only_the_discriminator(simclr):
    before = weights(simclr)
    embeddings = simclr.compute_forward(batch(2), sb.Stage.TRAIN)
    simclr.train_discriminator(embeddings.detach())
    assert changed(simclr, before) == {"discriminator"}
    encoder = simclr.modules.embedding_model
    assert all(p.grad is None for p in encoder.parameters())


def test_main_step_leaves_the_discriminator(simclr, monkeypatch):
    monkeypatch.setattr(simclr, "train_discriminator", lambda embeddings: None)
    before = weights(simclr)
    simclr.fit_batch(batch(2))
    assert changed(simclr, before) == {"embedding_model", "contrastive"}


def test_discriminator_learns_from_its_own_gradient_alone(simclr, monkeypatch):
    """The adversarial pass's gradients are cleared before the next step."""
    seen = []
    optimizer = simclr.discriminator_optimizer
    step = optimizer.step

    def spy():
        parameters = list(simclr.modules.discriminator.parameters())
        seen.append([p.grad.clone() for p in parameters])
        expected = torch.autograd.grad(spy.loss(), parameters)
        for grad, other in zip(seen[-1], expected):
            torch.testing.assert_close(grad, other)
        step()

    def own(embeddings):
        first, second, third = embeddings
        pairs = torch.cat(
            [torch.cat([first, second], 1), torch.cat([first, third], 1)]
        )
        target = torch.tensor([1] * BATCH + [0] * BATCH)
        spy.loss = lambda: torch.nn.functional.cross_entropy(
            simclr.modules.discriminator(pairs), target
        )
        SimCLRBrain.train_discriminator(simclr, embeddings)

    monkeypatch.setattr(optimizer, "step", spy)
    monkeypatch.setattr(simclr, "train_discriminator", own)
    for number in range(3):
        simclr.fit_batch(batch(2, number))
    assert len(seen) == 3


def test_encoder_gets_the_reversed_gradient_by_its_weight(simclr, monkeypatch):
    """g(w) = contrastive - w * adversarial: linear in w, and against it."""
    monkeypatch.setattr(simclr, "train_discriminator", lambda embeddings: None)
    embeddings = torch.randn(3, BATCH, DIM, requires_grad=True)
    gradients = {}
    for weight in (0.0, 1.0, 3.0):
        simclr.hparams.adversarial_weight = weight
        loss = simclr.compute_objectives(embeddings, batch(2), sb.Stage.TRAIN)
        (gradients[weight],) = torch.autograd.grad(loss, embeddings)
    discriminator = simclr.modules.discriminator
    first, second, third = embeddings
    logits = discriminator(
        torch.cat([torch.cat([first, second], 1), torch.cat([first, third], 1)])
    )
    target = torch.tensor([1] * BATCH + [0] * BATCH)
    loss = torch.nn.functional.cross_entropy(logits, target)
    (plain,) = torch.autograd.grad(loss, embeddings)
    for weight in (1.0, 3.0):
        difference = gradients[weight] - gradients[0.0]
        torch.testing.assert_close(difference, -weight * plain)
    assert plain.abs().max() > 1e-4


def test_views_share_augmentations_as_the_paper_has_it(simclr, monkeypatch):
    """A(a), A(b), B(b): the draws and the crops that each view gets."""
    calls = []

    def augment(wavs, draw=None):
        calls.append((wavs, draw))
        return wavs

    monkeypatch.setattr(simclr.modules.augment, "forward", augment)
    given = batch(2)
    simclr.compute_forward(given, sb.Stage.TRAIN)
    (a, first), (b, second), (b_again, third) = calls
    assert torch.equal(a, given.sig.data[:, 0])
    assert torch.equal(b, given.sig.data[:, 1])
    assert torch.equal(b_again, b)
    assert first is second and first is not None and third is not first


def test_simclr_learns_a_batch_by_heart(simclr):
    losses = [float(simclr.fit_batch(batch(2))) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    summary = simclr.epoch_summary()
    assert 0 <= summary["accuracy"] <= 1
    assert 0 <= summary["discriminator_accuracy"] <= 1


# Stage II


def test_no_gate_is_the_plain_mean_of_speechbrains_loss(gated):
    brain = gated(NoGate())
    given = batch(1)
    cosines = brain.compute_forward(given, sb.Stage.TRAIN)
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    reference = LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30.0))
    expected = reference(cosines[:, None], given.label[:, None])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_gated_loss_is_the_mean_over_the_selected(gated):
    brain = gated(Among(2))
    given = batch(1)
    cosines = brain.compute_forward(given, sb.Stage.TRAIN)
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    reference = LogSoftmaxWrapper(AdditiveAngularMargin(0.2, 30.0))
    expected = reference(cosines[:2, None], given.label[:2, None])
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_rejecting_all_changes_nothing_and_is_finite(gated):
    """A first step, so that Adam has no momentum to go on with."""
    brain = gated(FixedGate(1e-9))
    before = weights(brain)
    loss = brain.fit_batch(batch(1))
    assert loss == 0
    assert brain.optimizer_step == 1  # a step is taken, DDP's ranks agree
    assert changed(brain, before) == set()
    summary = brain.epoch_summary()
    assert summary["accuracy"] == 0 and summary["selected_share"] == 0
    assert all(p.isfinite().all() for p in brain.modules.parameters())


def test_rejecting_all_leaves_adam_without_a_gradient(gated):
    """After a real step only Adam's decaying momentum moves weights."""
    brain = gated(NoGate())
    brain.fit_batch(batch(1))
    moments = copy.deepcopy(brain.optimizer.state_dict()["state"])
    brain.modules["gate"] = FixedGate(1e-9)
    brain.fit_batch(batch(1))
    after = brain.optimizer.state_dict()["state"]
    for name, moment in moments.items():
        torch.testing.assert_close(
            after[name]["exp_avg"], 0.9 * moment["exp_avg"]
        )


@pytest.mark.parametrize("n", [1, 3, BATCH])
def test_accuracy_counts_the_selected_only(gated, n):
    brain = gated(Among(n))
    given = batch(1)
    # The first is right, the second wrong, the third right; the rejected
    # ones are right, too, and must not count.
    cosines = torch.nn.functional.one_hot(given.label, CLASSES).float() * 0.5
    cosines[1] = cosines[1].roll(1)
    brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    summary = brain.epoch_summary()
    assert summary["accuracy"] == pytest.approx((n - (n > 1)) / n)
    assert summary["selected_share"] == pytest.approx(n / BATCH)


def test_gate_sees_the_losses_of_the_epoch(gated, monkeypatch):
    gate = FixedGate(7.0)
    told = []
    monkeypatch.setattr(gate, "end_epoch", told.append)
    brain = gated(gate)
    for number in range(3):
        brain.fit_batch(batch(1, number))
    summary = brain.epoch_summary()
    (losses,) = told
    assert losses.shape == (3 * BATCH,) and losses.dtype == np.float32
    assert np.array_equal(losses <= 7.0, brain.selected)
    assert brain.rows.tolist() == 3 * list(range(BATCH))
    assert summary["tau"] == 7.0
    brain.on_stage_start(sb.Stage.TRAIN, 2)
    brain.fit_batch(batch(1))
    brain.epoch_summary()
    assert len(told[1]) == BATCH  # the first epoch's are forgotten


def test_gate_losses_are_float32_under_autocast(gated):
    """bfloat16 cosines would be steps of 0.12 in a scale of 30."""
    brain = gated(NoGate(), run_opts={"precision": "bf16"})
    brain.fit_batch(batch(1))
    ((_, losses, _, _),) = brain.seen
    assert losses.dtype == torch.float32
    with brain.training_ctx:
        cosines = brain.compute_forward(batch(1), sb.Stage.TRAIN)
    assert cosines.dtype == torch.float32


def test_stage_two_learns_a_batch_by_heart(gated):
    brain = gated(NoGate())
    losses = [float(brain.fit_batch(batch(1))) for _ in range(80)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


# Both


@pytest.mark.parametrize("kind", ["simclr", "gated"])
def test_held_out_embeddings_repeat_and_leave_the_generator(
    kind, simclr, gated
):
    brain = simclr if kind == "simclr" else gated(NoGate())
    brain.modules.eval()
    crops = batch(2).sig.data
    torch.manual_seed(123)
    expected = torch.randn(3)
    torch.manual_seed(123)
    brain.step = 1
    first = brain.held_out_embeddings(crops)
    assert torch.equal(torch.randn(3), expected)
    assert torch.equal(brain.held_out_embeddings(crops), first)  # an epoch on
    brain.step = 2
    assert not torch.equal(brain.held_out_embeddings(crops), first)
    assert first.shape == (2, BATCH, DIM)


def test_held_out_crops_are_in_their_utterances_place(simclr, monkeypatch):
    """Embedding [v, i] is that of crop v of utterance i."""
    monkeypatch.setattr(
        simclr.modules.augment, "forward", lambda wavs, draw=None: wavs
    )
    simclr.modules.eval()
    crops = batch(2).sig.data
    found = simclr.held_out_embeddings(crops)
    for view in (0, 1):
        expected = simclr.embed(crops[:, view])
        torch.testing.assert_close(found[view], expected)


def test_bad_utterances_are_counted_from_the_batch(simclr):
    simclr.fit_batch(batch(2, bad="x.wav\tsilent"))
    assert simclr.bad_files.reasons == {"x.wav": "silent"}
    with pytest.raises(ValueError, match="2 bad utterances"):
        simclr.fit_batch(batch(2, bad="y.wav\tsilent\nx.wav\tsilent"))


def epoch(brain, number, held_out):
    """One epoch of one batch, as `fit` would run it."""
    brain.on_stage_start(sb.Stage.TRAIN, number)
    brain.modules.train()
    n_crops = 2 if isinstance(brain, SimCLRBrain) else 1
    brain.step = 1
    loss = brain.fit_batch(batch(n_crops))
    average = brain.update_average(loss, 0.0)
    brain.on_stage_end(sb.Stage.TRAIN, average, number)
    assert brain.record["loss"] == pytest.approx(loss.item())
    brain.on_stage_start(sb.Stage.VALID, number)
    brain.modules.eval()
    brain.step = 1
    brain.evaluate_batch(held_out, sb.Stage.VALID)
    brain.on_stage_end(sb.Stage.VALID, 0.0, number)


@pytest.mark.parametrize("kind", ["simclr", "gated"])
def test_epochs_are_logged_in_plain_numbers(kind, simclr, gated):
    brain = simclr if kind == "simclr" else gated(NoGate())
    for number in (1, 2):
        epoch(brain, number, batch(2, seed=9))
    assert [record["epoch"] for record in brain.records] == [1, 2]
    # The scheduler: 0.01 halved each epoch; logged is what was trained with.
    assert [r["lr"] for r in brain.records] == [0.005, 0.0025]
    for record in brain.records:
        assert {type(value) for value in record.values()} <= {int, float}
        assert record["utterances_per_second"] > 0
        assert 0 <= record["pseudo_eer"] <= 100


def test_mean_loss_is_speechbrains(gated):
    """Of finite losses alone, and from the mean before an interruption on."""
    brain = gated(NoGate())
    expected = average = 7.0
    for brain.step in range(5, 5 + 2 * STEPS_PER_LOOK):
        loss = torch.tensor(math.nan if brain.step == 9 else brain.step / 3)
        expected = sb.Brain.update_average(brain, loss, expected)
        average = brain.update_average(loss, average)
        if brain.step % STEPS_PER_LOOK == 0:
            assert average == pytest.approx(expected)
    assert type(average) is float
    assert float(brain.average) == pytest.approx(expected)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", ["simclr", "gated"])
def test_a_step_that_is_not_finite_changes_nothing(kind, fused, make):
    further = {
        "simclr": {
            "contrastive": NTXent(),
            "discriminator": AugmentationDiscriminator(DIM, 16),
        },
        "gated": {
            "classifier": Classifier(input_size=DIM, out_neurons=CLASSES),
            "aam": AAMSoftmax(0.2, 30.0),
            "gate": NoGate(),
            "memory": LossMemory(BATCH, 0.0),
        },
    }
    brain_class = SimCLRBrain if kind == "simclr" else LossGatedBrain
    brain = make(brain_class, fused=fused, **further[kind])
    n_crops = 2 if kind == "simclr" else 1
    brain.fit_batch(batch(n_crops))
    before = weights(brain)
    state = copy.deepcopy(brain.optimizer.state_dict()["state"])
    brain.fit_batch(broken(n_crops))
    assert changed(brain, before) == set()
    for name, values in brain.optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert torch.equal(value, state[name][key])
    assert brain.tally["skipped"] == 1
    brain.fit_batch(batch(n_crops))  # and the next one trains
    assert changed(brain, before) >= {"embedding_model"}


@pytest.mark.parametrize("kind", ["simclr", "gated"])
def test_such_a_step_leaves_the_batch_statistics(kind, simclr, gated):
    """The encoder's and the discriminator's; evaluation reads them."""
    brain = simclr if kind == "simclr" else gated(NoGate())
    normalise(brain)

    def statistics():
        state = brain.modules.state_dict()
        return {k: v.clone() for k, v in state.items() if ".running_" in k}

    n_crops = 2 if kind == "simclr" else 1
    brain.fit_batch(batch(n_crops, seed=1))
    before = statistics()
    assert len(before) == (6 if kind == "simclr" else 2)
    brain.fit_batch(broken(n_crops))
    assert brain.tally["skipped"] == 1
    for name, value in statistics().items():
        assert torch.equal(value, before[name]), name
    brain.fit_batch(batch(n_crops, seed=2))  # and the next one counts
    for name, value in statistics().items():
        assert not torch.equal(value, before[name]), name
    brain.modules.eval()
    assert brain.embed(batch(1).sig.data[:, 0]).isfinite().all()


def train(brain, *kinds):
    """Steps on whole and on broken batches, with the looks at the loss."""
    for is_broken in kinds:
        brain.step += 1
        given = broken(1) if is_broken else batch(1)
        average = brain.update_average(brain.fit_batch(given), 0.0)
    return average


def test_many_such_steps_in_a_row_end_the_run(gated):
    brain = gated(NoGate())
    brain.nonfinite_patience = 2
    train(brain, *((STEPS_PER_LOOK - 3) * [False]))
    match = (
        r"last 3 steps, up to step 20 of epoch 1, .* other steps had a mean "
        r"loss of \d+\.\d+\. Try a lower lr, which is 0\.005 here"
    )
    with pytest.raises(ValueError, match=match):
        train(brain, True, True, True)
    assert brain.step == STEPS_PER_LOOK


def test_scattered_ones_do_not_end_it(gated):
    brain = gated(NoGate())
    brain.nonfinite_patience = 2
    average = train(brain, *(STEPS_PER_LOOK * [False, True, True]))
    brain.on_stage_end(sb.Stage.TRAIN, average, 1)
    brain.records.append(brain.record)
    assert brain.record["skipped_steps"] == 2 * STEPS_PER_LOOK
    assert "40 training steps were skipped" in said(brain)


def test_a_short_epoch_of_such_steps_ends_the_run_too(gated):
    brain = gated(NoGate())
    average = train(brain, *(5 * [True]))
    with pytest.raises(ValueError, match="No step of the epoch was finite"):
        brain.on_stage_end(sb.Stage.TRAIN, average, 1)


def test_weights_that_are_not_finite_are_named(gated):
    brain = gated(NoGate())
    brain.modules.embedding_model.frame.bias.data[:] = math.nan
    with pytest.raises(ValueError, match="of embedding_model are not finite"):
        train(brain, *(STEPS_PER_LOOK * [False]))


def test_mean_loss_goes_on_after_an_interruption(gated):
    brain = gated(NoGate())
    brain.checkpointer.add_recoverable("brain", brain)
    for brain.step in range(1, 4):
        brain.update_average(torch.tensor(float(brain.step)), 0.0)
    brain._save_intra_epoch_ckpt()
    brain.avg_train_loss = 0.0
    brain.checkpointer.recover_if_possible()
    assert (brain.avg_train_loss, brain.step) == (2.0, 3)


def test_told_behind_the_last_look_of_an_epoch_it_keeps_the_steps(
    gated, monkeypatch
):
    """Of several processes, which ask each other only at a look."""
    brain = gated(NoGate())
    brain.checkpointer.add_recoverable("brain", brain)
    monkeypatch.setattr(signals, "world_size", lambda: 2)
    with stop.on_signals():
        brain.on_stage_start(sb.Stage.TRAIN, 1)
        os.kill(os.getpid(), signal.SIGTERM)
        average = train(brain, False, False, False)
        assert brain.checkpointer.find_checkpoint() is None
        with pytest.raises(SystemExit):
            brain.on_stage_end(sb.Stage.TRAIN, average, 1)
    brain.step = 0
    brain.checkpointer.recover_if_possible()
    assert brain.step == 3 and len(brain.resumed["seen"][0][0]) == 3 * BATCH


def test_rows_are_kept_by_themselves(gated):
    """A tensor that a loader's worker shares keeps a file open."""
    brain = gated(NoGate())
    given = batch(1)
    given.row.share_memory_()
    brain.fit_batch(given)
    assert not brain.seen[0][0].is_shared()


class NothingReadByTheHost(TorchDispatchMode):
    """Raises where a GPU's host would have to wait for a result."""

    waits = (
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.nonzero.default,
        torch.ops.aten.masked_select.default,
        torch.ops.aten.equal.default,
    )

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in self.waits:
            raise AssertionError(f"the host reads a tensor: {operation}")
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["simclr", "gated"])
def test_no_step_waits_for_the_device(kind, simclr, gated, monkeypatch):
    brain = simclr if kind == "simclr" else gated(FixedGate(7.0))
    normalise(brain)
    # The augmenter, part of which runs on the host, has a test of its own.
    monkeypatch.setattr(
        brain.modules.augment, "forward", lambda wavs, draw=None: wavs
    )
    monkeypatch.setattr(brain.modules.augment, "draw", lambda *shape: None)
    given = batch(2 if kind == "simclr" else 1)
    for brain.step in (1, 2):
        with NothingReadByTheHost():
            loss = brain.fit_batch(given)
            brain.update_average(loss, 0.0)
    with NothingReadByTheHost(), pytest.raises(AssertionError, match="host"):
        loss.item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["simclr", "gated"])
def test_no_step_waits_for_the_gpu(kind, make):
    further = {"contrastive": NTXent()}
    further["discriminator"] = AugmentationDiscriminator(DIM, 16)
    if kind == "gated":
        further = {
            "classifier": Classifier(input_size=DIM, out_neurons=CLASSES),
            "aam": AAMSoftmax(0.2, 30.0),
            "gate": FixedGate(7.0),
            "memory": LossMemory(BATCH, 0.0),
        }
    brain_class = SimCLRBrain if kind == "simclr" else LossGatedBrain
    brain = make(brain_class, run_opts={"device": "cuda"}, **further)
    given = batch(2 if kind == "simclr" else 1).pin_memory()
    brain.fit_batch(given)
    torch.cuda.set_sync_debug_mode("error")
    try:
        brain.update_average(brain.fit_batch(given), 0.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Crops(torch.utils.data.Dataset):
    """Ten utterances whose crops follow from the epoch."""

    epoch = 0

    def __len__(self):
        return 10

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(100 * self.epoch + index)
        wavs = torch.randn(2, TIME, generator=generator)
        item = {"id": str(index), "sig": wavs, "row": index, "bad": ""}
        return {**item, "label": index % CLASSES}


class Killed(BaseException):
    """Nothing that the code under test would catch."""


@pytest.mark.parametrize("kind", ["simclr", "gated"])
def test_killed_at_any_step_ends_as_if_it_had_not_been(
    kind, tmp_path, monkeypatch
):
    """Weights, figures and what the gate saw; a checkpoint every second step.

    An epoch has 5 steps, validation after each counts as a step here.
    """

    def fit(folder, records, dies=None):
        torch.manual_seed(1)
        modules = {
            "compute_features": Frames(),
            "mean_var_norm": InputNormalization(
                norm_type="sentence", std_norm=False
            ),
            "augment": Augmenter(),
            "embedding_model": Encoder(),
        }
        if kind == "simclr":
            brain_class = SimCLRBrain
            modules["contrastive"] = NTXent()
            modules["discriminator"] = AugmentationDiscriminator(DIM, 16)
        else:
            brain_class = LossGatedBrain
            modules["classifier"] = Classifier(DIM, out_neurons=CLASSES)
            modules["aam"] = AAMSoftmax()
            modules["gate"] = DynamicGate()
            modules["memory"] = LossMemory(10, 0.5)
            modules["correction"] = LabelCorrection()
        counter = sb.utils.epoch_loop.EpochCounter(2)
        learnt = {k: m for k, m in modules.items() if m.state_dict()}
        brain = brain_class(
            modules,
            functools.partial(torch.optim.Adam, lr=0.01),
            {
                "selection": "last",
                "adversarial_weight": 3.0,
                "lr_annealing": StepScheduler(0.01, 0.5, 1),
            },
            {"device": "cpu", "ckpt_interval_steps": 2, "noprogressbar": True},
            Checkpointer(folder, {**learnt, "counter": counter}),
        )
        brain.bad_files = BadFiles(tmp_path / "bad_files.txt", 1)
        brain.log = records.append
        brain.train_data = Crops()
        steps = iter(range(1, 100))

        def survive():
            if next(steps) == dies:
                raise Killed

        for name in ("fit_batch", "evaluate_batch"):
            whole = getattr(brain, name)

            def part(*args, whole=whole, **kwargs):
                survive()
                return whole(*args, **kwargs)

            monkeypatch.setattr(brain, name, part)
        options = {"collate_fn": PaddedBatch}
        brain.fit(
            counter,
            brain.train_data,
            Crops(),
            train_loader_kwargs={**options, "batch_size": 2, "shuffle": True},
            valid_loader_kwargs={**options, "batch_size": 10},
        )
        return brain

    monkeypatch.setenv("SB_GLOBAL_SEED", "7")
    timings = ("seconds", "utterances_per_second")

    def figures(records):
        return [
            {k: v for k, v in record.items() if k not in timings}
            for record in records
        ]

    records = []
    whole = fit(tmp_path / "whole", records)
    for dies in (1, 2, 4, 5, 6, 7, 9, 11, 12):
        folder, again = tmp_path / str(dies), []
        with pytest.raises(Killed):
            fit(folder, again, dies)
        torch.manual_seed(99)
        brain = fit(folder, again)
        assert figures(again) == figures(records), dies
        state, other = whole.modules.state_dict(), brain.modules.state_dict()
        for name, value in state.items():
            assert torch.equal(value, other[name]), (dies, name)
        for name in whole.of_epoch:
            of, other = getattr(whole, name), getattr(brain, name)
            assert np.array_equal(of, other), (dies, name)


@pytest.mark.parametrize(
    "selection, eers, chosen",
    [("trials", [30.0, 10.0, 20.0], 2), ("last", [None] * 3, 3)],
)
def test_weights_of_the_chosen_epoch_come_back(gated, selection, eers, chosen):
    brain = gated(NoGate(), selection=selection)
    brain.checkpointer.add_recoverable(
        "embedding_model", brain.modules.embedding_model
    )
    scores = iter(eers)
    brain.examine = lambda encoder: {"eer": next(scores)}
    after = {}
    for number in (1, 2, 3):
        epoch(brain, number, batch(2))
        after[number] = weights(brain)
    brain.checkpointer.recover_if_possible(min_key="criterion")
    assert "embedding_model" not in changed(brain, after[chosen])


def test_pseudo_trials_choose_the_lowest_error(gated, monkeypatch):
    rates = iter([0.5, 0.2, 0.4])
    monkeypatch.setattr(
        "lgl_plugin.training.brain.pseudo_trial_eer", lambda a, b: next(rates)
    )
    brain = gated(NoGate(), selection="pseudo_trials")
    for number in (1, 2, 3):
        epoch(brain, number, batch(2))
    found = brain.checkpointer.find_checkpoint(min_key="criterion")
    assert found.meta["epoch"] == 2
    assert found.meta["criterion"] == 20.0


def test_gate_judges_by_the_remembered_loss(gated):
    """An utterance known to be hard stays out after one easy draw."""
    memory = LossMemory(BATCH, 0.9)
    brain = gated(FixedGate(5.0), memory=memory)
    memory.losses.fill_(1.0)
    memory.losses[0] = 100.0
    given = batch(1)
    easy = torch.nn.functional.one_hot(given.label, CLASSES).float()
    loss = brain.compute_objectives(easy, given, sb.Stage.TRAIN)
    _, remembered, selected, _ = brain.seen[-1]
    assert not selected[0] and selected[1:].all()
    assert remembered[0] > 80 and torch.isfinite(loss)


def test_corrected_labels_are_trained_with_the_margin_on_them(gated):
    """What the gate rejects and the network is sure of counts as relabelled."""
    correction = LabelCorrection(temperature=0.1, confidence=0.5)
    brain = gated(FixedGate(3.0), correction=correction)
    given = batch(1)
    believed = (given.label + torch.tensor([0, 0, 1, 1, 0, 0])) % CLASSES
    sure = torch.tensor([1, 1, 1, 0, 1, 1])[:, None]
    cosines = sure * torch.nn.functional.one_hot(believed, CLASSES).float()
    brain.clean_cosines = lambda batch: cosines
    loss = brain.compute_objectives(cosines, given, sb.Stage.TRAIN)
    # The fourth is rejected, and the network has no opinion of it.
    expected = brain.modules.aam(cosines, believed)[[0, 1, 2, 4, 5]].mean()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    _, losses, selected, corrected = brain.seen[-1]
    assert selected.tolist() == [True, True, False, False, True, True]
    assert corrected.tolist() == [-1, -1, believed[2].item(), -1, -1, -1]
    # The gate goes on judging the pseudo-label, not the correction.
    assert losses[2] == brain.modules.aam(cosines, given.label)[2]


def test_nothing_is_learnt_from_clean_crops(gated):
    """Neither gradients nor statistics, and training goes on as before."""
    brain = gated(FixedGate(0.1), correction=LabelCorrection())
    brain.modules.embedding_model.norm = torch.nn.BatchNorm1d(DIM)
    before = weights(brain)
    cosines = brain.clean_cosines(batch(1))
    assert not cosines.requires_grad
    assert brain.modules.training and not changed(brain, before)


# Training that goes wrong, and what health.py says of it


def said(brain):
    """What is found in a brain's records, as one text."""
    place = {"stage": 2, "iteration": 1, "phase": "gated"}
    if isinstance(brain, SimCLRBrain):
        place = {"stage": 1, "phase": "simclr"}
    run = Run(brain.checkpointer.checkpoints_dir / "run", 2, {})
    for record in brain.records:
        run.log(**place, **record)
    return "\n".join(words for _, words in findings(read_metrics(run.folder)))


COLLAPSED = "the embeddings have collapsed: "


def test_a_learning_rate_of_zero(simclr):
    simclr.hparams.lr_annealing = StepScheduler(0.0)
    simclr.anneal(1)
    before = weights(simclr)
    epoch(simclr, 1, batch(2))
    assert not changed(simclr, before)
    assert "the learning rate is 0 (lr)" in said(simclr)


@pytest.mark.parametrize("kind", ["simclr", "gated"])
def test_an_encoder_that_says_the_same_of_all(kind, simclr, gated):
    brain = simclr if kind == "simclr" else gated(NoGate())
    layer = brain.modules.embedding_model.utterance
    layer.weight.data.zero_()
    layer.weight.requires_grad_(False)
    epoch(brain, 1, batch(2, seed=9))
    assert brain.record["mean_cosine"] == pytest.approx(1, abs=1e-6)
    assert brain.record["effective_dimensions"] == 0
    assert f"{COLLAPSED}different held-out utterances" in said(brain)


def test_an_encoder_of_one_dimension(gated):
    brain = gated(NoGate())
    normalise(brain)  # so that tiny features show
    layer = brain.modules.embedding_model.utterance
    layer.weight.data[1:] = layer.weight.data[:1]
    layer.weight.requires_grad_(False)
    epoch(brain, 1, batch(2, seed=9))
    assert brain.record["mean_cosine"] < 0.99
    assert 1 <= brain.record["effective_dimensions"] < 1.5
    assert f"{COLLAPSED}they vary in 1." in said(brain)


def test_an_encoder_that_spreads_has_not_collapsed(gated):
    brain = gated(NoGate())
    normalise(brain)
    epoch(brain, 1, batch(2, seed=9))
    assert brain.record["effective_dimensions"] > 2
    assert COLLAPSED not in said(brain)


def test_a_discriminator_that_nobody_answers(simclr, monkeypatch):
    """The augmentation is plain to see, and the encoder does not hide it."""
    simclr.hparams.adversarial_weight = 0.0
    simclr.hparams.lr_annealing = StepScheduler(0.01, 1.0)
    simclr.anneal(1)
    monkeypatch.setattr(simclr.modules.augment, "draw", lambda *shape: "shared")
    monkeypatch.setattr(
        simclr.modules.augment,
        "forward",
        lambda wavs, draw=None: wavs if draw else 0.01 * wavs,
    )
    for _ in range(40):
        simclr.fit_batch(batch(2))
    for number in (1, 2, 3):
        epoch(simclr, number, batch(2, seed=9))
    assert "the discriminator has won: 3 epochs" in said(simclr)


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        (FixedGate(1e-9), "only 0 % through (selected_share) at tau 1e-09"),
        (FixedGate(1e9), "lets 100.0 % through (selected_share) at tau 1e+09"),
    ],
)
def test_a_gate_that_selects_nothing_or_all(gated, gate, words):
    brain = gated(gate)
    epoch(brain, 1, batch(2, seed=9))
    assert words in said(brain)


def test_no_gate_selects_all_as_was_asked_for(gated):
    brain = gated(NoGate())
    epoch(brain, 1, batch(2, seed=9))
    assert brain.record["selected_share"] == 1
    assert "through" not in said(brain)


def test_an_encoder_that_fails_in_evaluation_alone(gated):
    brain = gated(NoGate())
    normalise(brain)
    norm = brain.modules.embedding_model.norm
    norm.running_var[:] = math.nan  # as loaded
    with pytest.raises(ValueError, match="not finite, though .* --eval_prec"):
        epoch(brain, 1, batch(2, seed=9))
