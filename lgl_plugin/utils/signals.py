"""Leaves in good order when told to, by SIGTERM or Ctrl-C.

Batch systems send SIGTERM some seconds before they kill. In training the step
is finished and a checkpoint written first; elsewhere a run may be left at any
moment, since what is on disk is whole.
"""

import contextlib
import os
import signal
import threading

import torch
from speechbrain.utils.distributed import if_main_process
from speechbrain.utils.logger import get_logger

from lgl_plugin.utils.distributed import command, sum_over_ranks, world_size

logger = get_logger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """What the process was told, and whether it may leave at once.

    Attributes
    ---------
    deferred : bool
        Whether a step of training is to be finished first.
    requested : int or None
        The signal that asks the process to stop after its step.

    Example
    -------
    >>> stop = Stop()
    >>> stop.requested = signal.SIGTERM  # what `handle` notes during a step
    >>> stop.should_stop(collective=True)
    True
    >>> stop.end_deferral()
    Traceback (most recent call last):
    SystemExit: 143
    """

    def __init__(self):
        self.deferred = False
        self.requested = None
        self.owner = None

    @contextlib.contextmanager
    def on_signals(self):
        """While this lasts, signals end the run in good order.

        Also a decorator. Outside the main thread, which alone may handle
        signals, it changes nothing.

        Example
        -------
        >>> @Stop().on_signals()
        ... def train():
        ...     os.kill(os.getpid(), signal.SIGTERM)
        >>> try:
        ...     train()
        ... except SystemExit as left:
        ...     print(left.code == 128 + signal.SIGTERM)
        True
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

    def handle(self, number, frame):
        """What happens at a signal; a second one ends the wait."""
        if os.getpid() != self.owner:  # a process that reads audio
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return  # after Ctrl-C it is wanted until the step is done
        if self.deferred and self.requested is None:
            self.requested = number
            if hasattr(signal, "SIGCHLD"):  # not on Windows
                # Its readers may have been told too; torch would raise, in
                # the middle of the step, that they have ended.
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # Not by the logger: the signal may have come while it writes.
            name = signal.Signals(number).name
            words = f"{name}: stopping after this step; again to leave at once"
            os.write(2, f"{words}\n".encode())
            return
        self.leave(number)

    @contextlib.contextmanager
    def defer(self):
        """While this lasts, a signal is left to whoever looks at `told`.

        Example
        -------
        >>> with stop.defer():
        ...     stop.deferred
        True
        >>> stop.deferred
        False
        """
        self.deferred = True
        try:
            yield
        finally:
            self.deferred = False
        self.end_deferral()

    def end_deferral(self):
        """Ends the wait for a step; leaves if told to meanwhile."""
        self.deferred = False
        if self.requested is not None:
            self.leave()

    def should_stop(self, collective):
        """Whether the processes are to stop now; at a look all must call.

        Arguments
        ---------
        collective : bool
            Whether this is a step at which all processes ask; between these
            only a process that is alone may stop.
        """
        if world_size() == 1:
            return self.requested is not None
        if not collective:
            return False
        told = torch.tensor(self.requested is not None)
        return bool(sum_over_ranks({"told": told})["told"])

    def leave(self, number=None):
        """Ends the process and says how to go on.

        Raises
        ------
        SystemExit
            With the status that shells give to a signal.
        """
        number = number or self.requested or signal.SIGTERM
        if if_main_process():
            logger.info(
                "Stopped by %s; what is done is kept. Go on with the same "
                "command:\n%s",
                signal.Signals(number).name,
                command(),
            )
        raise SystemExit(128 + number)


def own_process_group(worker):
    """Takes a process that reads audio out of its parent's group.

    What a terminal or `timeout` tells the whole group then reaches the parent
    alone, whose readers go on until its step is done. For a DataLoader's
    `worker_init_fn`.

    Example
    -------
    >>> loader = torch.utils.data.DataLoader(
    ...     [1, 2], worker_init_fn=own_process_group
    ... )
    """
    if hasattr(os, "setpgrp"):  # not on Windows
        os.setpgrp()


stop = Stop()
