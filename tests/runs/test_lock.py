"""One process at a time in a folder."""

import errno
import fcntl
import multiprocessing
import os
import threading
import time

import pytest

from lgl_plugin.runs import lock


@pytest.fixture
def holder(tmp_path):
    """A process that holds the folder, and a child of it that outlives it."""
    here, there = multiprocessing.Pipe()

    def hold():
        lock.lock_folder(tmp_path)
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        there.send(child)
        time.sleep(60)

    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    child = here.recv()
    yield process
    process.kill()
    process.join()
    os.kill(child, 9)


def test_the_second_process_says_who_holds_it(tmp_path, holder):
    with pytest.raises(RuntimeError, match=f"by process {holder.pid} on "):
        lock.lock_folder(tmp_path)


def test_a_kill_leaves_no_lock_behind(tmp_path, holder):
    holder.kill()
    holder.join()
    lock.lock_folder(tmp_path)
    lock.lock_folder(tmp_path)  # a process does not lock itself out
    text = (tmp_path / lock.LOCK).read_text()
    assert f"process {os.getpid()} on " in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("lets_go", [True, False])
def test_another_machine_gets_time_to_let_go(
    lets_go, tmp_path, holder, monkeypatch, caplog
):
    """Network disks keep a dead machine's lock for a while."""
    monkeypatch.setattr(lock, "SECONDS", 20 if lets_go else 0.2)
    monkeypatch.setattr(lock.socket, "gethostname", lambda: "elsewhere")
    if lets_go:
        threading.Timer(0.5, holder.kill).start()
        lock.lock_folder(tmp_path)
    else:
        with pytest.raises(RuntimeError, match=f"by process {holder.pid} on "):
            lock.lock_folder(tmp_path)
    assert f"s for process {holder.pid} on " in caplog.text


def test_a_file_system_that_cannot_lock(tmp_path, monkeypatch, caplog):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    lock.lock_folder(tmp_path)
    lock.lock_folder(tmp_path)
    assert caplog.text.count("cannot lock") == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="a file is in .*Name another.*file/run"):
        lock.lock_folder(tmp_path / "file" / "run")
