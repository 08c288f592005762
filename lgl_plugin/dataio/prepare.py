"""Scans a folder of audio and writes its manifest, a csv of utterances.

Each file is opened and a little of it decoded, in parallel, and rows are
written at once: a million files need minutes and little memory. A finished
manifest is reused. Speakers of the trial list are left out.
"""

import collections
import contextlib
import csv
import functools
import hashlib
import itertools
import os
import pathlib
import re
import shutil
from collections.abc import Callable

from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import Header, probe
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.bandwidths import warn_of_bandwidths
from lgl_plugin.dataio.folder import (
    EXTENSIONS,
    UNREAD,
    find_audio,
    name_problem,
)
from lgl_plugin.dataio.manifest import CHANNEL, COLUMNS, one_line
from lgl_plugin.dataio.probing import probe_all
from lgl_plugin.dataio.shards import RECORD
from lgl_plugin.dataio.trials import exclude_tested, trial_paths
from lgl_plugin.utils.checks import check_from
from lgl_plugin.utils.files import (
    atomic_write,
    checksum,
    read_json,
    sync,
    write_json,
)
from lgl_plugin.utils.progress import tqdm

logger = get_logger(__name__)

# Shorter files are left out as bad ones. A manifest made with another value is
# made again.
MIN_SECONDS = 0.3
# The most processes that read files. There is at most one for 64 files, and at
# most four a core, because they wait for the disk more than they compute.
WORKERS = 32
# Counts of the files found; each file is in one count.
COUNTS = ("kept", "excluded", "bad", "short")

# Shown by verbs and recipes that train: the others take only folders.
LIST_HINT = (
    " A list of utterances is given beside it by --manifest, as a csv with the "
    f"columns {','.join(COLUMNS)}."
)
# Extensions of lists, wav.scp of Kaldi's folders among them.
LISTS = {".csv", ".tsv", ".scp"}

# SpeechBrain's csv reader takes these for variables in every column but ID.
_VARIABLE = re.compile(r"\$[\w.]")


