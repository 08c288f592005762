"""A cohort for score normalisation, drawn from a folder of unlabelled audio."""

import collections
import itertools
import pathlib
import random
from collections.abc import Iterable, Sequence

from lgl_plugin.dataio.audio import BadAudio, whole_file
from lgl_plugin.dataio.folder import find_audio, name_problem
from lgl_plugin.dataio.manifest import Manifest, one_line
from lgl_plugin.dataio.trials import exclude_tested, trial_paths
from lgl_plugin.utils.progress import tqdm


def draw_cohort(
    folder: str | pathlib.Path,
    trial_lists: Iterable[str | pathlib.Path],
    trial_folder: str | pathlib.Path,
    size: int,
    seed: int = 0,
    channel: int | None = None,
    rates: Sequence[int] = (16000,),
) -> Manifest:
    """Draws up to `size` files of a folder; returns them sorted by path.

    The path is the utterance's ID. First-level folders with an utterance of a
    trial list are left out, as in training. So are files that cannot be read,
    that lack the `channel`, or whose name a manifest cannot hold. The numbers
    of these files are printed. `channel` and `rates` are those of
    `trial_audio`. Raises FileNotFoundError if the folder is missing, and
    ValueError if it has no audio of untested speakers.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--cohort: there is no folder {folder}")
    counts = collections.Counter()
    tested: set[str] = set()
    for path in trial_lists:
        tested |= trial_paths(path, trial_folder)
    files = exclude_tested(find_audio(folder), folder, tested, counts)
    names, bad = [], []
    for name, problem in files:
        problem = problem or name_problem(str(folder / name))
        if problem:
            bad.append((name, problem))
        else:
            names.append(name)
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

    def readable():
        for name in names:
            try:
                yield whole_file(name, folder / name, channel, rates)
            except BadAudio as error:
                bad.append((name, str(error)))

    rows = itertools.islice(readable(), size)
    size = min(size, len(names))
    cohort = sorted(tqdm(rows, "cohort", size, delay=3))
    if bad:
        print(
            f"{len(bad)} files of the cohort cannot be used and are left out; "
            f"the first: {' '.join(map(one_line, bad[0]))}"
        )
    return Manifest.of(cohort)
