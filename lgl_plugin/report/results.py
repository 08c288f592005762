"""Reads the contents of a run's folder for its report.

Every file but metrics.jsonl may be missing: the run may be unfinished, or have
no trial list or no Stage II.
"""

import contextlib
import functools
import os
import pathlib
import re
import shlex
import urllib.parse

import numpy as np

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.labels import LABELS, read_labels, round_labels
from lgl_plugin.dataio.manifest import Manifest, Strings, load_manifest
from lgl_plugin.dataio.trials import read_trials
from lgl_plugin.evaluation.verification import bootstrap_eer
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.report.run_log import failure, warnings_and_errors
from lgl_plugin.runs.arguments import for_other_stage, key_of
from lgl_plugin.runs.metrics_log import (
    LOG_MEL_STATISTICS,
    read_metrics,
    summarise,
)
from lgl_plugin.runs.pretrained import YAML
from lgl_plugin.runs.provenance import (
    command_of,
    from_directory,
    into_folder,
    read_starts,
)
from lgl_plugin.runs.run import (
    CEILING,
    GATE,
    SCORES,
    planned_steps,
    round_of,
    stage1_steps,
)
from lgl_plugin.runs.state import STATE, read_state, refuse_adaptation
from lgl_plugin.utils.files import is_outside, load_arrays

# Phases of training in an iteration of Stage II.
PHASES = ("classifier", "gated", "large_margin")
# The recipe's yamls of Stage I, and those of other methods. `OF_METHOD` are
# options of the latter that are not for Stage II, which takes over the encoder
# and has its own optimiser.
STAGE1_YAML = re.compile(r"(?<=hparams/)(small_)?stage1\.yaml$")
METHOD_YAML = re.compile(
    r"(?<=hparams/)(moco|vicreg|simsiam|dino|rdino|sdpn)\.yaml$"
)
OF_METHOD = ("new_encoder", "opt_class", "lr", "lr_annealing")
# The most trials that the bootstrap of all intervals draws, at 10 million a
# second; and the fewest draws that suffice for percentiles.
BOOTSTRAP_TRIALS, FEWEST_DRAWS = 3e8, 200