def prepare_manifest(
    train_folder: str | pathlib.Path,
    manifest: str | pathlib.Path,
    data_root: str | pathlib.Path | None = None,
    speaker_folder: bool = True,
    trials: str | pathlib.Path | None = None,
    trial_folder: str | pathlib.Path | None = None,
    max_bad_share: float = 0.02,
    sample_rate: int = 16000,
    channel: int | None = None,
    accept: Callable[[pathlib.Path], None] | None = None,
    list_again: bool = False,
    to_train: bool = True,
) -> dict:
    """Scans a folder for wav, flac, ogg and mp3 files and lists them in a csv.

    One row per file, `ID,duration,wav,start,stop,spk_id`, sorted by path: ID
    is the path below `train_folder`; duration is in seconds; wav is
    `$data_root/<path below data_root>`; start and stop are in samples at the
    file's own rate; spk_id is used for analysis after the fact only.

    Links are followed, and every folder is scanned once. Hidden files and
    leftovers of systems are skipped, see `lgl_plugin.dataio.folder`. A
    finished manifest with the same settings is reused; delete it to have it
    made again. Beside it lie `bad_files.txt`, lines of `path below
    train_folder<TAB>reason`, and `<manifest>.json` with settings and counts.
    If a scan is refused, these files stay as they are. If it was for too many
    bad files, `bad_files.txt.refused` lists them.

    Arguments
    ---------
    train_folder : str or pathlib.Path
        The folder to scan, at any depth.
    manifest : str or pathlib.Path
        The csv to write.
    data_root : str or pathlib.Path, optional
        The folder that `$data_root` stands for: train_folder (the default) or
        one above it.
    speaker_folder : bool
        Whether the first folder below train_folder names the speaker.
    trials : str or pathlib.Path, optional
        A trial list. Files in the first-level folder of one of its utterances
        are left out, so that no test speaker is trained on.
    trial_folder : str or pathlib.Path, optional
        Where the trial list's paths start from; data_root if not given.
    max_bad_share : float
        The share of files that may be bad, between 0 and 1; those shorter than
        0.3 s count as bad.
    sample_rate : int
        The rate in Hz that training will convert to.
    channel : int, optional
        The channel to train on, from 0, kept in a column of that name; the
        mean of all if not given.
    accept : callable, optional
        Called with the path of a new manifest before any file is replaced. If
        it raises an error, all files stay as they are.
    list_again : bool
        Whether to scan again if files of the folder have changed, by their
        names, sizes and times of modification. For manifests without a trial
        list.
    to_train : bool
        Whether an encoder is to be trained on the manifest. Only then do
        notices name settings of training.

    Returns
    -------
    dict
        The content of `<manifest>.json`: settings; the numbers of files
        found, kept, excluded (test speakers), bad and short; hours; folders
        (first-level ones with a kept file); narrow (kept files of a lower rate
        than `sample_rate`); lowest_rate, in Hz; passed_over (numbers of
        "hidden" files and folders, and of other files by extension);
        manifest_bytes and manifest_sha256; with `list_again` a checksum of the
        files' names, sizes and times.

    Raises
    ------
    FileNotFoundError
        When train_folder or the trial list does not exist.
    ValueError
        When no audio is found or left, data_root is not above train_folder,
        too many files are bad, or an argument is out of range.

    Example
    -------
    >>> import soundfile
    >>> folder = getfixture("tmp_path")
    >>> (folder / "wav" / "ann").mkdir(parents=True)
    >>> soundfile.write(folder / "wav" / "ann" / "1.wav", [0.1] * 8000, 16000)
    >>> manifest = folder / "manifest.csv"
    >>> made = prepare_manifest(folder / "wav", manifest, data_root=folder)
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
    check_folders(train_folder, data_root, to_train)
    check_from(0, max_bad_share=max_bad_share, channel=channel or 0)
    tested = trial_paths(trials, trial_folder) if trials else set()
    settings = {
        "train_folder": train_folder,
        "data_root": data_root,
        "speaker_folder": bool(speaker_folder),
        "trials": checksum(trials) if trials else None,
        "trial_folder": trial_folder if trials else None,
        "min_seconds": MIN_SECONDS,
        "max_bad_share": float(max_bad_share),
        "sample_rate": sample_rate,
        "channel": channel,
    }
    made = _finished(manifest) or _finish(manifest)
    changes: list[str] = []
    if made is not None:
        changes = _changes(made, settings)
        if not changes and list_again and not _lists(manifest, made):
            changes = ["files came, went or changed"]
        if not changes:
            logger.info(
                f"Reusing {manifest}: {made['kept']} utterances, "
                f"{made['hours']:.1f} h. Delete it to scan {train_folder} "
                "again."
            )
            return made
    made, counts = _scan(
        settings, manifest, tested, accept, list_again, to_train
    )
    if changes:  # logged now: a refused scan leaves the manifest as it was
        logger.warning(f"Made {manifest} again: {', '.join(changes)}.")
    _log_notices(made, counts, manifest, to_train)
    return made


def check_folders(
    train_folder: str, data_root: str, to_train: bool = True
) -> None:
    """Checks that train_folder is a folder in data_root; paths are absolute."""
    if not os.path.isdir(train_folder):
        state = "is no folder" if os.path.exists(train_folder) else "is missing"
        extension = os.path.splitext(train_folder)[1].lower()
        is_list = os.path.isfile(train_folder) and extension not in EXTENSIONS
        raise FileNotFoundError(
            f"the folder of audio {train_folder} {state}. Name the one where "
            "the audio lies; a recipe does so by --data_folder, or by "
            "--train_folder itself." + LIST_HINT * (is_list and to_train)
        )
    if os.path.commonpath((train_folder, data_root)) != data_root:
        raise ValueError(
            f"data_root: {data_root} is not above train_folder "
            f"{train_folder}, so that paths cannot start from it. Set "
            "--data_folder to a folder that holds --train_folder."
        )


def _beside(manifest):
    """Returns the paths of a manifest's sidecar and unfinished manifest."""
    return (
        manifest.with_name(manifest.name + ".json"),
        manifest.with_name(manifest.name + ".new"),
    )


