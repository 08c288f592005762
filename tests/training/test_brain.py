"""What both Brains share: steps, epochs, checkpoints, stopping."""

import math
import os
import signal
import sys
import time
import types

import numpy as np
import pytest
import speechbrain as sb
import tiny_brains
import torch
from devices import DEVICES
from pretended_device import present
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.dataio.dataloader import SaveableDataLoader
from speechbrain.lobes.features import Fbank
from speechbrain.nnet.schedulers import StepScheduler
from tiny_brains import (
    BATCH,
    BRAINS,
    STAGE2,
    Crops,
    Network,
    batch,
    begin,
    changed,
    make_brain,
    n_crops,
    run_epoch,
    train,
    warnings_of,
    watch_step,
    weights,
)
from tiny_encoders import ENCODERS

from lgl_plugin.dataio.partners import Partners
from lgl_plugin.dataio.sampler import PassSampler
from lgl_plugin.nnet.augment import Augmenter
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.gates import DynamicGate, FixedGate, LabelCorrection
from lgl_plugin.nnet.losses import AAMSoftmax
from lgl_plugin.nnet.schedules import WarmupCosine
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.training import meetings
from lgl_plugin.training.brain import STEPS_PER_READING, SpeakerBrain
from lgl_plugin.utils import signals
from lgl_plugin.utils.signals import stop

KINDS = pytest.mark.parametrize("kind", list(BRAINS))
# To the device, of a step; those of other methods are 6 at most.
COPIES = {"dino": 11, "rdino": 11, "sdpn": 9}


def test_the_base_has_at_most_a_dozen_methods():
    own = vars(SpeakerBrain).values()
    methods = [m for m in own if isinstance(m, types.FunctionType)]
    assert 0 < len(methods) <= 12
    assert not [m for m in own if isinstance(m, property | staticmethod)]


# Whole when constructed


@KINDS
def test_fit_sets_nothing_that_the_constructor_did_not(kind, tmp_path):
    """Beside SpeechBrain's own, and what an epoch leaves."""
    brain = make_brain(kind, tmp_path)
    known = {*vars(brain), *vars(sb.Brain()), "optimizer", "optimizers_dict"}
    run_epoch(begin(brain), 1, batch(2))
    added = vars(brain).keys() - known
    state = {"epoch", "record", "is_training"}
    assert added <= state


@KINDS
@pytest.mark.parametrize("missing", ["bad_files", "log"])
def test_a_brain_without_its_parts_is_an_error(kind, missing, tmp_path):
    given = {"bad_files": None, "log": print}
    if kind == "ssps":
        given["group"] = print
        given["partners"] = Partners(1)
    del given[missing]
    with pytest.raises(TypeError, match=missing):
        BRAINS[kind]({}, None, {}, {}, WholeCheckpointer(tmp_path), **given)


def test_learning_rates_of_the_epochs_before_are_behind(tmp_path):
    brain = begin(make_brain("gated", tmp_path, epochs_before=2))
    for number in (1, 2):
        run_epoch(brain, number, batch(2))
        assert brain.record["lr"] == 0.01 * 0.5 ** (1 + number)


@KINDS
def test_a_step_draws_by_seed_epoch_and_step_alone(kind, tmp_path):
    """Not by what was drawn before: a run that goes on draws the same."""

    def draw(seed, epoch, step):
        brain = begin(make_brain(kind, tmp_path, seed=seed))
        brain.epoch, brain.step = epoch, step
        torch.manual_seed(len(drawn))
        draws = []
        brain.on_fit_batch_start = lambda *_: draws.append(torch.rand(3))
        brain.fit_batch(batch(n_crops(brain)))
        return tuple(draws[0].tolist())

    drawn = {}
    for place in ((0, 1, 1), (1, 1, 1), (0, 2, 1), (0, 1, 2)):
        drawn[place] = draw(*place)
    assert len(set(drawn.values())) == len(drawn)
    assert draw(0, 1, 1) == drawn[0, 1, 1]


# Steps


