"""The rungs of `lgl adapt`, ways to adapt an encoder, with their verdicts."""

import dataclasses
from collections.abc import Callable

from lgl_plugin.adaptation.verdict import Verdict
from lgl_plugin.inference.backends import Backend, Centring, Whitening

BACKENDS: dict[str, Callable[[], Backend]] = {
    "centring": Centring,
    "whitening": Whitening,
}
# The step that keeps speakers out of training, and the rung that trains.
SPLIT, TRAINED = "split", "loss_gate"
START = "start"  # the first step, which embeds the audio
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
        """Says whether the adapted encoder includes this rung."""
        return self.verdict.sign < 0

    def cells(self) -> list[str]:
        """Returns the rung's row of a table under `HEADER`."""
        verdict = self.verdict
        word, doubt = verdict.word, verdict.doubt
        return [
            self.name,
            f"{verdict.before:.1f}",
            f"{verdict.after:.1f}",
            f"{verdict.low:+.1f} to {verdict.high:+.1f}",
            f"{word}: {doubt}" if doubt else word,
            "yes" if self.kept else "no",
        ]
