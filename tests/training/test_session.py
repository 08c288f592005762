"""A session's log, curves and seeds, and data too small to train on."""

import logging
import shlex
import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
import train_lgl  # the recipe
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.utils.run_opts import RunOptions
from speechbrain.utils.train_logger import TensorboardLogger

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.manifest import Manifest, held_out
from lgl_plugin.evaluation.observer import TrueLabels
from lgl_plugin.inference.backends import Centring, Whitening, load_backend
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.gates import DynamicGate
from lgl_plugin.nnet.losses import SubCentreClassifier
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.weights import ENCODER, save_weights
from lgl_plugin.training import session as module
from lgl_plugin.training.data import read_data
from lgl_plugin.training.fit import epoch_line, fit, part_of
from lgl_plugin.training.health import findings
from lgl_plugin.training.session import Session, sample_rows
from lgl_plugin.training.stage2 import Round, start_from
from lgl_plugin.training.start import (
    check_front_end,
    check_inputs,
    find_encoder,
    stage1_command,
)
from lgl_plugin.utils.distributed import from_main
from lgl_plugin.utils.files import checksum

GATED = {"stage": 2, "iteration": 1, "phase": "gated"}


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A session without the checks that a yaml and a corpus go through."""
    # SpeechBrain's loggers hand nothing on to pytest's.
    for place in ("session", "start"):
        name = f"lgl_plugin.training.{place}.logger"
        monkeypatch.setattr(name, logging.getLogger("t"))
    session = Session.__new__(Session)
    session.run = Run(tmp_path, 2, {})
    session.settings = types.SimpleNamespace(stage=2, seed=3)
    session.settings.new_encoder = session.settings.new_first_encoder = None
    session.settings.freeze_batch_statistics = False
    session.settings.trained_weights = None
    session.settings.steps_per_epoch = None
    session.settings.grad_accumulation_factor = None
    session.observer, session.debug = TrueLabels([]), False
    session.batch_size, session.device = 8, "cpu"
    return session


def test_tensorboard_has_a_curve_for_each_figure(
    session, monkeypatch, tmp_path
):
    """SpeechBrain's own logger; its writer, which is large, has a stand-in."""
    curves = {}

    class Writer:
        """Remembers the points of each curve."""

        def __init__(self, folder):
            assert folder == tmp_path

        def add_scalar(self, tag, value, step):
            curves.setdefault(tag, []).append((step, value))

    stand_in = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    for epoch, tau in ((1, None), (2, 0.5), (3, 0.6)):
        if epoch != 2:  # each start of a run makes a logger
            session.settings.train_logger = TensorboardLogger(tmp_path)
        record = {"epoch": epoch, "loss": 3.0 / epoch, "tau": tau}
        session.show("iter1/gated", record)
    session.show("iter2/classifier", {"epoch": 1, "loss": 4.0})
    assert curves == {
        "iter1/gated/epoch": [(1, 1), (2, 2), (3, 3)],
        "iter1/gated/loss/train": [(1, 3.0), (2, 1.5), (3, 1.0)],
        "iter1/gated/tau/train": [(2, 0.5), (3, 0.6)],  # none before the gate
        "iter2/classifier/epoch": [(1, 1)],
        "iter2/classifier/loss/train": [(1, 4.0)],
    }


def test_without_a_train_logger_nothing_is_shown(session):
    session.settings.train_logger = None
    session.show("iter1/gated", {"epoch": 1, "loss": 3.0})


