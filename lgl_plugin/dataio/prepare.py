"""A folder of audio to a manifest, the csv that everything else starts from.

Only headers are read, in parallel, and rows are written as they come, so that
a million files need minutes and little memory. An interrupted scan goes on
where it stopped, a finished one is reused, and test speakers stay out.
"""

import collections
import contextlib
import csv
import itertools
import json
import multiprocessing
import operator
import os
import pathlib
import re
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import soundfile
from speechbrain.utils.logger import get_logger
from tqdm import tqdm

from lgl_plugin.dataio.audio import rate_problem, why_unreadable
from lgl_plugin.dataio.manifest import COLUMNS, CONTROL, one_line
from lgl_plugin.dataio.trials import trial_places, without_tested
from lgl_plugin.utils.files import atomic_write, checksum, write_json

logger = get_logger(__name__)

EXTENSIONS = (".flac", ".mp3", ".ogg", ".wav")
SAMPLE_RATE = 16000
# What a line of JSON that was torn, or is another's, may lead to.
TORN = (ValueError, TypeError, AttributeError, RecursionError)
# What a worker takes at a time: a few milliseconds of work.
BATCH = 64

# SpeechBrain's csv reader substitutes these in every column but ID.
_VARIABLE = re.compile(r"\$[\w.]")


def prepare_manifest(
    train_folder,
    manifest,
    data_root=None,
    speaker_folder=True,
    trials=None,
    trial_folder=None,
    min_seconds=0.3,
    max_bad_share=0.02,
    bad_files=None,
    num_workers=8,
):
    """Scans a folder for wav, flac, ogg and mp3 files and lists them in a csv.

    One row per file, `ID,duration,wav,start,stop,spk_id`, sorted by path: ID
    is the path below `train_folder`; duration is in seconds; wav is
    `$data_root/<path below data_root>`; start and stop are in samples at the
    file's own rate; spk_id is used for analysis after the fact only.

    Links are followed, and every folder is scanned once. A finished manifest
    with the same settings is reused; delete it to have it made again. Beside
    it lie `<manifest>.json` (settings and counts, written last) and, while a
    scan is under way or after it was interrupted, `<manifest>.journal`.

    Arguments
    ---------
    train_folder : str or pathlib.Path
        What to scan, with all that lies below it.
    manifest : str or pathlib.Path
        The csv to write.
    data_root : str or pathlib.Path, optional
        What `$data_root` stands for: train_folder (the default) or a folder
        above it.
    speaker_folder : bool
        Whether the first folder below train_folder names the speaker.
    trials : str or pathlib.Path, optional
        A trial list. What lies in the same first-level folder as one of its
        utterances is left out: nobody is trained on who is tested on.
    trial_folder : str or pathlib.Path, optional
        Where the trial list's paths start from; data_root if not given.
    min_seconds : float
        Shorter files count as bad.
    max_bad_share : float
        Which share of the files found may be bad, between 0 and 1.
    bad_files : str or pathlib.Path, optional
        Names every bad file, lines of `path below train_folder<TAB>reason`;
        `bad_files.txt` beside the manifest if not given.
    num_workers : int
        Processes that read headers. They wait for the disk more than they
        compute, so more of them than cores is right.

    Returns
    -------
    dict
        What `<manifest>.json` holds: settings; the numbers of files found,
        kept, excluded (test speakers), bad and short; hours; folders
        (first-level ones with a kept file); manifest_bytes and
        manifest_sha256.

    Raises
    ------
    FileNotFoundError
        When train_folder or the trial list does not exist.
    ValueError
        When no audio is found or left, data_root is not above train_folder,
        too many files are bad, or an argument is out of range.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> (folder / "wav" / "ann").mkdir(parents=True)
    >>> soundfile.write(folder / "wav" / "ann" / "1.wav", [0.1] * 8000, 16000)
    >>> manifest = folder / "manifest.csv"
    >>> made = prepare_manifest(
    ...     folder / "wav", manifest, data_root=folder, num_workers=1
    ... )
    >>> made["kept"]
    1
    >>> print(manifest.read_text(), end="")
    ID,duration,wav,start,stop,spk_id
    "ann/1.wav",0.5,"$data_root/wav/ann/1.wav",0,8000,"ann"
    """
    train_folder = os.path.abspath(train_folder)
    data_root = os.path.abspath(data_root or train_folder)
    trial_folder = os.path.abspath(trial_folder or data_root)
    manifest = pathlib.Path(manifest)
    bad_files = pathlib.Path(bad_files or manifest.parent / "bad_files.txt")
    sidecar = manifest.with_name(manifest.name + ".json")
    check_folders(train_folder, data_root)
    for name, value, least in (
        ("min_seconds", min_seconds, 0),
        ("max_bad_share", max_bad_share, 0),
        ("num_workers", num_workers, 1),
    ):
        if not value >= least:
            raise ValueError(f"{name} is {value}; it must be {least} or more")
    places = trial_places(trials, trial_folder) if trials else set()
    settings = {
        "train_folder": train_folder,
        "data_root": data_root,
        "speaker_folder": bool(speaker_folder),
        "trials": checksum(trials) if trials else None,
        "trial_folder": trial_folder if trials else None,
        "min_seconds": float(min_seconds),
        "max_bad_share": float(max_bad_share),
    }
    made = _finished(manifest, sidecar)
    if made is not None and _serves(made, settings):
        logger.info(
            f"Reusing {manifest}: {made['kept']} utterances, "
            f"{made['hours']:.1f} h. Delete it to scan {train_folder} again."
        )
        return made
    if made is not None:
        changes = ", ".join(
            f"{key} was {made['settings'].get(key)!r}, is {value!r}"
            for key, value in settings.items()
            if made["settings"].get(key) != value
        )
        logger.warning(f"Making {manifest} again: {changes}.")
    manifest.parent.mkdir(parents=True, exist_ok=True)
    return _scan(settings, manifest, sidecar, bad_files, places, num_workers)


