"""Errors that a user can mend."""

import logging

import pytest
import torch

from lgl_plugin.cli.common import show_notices
from lgl_plugin.dataio.storage import StorageFailure
from lgl_plugin.utils.errors import (
    TrainingFailed,
    explained_errors,
    logged_errors,
    message_of,
)


class Away(torch.utils.data.Dataset):
    """Utterances on a disk that is not there."""

    def __init__(self, message):
        self.message = message

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise OSError("Stale file handle")
        except OSError as error:
            raise StorageFailure(self.message) from error


@pytest.mark.parametrize(
    "message",
    [
        "/disk/a.wav cannot be read now: Stale handle.",
        "2 bad files; the first:\n  a.wav: silent\nRepair them.",
        "Traceback (most recent call last): see the log",
    ],
)
def test_an_error_of_a_loaders_process_is_its_message(message):
    """torch adds the traceback of that process in front of the message."""
    with pytest.raises(StorageFailure, match="Traceback") as caught:
        list(torch.utils.data.DataLoader(Away(message), num_workers=1))
    assert message_of(caught.value) == message


def test_a_message_that_begins_like_a_loaders_is_left_as_it_is():
    assert (
        message_of(ValueError("Caught nothing: why")) == "Caught nothing: why"
    )


def test_the_message_alone_is_shown(capsys):
    with pytest.raises(SystemExit) as left, explained_errors(2):
        raise ValueError("lr: -1 should be greater than 0")
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert shown == "ValueError: lr: -1 should be greater than 0\n"


def test_debug_and_faults_of_the_program_keep_their_traceback():
    with pytest.raises(ValueError), explained_errors(2, debug=True):
        raise ValueError
    with pytest.raises(ValueError), logged_errors(debug=True):
        raise ValueError
    for context in explained_errors(1), logged_errors():
        with pytest.raises(KeyError), context:
            raise KeyError


def test_an_error_of_one_rank_alone_keeps_its_traceback(monkeypatch, capsys):
    """Only the main process has a log file to keep it in."""
    monkeypatch.setattr("lgl_plugin.utils.distributed.rank", lambda: 1)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(SystemExit), explained_errors(1), logged_errors():
        raise RuntimeError("out of memory")
    shown = capsys.readouterr().err
    assert "Traceback" in shown and 'raise RuntimeError("out of' in shown
    with pytest.raises(SystemExit), explained_errors(1), logged_errors():
        raise ValueError("lr: -1 should be greater than 0")
    shown = capsys.readouterr().err
    assert shown == "ValueError: lr: -1 should be greater than 0\n"


@pytest.mark.parametrize("kind", [RuntimeError, ImportError, MemoryError])
@pytest.mark.parametrize("is_begun", [True, False])
def test_an_error_that_may_be_ours_names_the_log_if_one_is_begun(
    capsys, monkeypatch, tmp_path, is_begun, kind
):
    log = logging.FileHandler(tmp_path / "log.txt", delay=True)
    monkeypatch.setattr(logging.getLogger(), "handlers", [log] * is_begun)
    with pytest.raises(SystemExit), explained_errors(1):
        raise kind("out of memory")
    shown = capsys.readouterr().err
    assert shown.startswith(f"{kind.__name__}: out of memory\n")
    named = f"{tmp_path / 'log.txt'} has the traceback."
    assert (named in shown) == is_begun


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_failed_training_is_logged_once_and_shown_as_its_error(
    capsys, caplog, monkeypatch, tmp_path, kind
):
    log = logging.FileHandler(tmp_path / "log.txt")
    monkeypatch.setattr(logging.getLogger(), "handlers", [log])
    caplog.set_level(logging.DEBUG)
    show_notices()  # as `lgl adapt` does, whose training keeps tracebacks, too
    with pytest.raises(TrainingFailed, match="no memory") as failed:
        with logged_errors():
            raise kind("no memory")
    assert type(failed.value.__cause__) is kind
    with pytest.raises(SystemExit) as left, explained_errors(2):
        raise failed.value
    assert left.value.code == 1
    shown = capsys.readouterr().err.splitlines()
    assert shown[0] == f"{kind.__name__}: no memory"
    named = [f"{tmp_path / 'log.txt'} has the traceback."]
    assert shown[1:] == named * (kind is RuntimeError)
    log.close()
    assert (tmp_path / "log.txt").read_text().count("Traceback") == 1