@pytest.mark.parametrize("device", DEVICES)
@KINDS
def test_no_step_waits_for_the_device(kind, device, make, monkeypatch):
    """With the features and the augmentation of a run."""
    monkeypatch.setattr(tiny_brains, "TIME", 3200)
    given = {}
    if kind == "gated":
        given = {"gate": FixedGate(7.0), "correction": LabelCorrection(BATCH)}
    features = Fbank(n_mels=20)
    # All that an augmenter can do, to nearly each waveform.
    augment = Augmenter(clean=0.1, channel=0.9, drop=0.9)
    with present(device):
        opts = {"device": device}
        encoder = Encoder(features, Network())
        given["augment"] = augment
        brain = make(kind, run_opts=opts, encoder=encoder, **given)
        copies = watch_step(brain)
    # The batch's five tensors, and one for each view that is drawn.
    assert len(copies) <= COPIES.get(kind, 7), copies


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ENCODERS)
def test_no_encoder_waits_for_the_device(name, device, make, monkeypatch):
    monkeypatch.setattr(tiny_brains, "TIME", 3200)
    with present(device):
        opts = {"device": device}
        watch_step(make("simsiam", run_opts=opts, encoder=ENCODERS[name]()))


def test_mean_loss_is_speechbrains(gated):
    """Of finite losses alone, and from the mean before an interruption on."""
    brain = gated()
    expected = average = 7.0
    for brain.step in range(5, 5 + 2 * STEPS_PER_READING):
        loss = torch.tensor(math.nan if brain.step == 9 else brain.step / 3)
        expected = sb.Brain.update_average(brain, loss, expected)
        average = brain.update_average(loss, average)
        if brain.step % STEPS_PER_READING == 0:
            assert average == pytest.approx(expected)
    assert type(average) is float
    assert float(brain.tally.average) == pytest.approx(expected)


def test_the_bar_shows_a_loss_from_the_first_step_on(gated):
    """On a GPU, too, where an epoch may be shorter than the next reading."""
    brain = gated()
    brain.steps_per_reading = STEPS_PER_READING
    average = 0.0
    for brain.step in (1, 2, 3):
        average = brain.update_average(torch.tensor(6.0 / brain.step), average)
        assert average == 6.0
    assert float(brain.tally.average) == pytest.approx((6 + 3 + 2) / 3)


@pytest.mark.parametrize(
    "pace, factor, steps",
    [
        (0.01, 1, [1, 21, 41]),
        (1.7, 1, [*range(1, 60, 2)]),
        # Not at a step that accumulates, behind which nothing is saved.
        (0.01, 2, [2, 22, 42]),
        (1.7, 4, [*range(4, 60, 4)]),
    ],
)
def test_processes_ask_each_other_now_and_then(
    pace, factor, steps, gated, monkeypatch
):
    """At a step in twenty, or in five seconds where steps are slow.

    SpeechBrain asks at each step whether to save, and a GPU's host would wait.
    """
    core, brain = sb.core.torch.distributed, gated()
    brain.ckpt_interval_minutes = 10.0
    brain.grad_accumulation_factor = factor
    asked, sums, before = [], [], [0]
    monkeypatch.setattr(sb.core, "is_distributed_initialized", lambda: True)
    monkeypatch.setattr(
        core, "broadcast_object_list", lambda *_, **__: asked.append(brain.step)
    )
    for module in (signals, meetings):
        monkeypatch.setattr(module, "world_size", lambda: 2)

    def total(values):
        sums.append(brain.step)
        steps = brain.step - before[0]
        before[0] = brain.step if "seconds" in values else before[0]
        return {"requested": 0, "seconds": 2 * steps * pace}

    for module in (signals, meetings):
        monkeypatch.setattr(module, "sum_over_ranks", total)
    brain.on_stage_start(sb.Stage.TRAIN, 1)
    for brain.step in range(1, 60):
        brain.update_average(torch.tensor(1.0), 0.0)
        brain._should_save_intra_epoch_ckpt(time.time(), brain.step)
    assert asked == sorted({*sums}) == steps
    stop.deferred = False


def test_a_stop_at_an_epochs_end_is_saved_whatever_was_accumulated(
    gated, monkeypatch
):
    brain, saved = gated(), []
    brain.grad_accumulation_factor = 3
    brain.on_stage_start(sb.Stage.TRAIN, 1)
    for brain.step in range(1, 6):
        brain.update_average(torch.tensor(1.0), 0.0)
    monkeypatch.setattr(
        sb.Brain, "_save_intra_epoch_ckpt", lambda self: saved.append(self.step)
    )
    monkeypatch.setattr(stop, "should_stop", lambda _: True)
    monkeypatch.setattr(stop, "leave", lambda: sys.exit(143))
    assert brain.accumulates
    with pytest.raises(SystemExit):
        brain.on_stage_end(sb.Stage.TRAIN, 1.0, 1)
    assert saved == [5]
    stop.deferred = False