def check_folders(train_folder, data_root):
    """Raises what a user can do about a folder that cannot be scanned.

    Arguments
    ---------
    train_folder : str
        What is to be scanned, an absolute path.
    data_root : str
        What `$data_root` is to stand for, an absolute path.

    Raises
    ------
    FileNotFoundError
        When train_folder does not exist.
    ValueError
        When data_root is not above it.

    Example
    -------
    >>> check_folders("/no/such/folder", "/no/such")
    Traceback (most recent call last):
    FileNotFoundError: train_folder: /no/such/folder is missing. Set \
--data_folder, or --train_folder itself, to where the training audio lies.
    """
    if not os.path.isdir(train_folder):
        what = "is no folder" if os.path.exists(train_folder) else "is missing"
        raise FileNotFoundError(
            f"train_folder: {train_folder} {what}. Set --data_folder, or "
            "--train_folder itself, to where the training audio lies."
        )
    if os.path.commonpath((train_folder, data_root)) != data_root:
        raise ValueError(
            f"data_root: {data_root} is not above train_folder "
            f"{train_folder}, so that paths cannot start from it. Set "
            "--data_folder to a folder that holds --train_folder."
        )


def _below(folder, root):
    """The path from root down to folder, empty or with a slash at its end."""
    path = os.path.relpath(folder, root).replace(os.sep, "/")
    return "" if path == "." else path + "/"


def _finished(manifest, sidecar):
    """What a sidecar says of its manifest; None unless they match."""
    try:
        made = json.loads(sidecar.read_text(encoding="utf-8"))
        whole = made["manifest_bytes"] == manifest.stat().st_size
        # Earlier versions kept no checksum.
        before = made.get("manifest_sha256")
        whole = whole and before in (None, checksum(manifest))
        counts = [made[key] for key in ("found", "kept", "bad", "short")]
        whole = whole and all(type(count) is int for count in counts)
        whole = whole and isinstance(made["hours"], float)
        whole = whole and isinstance(made["settings"], dict)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return made if whole else None


def _serves(made, settings):
    """Whether a finished manifest is what these settings would make."""
    wrong, share = made["bad"] + made["short"], settings["max_bad_share"]
    same = {**made["settings"], "max_bad_share": share} == settings
    return same and wrong <= share * made["found"]