@pytest.mark.parametrize(
    "left, words", [(0, "0 s"), (119, "119 s"), (180, "3 min"), (9000, "2 h")]
)
def test_an_epoch_is_a_line(left, words):
    record = {
        "epoch": 3,
        "loss": 3.21456,
        "accuracy": 0.3123,
        "lr": 0.00095,
        "pseudo_eer": 21.345,
        "utterances_per_second": 153.4,
        "nmi": 0.5,  # of true labels, which the line leaves out
    }
    figures = (
        "loss 3.215, accuracy 0.312, lr 0.00095, pseudo-EER 21.3 %, "
        "153 utterances/s"
    )
    line = epoch_line("iter1/gated", record, 60, left)
    assert line == f"iter1/gated: epoch 3 of 60, {figures}, {words} left"
    line = epoch_line("stage1", {**record, "accuracy": None}, 3, 0.0)
    assert line == f"stage1: epoch 3 of 3, {figures}".replace(
        "accuracy 0.312, ", ""
    )


def test_every_step_has_seeds_of_its_own(session):
    """SpeechBrain shuffles by seed and epoch."""
    drawn = []
    for step in (0, 1, 10, 11, 0):
        session.seed(step)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[0] == drawn[-1] and len(set(drawn)) == 4


def test_warnings_are_logged_once_and_after_a_restart_too(session, caplog):
    for epoch, lr in enumerate((0.1, 0.0, 0.0), 1):
        session.log(**GATED, epoch=epoch, lr=lr)
    (found,) = findings(read_metrics(session.run.folder))
    assert caplog.messages == [found[1]]
    session.log(**GATED, epoch=2, lr=0.0)  # the epoch was trained again
    assert len(caplog.messages) == 1  # the third one had said it
    session.log(**{**GATED, "iteration": 2}, epoch=1, lr=0.0)
    assert caplog.messages[1].startswith("iteration 2, gated, epoch 1: the le")


def test_a_few_batches_for_a_try_warn_of_nothing(session, caplog):
    """As those that `lgl check` times."""
    session.debug = True
    session.log(**GATED, epoch=1, lr=0.0)
    assert not caplog.messages and len(read_metrics(session.run.folder)) == 1


def test_metrics_that_were_altered_do_not_end_a_run(session, caplog):
    session.log(**GATED, epoch=1, lr=0.1)
    metrics = session.run.folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("0.1", '"fast"'))
    session.log(**GATED, epoch=2, skipped_steps="some")
    assert caplog.messages[0].startswith("The run's health cannot be judged")


def test_without_trials_there_are_no_scores(session):
    assert session.score(torch.nn.Identity()) == {}


class Watcher(TrueLabels):
    """Notes what it is asked to score."""

    def score_trials(self, embed, path=None, backend=None, cohort=None):
        self.asked = path, backend, cohort
        return {"eer": 40.0}


@pytest.fixture
def scored(session, monkeypatch):
    """The session, with 2,500 utterances and one of each trial."""
    session.rows = np.arange(2500)
    session.vectors = np.random.default_rng(0).normal(size=(2500, 6)) + 1
    session.settings.backend = None
    session.settings.verification_file = "trials.txt"
    session.observer = Watcher([])
    session.embedded = []

    def embed(encoder, rows):
        session.embedded.append(rows)
        return types.SimpleNamespace(vectors=session.vectors[rows])

    session.embed = embed
    return session


@pytest.mark.parametrize("backend", [None, Centring(), Whitening(0.1)])
def test_a_phase_has_a_back_end_fitted_on_a_sample(scored, tmp_path, backend):
    scored.settings.backend = backend
    places = tmp_path / "scores.npz", tmp_path / "backend.npz"
    assert scored.score(None, *places) == {"eer": 40.0}
    scored.score(None, *places)
    rows, again = scored.embedded
    assert rows.tolist() == again.tolist() == sorted({*rows.tolist()})
    assert len(rows) == 2000
    assert np.array_equal(rows, sample_rows(2500, scored.settings.seed))
    sample = scored.vectors[rows]
    path, fitted, cohort = scored.observer.asked
    assert path == places[0] and np.array_equal(cohort, sample)
    expected = (backend or Whitening()).fit(sample)(scored.vectors)
    for found in (fitted, load_backend(places[1])):
        np.testing.assert_array_equal(found(scored.vectors), expected)
    assert fitted is not backend  # which the next phase fits anew


