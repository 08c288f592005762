"""Reads trial lists, and excludes their audio from training."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import BadAudio, whole_file
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.utils.files import check_file, is_outside
from lgl_plugin.utils.progress import tqdm

logger = get_logger(__name__)


def trial_paths(
    trials: str | pathlib.Path, trial_folder: str | pathlib.Path
) -> set[str]:
    """Returns the real paths of a list's utterances and of all parents."""
    tested = set()
    real = {}
    for utterance in read_trials(trials).utterances:
        folder, name = os.path.split(os.path.join(trial_folder, utterance))
        # One realpath a folder: each costs a system call per path component.
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        place = os.path.join(real[folder], name)
        for path in {place, os.path.realpath(place)}:
            while path not in tested:
                tested.add(path)
                path = os.path.dirname(path)
    return tested


def exclude_tested(
    files: Iterable[tuple[str, str | None]],
    root: str | pathlib.Path,
    tested: set[str],
    counts: collections.Counter,
) -> Iterator[tuple[str, str | None]]:
    """Drops files of `find_audio` in a first-level folder that is tested on.

    `tested` comes from `trial_paths`; `counts` gains "excluded" files and
    "excluded folders".
    """
    last = None
    excluded = False
    for name, problem in files:
        top = name.split("/")[0]
        if top != last:
            last = top
            excluded = os.path.realpath(os.path.join(root, top)) in tested
            counts["excluded folders"] += excluded
        if excluded:
            counts["excluded"] += 1
        else:
            yield name, problem


def trial_audio(
    trials: Trials,
    folder: str | pathlib.Path,
    channel: int | None = None,
    rates: Sequence[int] = (16000,),
) -> Manifest:
    """Returns a manifest of a list's utterances, in its order, below `folder`.

    `channel`, from 0, is the one to read of files with several channels; by
    default their mean is read. `rates`, in Hz, are those of the encoders that
    score. Raises ValueError, which names the first ten, if files cannot be
    read with that channel and at those rates.
    """
    folder, rows, bad = pathlib.Path(folder), [], []
    # delay: only long lists and network disks are worth a progress bar.
    names = tqdm(trials.utterances, "trial files", unit="file", delay=3)
    for name in names:
        try:
            rows.append(whole_file(name, folder / name, channel, rates))
        except BadAudio as error:
            bad.append(f"  {name} {error}")
    if bad:
        raise ValueError(
            f"{len(bad)} of the trial list's {len(trials.utterances)} "
            f"utterances in {folder} cannot be scored; the first:\n"
            + "\n".join(bad[:10])
            + "\nRepair them, or take their trials out of the list."
        )
    return Manifest.of(rows)


