"""Draws a cohort for score normalisation from a folder of unlabelled audio."""

import collections
import pathlib
import random

from tqdm import tqdm

from lgl_plugin.dataio.audio import BadAudio, audio_seconds
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.prepare import find_audio
from lgl_plugin.dataio.trials import trial_places, without_tested


def draw_cohort(folder, verification_file, trial_folder, size, seed=0):
    """A random sample of a folder's audio without the trial list's speakers.

    As in training, all below a first-level folder that holds an utterance of
    the trial list is left out; that is printed. Files whose header cannot be
    read are passed over.

    Arguments
    ---------
    folder : str or pathlib.Path
        Audio in wav, flac, ogg or mp3 files, at any depth.
    verification_file : str or pathlib.Path
        The trial list.
    trial_folder : str or pathlib.Path
        The folder that its paths start from.
    size : int
        How many files to draw; all, where there are fewer.
    seed : int
        Of the draw.

    Returns
    -------
    lgl_plugin.dataio.manifest.Manifest
        Sorted by path, which is the ID.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If there is no audio in it, or none that the list does not test on.

    Example
    -------
    >>> import numpy as np, soundfile
    >>> folder = getfixture("tmp_path")
    >>> for name in ("ann", "bob", "cat", "dan"):
    ...     (folder / name).mkdir()
    ...     soundfile.write(folder / name / "1.wav", np.zeros(8000), 16000)
    >>> trials = folder / "trials.txt"
    >>> lines = "1 ann/1.wav ann/1.wav\\n0 ann/1.wav bob/1.wav\\n"
    >>> _ = trials.write_text(lines)
    >>> list(draw_cohort(folder, trials, folder, size=10).ids)
    2 files of the cohort, of 2 folders that the trial list tests on, are left \
out
    ['cat/1.wav', 'dan/1.wav']
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--cohort: there is no folder {folder}")
    counts = collections.Counter()
    files = find_audio(folder, collections.Counter())
    places = trial_places(verification_file, trial_folder)
    files = without_tested(files, folder, places, counts)
    names = [name for name, problem in files if problem is None]
    if counts["excluded"]:
        print(
            f"{counts['excluded']} files of the cohort, of "
            f"{counts['excluded folders']} folders that the trial list tests "
            "on, are left out"
        )
    if not names:
        raise ValueError(
            f"--cohort: {folder} holds no wav, flac, ogg or mp3 file of a "
            "folder that the trial list does not test on. Give a folder with "
            "one folder for each of other speakers"
        )
    random.Random(seed).shuffle(names)
    rows = []
    with tqdm(total=min(size, len(names)), desc="cohort", delay=3) as progress:
        for name in names:
            if len(rows) == size:
                break
            path = str(folder / name)
            try:
                seconds = audio_seconds(path)
            except BadAudio:
                continue
            rows.append((name, path, 0.0, seconds, ""))
            progress.update()
    return Manifest.of(sorted(rows))
