"""Embeds all audio of a folder with an exported encoder, on disk."""

import hashlib
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterable

import numpy as np
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.folder import refuse_recordings
from lgl_plugin.dataio.manifest import Manifest, load_manifest, one_line
from lgl_plugin.dataio.prepare import prepare_manifest
from lgl_plugin.inference.extractor import load_extractor
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.lock import LOCK, lock_folder
from lgl_plugin.runs.plain import plain_settings
from lgl_plugin.runs.pretrained import YAML, encoder_files
from lgl_plugin.runs.state import STATE
from lgl_plugin.runs.weights import AFFINE, ENCODER
from lgl_plugin.utils.device import check_device
from lgl_plugin.utils.files import checksum, read_json, write_json
from lgl_plugin.utils.signals import stop
from lgl_plugin.utils.tables import write_csv

logger = get_logger(__name__)

RECORD = "embeddings.json"
MADE = ("vectors.npy", "utterances.csv", "manifest.csv", "bad_files.txt")


def embed_folder(
    encoder: str | pathlib.Path,
    audio: str | pathlib.Path,
    folder: str | pathlib.Path,
    device: str | None = None,
    num_workers: int | None = None,
    check: Callable[[Manifest], object] | None = None,
    channel: int | None = None,
) -> tuple[Manifest, Embeddings]:
    """Embeds every audio file of a folder and keeps the vectors on disk.

    `folder` gets `vectors.npy`, `utterances.csv` with a line for each row of
    the vectors, `manifest.csv` and `bad_files.txt`. The same call continues an
    interrupted one. Once all is embedded it does nothing, unless files came,
    went or have another time of modification, or a file that could not be read
    was replaced.

    Arguments
    ---------
    encoder : str or pathlib.Path
        A source for `load_extractor`.
    audio : str or pathlib.Path
        A folder of wav, flac, ogg and mp3 files, at any depth.
    folder : str or pathlib.Path
        Where to write.
    device : str, optional
        Where to embed; the GPU if there is one.
    num_workers : int, optional
        Processes that read audio; 0 reads in this one. By default 0 on a CPU
        and up to 8 beside a GPU.
    check : callable, optional
        Called with the manifest before anything is embedded. It raises an error
        if other input, such as labels, does not fit the audio.
    channel : int, optional
        The channel to read, from 0; files without it are left out. By default
        the mean of all is read.

    Returns
    -------
    Manifest, Embeddings
        All files that were listed, and the embeddings of those that could be
        read.

    Raises
    ------
    FileNotFoundError
        If a folder is missing.
    FileExistsError
        If `folder` holds recordings, or files of these names that another
        program wrote.
    ValueError
        If there is no audio, the encoder cannot be loaded, or `folder` holds
        embeddings by another encoder, of another folder's audio or of another
        channel.

    Example
    -------
    >>> manifest, found = embed_folder(
    ...     "results/lgl/1/export/iter5", "/my/audio", "embeddings"
    ... )  # doctest: +SKIP
    >>> found.vectors.shape  # doctest: +SKIP
    (1078, 192)
    """
    folder, device = pathlib.Path(folder), check_device(device)
    refuse_recordings(folder, audio)
    # The encoder first: its faults show before a long scan.
    extract = load_extractor(encoder, device, num_workers)
    refuse_foreign(folder, MADE, folder)
    lock_folder(folder)
    before = read_json(folder / RECORD)  # {} if unfinished
    made_from = {n: checksum(p) for n, p in encoder_files(encoder).items()}
    # Checked before the listing, which would replace the other encoder's list.
    parts = (ENCODER, AFFINE)
    if before and any(before.get(n) != made_from.get(n) for n in parts):
        raise ValueError(
            f"{folder} holds embeddings by another encoder: name another "
            "folder, or delete that one"
        )
    channels = other_channel(folder, channel)
    if before and channels:
        raise ValueError(
            f"{folder} holds embeddings with {channels}: name another folder, "
            "or delete that one"
        )
    listed = folder / "manifest.csv"
    earlier = _listed_with(folder).get("train_folder", os.path.abspath(audio))

    def accept(version):
        """Accepts changed files of the same folder, and a moved folder."""
        moved = earlier != os.path.abspath(audio)
        if before and moved and version[listed.name] != before[listed.name]:
            raise ValueError(
                f"{folder} holds embeddings of {earlier}: name another "
                "folder, or delete that one"
            )

    rate = extract.sample_rate
    manifest, version = list_folder(audio, listed, rate, accept, channel)
    if check is not None:
        check(manifest)
    made_from.update(version)
    if before == made_from:
        embeddings = Embeddings.load(folder)
        if not _unnamed(manifest, embeddings, folder):
            logger.info("%s: all is embedded already", folder)
            return manifest, embeddings
    # A crash must not leave vectors of one encoder under another's record.
    (folder / RECORD).unlink(missing_ok=True)
    rows, times = np.arange(len(manifest)), version["times"]
    with stop.on_signals():
        embeddings, bad = extract(manifest, rows, folder, version=times)
    BadFiles(folder / "bad_files.txt", limit=sys.maxsize).add(bad)
    names = embeddings.utterances
    durations = manifest.durations[manifest.rows(names)]
    lines = (
        [row, name, round(float(seconds), 3)]
        for row, (name, seconds) in enumerate(zip(names, durations))
    )
    header = ["row", "ID", "seconds"]
    write_csv(folder / "utterances.csv", itertools.chain([header], lines))
    write_json(folder / RECORD, made_from)  # last: it marks all as complete
    return manifest, embeddings


