"""Leaving in good order."""

import os
import signal
import subprocess
import sys

import pytest

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