def test_bad_utterances_are_counted_from_the_batch(simclr):
    simclr.fit_batch(batch(2, bad="x.wav\tsilent"))
    assert simclr.bad_files.reasons == {"x.wav": "silent"}
    with pytest.raises(ValueError, match="2 bad utterances"):
        simclr.fit_batch(batch(2, bad="y.wav\tsilent\nx.wav\tsilent"))


@KINDS
def test_bad_held_out_utterances_are_counted_too(kind, make):
    brain = make(kind)
    brain.evaluate_batch(batch(2, bad="x.wav\tsilent"), sb.Stage.VALID)
    assert brain.bad_files.reasons == {"x.wav": "silent"}


# Epochs


@KINDS
def test_epochs_are_logged_in_plain_numbers(kind, make):
    brain = make(kind)
    for number in (1, 2):
        run_epoch(brain, number, batch(2, seed=9))
    assert [record["epoch"] for record in brain.records] == [1, 2]
    # The scheduler: 0.01, halved each epoch; logged is what was trained with.
    assert [r["lr"] for r in brain.records] == [0.01, 0.005]
    for record in brain.records:
        assert {type(value) for value in record.values()} <= {int, float}
        assert record["utterances_per_second"] > 0
        assert 0 <= record["pseudo_eer"] <= 100


def test_examine_sees_the_encoder_and_leaves_the_generator(make):
    brain = make("gated")
    seen = []

    def examine(encoder):
        torch.rand(7)
        seen.append(encoder)
        return {"silhouette": 0.25}

    brain.examine = examine
    state = torch.get_rng_state()
    run_epoch(brain, 1, batch(2))
    after = torch.get_rng_state()
    assert seen == [brain.modules.encoder]
    assert brain.records[0]["silhouette"] == 0.25
    brain.examine = lambda encoder: {}
    torch.set_rng_state(state)
    run_epoch(brain, 1, batch(2))
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize(
    "selection, figures, chosen",
    [("silhouette", [0.1, 0.5, 0.3], 2), ("last", [None] * 3, 3)],
)
def test_weights_of_the_chosen_epoch_come_back(
    gated, selection, figures, chosen
):
    brain = gated(selection=selection)
    brain.checkpointer.add_recoverable(
        "embedding_model", brain.modules.encoder.network
    )
    figures = iter(figures)
    brain.examine = lambda encoder: {"silhouette": next(figures)}
    after = {}
    for number in (1, 2, 3):
        run_epoch(brain, number, batch(2))
        after[number] = weights(brain)
    assert len(changed(brain, after[2])) > 0
    brain.checkpointer.recover_if_possible(min_key="criterion")
    assert "encoder" not in changed(brain, after[chosen])


def test_pseudo_trials_choose_the_lowest_error(gated, monkeypatch):
    rates = iter([0.5, 0.2, 0.4])
    monkeypatch.setattr(
        "lgl_plugin.training.held_out.pairs_eer",
        lambda first, second: (next(rates), 0.0),
    )
    brain = gated(selection="pseudo_trials")
    for number in (1, 2, 3):
        run_epoch(brain, number, batch(2))
    found = brain.checkpointer.find_checkpoint(min_key="criterion")
    assert found.meta["epoch"] == 2
    assert found.meta["criterion"] == 20.0


def test_a_learning_rate_of_zero_is_warned_of(simclr):
    simclr.hparams.lr_annealing = StepScheduler(0.0)
    simclr.epoch = 1
    before = weights(simclr)
    run_epoch(simclr, 1, batch(2))
    assert not changed(simclr, before)
    assert "the learning rate is 0 (lr)" in warnings_of(simclr)


def test_the_learning_rate_spans_the_phases_of_a_round(tmp_path):
    """Two epochs of four steps, then one of the phase that goes on."""
    schedule = WarmupCosine(0.1, warmup=0.25)
    rates = []
    for before, epochs in ((0, 2), (2, 1)):
        options = {"epochs_before": before, "epochs_in_all": 3}
        brain = make_brain("gated", tmp_path, steps_per_epoch=4, **options)
        begin(brain)
        brain.hparams.lr_annealing = schedule
        for brain.epoch in range(1, epochs + 1):
            for brain.step in range(1, 5):
                brain.anneal()
                rates.append(brain.optimizer.param_groups[0]["lr"])
    assert rates == [schedule(step / 12) for step in range(1, 13)]
    assert 0 < rates[0] < rates[1] < rates[2] == 0.1  # a quarter of 12 steps
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.001)


