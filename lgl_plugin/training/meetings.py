"""Schedules the steps at which processes agree on stopping and saving."""

import time

from lgl_plugin.utils.distributed import sum_over_ranks, world_size

# torchrun kills processes that have not ended 30 seconds after a signal, so
# processes with slow steps must meet sooner.
SECONDS = 5.0


class Meetings:
    """Decides at which steps the processes meet to agree on stopping or saving.

    A meeting makes each process wait for its GPU. All processes meet at the
    same step, after at most `most_steps` and after about `SECONDS`. A single
    process is always due.
    """

    def __init__(self, most_steps: int):
        self.most_steps = most_steps
        self.start(0)

    def start(self, step: int) -> None:
        """Begins an epoch of which `step` steps are done."""
        self.next, self.last, self.began = 0, step, time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Returns True if processes meet at this step."""
        return world_size() == 1 or step >= self.next

    def hold(self, step: int) -> None:
        """Agrees on the step of the next meeting; all processes must call."""
        if world_size() == 1:
            return
        now = time.perf_counter()
        # The sum of all clocks makes all processes choose the same step.
        total = sum_over_ranks({"seconds": now - self.began})["seconds"]
        pace = float(total) / world_size() / (step - self.last)
        self.next = step + min(max(1, int(SECONDS / pace)), self.most_steps)
        self.last, self.began = step, now
