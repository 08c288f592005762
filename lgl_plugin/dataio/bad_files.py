"""A count of bad audio files over a run, up to a limit."""

import pathlib
from collections.abc import Collection, Iterable

from lgl_plugin.dataio.manifest import one_line
from lgl_plugin.utils.files import append_line, atomic_write, sync


class BadFiles:
    """A log of bad utterances, `utterance<TAB>reason` a line, with a limit.

    Lines of earlier processes count. `add` and `check` raise ValueError, which
    shows the first ten, when there are more than `limit`.
    """

    def __init__(self, path: str | pathlib.Path, limit: int = 0):
        self.path = pathlib.Path(path)
        self.limit = limit
        self.reasons: dict[str, str] = {}
        self._read()

    def _read(self):
        """Takes in the lines that the log holds."""
        if self.path.exists():
            # A crash or an editor may leave invalid UTF-8, which is no reason
            # to stop a training, or a line without a tab: a name that was cut
            # off is of no file, and must not count towards the limit.
            text = self.path.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                utterance, tab, reason = line.partition("\t")
                if tab:
                    self.reasons[utterance] = reason

    def add(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Logs (utterance, reason) pairs and checks; known utterances pass."""
        bad = {one_line(name): reason for name, reason in pairs}
        if not bad.keys() <= self.reasons.keys():
            self._read()  # other ranks append to the same log
        news = [name for name in bad if name not in self.reasons]
        if news:
            for name in news:
                self.reasons[name] = one_line(" ".join(bad[name].split()))
            lines = [f"{name}\t{self.reasons[name]}" for name in news]
            # On disk before the checkpoint that counts these: after a power
            # cut the limit would be lifted.
            append_line(self.path, "\n".join(lines))
            sync(self.path.parent)
        if bad:
            self.check()

    def forget(self, names: Collection[str]) -> None:
        """Takes utterances out of the log."""
        for name in names:
            self.reasons.pop(name, None)
        with atomic_write(self.path) as out:
            out.writelines(f"{u}\t{r}\n" for u, r in self.reasons.items())

    def check(self) -> None:
        """Raises ValueError if there are more bad utterances than the limit."""
        if len(self.reasons) > self.limit:
            first = list(self.reasons.items())[:10]
            listing = "\n".join(f"  {u}: {r}" for u, r in first)
            raise ValueError(
                f"{len(self.reasons)} bad utterances, more than the "
                f"{self.limit} that max_bad_share allows. All are named in "
                f"{self.path}; the first:\n{listing}\n"
                f"Repair them and delete {self.path.name}, or raise "
                "max_bad_share."
            )
