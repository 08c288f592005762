"""A session: its log, curves and seeds, its data, scores and exports."""

import sys
import types
from unittest import mock

import numpy as np
import pytest
import torch
from speechbrain.utils.run_opts import RunOptions
from speechbrain.utils.train_logger import TensorboardLogger

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.manifest import Manifest, held_out
from lgl_plugin.evaluation.observer import TrueLabels
from lgl_plugin.inference.backends import Centring, Whitening, load_backend
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.weights import ENCODER, save_weights
from lgl_plugin.training import session as module
from lgl_plugin.training.data import read_data
from lgl_plugin.training.health import findings
from lgl_plugin.training.session import Session, sample_rows
from lgl_plugin.utils.distributed import from_main

GATED = {"stage": 2, "iteration": 1, "phase": "gated"}


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