# Interruptions


def test_mean_loss_goes_on_after_an_interruption(gated):
    brain = gated()
    for brain.step in range(1, 4):
        brain.update_average(torch.tensor(float(brain.step)), 0.0)
    brain.save_in_epoch()
    brain.avg_train_loss = 0.0
    brain.checkpointer.recover_if_possible()
    assert (brain.avg_train_loss, brain.step) == (2.0, 3)


def test_told_behind_the_last_reading_of_an_epoch_it_keeps_the_steps(
    gated, monkeypatch
):
    """Of several processes, which ask each other only at a reading."""
    brain = gated()
    for module in (signals, meetings):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    with stop.on_signals():
        brain.on_stage_start(sb.Stage.TRAIN, 1)
        train(brain, False)
        os.kill(os.getpid(), signal.SIGTERM)
        average = train(brain, False, False)
        assert brain.checkpointer.find_checkpoint() is None
        with pytest.raises(SystemExit):
            brain.on_stage_end(sb.Stage.TRAIN, average, 1)
    brain.step = 0
    brain.checkpointer.recover_if_possible()
    brain.tally.start()
    assert brain.step == 3 and len(brain.tally.seen[0][0]) == 3 * BATCH


def test_told_to_stop_a_single_process_ends_behind_its_step(gated):
    brain = gated()
    with stop.on_signals():
        brain.on_stage_start(sb.Stage.TRAIN, 1)
        train(brain, False)
        os.kill(os.getpid(), signal.SIGTERM)  # waits for the step
        with pytest.raises(SystemExit) as left:
            train(brain, False)
    assert left.value.code == 128 + signal.SIGTERM
    brain.step = 0
    brain.checkpointer.recover_if_possible()
    assert brain.step == 2