def _finished(manifest, file=None):
    """Returns the sidecar's content, or None if it is of another file."""
    file, made = file or manifest, read_json(_beside(manifest)[0])
    try:
        whole = (
            made["manifest_bytes"] == file.stat().st_size
            and made["manifest_sha256"] == checksum(file)
            and made["found"] == sum(made[key] for key in COUNTS)
            and isinstance(made["hours"], float)
            and isinstance(made["settings"], dict)
        )
    except (OSError, KeyError, TypeError):
        return None
    return made if whole else None


def _finish(manifest):
    """Moves an unfinished manifest into place if the sidecar is its own.

    Returns the sidecar's content, or None.
    """
    _, new = _beside(manifest)
    made = _finished(manifest, new)
    if made is not None:
        os.replace(new, manifest)
        sync(manifest.parent)
    return made


def _changes(made, settings):
    """Returns how settings differ from those that a manifest was made with."""
    was = dict(made["settings"])
    # Another max_bad_share matters only if the scan exceeds it.
    share = settings["max_bad_share"]
    if made["bad"] + made["short"] <= share * made["found"]:
        was["max_bad_share"] = share
    return [
        f"{key} was {was.get(key)!r}, is {value!r}"
        for key, value in settings.items()
        if was.get(key) != value
    ]


def _lists(manifest, made):
    """Tells whether a folder still holds the files that a manifest lists.

    Names, sizes and times must be equal, not merely older than the manifest: a
    file that is copied over another often keeps an older time. A bad file also
    counts as changed if its inode was changed since, because a repaired file
    may have the same size and time.
    """
    folder, listed = made["settings"]["train_folder"], manifest.stat()
    bad = BadFiles(manifest.with_name("bad_files.txt")).reasons
    if len(bad) < made["bad"] + made["short"]:
        return False
    stamps = hashlib.sha256()
    for name, _ in _stamped(find_audio(folder), folder, stamps):
        if one_line(name) in bad:
            with contextlib.suppress(OSError):
                changed = os.stat(os.path.join(folder, name)).st_ctime_ns
                if changed > listed.st_mtime_ns:
                    return False
    return stamps.hexdigest() == made.get("files")


def _stamped(files, folder, stamps):
    """Yields files as they are; adds names, sizes and times to a checksum."""
    for name, problem in files:
        stamp = None
        with contextlib.suppress(OSError):
            status = os.stat(os.path.join(folder, name))
            stamp = status.st_size, status.st_mtime_ns
        stamps.update(repr((name, stamp)).encode())
        yield name, problem


