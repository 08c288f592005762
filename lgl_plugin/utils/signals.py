"""Leaves in good order at SIGTERM or Ctrl-C.

Batch systems send SIGTERM some seconds before they kill. In training the step
is finished and a checkpoint written first; elsewhere a run may be left at any
moment, since all files on disk are whole.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import NoReturn, TextIO

import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from lgl_plugin.utils.distributed import (
    launch_command,
    sum_over_ranks,
    world_size,
)

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A step that is not done by then hangs, as in a loader that waits for shared
# memory that it will not get.
SECONDS_TO_FINISH = 120


class Stop:
    """A request to stop, by a signal, that may be deferred to a step's end."""

    def __init__(self):
        self.deferred = False  # whether a step is to be finished first
        self.keeps = True  # whether the same command goes on
        self.requested: int | None = None  # the signal that came meanwhile
        self.owner: int | None = None  # the process that installed handlers
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Ends the run in good order at a signal; also a decorator.

        Outside the main thread, which alone may handle signals, it changes
        nothing.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.owner, self.deferred, self.requested = os.getpid(), False, None
        self.keeps = True
        before = [signal.signal(number, self.handle) for number in SIGNALS]
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(PipeProof, streams)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            self.deferred, self.requested = False, None
            if self._timer is not None:
                self._timer.cancel()
            for number, handler in zip(SIGNALS, before):
                signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        """Notes a signal if a step is to be finished first, else leaves.

        A second Ctrl-C leaves at once, and so does a step that takes minutes.
        """
        # A forked loader worker inherits this handler. It ends at SIGTERM, but
        # not at Ctrl-C: the training process needs it until its step is done.
        if os.getpid() != self.owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if not self.deferred:
            self.leave(number)
        if self.requested is not None:
            # torchrun forwards the SIGTERM that a batch system has sent to
            # every process: the second one asks for nothing new.
            if number == signal.SIGINT:
                self.leave(number)
            return
        self.requested = number
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            # Loader workers may get the signal too and end. torch's SIGCHLD
            # handler would raise that in the middle of the step.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._timer = threading.Timer(
            SECONDS_TO_FINISH, os.kill, (os.getpid(), signal.SIGINT)
        )
        self._timer.daemon = True
        self._timer.start()
        name = signal.Signals(number).name
        text = f"{name}: stopping after this step; Ctrl-C to leave at once"
        # logging is not re-entrant: the signal may interrupt a call that
        # holds its lock, so write to stderr directly. In `… | tee log` the
        # same Ctrl-C has ended tee, and the pipe is broken.
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())

    @contextlib.contextmanager
    def defer(self) -> Iterator[bool]:
        """Defers signals to the end of the block.

        Gives whether the block may leave before its end: not within another
        deferral, whose work would be lost.
        """
        before, self.deferred = self.deferred, True
        try:
            yield not before
        finally:
            self.deferred = before
        if not before and self.requested is not None:
            self.leave()

    def should_stop(self, collective: bool) -> bool:
        """Tells whether the processes are to stop now.

        With several processes it is False unless `collective`, with which all
        of them call it at the same step: a process that stopped alone would
        leave the others waiting for its gradients.
        """
        now = self.requested is not None
        if world_size() > 1:
            if not collective:
                return False
            total = sum_over_ranks({"requested": torch.tensor(now)})
            now = bool(total["requested"])
        if now and self._timer is not None:
            # The step has not hung, and a checkpoint on a slow disk may take
            # longer than the time that is left.
            self._timer.cancel()
        return now

    def leave(self, number: int | None = None) -> NoReturn:
        """Logs how to go on; raises SystemExit with a shell's status."""
        number = number or self.requested or signal.SIGTERM
        if if_main_process():
            outlook = "what is done is kept. Go on with the same command"
            if not self.keeps:
                outlook = "of a trial nothing is kept. Begin it anew with"
            logger.info(
                "Stopped by %s; %s:\n%s",
                *(signal.Signals(number).name, outlook, launch_command()),
            )
        raise SystemExit(128 + number)


class PipeProof:
    """A stream that goes on in silence once nobody reads its pipe.

    Ctrl-C in `… 2>&1 | tee log` ends tee, too. The next progress bar would
    raise BrokenPipeError in the middle of a step, before the checkpoint.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream, or drops what it holds."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self):
        try:
            yield
        except BrokenPipeError:
            # Python flushes the stream once more at the process's end.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def own_process_group(worker: int) -> None:
    """Moves a DataLoader's worker to a process group of its own.

    A `worker_init_fn`. Ctrl-C and `timeout` signal the whole group of the
    training process; its workers must outlive its last step.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


stop = Stop()