def _scan(settings, manifest, sidecar, bad_files, places, num_workers):
    """Writes bad_files, the manifest and its sidecar, in this order."""
    folder = settings["train_folder"]
    prefix = _below(folder, settings["data_root"])
    counts = collections.Counter()
    others = collections.Counter()
    journal = _Journal(manifest.with_name(manifest.name + ".journal"), settings)
    with journal, atomic_write(manifest) as out:
        files = find_audio(folder, others)
        files = without_tested(files, folder, places, counts)
        files = _sifted(files, prefix, journal)
        headers = _read_headers(folder, files, num_workers)
        with atomic_write(bad_files) as bad, contextlib.closing(headers):
            _write_rows(headers, settings, prefix, out, bad, journal, counts)
        # The scan is complete: what is wrong now is put right by changing
        # files, and no record of them may outlast the change.
        journal.remove()
        made = _summary(settings, counts)
        _check_counts(made, others, bad_files)
        if manifest.exists() and _finished(manifest, sidecar) is None:
            aside = manifest.with_name(manifest.name + ".old")
            os.replace(manifest, aside)
            logger.warning(
                f"{manifest} was not made here or was changed since; it is "
                f"now {aside}."
            )
        # Should the power fail between the two, no sidecar may vouch for a
        # manifest that it does not belong to.
        sidecar.unlink(missing_ok=True)
    made["manifest_bytes"] = manifest.stat().st_size
    made["manifest_sha256"] = checksum(manifest)
    write_json(sidecar, made)
    _log_notices(made, counts, manifest, bad_files)
    return made


def _write_rows(headers, settings, prefix, out, bad, journal, counts):
    """Sends every file to the manifest or to the bad ones, and counts."""
    out.write(",".join(COLUMNS) + "\n")
    # All text is quoted: SpeechBrain's reader strips blanks at the start of
    # bare fields, which would change the ID of such a file.
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    last_folder = ""
    for name, header, fresh in tqdm(
        headers, desc="reading headers", unit=" files"
    ):
        problem, kind = _problem(header, settings["min_seconds"])
        if problem:
            counts[kind] += 1
            bad.write(f"{one_line(name)}\t{one_line(problem)}\n")
            continue
        if fresh:
            journal.add(name, header)
        frames, rate, channels = header
        folder = name.split("/")[0] if "/" in name else ""
        speaker = folder if settings["speaker_folder"] else ""
        wav = f"$data_root/{prefix}{name}"
        seconds = round(frames / rate, 6)
        writer.writerow((name, seconds, wav, 0, frames, speaker))
        counts["kept"] += 1
        counts["seconds"] += seconds
        counts["other rate"] += rate != SAMPLE_RATE
        counts["more channels"] += channels > 1
        counts["converted"] += rate != SAMPLE_RATE or channels > 1
        # Sorted by path, a folder's files come one after another.
        counts["folders"] += folder not in ("", last_folder)
        last_folder = folder


def _summary(settings, counts):
    """What the sidecar says, but for the size of the manifest."""
    keys = ("kept", "excluded", "bad", "short")
    return {
        "settings": settings,
        "found": sum(counts[key] for key in keys),
        **{key: counts[key] for key in keys},
        "hours": round(counts["seconds"] / 3600, 3),
        "folders": counts["folders"],
    }


def find_audio(root, others):
    """Finds the audio files of a folder, at any depth, sorted by path.

    Links are followed, and every folder is looked at once. Files are not
    opened.

    Arguments
    ---------
    root : str or pathlib.Path
        The folder.
    others : collections.Counter
        Counts what has another extension, by extension.

    Yields
    ------
    (str, str or None)
        The path below root, and why the file or folder cannot be read, None
        if nothing speaks against it.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> for name in ("b.flac", "a.WAV", "notes.txt"):
    ...     (folder / name).touch()
    >>> others = collections.Counter()
    >>> list(find_audio(folder, others)), others
    ([('a.WAV', None), ('b.flac', None)], Counter({'.txt': 1}))
    """
    visited = set()
    repeated = []
    stack = [("", "folder")]
    while stack:
        name, kind = stack.pop()
        path = os.path.join(root, name)
        if kind == "folder":
            # A link may lead back up, or to a folder that is here anyway.
            real = os.path.realpath(path)
            if real in visited:
                repeated.append(path)
                continue
            visited.add(real)
            try:
                with os.scandir(path) as entries:
                    below = [
                        (os.path.join(name, entry.name), _kind(entry))
                        for entry in entries
                    ]
            except OSError as error:
                yield name, f"folder cannot be listed: {error.strerror}"
                continue
            stack += sorted(below, reverse=True)
            continue
        extension = os.path.splitext(name)[1].lower()
        if extension not in EXTENSIONS:
            others[extension or "no extension"] += 1
        elif kind == "file":
            yield name, None
        else:
            yield name, "is a broken link or not a regular file"
    if repeated:
        logger.warning(
            f"{len(repeated)} linked folders lead to folders that were "
            "scanned already and were skipped, "
            f"{one_line(repeated[0])} the first."
        )


