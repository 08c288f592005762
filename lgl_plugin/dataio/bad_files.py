"""Counts bad audio files over a run, up to a limit."""

import os
import pathlib

from lgl_plugin.dataio.manifest import one_line


class BadFiles:
    """Counts and names bad utterances, up to a limit.

    Arguments
    ---------
    path : str or pathlib.Path
        The log, lines of `utterance<TAB>reason`; what it already holds counts.
    limit : int
        How many are tolerated.

    Raises
    ------
    ValueError
        From `add` and `check`, when there are more than `limit`; shows the
        first ten.

    Example
    -------
    >>> path = getfixture("tmp_path") / "bad_files.txt"
    >>> bad = BadFiles(path, limit=1)
    >>> bad.add([("a.wav", "cannot be read"), ("a.wav", "cannot be read")])
    >>> path.read_text()
    'a.wav\\tcannot be read\\n'
    """

    def __init__(self, path, limit=0):
        self.path = pathlib.Path(path)
        self.limit = limit
        self.reasons = {}
        self._read()

    def _read(self):
        if self.path.exists():
            # What is torn or edited by hand is no reason to stop.
            text = self.path.read_text(encoding="utf-8", errors="replace")
            for line in text.splitlines():
                utterance, _, reason = line.partition("\t")
                self.reasons[utterance] = reason

    def add(self, found):
        """Adds (utterance, reason) pairs; one already known is not counted."""
        found = {one_line(name): reason for name, reason in found}
        if not found.keys() <= self.reasons.keys():
            self._read()  # what other processes have found
        news = [name for name in found if name not in self.reasons]
        if news:
            with open(self.path, "a+b") as log:
                if log.tell():
                    log.seek(-1, os.SEEK_END)
                    if log.read() != b"\n":  # torn by a crash
                        log.write(b"\n")
                for name in news:
                    self.reasons[name] = one_line(" ".join(found[name].split()))
                    log.write(f"{name}\t{self.reasons[name]}\n".encode())
        if found:
            self.check()

    def check(self):
        """Raises if there are too many, those of an earlier start counted."""
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
