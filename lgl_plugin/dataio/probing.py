"""Headers of many files, read in parallel and in order."""

import collections
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.manifest import one_line
from lgl_plugin.dataio.storage import StorageFailure

# Files that a worker takes at a time: a few milliseconds of work.
BATCH = 64


def probe_all(
    read: Callable[[str], Any],
    folder: str,
    files: Iterator[tuple[str, str | None]],
    num_workers: int,
) -> Iterator[tuple[str, Any]]:
    """Yields (path, header or problem) of (path, problem or None), in order."""
    # Processes, because threads were no faster than a plain loop on files that
    # were not in memory. Not SpeechBrain's parallel_map: while one file hangs
    # on a network disk, it would read all others and keep their results. Here
    # the number of batches in flight is limited, but large enough that no
    # worker waits.
    batches = iter(lambda: list(itertools.islice(files, BATCH)), [])
    waiting = collections.deque()
    first = [
        *itertools.islice(batches, min(num_workers, 4 * (os.cpu_count() or 1)))
    ]
    workers = max(len(first), 1)
    try:
        with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
            try:
                for batch in itertools.chain(first, batches):
                    future = pool.submit(_probe_batch, read, folder, batch)
                    waiting.append((future, batch))
                    if len(waiting) > 4 * workers:
                        yield from waiting[0][0].result()
                        waiting.popleft()
                while waiting:
                    yield from waiting[0][0].result()
                    waiting.popleft()
            except StorageFailure:
                # Cancelled: each remaining batch would wait for the storage.
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    # The system killed a worker for lack of memory, or libsndfile crashed.
    except BrokenProcessPool as error:
        (_, oldest), (_, newest) = waiting[0], waiting[-1]
        first, last = oldest[0][0], newest[-1][0]
        raise RuntimeError(
            "a process that reads files died, for lack of memory or because "
            f"of a file in {folder} from {one_line(first)} to "
            f"{one_line(last)}. Start the same command again, without that "
            "file or with more free memory."
        ) from error


def start_worker() -> None:
    """Makes a worker ignore Ctrl-C, and end when its parent process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _probe_batch(read, folder, batch):
    """Returns (path, header or problem) of a batch of (path, problem)."""

    def header(name):
        try:
            return read(os.path.join(folder, name))
        except BadAudio as error:
            return str(error)

    return [(name, problem or header(name)) for name, problem in batch]
