"""The log of a run's bad utterances, and the limit on their number."""

import pathlib
from collections.abc import Collection, Iterable

from lgl_plugin.dataio.manifest import one_line
from lgl_plugin.utils.files import append_line, atomic_write, sync


class BadFiles:
    """A log of bad utterances, `utterance<TAB>reason` a line, with a limit.

    Utterances that earlier processes logged count, too. `add` and `check`
    raise ValueError, which shows the first ten, if there are more than `limit`.
    """

    def __init__(self, path: str | pathlib.Path, limit: int = 0):
        self.path = pathlib.Path(path)
        self.limit = limit
        self.reasons: dict[str, str] = {}
        self._read()

    def _read(self):
        """Reads the log."""
        if self.path.exists():
            # A crash or an editor may leave invalid UTF-8, which must not stop
            # a training. A line without a tab was cut off: its name is that of
            # no utterance, and must not count towards the limit.
            text = self.path.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                utterance, tab, reason = line.partition("\t")
                if tab:
                    self.reasons[utterance] = reason

    def add(self, pairs: Iterable[tuple[str, str]]) -> None:
        """Logs (utterance, reason) pairs that are new, and checks the limit."""
        bad = {one_line(name): reason for name, reason in pairs}
        if not bad.keys() <= self.reasons.keys():
            self._read()  # other ranks append to the same log
        news = [name for name in bad if name not in self.reasons]
        if news:
            for name in news:
                self.reasons[name] = one_line(" ".join(bad[name].split()))
            lines = [f"{name}\t{self.reasons[name]}" for name in news]
            # Synced before the next checkpoint: if a power cut lost these
            # lines, a resumed run would not count them towards the limit.
            append_line(self.path, "\n".join(lines))
            sync(self.path.parent)
        if bad:
            self.check()

    def forget(self, names: Collection[str]) -> None:
        """Removes utterances from the log."""
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