def list_folder(
    audio: str | pathlib.Path,
    listed: pathlib.Path,
    sample_rate: int,
    accept: Callable[[dict[str, str]], None],
    channel: int | None = None,
) -> tuple[Manifest, dict[str, str]]:
    """Lists a folder's audio in a csv, again if files came, went or changed.

    Files that cannot be read are counted and named; there is no limit on their
    number. Returns the manifest and its version: checksums of the csv and of
    the files' times, by which a later call recognises the same audio. The times
    count, because a replaced file may have other audio of the same length.
    `accept` is called with the version of a new listing before any file is
    replaced, as by `prepare_manifest`.
    """

    def read(path):
        manifest = load_manifest(path, os.path.abspath(audio))
        version = {listed.name: checksum(path), "times": _times(manifest)}
        return manifest, version

    prepare_manifest(
        audio,
        listed,
        speaker_folder=False,
        max_bad_share=1.0,
        list_again=True,
        to_train=False,
        sample_rate=sample_rate,
        channel=channel,
        accept=lambda path: accept(read(path)[1]),
    )
    return read(listed)


def other_channel(folder: pathlib.Path, channel: int | None) -> str:
    """Names the --channel that a folder was listed with, if it differs."""
    both = _listed_with(folder).get("channel", channel), channel
    was, now = ("no --channel" if n is None else f"--channel={n}" for n in both)
    return "" if was == now else f"{was}, and this call has {now}"


def _listed_with(folder):
    """Returns the settings that a folder's audio was listed with, if it was."""
    return read_json(folder / "manifest.csv.json").get("settings", {})


def refuse_foreign(
    folder: pathlib.Path,
    names: Iterable[str],
    locked: pathlib.Path | None = None,
) -> None:
    """Refuses to replace `names` in a folder, unless an earlier call made them.

    An earlier call is recognised by its lock in `locked`, if that is given. A
    run's folder is refused: it has a lock, too.
    """
    if (folder / STATE).exists():
        raise FileExistsError(
            f"{folder} is a run's folder, whose files would be replaced: name "
            "another folder"
        )
    present = [name for name in names if (folder / name).exists()]
    if present and not (locked and (locked / LOCK).exists()):
        raise FileExistsError(
            f"{folder} holds {', '.join(present)}, which would be replaced: "
            "name another folder, or delete these files"
        )


def _unnamed(manifest, embeddings, folder):
    """Tells whether a file has no vector, and bad_files.txt gives no reason.

    This is so after a new listing: the file may have been repaired.
    """
    if len(embeddings.utterances) == len(manifest):
        return False
    bad, done = BadFiles(folder / "bad_files.txt"), {*embeddings.utterances}
    return any(
        name not in done and one_line(name) not in bad.reasons
        for name in manifest.ids
    )


def _times(manifest):
    """Computes a checksum of the times at which the audio was modified."""

    def modified(path):
        try:
            return os.stat(path).st_mtime_ns
        except OSError:  # a bad file: the extraction will name it
            return 0

    times = np.fromiter(map(modified, manifest.wavs), np.int64)
    return hashlib.sha256(times.tobytes()).hexdigest()


def read_threshold(encoder: str | pathlib.Path) -> float | None:
    """Reads the cosine threshold of an exported folder; None without one."""
    path = encoder_files(encoder).get(YAML)
    if path is None:
        return None
    threshold = plain_settings(path.read_text("utf-8")).get("threshold")
    return float(threshold) if isinstance(threshold, int | float) else None