def _kind(entry):
    """Whether a directory entry is, or links to, a folder or a file."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() else "neither"
    except OSError:  # a link to itself
        return "neither"


def _sifted(files, prefix, journal):
    """Yields (path, outcome): a problem, a header known, or None to read."""
    for name, problem in files:
        problem = problem or _name_problem(prefix + name)
        yield name, problem or journal.find(name)


def _name_problem(path):
    """Why a path would not survive the csv and its readers, or None."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "name is not UTF-8"
    if CONTROL.search(path):
        return "name holds a line break or another control character"
    if _VARIABLE.search(path):
        return "name holds a $ that SpeechBrain would take for a variable"
    return None


def _read_headers(folder, files, num_workers):
    """Reads headers in parallel; yields (path, outcome, fresh) in order.

    Processes, since threads gained nothing over a plain loop when measured
    on files that were not in memory.
    """
    files = iter(files)
    waiting = collections.deque()
    with ProcessPoolExecutor(num_workers, initializer=start_worker) as pool:
        while True:
            batch = list(itertools.islice(files, BATCH))
            if batch:
                future = pool.submit(_read_batch, folder, batch)
                waiting.append((future, batch))
            # Enough in flight that nobody waits, few enough for the memory.
            if waiting and (not batch or len(waiting) > 4 * num_workers):
                future, asked = waiting.popleft()
                try:
                    yield from future.result()
                except BrokenProcessPool as error:
                    last = waiting[-1][1] if waiting else asked
                    raise RuntimeError(
                        "a process that reads headers died, of memory or of a "
                        f"file in {folder} from {one_line(asked[0][0])} to "
                        f"{one_line(last[-1][0])}. The same command goes on "
                        "from there."
                    ) from error
            elif not batch:
                return


