"""Ends a run without loss at SIGTERM or Ctrl-C.

Batch systems send SIGTERM some seconds before they kill. Training first
finishes its step and writes a checkpoint. Other work may end at any moment,
because all files are written atomically.
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
# A step that takes longer is taken to hang, such as in a loader that waits for
# shared memory in vain.
SECONDS_TO_FINISH = 120


class Stop:
    """A signal's request to stop, which a training step may defer."""

    def __init__(self):
        self.deferred = False  # whether a step is to be finished first
        self.keeps = True  # whether the same command can continue the run
        self.requested: int | None = None  # the signal that was deferred
        self.owner: int | None = None  # the process that installed handlers
        self._timer: threading.Timer | None = None

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Ends the run without loss at a signal; also a decorator.

        Outside the main thread it does nothing, because Python lets only the
        main thread handle signals.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self.owner, self.deferred, self.requested = os.getpid(), False, None
        self.keeps = True
        handlers = [signal.signal(number, self.handle) for number in SIGNALS]
        streams = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(PipeProof, streams)
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            self.deferred, self.requested = False, None
            if self._timer is not None:
                self._timer.cancel()
            for number, handler in zip(SIGNALS, handlers):
                signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        """Notes a signal if a step is to be finished first, else leaves.

        A second Ctrl-C leaves at once. So does a step that takes longer than
        `SECONDS_TO_FINISH`.
        """
        # A forked loader worker inherits this handler. The worker ends at
        # SIGTERM, but not at Ctrl-C: the training process needs the worker
        # until the step is done.
        if os.getpid() != self.owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if not self.deferred:
            self.leave(number)
        if self.requested is not None:
            # A batch system sends SIGTERM to every process, and torchrun
            # forwards its own: the second SIGTERM asks for nothing new.
            if number == signal.SIGINT:
                self.leave(number)
            return
        self.requested = number
        if hasattr(signal, "SIGCHLD"):  # not on Windows
            # Loader workers may get the signal too and end. torch's SIGCHLD
            # handler would then raise an error in the middle of the step.
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._timer = threading.Timer(
            SECONDS_TO_FINISH, os.kill, (os.getpid(), signal.SIGINT)
        )
        self._timer.daemon = True
        self._timer.start()
        name = signal.Signals(number).name
        text = f"{name}: stopping after this step; Ctrl-C to leave at once"
        # Written to stderr directly: the signal may have interrupted a call
        # that holds logging's lock. In `… | tee log` the same Ctrl-C has ended
        # tee, so that the write raises OSError.
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())

    @contextlib.contextmanager
    def defer(self) -> Iterator[bool]:
        """Defers signals to the end of the block.

        Yields True if the block may leave before its end. Within another
        deferral it yields False: the outer block's work would be lost.
        """
        nested, self.deferred = self.deferred, True
        try:
            yield not nested
        finally:
            self.deferred = nested
        if not nested and self.requested is not None:
            self.leave()

    def should_stop(self, collective: bool) -> bool:
        """Tells whether the processes are to stop now.

        With several processes it is always False unless `collective` is set,
        which all processes must do at the same step. A process that stopped
        alone would leave the others waiting for its gradients.
        """
        now = self.requested is not None
        if world_size() > 1:
            if not collective:
                return False
            total = sum_over_ranks({"requested": torch.tensor(now)})
            now = bool(total["requested"])
        if now and self._timer is not None:
            # The step is done, and writing a checkpoint to a slow disk may
            # take longer than the timer allows.
            self._timer.cancel()
        return now

    def leave(self, number: int | None = None) -> NoReturn:
        """Logs the command that continues the run, and raises SystemExit."""
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
    """A stream that drops its text once nobody reads its pipe.

    Ctrl-C in `… 2>&1 | tee log` also ends tee. The next progress bar would
    then raise BrokenPipeError in the middle of a step, before the checkpoint.
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
        """Flushes the stream, or drops its buffer."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self):
        try:
            yield
        except BrokenPipeError:
            # To a file that can be written: Python flushes the stream once
            # more when the process ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def own_process_group(worker: int) -> None:
    """Moves a DataLoader's worker to a process group of its own.

    A `worker_init_fn`. Ctrl-C and `timeout` signal the whole group of the
    training process, but that process needs its workers until its last step.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


stop = Stop()