def test_an_epoch_is_scored_by_the_cosine_alone(scored):
    assert scored.score(None) == {"eer": 40.0}
    assert scored.observer.asked == (None, None, None) and not scored.embedded


def test_without_trials_a_back_end_is_kept_for_the_export(scored, tmp_path):
    scored.settings.verification_file = None
    scored.observer = TrueLabels([])
    path = tmp_path / "scores.npz"
    assert scored.score(None, path) == {} and not scored.embedded
    assert scored.score(None, path, tmp_path / "backend.npz") == {}
    assert (tmp_path / "backend.npz").exists()


def test_a_collapsed_encoder_has_no_back_end(scored, tmp_path, caplog):
    scored.vectors = np.ones((2500, 6))
    places = tmp_path / "scores.npz", tmp_path / "backend.npz"
    scored.score(None, *places)
    assert scored.observer.asked[1] is None and not places[1].exists()
    assert caplog.messages[0].startswith("No back-end for this phase: whiten")


def begin_fit(session, labels):
    """Begins to fit a phase on labels of 20 utterances."""
    session.seed(1)
    names = [f"{n}.wav" for n in range(20)]
    session.manifest = Manifest.of((n, n, 0.0, 3.0, "") for n in names)
    session.settings.augment = torch.nn.Identity()
    session.settings.crop_seconds, session.settings.sample_rate = 1.0, 16000
    encoder = types.SimpleNamespace(network=torch.nn.Linear(2, 2))
    encoder.state_dict = encoder.network.state_dict
    fit(
        session,
        pytest.fail,
        {"encoder": encoder},
        session.run.folder / "gated",
        1,
        labels=labels,
        rows=np.arange(20),
        phase="gated",
    )


def test_fewer_utterances_than_a_batch_are_an_error(session):
    """The last, smaller batch is left out: there would be no step at all."""
    labels = np.where(np.arange(20) < 7, 0, -1)
    with pytest.raises(ValueError, match="gated: 7 utterances make no batch"):
        begin_fit(session, labels)


@pytest.mark.parametrize("balanced", [False, True])
def test_classes_to_balance_are_those_of_the_labelled(
    session, balanced, monkeypatch
):
    class Drawn(Exception):
        pass

    def sampler(*arguments):
        raise Drawn(arguments[-1])

    monkeypatch.setattr("lgl_plugin.training.fit.PassSampler", sampler)
    session.settings.balanced_sampling = balanced
    session.settings.steps_per_epoch = 1
    session.held_out_rows = np.arange(2)
    with pytest.raises(Drawn) as drawn:
        begin_fit(session, np.where(np.arange(20) < 17, np.arange(20) % 3, -1))
    (classes,) = drawn.value.args
    assert (classes is not None) == balanced
    if balanced:
        assert classes.tolist() == [n % 3 for n in range(17)]


HEADER = "ID,duration,wav,start,stop,spk_id\n"


def read(session):
    """Reads a session's data, as its constructor does."""
    session.manifest, session.given, _ = read_data(
        session.settings, session.run
    )
    session._set_aside()


def test_labels_that_a_user_gives_are_not_held_out(session, tmp_path):
    """They would teach nothing; the draw without labels stays as it was."""
    names = [f"{n}.wav" for n in range(20)]
    rows = [f"{name},2,$data_root/{name},0,32000,\n" for name in names]
    (tmp_path / "own.csv").write_text(HEADER + "".join(rows))
    settings = session.settings
    settings.manifest, settings.data_folder = tmp_path / "own.csv", "corpus"
    settings.allow_outside_data_folder, settings.max_bad_share = False, 0.1
    settings.held_out_share = 0.3
    settings.dataloader_options = types.SimpleNamespace(batch_size=4)
    settings.labels_file = settings.verification_file = None
    read(session)
    train, aside = held_out(20, 0.3, settings.seed)
    assert session.given is None
    assert np.array_equal(session.held_out_rows, aside)
    assert np.array_equal(session.train_rows, train)
    labelled = [*aside[:4], *train[:4]]
    lines = [f"{names[row]},ann\n" for row in labelled]
    (tmp_path / "few.csv").write_text("utterance,speaker\n" + "".join(lines))
    settings.labels_file = tmp_path / "few.csv"
    read(session)
    assert len(session.held_out_rows) == 6 and len(session.train_rows) == 14
    assert {*labelled} <= {*session.train_rows}
    assert session.given.speakers == ("ann",)
    assert "labels_file" in session.run.inputs["stage 2"]