def _scan(settings, manifest, tested, accept, stamp, to_train):
    """Writes bad_files.txt, the manifest and its sidecar.

    Returns the content of the sidecar, and all counts.
    """
    sidecar, new = _beside(manifest)
    bad_files = manifest.with_name("bad_files.txt")
    folder = settings["train_folder"]
    prefix = os.path.relpath(folder, settings["data_root"])
    prefix = "" if prefix == "." else prefix.replace(os.sep, "/") + "/"
    counts, passed_over = collections.Counter(), collections.Counter()
    files, stamps = find_audio(folder, passed_over), hashlib.sha256()
    if stamp:  # not otherwise: a further call a file is slow on network disks
        files = _stamped(files, folder, stamps)
    files = exclude_tested(files, folder, tested, counts)
    files = (
        (name, problem or _name_problem(prefix + name))
        for name, problem in files
    )
    read = functools.partial(
        probe, sample_rate=settings["sample_rate"], channel=settings["channel"]
    )
    # Closed explicitly: the traceback of an exception would keep the generator,
    # and with it the processes of the pool.
    headers = contextlib.closing(probe_all(read, folder, files, WORKERS))
    refused = bad_files.with_name(bad_files.name + ".refused")
    # Nothing is replaced before all checks have passed: otherwise the bad files
    # of a refused scan would stand beside the old manifest.
    with atomic_write(new) as out, atomic_write(bad_files) as bad:
        with headers as rows:
            _write_rows(rows, settings, prefix, out, bad, counts)
        made = {
            "settings": settings,
            "found": sum(counts[key] for key in COUNTS),
            **{key: counts[key] for key in COUNTS},
            "hours": round(counts["seconds"] / 3600, 3),
            "folders": counts["folders"],
            "narrow": counts["narrow"],
            "lowest_rate": counts["lowest rate"],
            "passed_over": dict(passed_over),
        }
        bad.flush()
        _check_counts(made, bad.name, refused, to_train)
        if accept is not None:
            out.flush()
            accept(pathlib.Path(out.name))
    refused.unlink(missing_ok=True)
    made["manifest_bytes"] = new.stat().st_size
    made["manifest_sha256"] = checksum(new)
    if stamp:
        made["files"] = stamps.hexdigest()
    if manifest.exists() and _finished(manifest) is None:
        aside = manifest.with_name(manifest.name + ".old")
        os.replace(manifest, aside)
        logger.warning(
            f"{manifest} was not made here or was changed since; it is now "
            f"{aside}."
        )
    # The sidecar first: it has the manifest's checksum. After a kill between
    # the two, the next start recognises the manifest and need not scan again.
    write_json(sidecar, made)
    _finish(manifest)
    return made, counts