@dataclasses.dataclass(frozen=True, eq=False)
class Trials:
    """A trial list over a set of utterances, see `read_trials`."""

    labels: np.ndarray  # True for a target trial, of one speaker, bool (T,)
    utterances: list[str]  # the paths that occur in the list, once, sorted
    enrolment: np.ndarray  # indices of the paths compared, int64 (T,)
    test: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def read_trials(
    path: str | pathlib.Path,
    audio_folder: str | pathlib.Path | None = None,
    allow_outside: bool = False,
) -> Trials:
    """Reads a trial list in VoxCeleb's form.

    One trial a line, `label enrolment test`: label 1 for the same speaker, 0
    for different ones, then two paths. With tabs between the three, paths may
    hold blanks. Empty lines are skipped.

    Arguments
    ---------
    path : str or pathlib.Path
        The trial list, the recipe's `verification_file`.
    audio_folder : str or pathlib.Path, optional
        The folder that the list's paths start from, the recipe's
        `trial_folder`; when given, every utterance must exist there.
    allow_outside : bool
        Whether the list's paths may lead out of that folder.

    Returns
    -------
    Trials

    Raises
    ------
    FileNotFoundError
        When the list, the folder, or utterances in it do not exist.
    ValueError
        When a line is malformed or leads out of the folder, or the list has no
        trial or trials of only one class.

    Example
    -------
    >>> path = getfixture("tmp_path") / "trials.txt"
    >>> _ = path.write_text("1 ann/1.wav ann/2.wav\\n0 ann/1.wav bob/1.wav\\n")
    >>> trials = read_trials(path)
    >>> trials.utterances
    ['ann/1.wav', 'ann/2.wav', 'bob/1.wav']
    >>> trials.labels.tolist(), trials.test.tolist()
    ([True, False], [1, 2])
    """
    check_file(
        "trial list",
        path,
        ". Give the path of a trial list on this machine. A training's yaml "
        "may do without: verification_file: null",
    )
    first_line, labels, enrolment, test = {}, [], [], []
    # errors="replace": audio given in place of a list is reported as a
    # malformed line 1, not as a UnicodeDecodeError.
    with open(path, encoding="utf-8-sig", errors="replace") as source:
        for number, line in enumerate(source, 1):
            # Tabs between the fields let names hold blanks.
            row = [field.strip() for field in line.split("\t")]
            if len(row) != 3 or not all(row):
                row = line.split()
            if not row:
                continue
            if len(row) != 3 or row[0] not in ("0", "1"):
                raise ValueError(
                    f"trial list {path}, line {number} is malformed: "
                    f"{' '.join(row)[:200]!r}. Each line holds "
                    "'label enrolment test' with label 1 (same speaker) or 0, "
                    "with tabs between them if names hold blanks"
                )
            labels.append(row[0] == "1")
            enrolment.append(row[1])
            test.append(row[2])
            for utterance in row[1:]:
                first_line.setdefault(utterance, number)
    if not labels:
        raise ValueError(f"trial list {path} holds no trial")
    if len(set(labels)) == 1:
        raise ValueError(
            f"trial list {path}: all {len(labels)} trials have label "
            f"{labels[0]:d}: error rates need both target trials (1) and "
            "non-target trials (0)"
        )
    if audio_folder is not None:
        if not allow_outside:
            _check_inside(path, first_line, audio_folder)
        _check_audio(path, first_line, audio_folder)
    utterances = sorted(first_line)
    index = {utterance: n for n, utterance in enumerate(utterances)}
    return Trials(
        np.array(labels),
        utterances,
        np.array([index[utterance] for utterance in enrolment]),
        np.array([index[utterance] for utterance in test]),
    )


def _check_inside(path, first_line, audio_folder):
    """Raises ValueError if the list at `path` names a file outside a folder."""
    for utterance, line in first_line.items():
        if is_outside(os.path.join(audio_folder, utterance), audio_folder):
            raise ValueError(
                f"trial list {path}, line {line}: {utterance!r} leads "
                f"out of the folder of audio {audio_folder}. Put the audio, or "
                "a link to it, there. A list that you trust is taken as it is "
                "by training whose yaml says allow_outside_data_folder: True"
            )


def _check_audio(path, first_line, audio_folder):
    """Raises FileNotFoundError if a folder lacks utterances of a list."""
    if not os.path.isdir(audio_folder):
        raise FileNotFoundError(
            f"there is no folder of audio {audio_folder}. The paths in "
            f"{path} are read from there"
        )
    missing = [
        f"  line {line}: {utterance!r}"
        for utterance, line in tqdm(
            first_line.items(), "trial files", unit="file", delay=3
        )
        if not os.path.isfile(os.path.join(audio_folder, utterance))
    ]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of the {len(first_line)} utterances that trial "
            f"list {path} names are not in {audio_folder}. The first ones:\n"
            + "\n".join(missing[:5])
            + "\nName the folder that these paths start from (a training's "
            "yaml does by trial_folder)"
        )


def join_trials(lists: Sequence[Trials]) -> Trials:
    """Joins trial lists end to end over the union of their utterances."""
    utterances = sorted(set().union(*(trials.utterances for trials in lists)))
    place = {utterance: row for row, utterance in enumerate(utterances)}
    rows = [np.array([place[name] for name in t.utterances]) for t in lists]
    return Trials(
        np.concatenate([trials.labels for trials in lists]),
        utterances,
        np.concatenate([r[t.enrolment] for r, t in zip(rows, lists)]),
        np.concatenate([r[t.test] for r, t in zip(rows, lists)]),
    )