class Results:
    """The contents of a run folder, which may be incomplete.

    Arguments
    ---------
    folder : str or pathlib.Path
        The yaml's output_folder.

    Raises
    ------
    FileNotFoundError
        If the folder is not that of a run.
    ValueError
        If the metrics or state.json are damaged, or the folder is that of an
        `lgl adapt`, which has another page.

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

    def __init__(self, folder: str | pathlib.Path):
        self.folder = pathlib.Path(folder)
        refuse_adaptation(folder)
        self.records = read_metrics(folder)
        self.rows = summarise(self.records)
        self.starts = read_starts(folder)
        has_state = (self.folder / STATE).exists()
        state = read_state(folder) if has_state else {}
        self.settings, self.done, self.failed, self.inputs = (
            state.get(key, {})
            for key in ("settings", "done", "failed", "inputs")
        )
        begun = state.get("sources", {})
        # A run of `ceiling.py` alone has no rounds, though its settings do.
        self._is_ceiling = CEILING in begun and not any(map(round_of, begun))

    @property
    def name(self) -> str:
        """Names the folder and its parent folder, such as `lgl/1`."""
        return "/".join(self.folder.resolve().parts[-2:])

    @property
    def iterations(self) -> list[int]:
        """Lists the iterations of Stage II that have begun."""
        folders = self.folder.glob("iter*")
        numbers = [folder.name.removeprefix("iter") for folder in folders]
        return sorted(int(number) for number in numbers if number.isdigit())

    @property
    def steps(self) -> list[str]:
        """Lists all steps of the settings in order, without exports."""
        steps = planned_steps(self.settings)
        steps = [step for step in steps if not step.startswith("export/")]
        if self._is_ceiling:
            return [*(s for s in steps if not round_of(s)), CEILING]
        return steps

    @property
    def left(self) -> list[str]:
        """Lists those of `steps` that are not done."""
        return [step for step in self.steps if step not in self.done]

    def next_command(self) -> tuple[str, str]:
        """Returns a reason and the next command.

        The command continues unfinished steps; or begins Stage II; or uses the
        last encoder, or exports it first.
        """
        start = self.starts[-1] if self.starts else {}
        command = command_of(start, self.folder)
        if not (self.folder / STATE).exists():
            return self._first_command(start, command)
        unfinished = bool(self.left or self.failed)
        if command and (unfinished or "stage 2" not in self.settings):
            # `lgl train` does both stages; a recipe's command names one.
            both, reason = "train" in shlex.split(command), "Go on with"
            if not (unfinished or both or not self.steps):
                words = self._stage2_words(start, command)
                reason = "Stage I is done. Go on with Stage II"
                if words:
                    command = shlex.join(words)
                else:  # the user's own yaml
                    option = self._as_pretrained(command)
                    reason += f" by stage2.yaml with {option}, after"
            return reason, from_directory(start, command)
        exports = [
            self.folder / step
            for step in planned_steps(self.settings)
            if step.startswith("export/")
        ]
        latest = []
        if self._is_ceiling:  # its encoder is not exported automatically
            exports, latest = [self.folder / "export" / CEILING], [CEILING]
        for encoder in reversed(exports):
            if (encoder / YAML).exists():  # an export writes it last
                words = ["lgl", "who", str(encoder), "AUDIO", "OUT"]
                return "Next", shlex.join(words)
        return "Next", shlex.join(["lgl", "export", str(self.folder), *latest])

    def _first_command(self, start, command):
        """Returns the `next_command` for a folder without a state.json.

        If metrics were logged there, a run refuses to continue.
        """
        if self.records or command is None:
            reason = f"It holds no {STATE}, so that no run can go on here"
            new = into_folder(command or "lgl train AUDIO", "NEW")
            return f"{reason}. Begin anew", from_directory(start, new)
        return "Go on with", from_directory(start, command)

    def _stage2_words(self, start, command):
        """Returns the words of Stage II's command; none after a user's yaml.

        After the yaml of another method, Stage II is stage2.yaml with the
        exported encoder and its own optimiser.
        """
        yamls = [w for w in shlex.split(command) if w.endswith(".yaml")]
        yaml = yamls[0] if yamls else ""
        second = re.sub(r"stage1\.yaml$", "stage2.yaml", yaml)
        beside = pathlib.Path(start.get("directory", ""), second)
        # For a user's own Stage I, a yaml of that name may be missing.
        if STAGE1_YAML.search(yaml) or second != yaml and beside.exists():
            return for_other_stage(command, 2, lambda _: second)
        if not METHOD_YAML.search(yaml):
            return []
        words = for_other_stage(
            command, 2, lambda yaml: METHOD_YAML.sub("stage2.yaml", yaml)
        )
        return [
            *(word for word in words if key_of(word) not in OF_METHOD),
            self._as_pretrained(command),
        ]

    def _as_pretrained(self, command):
        """Returns the option that gives Stage I's encoder to Stage II."""
        words = for_other_stage(command, 2, str)
        typed = [w for w in words if key_of(w) == "output_folder"]
        folder = self.setting("output_folder") or str(self.folder)
        if typed:  # if the run was moved, this is its new folder
            folder = typed[-1].partition("=")[2]
        last = stage1_steps(self.settings)[-1]
        exported = os.path.join(folder, "export", last)
        return f"--pretrained_encoder={exported}"

    def setting(self, name: str) -> str:
        """Returns a setting of the later stage as text, "" for none."""
        return str(self._latest.get(name) or "")

    @property
    def _latest(self):
        """Returns the settings of the later stage."""
        return self.settings.get(max(self.settings, default=""), {})

    @functools.cached_property
    def manifest(self) -> Manifest | None:
        """Reads the run's manifest; None if it is missing."""
        path = self.setting("manifest") or self.folder / "manifest.csv"
        if not pathlib.Path(path).exists():
            return None
        # The arguments are the run's, so that within its process the page
        # shares the parsed manifest. By default paths may lead anywhere:
        # `player` plays no audio outside the data folder.
        outside = self._latest.get("allow_outside_data_folder", True)
        return load_manifest(path, self.setting("data_folder"), outside)

    @property
    def speakers_known(self) -> bool:
        """Tells whether the manifest names any speaker."""
        return self.manifest is not None and (self.manifest.speakers >= 0).any()

    def player(self, row: int) -> str:
        """Returns the address of a manifest row's audio from the page.

        It is empty if the audio lies in a shard, lies outside the data folder
        (a manifest is not trusted), or is missing.
        """
        manifest, folder = self.manifest, self.setting("data_folder")
        wav = manifest.wavs[row]
        if manifest.places is not None or not folder:
            return ""
        if is_outside(wav, folder) or not os.path.isfile(wav):
            return ""
        start = manifest.offsets[row]
        span = f"#t={start:.3f},{start + manifest.durations[row]:.3f}"
        path = os.path.relpath(wav, self.folder / "report")
        return urllib.parse.quote(path.replace(os.sep, "/")) + span

    def labels(self, number: int) -> tuple[Strings, np.ndarray] | None:
        """Reads an iteration's utterances and pseudo-labels, if any."""
        path = self.folder / f"iter{number}" / "labels" / LABELS
        return read_labels(path) if path.exists() else None

    def labels_by_row(self, number: int) -> np.ndarray:
        """Returns an iteration's label of each manifest row, -1 for none."""
        return round_labels(self.folder, number, self.manifest)

    def embeddings(self, number: int) -> Embeddings | None:
        """Opens an iteration's embeddings on disk; None if incomplete."""
        folder = self.folder / f"iter{number}" / "embeddings"
        # utterances.txt is written last: without it vectors may be missing.
        whole = (folder / "utterances.txt").exists()
        return Embeddings.load(folder) if whole else None

    def gate(self, step: str) -> dict[str, np.ndarray] | None:
        """Reads the arrays of a step's last gated epoch, if there was one.

        They are `rows` of the manifest, int64 (n,); their `losses`, float32
        (n,); a mask `selected`, bool (n,); the threshold `tau`; and more, see
        `lgl_plugin.training.loss_gated.LossGatedBrain`.
        """
        path = self.folder / step / GATE
        return load_arrays(path) if path.exists() else None

    @property
    def scored(self) -> dict[str, pathlib.Path]:
        """Maps each scored phase, named as by `summarise`, to its file."""
        files = {
            LOG_MEL_STATISTICS: "baselines/floor.npz",
            "untrained": "baselines/untrained.npz",
            "Stage I": f"stage1/{SCORES}",
            "Stage I, SSPS": f"ssps/{SCORES}",
        }
        for number in self.iterations:
            for phase in PHASES:
                name = f"iteration {number}, {phase}"
                files[name] = f"iter{number}/{phase}/{SCORES}"
        paths = {name: self.folder / file for name, file in files.items()}
        return {name: path for name, path in paths.items() if path.exists()}

    def scores(self, phase: str) -> tuple[np.ndarray, np.ndarray]:
        """Reads a phase's trial scores, float32 (T,), and labels, bool (T,)."""
        arrays = load_arrays(self.scored[phase])
        return arrays["scores"], arrays["labels"]

    @functools.cached_property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Computes the 95 % interval of each phase's EER, in percent.

        Empty if the trial list was moved or changed since. With many trials,
        only the latest phase has an interval.
        """
        intervals, phases = {}, list(self.scored)
        try:
            trials = read_trials(self.setting("verification_file"))
        except (OSError, ValueError):
            return {}
        if FEWEST_DRAWS * len(trials) * len(phases) > BOOTSTRAP_TRIALS:
            phases = phases[-1:]
        draws = BOOTSTRAP_TRIALS // (len(trials) * max(len(phases), 1))
        draws = int(np.clip(draws, FEWEST_DRAWS, 1000))
        for phase in phases:
            # ValueError means that the file is damaged, which the section of
            # DET curves reports, or that the list has too few speakers.
            with contextlib.suppress(ValueError):
                scores, labels = self.scores(phase)
                if np.array_equal(labels, trials.labels):
                    ends = bootstrap_eer(scores, trials, draws)
                    intervals[phase] = (100 * ends[0], 100 * ends[1])
        return intervals

    def bad_files(self) -> list[tuple[str, str]]:
        """Lists (utterance, reason) of utterances that could not be used."""
        return list(BadFiles(self.folder / "bad_files.txt").reasons.items())

    def failure(self) -> str | None:
        """Returns the error that ended the latest start, if any."""
        logs = self.folder.glob("stage[12]/log.txt")
        latest = max(logs, key=os.path.getmtime, default=None)
        return None if latest is None else failure(latest)

    def log_entries(self) -> list[tuple[str, str, str, str]]:
        """Lists (log, time, level, message) of logged warnings and errors."""
        return [
            (name, *entry)
            for name in ("stage1/log.txt", "stage2/log.txt")
            for entry in warnings_and_errors(self.folder / name)
        ]