@pytest.mark.parametrize("steps, factor", [(None, 3), (4, 5)])
def test_accumulation_over_more_than_an_epoch_is_an_error(
    session, steps, factor
):
    """No step of the optimiser would be taken, and the run end well."""
    session.settings.steps_per_epoch = steps
    session.settings.grad_accumulation_factor = factor
    with pytest.raises(ValueError, match=f"factor: {factor} is more than the"):
        session.steps_per_epoch(2 * session.batch_size + 1)
    session.settings.grad_accumulation_factor = factor - 1
    assert session.steps_per_epoch(2 * session.batch_size + 1) == factor - 1


def raised_by_main(error):
    """An error as all processes have it of work that one does."""
    with pytest.raises(type(error)) as caught:
        from_main(mock.Mock(side_effect=error))
    return caught.value


@pytest.mark.parametrize(
    "error, processes, ends",
    [
        (RuntimeError("CUDA out of memory"), 1, False),
        (RuntimeError("CUDA out of memory"), 2, True),
        (ValueError("no threshold"), 2, False),
        (raised_by_main(OSError(28, "No space left on device")), 2, False),
    ],
)
def test_an_export_fails_alone_or_ends_all_processes(
    error, processes, ends, session, monkeypatch, caplog
):
    """Others would wait for the one of several that failed for ever."""
    monkeypatch.setattr(module, "world_size", lambda: processes)
    monkeypatch.setattr(module, "export", mock.Mock(side_effect=error))
    if ends:
        with pytest.raises(RuntimeError, match="out of memory"):
            session.publish("stage1", "checksum")
        return
    session.publish("stage1", "checksum")
    assert "No export; try `lgl export" in caplog.text


def test_what_cannot_be_exported_is_a_line(session, tmp_path, caplog):
    """It was a traceback, and the advice to try what cannot work."""
    plain = {"new_encoder": {"!name:my.Encoder": ""}, "sample_rate": 16000}
    session.run = Run(tmp_path, 1, plain)
    session.run.step(
        "stage1", lambda f: save_weights(torch.nn.Linear(3, 2), f / ENCODER)
    )
    session.publish("stage1", "checksum")
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert "my.Encoder cannot be exported" in record.getMessage()
    assert "lgl export" not in caplog.text and record.exc_info is None


def test_extraction_hears_of_the_limit_of_bad_files(session):
    """Behind all utterances it would be hours late."""
    session.manifest, session.rows, session.bad_files = "m", [1], BadFiles("x")
    found = types.SimpleNamespace(utterances=["a"])
    asked = []

    def extract(*given):
        asked.append(given)
        return found, []

    session.extractor = lambda encoder: extract
    assert session.embed(None, folder="here") is found
    assert asked == [("m", [1], "here", session.bad_files)]


