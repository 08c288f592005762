"""What a run left in its folder, read again for its report.

Everything but metrics.jsonl may still be missing: a run that is half-way, has
no trial list or no Stage II is read like any other.
"""

import functools
import pathlib
import re

import numpy as np

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.labels import read_labels
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.metrics_log import read_metrics, summarise
from lgl_plugin.runs.provenance import read_starts
from lgl_plugin.runs.state import read_state

PHASES = ("classifier", "gated", "large_margin")  # of training, in a round
# A line of SpeechBrain's log.txt that begins an entry.
ENTRY = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),\d+ - \S+ - (\w+) - (.*)")


class Results:
    """A run folder, read as far as it is written.

    Arguments
    ---------
    folder : str or pathlib.Path
        The yaml's output_folder.

    Raises
    ------
    FileNotFoundError
        If there are no metrics in that folder.
    ValueError
        If they or state.json are damaged.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> _ = (folder / "metrics.jsonl").write_text(
    ...     '{"stage": 0, "phase": "untrained", "eer": 38.0}'
    ... )
    >>> results = Results(folder)
    >>> results.rows, results.iterations, results.manifest
    ({'untrained': {'eer': 38.0}}, [], None)
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.records = read_metrics(folder)
        self.rows = summarise(self.records)
        self.starts = read_starts(folder)
        self.settings, self.done, self.failed = {}, {}, {}
        if (self.folder / "state.json").exists():
            state = read_state(folder)
            self.settings, self.done = state["settings"], state["done"]
            self.failed = state["failed"]

    @property
    def name(self):
        """The folder and the one that it lies in, such as `lgl/1`."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def iterations(self):
        """Numbers of the rounds of Stage II that have begun."""
        folders = self.folder.glob("iter*")
        numbers = [folder.name.removeprefix("iter") for folder in folders]
        return sorted(int(number) for number in numbers if number.isdigit())

    @property
    def steps(self):
        """All steps that the settings ask for, in order."""
        steps = ["baselines", "stage1"] if "stage 1" in self.settings else []
        settings = self.settings.get("stage 2", {})
        for number in range(1, settings.get("n_iterations", 0) + 1):
            steps += [
                f"iter{number}/{step}"
                for step in ("embeddings", "labels", "classifier", "gated")
            ]
        if settings.get("large_margin_epochs"):
            steps.append(f"iter{number}/large_margin")
        return steps

    @functools.cached_property
    def manifest(self):
        """The utterances, or None if they cannot be found."""
        settings = next(iter(self.settings.values()), {})
        path = settings.get("manifest") or self.folder / "manifest.csv"
        if not pathlib.Path(path).exists():
            return None
        # A page names utterances and opens none.
        folder = settings.get("data_folder", "")
        return load_manifest(path, folder, allow_outside=True)

    @property
    def speakers_known(self):
        """Whether the manifest names any speaker."""
        return self.manifest is not None and (self.manifest.speakers >= 0).any()

    def labels(self, number):
        """A round's utterances and pseudo-labels, or None."""
        path = self.folder / f"iter{number}" / "labels" / "labels.csv"
        return read_labels(path) if path.exists() else None

    def pseudo(self, number):
        """A round's pseudo-labels by row of the manifest, -1 for none."""
        names, labels = self.labels(number)
        pseudo = np.full(len(self.manifest), -1)
        pseudo[self.manifest.rows(names)] = labels
        return pseudo

    def embeddings(self, number):
        """A round's `Embeddings`, on disk, or None."""
        folder = self.folder / f"iter{number}" / "embeddings"
        whole = (folder / "utterances.txt").exists()
        return Embeddings.load(folder) if whole else None

    def gate(self, step):
        """What the gate saw in a step's last epoch, or None.

        Returns
        -------
        dict
            `rows` of the manifest, int64 (n,); their `losses`, float32 (n,);
            the `selected`, bool (n,); the threshold `tau`.
        """
        return _arrays(self.folder / step / "gate.npz")

    def scores(self):
        """Each scored phase's trial scores and labels.

        Returns
        -------
        dict
            From the name that `summarise` gives the phase to (scores, labels),
            float32 and bool (T,), in the order of the run.
        """
        files = {
            "log-mel statistics": "baselines/floor.npz",
            "untrained": "baselines/untrained.npz",
            "Stage I": "stage1/scores.npz",
        }
        for number in self.iterations:
            for phase in PHASES:
                name = f"iteration {number}, {phase}"
                files[name] = f"iter{number}/{phase}/scores.npz"
        found = {
            name: _arrays(self.folder / path) for name, path in files.items()
        }
        return {
            name: (arrays["scores"], arrays["labels"])
            for name, arrays in found.items()
            if arrays is not None
        }

    def bad_files(self):
        """(utterance, reason) of what could not be used."""
        return list(BadFiles(self.folder / "bad_files.txt").reasons.items())

    def log_entries(self):
        """(log, time, level, message) of each warning and error logged.

        Of an exception the message's end is the exception's last line.
        """
        entries = []
        for stage in ("stage1", "stage2"):
            path = self.folder / stage / "log.txt"
            if not path.exists():
                continue
            inside = False
            with open(path, encoding="utf-8", errors="replace") as log:
                for line in map(str.rstrip, log):
                    match = ENTRY.match(line)
                    if match:
                        inside = match[2] in ("WARNING", "ERROR", "CRITICAL")
                    if match and inside:
                        entries.append((f"{stage}/log.txt", *match.groups()))
                    elif inside and line:
                        *head, message = entries[-1]
                        message = f"{message.split(' … ')[0]} … {line.strip()}"
                        entries[-1] = (*head, message)
        return entries

    def environment(self):
        """SpeechBrain's description of the machine of the latest stage."""
        for stage in ("stage2", "stage1"):
            path = self.folder / stage / "env.log"
            if path.exists():
                return path.read_text(encoding="utf-8", errors="replace")
        return ""


def _arrays(path):
    """The arrays of an npz by name, or None if there is no such file."""
    if not path.exists():
        return None
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception as error:  # zip files fail in many ways
        raise ValueError(f"{path} is damaged: {error}") from error
