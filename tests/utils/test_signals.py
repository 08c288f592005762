"""Leaving in good order."""

import os
import signal
import subprocess
import sys
import threading
from unittest import mock

import pytest

from lgl_plugin.utils import signals
from lgl_plugin.utils.signals import Stop


@pytest.fixture
def watched():
    """Raises where a child ends, as torch does for a loader's readers."""

    def raises(number, frame):
        raise RuntimeError("a reader has ended")

    before = signal.signal(signal.SIGCHLD, raises)
    yield
    signal.signal(signal.SIGCHLD, before)


def end_a_child():
    subprocess.run([sys.executable, "-S", "-c", ""], check=True)


def test_readers_that_were_told_too_do_not_break_the_step(watched):
    stop = Stop()
    with stop.on_signals():
        stop.deferred = True
        with pytest.raises(RuntimeError, match="a reader has ended"):
            end_a_child()
        os.kill(os.getpid(), signal.SIGTERM)
        end_a_child()
        assert stop.should_stop(collective=False)
        with pytest.raises(SystemExit) as left:
            stop.leave()
    assert left.value.code == 128 + signal.SIGTERM


def test_handlers_are_what_they_were():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(KeyError), Stop().on_signals():
        raise KeyError
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    assert after == before


def test_a_second_signal_does_not_wait_for_the_step():
    stop = Stop()
    with stop.on_signals():
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit) as left:
            os.kill(os.getpid(), signal.SIGINT)
    assert left.value.code == 128 + signal.SIGINT


def test_a_signal_ends_the_run_at_once_where_no_step_is_under_way():
    @Stop().on_signals()
    def train():
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as left:
        train()
    assert left.value.code == 128 + signal.SIGTERM


def test_a_deferred_signal_ends_the_run_after_the_block():
    stop, done = Stop(), False
    with pytest.raises(SystemExit), stop.on_signals():
        with stop.defer():
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.should_stop(collective=True)
            done = True
    assert done and not stop.deferred


def test_the_sigterm_that_torchrun_forwards_throws_nothing_away():
    """A batch system signals torchrun and its workers; torchrun does too."""
    stop = Stop()
    with stop.on_signals():
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == signal.SIGTERM
        with pytest.raises(SystemExit):
            stop.leave()


def test_a_step_that_hangs_is_left_after_a_while(monkeypatch):
    """Such as one that waits for a loader without shared memory."""
    monkeypatch.setattr(signals, "SECONDS_TO_FINISH", 0.2)
    stop, waits = Stop(), threading.Event()
    with pytest.raises(SystemExit), stop.on_signals():
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        waits.wait(60)
    assert not waits.is_set()


def test_a_checkpoint_may_take_longer_than_a_step(monkeypatch):
    monkeypatch.setattr(signals, "SECONDS_TO_FINISH", 0.2)
    stop, written = Stop(), False
    with pytest.raises(SystemExit) as left, stop.on_signals():
        stop.deferred = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.should_stop(collective=True)
        threading.Event().wait(0.6)
        written = True
        stop.leave()
    assert written and left.value.code == 128 + signal.SIGTERM


def test_a_block_within_another_deferral_may_not_leave():
    stop = Stop()
    with pytest.raises(SystemExit), stop.on_signals():
        with stop.defer() as outer:
            with stop.defer() as inner:
                os.kill(os.getpid(), signal.SIGTERM)
            assert (outer, inner) == (True, False)
            assert stop.deferred  # the inner block's end is not the end


@pytest.mark.parametrize("keeps", [True, False])
def test_a_trial_that_keeps_nothing_does_not_say_to_go_on(keeps, monkeypatch):
    logger, stop = mock.Mock(), Stop()
    monkeypatch.setattr(signals, "logger", logger)
    with pytest.raises(SystemExit), stop.on_signals():
        stop.keeps = keeps
        stop.leave(signal.SIGTERM)
    text, *parts = logger.info.call_args[0]
    assert ("Go on with" in text % (*parts,)) == keeps
    assert ("Begin it anew" in text % (*parts,)) == (not keeps)
    with stop.on_signals():
        assert stop.keeps


SCRIPT = """
import os, signal, sys, time
from lgl_plugin.utils import signals
from lgl_plugin.utils.signals import Stop
stop = Stop()
with stop.on_signals():
    with stop.defer():
        print("ready", flush=True)
        while stop.requested is None:
            time.sleep(0.01)
        time.sleep(0.5)  # tee has ended meanwhile
        for _ in range(3):
            print("step", flush=True)
            print("bar", file=sys.stderr, flush=True)
        open(sys.argv[1], "w").write("checkpoint")
"""


def test_ctrl_c_ends_tee_and_the_step_goes_on(tmp_path):
    """As in `… 2>&1 | tee log`: one Ctrl-C for both."""
    saved = tmp_path / "checkpoint"
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(saved)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout.readline() == "ready\n"
    run.stdout.close()  # the pipe's reader is gone
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 128 + signal.SIGINT
    assert saved.read_text() == "checkpoint"