def test_noise_folders_are_on_record(tmp_path, monkeypatch):
    """Other noise, or one still being copied, would change a run unseen.

    Nor does the session keep the speakers, which it shows to the observer.
    """
    for name in ("_begin_log", "_set_aside"):
        monkeypatch.setattr(Session, name, lambda *given: None)
    known = Manifest.of([("a", "a", 0.0, 1.0, "ann")])
    monkeypatch.setattr(module, "read_data", lambda *given: (known, None, None))
    monkeypatch.setattr(module, "check_loaders", lambda *given: None)
    audio = tmp_path / "wav"
    audio.mkdir()
    (tmp_path / "rooms").mkdir()
    (tmp_path / "rooms" / "1.wav").write_bytes(b"1234")

    class Settings(types.SimpleNamespace):
        def __iter__(self):
            return iter(vars(self).items())

    settings = Settings(
        stage=1,
        seed=3,
        manifest=None,
        train_folder=audio,
        data_folder=tmp_path,
        output_folder=tmp_path / "run",
        verification_file=None,
        musan_folder=None,
        rir_folder=str(tmp_path / "rooms"),
        crop_seconds=1.0,
    )

    def unseen(settings):
        return lambda manifest: manifest.speakers.tolist()

    run_opts = RunOptions.from_dictionary({"device": "cpu"})

    def start():
        session = Session(settings, "stage: 1", run_opts, unseen)
        assert session.observer == [0]
        assert session.manifest.speakers.tolist() == [-1]
        assert session.manifest.ids == known.ids and known.speakers == [0]
        return session.run

    start().step("stage1", lambda folder: {})
    assert [*start().inputs["stage 1"]] == ["rir_folder"]
    (tmp_path / "rooms" / "1.wav").write_bytes(b"12345")
    with pytest.raises(ValueError, match="^rir_folder: .*rooms is not what"):
        start()


# Rounds of Stage II


def make_round(session, number=1):
    """A round whose folder is there."""
    this = Round.__new__(Round)
    this.session, this.settings = session, session.settings
    this.number, this.name = number, f"iter{number}"
    this.folder = session.run.folder / this.name
    (this.folder / "gated").mkdir(parents=True)
    this.is_last, this.made_from = True, None
    return this


def test_too_few_for_the_large_margin_leave_the_round_as_it_is(session, caplog):
    """An error would lose the round, whose settings cannot be changed."""
    this = make_round(session)
    path = this.folder / "gated" / "gate.npz"
    np.savez(path, passed=np.arange(7))
    session.settings.large_margin_epochs = 1
    session.settings.classifier_epochs = session.settings.gated_epochs = 1
    this.load = this.fit = pytest.fail
    session.publish = lambda name, made_from: None

    def step(name, work):
        if name == "large_margin":
            work(this.folder / name)

    this.step = step
    train_lgl.train_round(this)
    (message,) = caplog.messages
    assert message.startswith("iteration 1, large_margin: nothing is trained")
    assert "7 utterances" in message and "no batch of 8" in message


def test_the_gate_begins_with_the_last_epoch_of_the_classifier(session):
    """Losses fall: of several epochs it would part early from late."""
    this, rng = make_round(session), np.random.default_rng(0)
    right, wrong = rng.normal(-2, 0.3, 300), rng.normal(0, 0.3, 200)
    (this.folder / "classifier").mkdir()
    path = this.folder / "classifier" / "gate.npz"
    np.savez(path, losses=np.exp(np.append(right, wrong)))
    session.settings.gate = DynamicGate()
    tau = this.primed_gate().tau.item()
    assert np.log(tau) == pytest.approx(-1, abs=0.3)


@pytest.mark.parametrize("new", [Classifier, SubCentreClassifier])
def test_a_classifier_can_start_from_centroids(new):
    """Each centroid is then nearest to its own class."""
    centroids = torch.nn.functional.normalize(torch.randn(5, 16), dim=1)
    classifier = new(16, out_neurons=5)
    start_from(classifier, centroids)
    cosines = classifier(centroids[:, None])[:, 0]
    assert cosines.argmax(1).tolist() == list(range(5))
    # Sub-centres lie a little apart, so that they can part in training.
    apart = 0.01 if new is SubCentreClassifier else 1e-6
    assert cosines.diagonal().min() > 1 - apart
    assert all(p.requires_grad for p in classifier.parameters())