@KINDS
def test_told_to_stop_during_held_out_crops_it_keeps_the_epoch(kind, make):
    brain = make(kind)
    embed = brain.held_out.embed

    def told(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return embed(*args, **kwargs)

    brain.held_out.embed = told
    with stop.on_signals(), pytest.raises(SystemExit) as left:
        run_epoch(brain, 1, batch(2))
    assert left.value.code == 128 + signal.SIGTERM
    assert [record["epoch"] for record in brain.records] == [1]
    found = brain.checkpointer.find_checkpoint(min_key="criterion")
    assert found.meta["epoch"] == 1


@pytest.mark.parametrize("fixed, step", [(None, 6), (8, 3)])
def test_fewer_processes_read_on_from_where_the_epoch_was(
    tmp_path, fixed, step
):
    """Two processes came to step 3; one goes on at step 6.

    Not where an epoch is so many steps: it would end early.
    """
    brain = begin(make_brain("gated", tmp_path))
    train(brain, False, False, False)
    brain.tally.batch_size = 2
    brain.save_in_epoch()
    checkpointer = WholeCheckpointer(tmp_path / "checkpoints")
    loader = SaveableDataLoader(range(8), batch_size=1)
    checkpointer.add_recoverable("dataloader-TRAIN", loader, optional_load=True)
    brain = make_brain("gated", tmp_path, checkpointer=checkpointer)
    brain.hparams.steps_per_epoch = fixed
    brain.on_fit_start()
    assert brain.step == step
    assert [int(item) for item in loader] == [*range(step, 8)]


@KINDS
def test_no_epoch_is_begun_behind_the_limit_of_steps(kind, tmp_path):
    """The fit is over, and the run was killed before its step was done."""
    for first in (True, False):
        counter = sb.utils.epoch_loop.EpochCounter(3)
        checkpointer = WholeCheckpointer(tmp_path / "c", {"counter": counter})
        brain = make_brain(
            kind,
            tmp_path,
            run_opts={"optimizer_step_limit": 4, "noprogressbar": True},
            checkpointer=checkpointer,
        )
        options = {"collate_fn": PaddedBatch, "batch_size": 5}
        brain.fit(counter, Crops(), Crops(), None, options, options)
        epochs = [record["epoch"] for record in brain.records]
        assert epochs == ([1, 2] if first else [])


class Killed(BaseException):
    """Nothing that the code under test would catch."""


@pytest.mark.parametrize(
    "kind, accumulated, told",
    [
        *((kind, 1, False) for kind in BRAINS),
        *(("simclr", 3, told) for told in (False, True)),
        *(("gated", n, told) for n, told in ((3, False), (3, True), (1, True))),
    ],
)
def test_killed_at_any_step_ends_as_if_it_had_not_been(
    kind, accumulated, told, tmp_path, monkeypatch
):
    """Weights, figures and what the gate saw; a checkpoint every second step.

    Or, told by a signal, one at the next step of the optimiser: with three
    batches to each, behind an epoch's end, which throws two batches away.

    An epoch has 5 steps, validation after each counts as a step here. Methods
    differ in what they keep from step to step, not in when that is saved: of
    most it is tried in either epoch's middle and between them.
    """

    def fit(folder, records, dies=None):
        torch.manual_seed(1)
        modules = {}
        if kind == "gated":
            modules["aam"] = AAMSoftmax()
            modules["gate"] = DynamicGate()
            modules["correction"] = LabelCorrection(10)
        counter = sb.utils.epoch_loop.EpochCounter(2)
        checkpointer = WholeCheckpointer(folder, {"counter": counter})
        data, given = Crops(7), {}
        if kind == "ssps":
            given["partners"] = data.partners = Partners(len(Crops()))
        sampler = PassSampler(len(data), 10, seed=7)
        brain = make_brain(
            kind,
            tmp_path,
            modules,
            {
                "ckpt_interval_steps": 2,
                "grad_accumulation_factor": accumulated,
                "noprogressbar": True,
            },
            fused=False,
            checkpointer=checkpointer,
            log=records.append,
            # Epochs of five steps, longer and shorter than passes.
            train_sampler=sampler,
            steps_per_epoch=5,
            epochs_in_all=2,
            **given,
        )
        brain.hparams.lr_annealing = WarmupCosine(0.01, warmup=0.3)
        for name, module in brain.modules.items():
            if name == "encoder":
                checkpointer.add_recoverable("embedding_model", module.network)
            elif module.state_dict():
                checkpointer.add_recoverable(name, module)
        steps = iter(range(1, 100))

        def survive():
            if next(steps) != dies:
                return
            if not told:
                raise Killed
            os.kill(os.getpid(), signal.SIGTERM)

        for name in ("fit_batch", "evaluate_batch"):
            whole = getattr(brain, name)

            def part(*args, whole=whole, **kwargs):
                survive()
                return whole(*args, **kwargs)

            monkeypatch.setattr(brain, name, part)
        options = {"collate_fn": PaddedBatch}
        with stop.on_signals():
            brain.fit(
                counter,
                data,
                Crops(),
                train_loader_kwargs={
                    **options,
                    "batch_size": 2,
                    "sampler": sampler,
                },
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
    names = {
        "ssps": {"rows", "positives"},
        **dict.fromkeys(
            STAGE2,
            {"rows", "losses", "selected", "corrected", "passed", "tau"},
        ),
    }
    assert whole.tally.last.keys() == names.get(kind, set())
    few = kind not in ("simclr", "ssps", "gated")
    for dies in (4, 7, 9) if few else (1, 2, 4, 5, 6, 7, 9, 11, 12):
        folder, again = tmp_path / str(dies), []
        with pytest.raises(SystemExit if told else Killed):
            fit(folder, again, dies)
        torch.manual_seed(99)
        brain = fit(folder, again)
        assert figures(again) == figures(records), dies
        state, other = whole.modules.state_dict(), brain.modules.state_dict()
        for name, value in state.items():
            assert np.array_equal(value, other[name]), (dies, name)
        assert brain.tally.last.keys() == whole.tally.last.keys()
        for name, value in whole.tally.last.items():
            assert np.array_equal(value, brain.tally.last[name]), (dies, name)


def test_groups_of_weights_keep_their_share_of_the_rate(gated):
    brain = gated()
    group = brain.optimizer.param_groups[0]
    group["lr_scale"] = 0.25
    for _ in range(2):
        brain.anneal()
        assert group["lr"] == 0.25 * 0.01
