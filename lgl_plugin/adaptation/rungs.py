"""The rungs of `lgl adapt`: what is tried, and the verdict on each."""

import dataclasses
from collections.abc import Callable

from lgl_plugin.adaptation.verdict import Verdict
from lgl_plugin.inference.backends import Backend, Centring, Whitening

BACKENDS: dict[str, Callable[[], Backend]] = {
    "centring": Centring,
    "whitening": Whitening,
}
# The step before training, and training.
SPLIT, TRAINED = "split", "loss_gate"
START = "start"  # the step before all rungs
HEADER = ["rung", "before %", "after %", "change, points", "verdict", "kept"]


def steps_of(train: bool) -> list[str]:
    """Lists the steps of an adaptation, with or without training."""
    return [START, *BACKENDS, *([SPLIT, TRAINED] if train else [])]


@dataclasses.dataclass(frozen=True)
class Rung:
    """A rung that was tried, and the verdict on it."""

    name: str
    verdict: Verdict

    @property
    def kept(self) -> bool:
        """Says whether the adapted encoder has this rung."""
        return self.verdict.sign < 0

    def cells(self) -> list[str]:
        """Returns the rung's line of a table under `HEADER`."""
        found = self.verdict
        return [
            self.name,
            f"{found.before:.1f}",
            f"{found.after:.1f}",
            f"{found.low:+.1f} to {found.high:+.1f}",
            f"{found.word}: {found.doubt}" if found.doubt else found.word,
            "yes" if self.kept else "no",
        ]
