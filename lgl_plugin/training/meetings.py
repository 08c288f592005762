"""The steps at which several processes ask each other."""

import time

from lgl_plugin.utils.distributed import sum_over_ranks, world_size

# torchrun kills what has not ended 30 seconds after a signal: processes whose
# steps are slow must meet before.
SECONDS = 5.0


class Meetings:
    """Says at which steps processes ask each other whether to stop or save.

    A meeting makes each wait for its GPU. It is held after `most_steps`, or
    after `SECONDS` if that is earlier, at the same step by all. One process
    alone may ask itself at any step.
    """

    def __init__(self, most_steps: int):
        self.most_steps = most_steps
        self.start(0)

    def start(self, step: int) -> None:
        """Begins an epoch, of which so many steps are done."""
        self.next, self.last, self.began = 0, step, time.perf_counter()

    def is_due(self, step: int) -> bool:
        """Says whether processes meet at this step."""
        return world_size() == 1 or step >= self.next

    def hold(self, step: int) -> None:
        """Agrees on the step of the next meeting; all processes call."""
        if world_size() == 1:
            return
        now = time.perf_counter()
        # From the sum of all clocks, so that all choose the same step.
        total = sum_over_ranks({"seconds": now - self.began})["seconds"]
        pace = float(total) / world_size() / (step - self.last)
        self.next = step + min(max(1, int(SECONDS / pace)), self.most_steps)
        self.last, self.began = step, now