def _write_rows(headers, settings, prefix, out, bad, counts):
    """Writes every file to the manifest or to bad_files.txt, and counts."""
    last = [] if settings["channel"] is None else [settings["channel"]]
    out.write(",".join([*COLUMNS, *[CHANNEL] * len(last)]) + "\n")
    # All text is quoted: SpeechBrain's reader strips blanks at the start of
    # bare fields, which would change the ID of such a file.
    writer = csv.writer(out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    last_folder = ""
    for name, header in tqdm(headers, "reading files", unit=" files"):
        kind, problem = "bad", header
        if isinstance(header, Header):
            kind, problem = "short", None
            if header.seconds < MIN_SECONDS:
                problem = f"lasts {header.seconds:.3f} s, under {MIN_SECONDS} s"
        if problem:
            counts[kind] += 1
            bad.write(f"{one_line(name)}\t{one_line(problem)}\n")
            continue
        frames, rate, channels = header
        folder = name.split("/")[0] if "/" in name else ""
        speaker = folder if settings["speaker_folder"] else ""
        wav = f"$data_root/{prefix}{name}"
        seconds = round(header.seconds, 6)
        writer.writerow((name, seconds, wav, 0, frames, speaker, *last))
        counts["kept"] += 1
        counts["seconds"] += seconds
        other_rate = rate != settings["sample_rate"]
        counts["other rate"] += other_rate
        counts["narrow"] += rate < settings["sample_rate"]
        counts["lowest rate"] = min(rate, counts["lowest rate"] or rate)
        counts["more channels"] += channels > 1
        counts["converted"] += other_rate or channels > 1
        # Sorted by path, a folder's files come one after another.
        counts["folders"] += folder not in ("", last_folder)
        last_folder = folder


def _name_problem(path):
    """Returns why a path would not survive the csv and its readers, or None."""
    if not name_problem(path) and _VARIABLE.search(path):
        return "name holds a $ that SpeechBrain would take for a variable"
    return name_problem(path)


def _check_counts(made, bad_files, refused, to_train):
    """Raises ValueError if there is no audio, none is left or too much is bad.

    If too many files are bad, their list is copied to `refused`.
    """
    settings = made["settings"]
    folder = settings["train_folder"]
    if made["found"] == 0:
        others = collections.Counter(made["passed_over"]).most_common(5)
        instead = ", ".join(f"{count} {kind}" for kind, count in others)
        if os.path.exists(os.path.join(folder, RECORD)):
            advice = f"add --manifest={os.path.join(folder, 'manifest.csv')}"
            if not to_train:
                advice = "they are to train on. Name the recordings' folder"
            raise ValueError(f"{folder} holds shards of `lgl pack`: {advice}")
        raise ValueError(
            f"there is no audio below {folder}. Looked for "
            f"{', '.join(EXTENSIONS)}; found {instead or 'no file at all'}. "
            "Name the folder where the audio lies (a recipe does so by "
            "--data_folder, or by --train_folder itself), or convert the "
            "audio to one of these."
            + LIST_HINT
            * (to_train and bool(LISTS & made["passed_over"].keys()))
        )
    wrong = made["bad"] + made["short"]
    share = settings["max_bad_share"]
    if wrong > share * made["found"] or (wrong and not made["kept"]):
        shutil.copyfile(bad_files, refused)
        with open(refused, encoding="utf-8") as lines:
            first = "".join(
                "  " + line.replace("\t", ": ", 1)
                for line in itertools.islice(lines, 10)
            )
        raise ValueError(
            f"{wrong} of {made['found']} audio files below {folder} are bad "
            f"({made['bad']} unusable, {made['short']} shorter than "
            f"{MIN_SECONDS} s), {made['kept']} are left; max_bad_share: "
            f"{share} allows {int(share * made['found'])}. All are named in "
            f"{refused}; the first:\n{first}"
            + (
                "Repair or remove them, or raise max_bad_share."
                if made["kept"]
                else "Repair them, or name other audio or another channel."
            )
        )
    if not made["kept"]:
        raise ValueError(
            f"train_folder: all {made['found']} files below {folder} share "
            "their first-level folder with utterances of the trial list, so "
            "none is left to train on. Set --train_folder to the folder that "
            "holds one folder per speaker. If it is that already, add "
            "recordings of other speakers, or test on fewer."
        )


def _log_notices(made, counts, manifest, to_train):
    """Logs what a user should know about a new manifest."""
    settings, where = made["settings"], f"in {made['folders']} folders"
    if not made["folders"]:
        where = f"directly in {settings['train_folder']}"
    logger.info(
        f"{manifest}: {made['kept']} utterances {where}, {made['hours']:.1f} h."
    )
    if settings["speaker_folder"] and not made["folders"]:
        logger.warning(
            "No folder names a speaker, so that the run cannot say how good "
            "its pseudo-labels are. If speakers have folders, set "
            "--train_folder to the folder above theirs."
        )
    unread = {k: n for k, n in made["passed_over"].items() if k in UNREAD}
    if unread:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(unread.items()))
        logger.warning(
            f"{sum(unread.values())} files of other audio formats are left "
            f"out ({kinds}). To have them read, convert them, for example "
            f"by `ffmpeg -i file{next(iter(unread))} file.wav`."
        )
    if counts["excluded"]:
        logger.warning(
            f"{counts['excluded']} files in {counts['excluded folders']} "
            "folders are left out: the trial list tests on these folders."
        )
    if counts["bad"] + counts["short"]:
        logger.warning(
            f"{counts['bad']} unusable and {counts['short']} short files are "
            f"left out; {manifest.with_name('bad_files.txt')} names them."
        )
    if counts["converted"]:
        channel = settings["channel"]
        mix = "mean" if channel is None else f"channel {channel}"
        logger.warning(
            f"{counts['converted']} files are not {settings['sample_rate']} Hz "
            f"mono ({counts['other rate']} of another rate, {made['narrow']} "
            f"of them of a lower one, {counts['more channels']} of more "
            f"channels, whose {mix} is taken); they are converted when read."
        )
    rates = made["lowest_rate"], settings["sample_rate"]
    warn_of_bandwidths(
        *(made["narrow"], made["kept"], *rates, "files", to_train)
    )
