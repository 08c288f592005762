"""Trial lists: reading them, their audio, and keeping it out of training."""

import dataclasses
import itertools
import os
import pathlib

import numpy as np
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from lgl_plugin.dataio.audio import BadAudio, audio_seconds
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.utils.files import is_outside

logger = get_logger(__name__)


def trial_places(trials, trial_folder):
    """The real paths of a trial list's utterances and all folders above.

    Arguments
    ---------
    trials : str or pathlib.Path
        The trial list, see `trials.read_trials`.
    trial_folder : str or pathlib.Path
        The folder that its paths start from.

    Returns
    -------
    set of str
        For `without_tested`.

    Raises
    ------
    FileNotFoundError
        If there is no such list.
    ValueError
        If it is malformed.

    Example
    -------
    >>> folder = pathlib.Path(os.path.realpath(getfixture("tmp_path")))
    >>> trials = folder / "trials.txt"
    >>> _ = trials.write_text("1 ann/1.wav ann/2.wav\\n0 ann/1.wav bob/1.wav")
    >>> places = trial_places(trials, folder)
    >>> str(folder / "ann") in places, str(folder / "cat") in places
    (True, False)
    """
    places = set()
    real = {}
    for utterance in read_trials(trials).utterances:
        folder, name = os.path.split(os.path.join(trial_folder, utterance))
        if folder not in real:
            real[folder] = os.path.realpath(folder)
        place = os.path.join(real[folder], name)
        for path in {place, os.path.realpath(place)}:
            while path not in places:
                places.add(path)
                path = os.path.dirname(path)
    return places


def without_tested(files, root, places, counts):
    """Drops files that share a first-level folder with a trial list.

    Arguments
    ---------
    files : iterable of (str, str or None)
        From `find_audio`.
    root : str or pathlib.Path
        The folder that they were found in.
    places : set of str
        From `trial_places`.
    counts : collections.Counter
        Counts what is dropped as "excluded", its first-level folders as
        "excluded folders".

    Yields
    ------
    (str, str or None)
        Those of the files that are left.

    Example
    -------
    >>> files = [("ann/1.wav", None), ("ann/2.wav", None), ("bob/1.wav", None)]
    >>> counts = collections.Counter()
    >>> tested = {os.path.realpath("corpus/ann")}
    >>> list(without_tested(files, "corpus", tested, counts))
    [('bob/1.wav', None)]
    >>> counts["excluded"], counts["excluded folders"]
    (2, 1)
    """
    last = None
    tested = False
    for name, problem in files:
        top = name.split("/")[0]
        if top != last:
            last = top
            tested = os.path.realpath(os.path.join(root, top)) in places
            counts["excluded folders"] += tested
        if tested:
            counts["excluded"] += 1
        else:
            yield name, problem


def trial_audio(trials, folder):
    """The audio that a trial list names, as a Manifest, in its order.

    Arguments
    ---------
    trials : lgl_plugin.dataio.trials.Trials
        The list.
    folder : str or pathlib.Path
        Where its paths begin.

    Raises
    ------
    ValueError
        If one of its files cannot be read; names the first ten.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> for name in ("a.wav", "b.wav", "c.wav"):
    ...     soundfile.write(folder / name, [0.5] * 8000, 16000)
    >>> _ = (folder / "trials.txt").write_text("1 a.wav b.wav\\n0 a.wav c.wav")
    >>> trials = trials.read_trials(folder / "trials.txt", folder)
    >>> trial_audio(trials, folder).durations
    array([0.5, 0.5, 0.5])
    """
    folder, rows, bad = pathlib.Path(folder), [], []
    for name in trials.utterances:
        path = str(folder / name)
        try:
            rows.append((name, path, 0.0, audio_seconds(path), ""))
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
    """A trial list over a set of utterances.

    Arguments
    ---------
    labels : numpy.ndarray, (T,), bool
        True for a target trial: both utterances are of one speaker.
    utterances : list of str
        The paths that occur in the list, each once, sorted.
    enrolment : numpy.ndarray, (T,), int64
        Each trial's enrolment utterance as an index into `utterances`.
    test : numpy.ndarray, (T,), int64
        Each trial's test utterance as an index into `utterances`.

    Example
    -------
    >>> trials = Trials(
    ...     np.array([True, False]),
    ...     ["ann/1.wav", "ann/2.wav", "bob/1.wav"],
    ...     np.array([0, 0]),
    ...     np.array([1, 2]),
    ... )
    >>> len(trials)
    2
    """

    labels: np.ndarray
    utterances: list
    enrolment: np.ndarray
    test: np.ndarray

    def __len__(self):
        return len(self.labels)