def test_no_encoder_to_start_from_is_an_error_that_says_how(session, tmp_path):
    options = {"pretrained_encoder": None, "stage1_yaml": "s1.yaml"}
    options |= {"output_folder": "out", "data_folder": "in"}
    for name, value in options.items():
        setattr(session.settings, name, value)
    command = "train_lgl.py s1.yaml --output_folder=out --data_folder=in"
    with pytest.raises(FileNotFoundError, match=f"^Stage II: .*{command}"):
        find_encoder(session)
    session.settings.pretrained_encoder = "nowhere"
    with pytest.raises(FileNotFoundError, match="^pretrained_encoder: nowhere"):
        find_encoder(session)
    exported = tmp_path / "adapted" / "export" / "adapted"
    exported.mkdir(parents=True)
    for name in ("hyperparams.yaml", "embedding_model.ckpt"):
        (exported / name).touch()
    session.settings.pretrained_encoder = tmp_path / "adapted"
    with pytest.raises(FileNotFoundError, match=f"below it: {exported}.$"):
        find_encoder(session)


def test_an_encoder_is_not_trained_behind_other_features(tmp_path):
    """It would be fed what it was never trained on, without a word."""
    mels = {"!name:speechbrain.lobes.features.Fbank": {"n_mels": 24}}
    made = "!name:lgl_plugin.nnet.encoders.Encoder"

    def settings(rate=16000, normalise=None, network=8):
        parts = {"features": mels, "normalise": normalise, "network": network}
        return {"sample_rate": rate, "new_encoder": {made: parts}}

    run = Run(tmp_path, 1, settings())
    run.step("stage1", lambda folder: {})
    weights = tmp_path / "stage1" / ENCODER
    check_front_end(weights, settings(network=16))  # its width shows elsewhere
    with pytest.raises(ValueError, match="sample_rate: was 16000, is 8000.*"):
        check_front_end(weights, settings(rate=8000))
    with pytest.raises(ValueError, match=f"={tmp_path}/export/stage1"):
        check_front_end(weights, settings(normalise={"!name:a.B": {}}))
    # Exported folders bring their own along; others are of no run.
    exported = tmp_path / "export" / "stage1" / ENCODER
    check_front_end(exported, settings(rate=8000))
    check_front_end(tmp_path.parent / "a" / ENCODER, settings(rate=8000))


@pytest.mark.parametrize(
    "typed, advised",
    [
        (
            "s2.yaml --lr=0.1 --n_clusters=9 --data_folder 'my data' --debug",
            "s1.yaml --lr=0.1 '--data_folder=my data' --debug "
            "--output_folder=out",
        ),
        (
            "--gated_epochs 3 --noprogressbar s2.yaml --stage1_yaml s1.yaml "
            "--dataloader_options='{num_workers: 2}' --output_folder=mine",
            "--noprogressbar s1.yaml '--dataloader_options={num_workers: 2}' "
            "--output_folder=mine --data_folder=in",
        ),
    ],
)
def test_the_advised_command_has_the_options_of_the_typed_one(
    session, monkeypatch, typed, advised
):
    monkeypatch.setattr("sys.argv", ["train_lgl.py", *shlex.split(typed)])
    options = {"stage1_yaml": "s1.yaml", "output_folder": "out"}
    settings = types.SimpleNamespace(**options, data_folder="in")
    assert stage1_command(settings) == f"python train_lgl.py {advised}"
    monkeypatch.setattr("sys.argv", ["ceiling.py", *shlex.split(typed)])
    assert stage1_command(settings) == f"python train_lgl.py {advised}"


