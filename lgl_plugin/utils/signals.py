"""Leaves in good order at SIGTERM or Ctrl-C.

Batch systems send SIGTERM some seconds before they kill. In training the step
is finished and a checkpoint written first; elsewhere a run may be left at any
moment, since all files on disk are whole.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import NoReturn

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


class Stop:
    """A request to stop, by a signal, that may be deferred to a step's end."""

    def __init__(self):
        self.deferred = False  # whether a step is to be finished first
        self.requested: int | None = None  # the signal that came meanwhile
        self.owner: int | None = None  # the process that installed handlers

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
        before = [signal.signal(number, self.handle) for number in SIGNALS]
        try:
            yield
        finally:
            self.deferred, self.requested = False, None
            for number, handler in zip(SIGNALS, before):
                signal.signal(number, handler)

    def handle(self, number: int, frame: object) -> None:
        """Notes a signal if a step is to be finished first, else leaves.

        A second signal leaves at once.
        """
        # A forked loader worker inherits this handler. It ends at SIGTERM, but
        # not at Ctrl-C: the training process needs it until its step is done.
        if os.getpid() != self.owner:
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        if self.deferred and self.requested is None:
            self.requested = number
            if hasattr(signal, "SIGCHLD"):  # not on Windows
                # Loader workers may get the signal too and end. torch's
                # SIGCHLD handler would raise that in the middle of the step.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            name = signal.Signals(number).name
            text = f"{name}: stopping after this step; again to leave at once"
            # logging is not re-entrant: the signal may interrupt a call that
            # holds its lock, so write to stderr directly.
            os.write(2, f"{text}\n".encode())
            return
        self.leave(number)

    @contextlib.contextmanager
    def defer(self) -> Iterator[None]:
        """Defers signals to the end of the block, which may leave before."""
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        self.end_deferral()

    def end_deferral(self) -> None:
        """Leaves at once from now on, and now if a stop was requested."""
        self.deferred = False
        if self.requested is not None:
            self.leave()

    def should_stop(self, collective: bool) -> bool:
        """Tells whether the processes are to stop now.

        With several processes it is False unless `collective`, with which all
        of them call it at the same step: a process that stopped alone would
        leave the others waiting for its gradients.
        """
        if world_size() == 1:
            return self.requested is not None
        if not collective:
            return False
        requested = torch.tensor(self.requested is not None)
        return bool(sum_over_ranks({"requested": requested})["requested"])

    def leave(self, number: int | None = None) -> NoReturn:
        """Logs how to go on; raises SystemExit with a shell's status."""
        number = number or self.requested or signal.SIGTERM
        if if_main_process():
            logger.info(
                "Stopped by %s; what is done is kept. Go on with the same "
                "command:\n%s",
                signal.Signals(number).name,
                launch_command(),
            )
        raise SystemExit(128 + number)


def own_process_group(worker: int) -> None:
    """Moves a DataLoader's worker to a process group of its own.

    A `worker_init_fn`. Ctrl-C and `timeout` signal the whole group of the
    training process; its workers must outlive its last step.
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


stop = Stop()