def read_trials(path, audio_folder=None, allow_outside=False):
    """Reads a trial list in VoxCeleb's form.

    One trial a line, `label enrolment test`: label 1 for the same speaker, 0
    for different ones, then two paths without blanks. Empty lines are skipped.

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
        When a line is malformed or leads out of the folder, or there is no
        trial or only one class.

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
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"verification_file: there is no file {path}. Give the path of a "
            "trial list on this machine; training does without one if the "
            "yaml says verification_file: null"
        )
    words = []
    for number, row in _rows(path):
        if len(row) != 3 or row[0] not in ("0", "1"):
            raise ValueError(
                f"verification_file: {path}, line {number} is malformed: "
                f"{' '.join(row)[:200]!r}. Each line holds "
                "'label enrolment test' with label 1 (same speaker) or 0"
            )
        words += row
    if not words:
        raise ValueError(f"verification_file: {path} holds no trial")
    labels, enrolment, test = words[0::3], words[1::3], words[2::3]
    labels = np.array(labels) == "1"
    if labels.all() or not labels.any():
        raise ValueError(
            f"verification_file: all {len(labels)} trials of {path} have label "
            f"{labels[0]:d}: error rates need both target trials (1) and "
            "non-target trials (0)"
        )
    utterances = sorted({*enrolment, *test})
    if audio_folder is not None:
        if not allow_outside:
            _check_inside(path, utterances, audio_folder)
        _check_audio(path, utterances, audio_folder)
    index = {utterance: n for n, utterance in enumerate(utterances)}
    return Trials(
        labels,
        utterances,
        np.array([index[utterance] for utterance in enrolment]),
        np.array([index[utterance] for utterance in test]),
    )


def _rows(path):
    """Yields each line's number and its words, empty lines left out."""
    # A file that is no text at all is to be seen as malformed, line 1.
    with open(path, encoding="utf-8-sig", errors="replace") as source:
        for number, line in enumerate(source, 1):
            if row := line.split():
                yield number, row


def _check_inside(path, utterances, audio_folder):
    """Raises if the list at `path` names a file that is not in the folder."""
    outside = {
        utterance
        for utterance in utterances
        if is_outside(os.path.join(audio_folder, utterance), audio_folder)
    }
    for line, utterance in _lines_of(path, outside):
        raise ValueError(
            f"verification_file: {path}, line {line}: {utterance!r} leads out "
            f"of the trial_folder {audio_folder}. Put the audio, or a link to "
            "it, there. A list that you trust is taken as it is by training "
            "whose yaml says allow_outside_data_folder: True"
        )


def _lines_of(path, utterances):
    """Yields the first line and the name of utterances of the list."""
    left = set(utterances)
    for number, row in _rows(path):
        for utterance in row[1:]:
            if utterance in left:
                left.remove(utterance)
                yield number, utterance


def _check_audio(path, utterances, audio_folder):
    """Raises if utterances of the list at `path` are not in the folder."""
    if not os.path.isdir(audio_folder):
        raise FileNotFoundError(
            f"trial_folder: there is no folder {audio_folder}. The paths in "
            f"{path} are read from there"
        )
    # The bar shows itself only where looking takes long: a network disk.
    missing = {
        utterance
        for utterance in tqdm(utterances, "trial files", unit="file", delay=3)
        if not os.path.isfile(os.path.join(audio_folder, utterance))
    }
    if not missing:
        return
    first = itertools.islice(_lines_of(path, missing), 5)
    named = [f"  line {line}: {name!r}" for line, name in first]
    raise FileNotFoundError(
        f"trial_folder: {len(missing)} of the {len(utterances)} utterances "
        f"that {path} names are not in {audio_folder}. The first ones:\n"
        + "\n".join(named)
        + "\nSet trial_folder to the folder that these paths start from"
    )