def start_worker():
    """Leaves Ctrl-C to the main process, and ends with it if it is killed.

    Example
    -------
    >>> with ProcessPoolExecutor(1, initializer=start_worker) as pool:
    ...     pool.submit(signal.getsignal, signal.SIGINT).result()
    <Handlers.SIG_IGN: 1>
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _read_batch(folder, batch):
    """Reads the headers that a batch of (path, outcome) still lacks."""
    return [
        (name, outcome or _read_header(os.path.join(folder, name)), not outcome)
        for name, outcome in batch
    ]


def _read_header(path):
    """Frames, sample rate and channels of a file, or why it is bad."""
    try:
        # Half again as fast as soundfile.info, which also gathers a log.
        with soundfile.SoundFile(path) as audio:
            return audio.frames, audio.samplerate, audio.channels
    except soundfile.LibsndfileError as error:
        return why_unreadable(path, error)


def _problem(header, min_seconds):
    """Why a file is bad and which count it goes to, or (None, None)."""
    if isinstance(header, str):
        return header, "bad"
    frames, rate, _ = header
    if frames == 0:
        return "holds no samples", "bad"
    if frames >= 2**62:  # FLAC from a stream; libsndfile's largest count
        return "header does not give the length: encode it again", "bad"
    if problem := rate_problem(rate, SAMPLE_RATE):
        return problem, "bad"
    if frames / rate < min_seconds:
        return f"lasts {frames / rate:.3f} s, under {min_seconds} s", "short"
    return None, None


def _check_counts(made, others, bad_files):
    """Raises ValueError when too little came of a scan."""
    settings = made["settings"]
    folder = settings["train_folder"]
    if made["found"] == 0:
        instead = ", ".join(
            f"{count} {extension}" for extension, count in others.most_common(5)
        )
        raise ValueError(
            f"train_folder: no audio below {folder}. Looked for "
            f"{', '.join(EXTENSIONS)}; found {instead or 'no file at all'}. "
            "Set --data_folder, or --train_folder itself, to where the "
            "training audio lies, or convert it to one of these."
        )
    wrong = made["bad"] + made["short"]
    share = settings["max_bad_share"]
    if wrong > share * made["found"] or (wrong and not made["kept"]):
        with open(bad_files, encoding="utf-8") as lines:
            first = "".join(
                "  " + line.replace("\t", ": ", 1)
                for line in itertools.islice(lines, 10)
            )
        raise ValueError(
            f"{wrong} of {made['found']} audio files below {folder} are bad "
            f"({made['bad']} unusable, {made['short']} shorter than "
            f"min_seconds: {settings['min_seconds']}), {made['kept']} are "
            f"left; max_bad_share: {share} allows "
            f"{int(share * made['found'])}. All are named in {bad_files}; "
            f"the first:\n{first}"
            "Repair or remove them, or raise max_bad_share."
        )
    if not made["kept"]:
        raise ValueError(
            f"train_folder: all {made['found']} files below {folder} share "
            "their first-level folder with utterances of the trial list, so "
            "none is left to train on. Set --train_folder to the folder that "
            "holds one folder per speaker."
        )


def _log_notices(made, counts, manifest, bad_files):
    """Says what a user should know about a new manifest."""
    logger.info(
        f"{manifest}: {made['kept']} utterances in {made['folders']} folders, "
        f"{made['hours']:.1f} h."
    )
    if counts["excluded"]:
        logger.warning(
            f"{counts['excluded']} files in {counts['excluded folders']} "
            "folders are left out: the trial list tests on these folders."
        )
    if counts["bad"] + counts["short"]:
        logger.warning(
            f"{counts['bad']} unusable and {counts['short']} short files are "
            f"left out; {bad_files} names them."
        )
    if counts["converted"]:
        logger.warning(
            f"{counts['converted']} files are not {SAMPLE_RATE} Hz mono "
            f"({counts['other rate']} of another rate, "
            f"{counts['more channels']} of more channels); they are converted "
            "when read."
        )


class _Journal:
    """Headers that an unfinished scan has read, so that the next need not.

    A line of settings, then a line of JSON per file in the order of the scan,
    so that finding is a merge and takes no memory. What was bad is not kept:
    it may have been repaired.
    """

    def __init__(self, path, settings):
        self._path = path
        first = json.dumps(settings).encode() + b"\n"
        self._old = None
        self._head = None
        if path.exists():
            self._old = open(path, "rb")
            self._left = path.stat().st_size - len(first)
            if self._old.readline() == first:
                self._head = self._next()
        self._new = open(path, "ab" if self._head else "wb")
        if self._head:
            logger.info(
                f"Going on with the scan that was interrupted; delete {path} "
                "to read all headers again."
            )
        # Going on, the line break sets off a last line written by half.
        self._new.write(b"\n" if self._head else first)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._new.close()
        if self._old is not None:
            self._old.close()

    def _next(self):
        """The next whole line of the earlier scan, or None after the last."""
        while self._left > 0:
            line = self._old.readline()
            self._left -= len(line)
            with contextlib.suppress(*TORN):
                name, *header = json.loads(line)
                frames, rate, channels = map(operator.index, header)
                if rate > 0:
                    return name.split("/"), (frames, rate, channels)
        return None

    def find(self, name):
        """The header that the earlier scan read, or None."""
        key = name.split("/")
        while self._head is not None and self._head[0] < key:
            self._head = self._next()
        if self._head is not None and self._head[0] == key:
            return self._head[1]
        return None

    def add(self, name, header):
        """Records a header."""
        self._new.write(json.dumps([name, *header]).encode() + b"\n")

    def remove(self):
        """Ends the journal: its scan is complete."""
        self._path.unlink()