@pytest.mark.parametrize(
    "trials, stage1s, done, asked",
    [
        (None, None, [], False),
        ("one", None, [], True),
        ("one", None, ["baselines"], True),  # Stage I had no list
        ("one", "other", ["baselines"], True),
        ("one", "one", ["stage1"], True),
        ("one", "one", ["baselines"], False),
        ("one", None, ["iter1/classifier"], False),
    ],
)
def test_trial_audio_is_tried_before_the_first_round(
    session, tmp_path, monkeypatch, trials, stage1s, done, asked
):
    """A silent file would end a run of Stage II after its first phase."""
    session.settings.first_encoder = lambda: types.SimpleNamespace(
        network=torch.nn.Linear(2, 2)
    )
    first = tmp_path / "encoder.ckpt"
    save_weights(torch.nn.Linear(2, 2), first)
    for stage, digest in ((1, stage1s), (2, trials)):
        if digest:
            inputs = session.run.inputs.setdefault(f"stage {stage}", {})
            inputs["verification_file"] = digest
    session.run.done.update(dict.fromkeys(done, {}))
    heard = []

    def score(encoder):
        heard.append(encoder.network.weight.tolist())
        raise ValueError("cannot be scored")

    session.score = score
    monkeypatch.setattr(train_lgl, "find_encoder", lambda session: first)
    monkeypatch.setattr(train_lgl, "train_round", lambda this: None)
    monkeypatch.setattr(train_lgl, "Round", lambda *given: None)
    monkeypatch.setattr(train_lgl, "try_to_write_report", lambda folder: None)
    session.rows, session.given = [], None
    session.settings.n_iterations = 1
    session.settings.cluster = types.SimpleNamespace(check=lambda n: None)
    session.settings.min_cluster_size = 0
    session.settings.cluster_twice = False
    if asked:
        with pytest.raises(ValueError, match="cannot be scored"):
            train_lgl.train_stage2(session)
        assert heard == [torch.load(first)["weight"].tolist()]
    else:
        train_lgl.train_stage2(session)
        assert not heard
    assert not (tmp_path / "metrics.jsonl").exists()


def test_another_encoder_does_not_take_the_place_of_rounds(session, tmp_path):
    """Given to a begun run, or left out: both would do all rounds again."""
    for name in ("stage1", "mine"):
        save_weights(torch.nn.Linear(2, 2), tmp_path / name / ENCODER)
    settings, run = session.settings, session.run
    settings.new_encoder = lambda: types.SimpleNamespace(
        network=torch.nn.Linear(2, 2)
    )
    settings.first_encoder = settings.new_encoder
    settings.pretrained_encoder = None
    first = find_encoder(session)
    assert first == tmp_path / "stage1" / ENCODER and not run.inputs["stage 2"]
    run.step("iter1/embeddings", lambda folder: {}, checksum(first))
    settings.pretrained_encoder = tmp_path / "mine"
    with pytest.raises(ValueError, match="^pretrained_encoder: .*mine.* is"):
        find_encoder(session)
    settings.pretrained_encoder = tmp_path / "stage1"  # the same
    assert find_encoder(session) == first
    save_weights(torch.nn.Linear(2, 2), first)
    settings.pretrained_encoder = None
    with pytest.raises(ValueError, match="^pretrained_encoder: .*stage1.* is"):
        find_encoder(session)


def test_weights_to_train_that_no_encoder_has_are_refused_in_time(
    session, tmp_path
):
    """Before Stage II, and by `lgl train`, which does both, before Stage I."""
    save_weights(torch.nn.Linear(2, 2), tmp_path / "stage1" / ENCODER)
    session.settings.pretrained_encoder = None
    session.settings.new_encoder = lambda: Encoder(
        torch.nn.Identity(), torch.nn.Linear(2, 2)
    )
    session.settings.first_encoder = session.settings.new_encoder
    session.settings.trained_weights = "asp"
    with pytest.raises(ValueError, match="has 'asp' in its name"):
        find_encoder(session)
    with pytest.raises(ValueError, match="has 'asp' in its name"):
        check_inputs(session.settings, [])


def test_phases_share_one_course_of_the_learning_rate():
    course = {"classifier": 6, "gated": 4, "large_margin": 1}
    found = part_of(course, "gated")
    assert found == {"epochs": 4, "epochs_before": 6, "epochs_in_all": 11}
    assert part_of(course, "one of the user's own") == {}
