"""Packs a corpus into shards: few large tar files instead of many small files.

For disks and clusters on which opening a small file is slow. A manifest names
the shard and the bytes of each utterance, so that reading stays random access:
dataset, samplers, ranks, resumption and labels work as without shards. Readers
of webdataset's format can read the shards as well.

> lgl pack manifest.csv /fast/shards --data_root=/corpus
> python train_lgl.py hparams/stage1.yaml --data_folder=/fast/shards \\
>     --manifest=/fast/shards/manifest.csv
"""

import contextlib
import csv
import errno
import functools
import io
import itertools
import math
import os
import pathlib
import shutil
import tarfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import soundfile
from speechbrain.utils.logger import get_logger
from speechbrain.utils.parallel import parallel_map

from lgl_plugin.dataio.audio import (
    BLOCK,
    BadAudio,
    open_audio,
    probe,
    read_audio,
)
from lgl_plugin.dataio.folder import EXTENSIONS, refuse_recordings
from lgl_plugin.dataio.manifest import (
    CHANNEL,
    COLUMNS,
    SHARD_COLUMNS,
    load_manifest,
    one_line,
)
from lgl_plugin.dataio.probing import start_worker
from lgl_plugin.runs.lock import lock_folder
from lgl_plugin.utils.checks import check_from
from lgl_plugin.utils.files import atomic_write, checksum, read_json, write_json
from lgl_plugin.utils.progress import tqdm

logger = get_logger(__name__)

RECORD = "shards.json"
# Files whose headers give the corpus's bytes a second, to a few per cent.
N_SAMPLED = 200
# The lossless format for a part cut out of a file, by the file's subtype in
# libsndfile. A part of another subtype is stored as floating point, as decoded.
PART_FORMATS = {
    **dict.fromkeys(
        ("PCM_16", "PCM_S8", "PCM_U8", "ULAW", "ALAW"), ("flac", "PCM_16")
    ),
    "PCM_24": ("flac", "PCM_24"),
}


def write_shards(
    manifest: str | pathlib.Path,
    data_root: str | pathlib.Path,
    folder: str | pathlib.Path,
    shard_mb: float = 512,
    num_workers: int = 8,
    max_bad_share: float = 0.02,
    allow_outside: bool = False,
    decode: bool = False,
) -> pathlib.Path:
    """Packs a manifest's utterances into shards, in random order.

    The options are those of `lgl pack`; the new manifest's path is returned. A
    file that is one utterance is copied byte for byte. An utterance that is a
    part of a longer file is cut out, decoded and kept with the same samples: as
    flac if they have up to 24 bits, as 32-bit floating-point wav if they have
    more or come from mp3 or ogg. `decode` writes 16-bit wav: far more room than
    mp3, but no decoding in training. Further bits are cut off, and what mp3 or
    ogg decode to beyond full scale is clipped. A file of floats beyond full
    scale, such as integers written as floats, becomes 32-bit floating-point
    wav.

    The folder gets `shard-000000.tar` and so on, `bad_files.txt`, `shards.json`
    (the settings) and, last, `manifest.csv`: the rows of `manifest` without
    bad ones, in its order, with two more columns, first_byte and n_bytes, for
    the utterance's place in the shard. An interrupted run goes on with the
    shards that are missing; a finished one is reused.

    Members are named by utterance ID with one extension, as webdataset wants
    it: further dots in the last part of an ID become %2E. An ID that leads up
    or begins at the root (`../a`, `/a`, `C:\\a`) becomes a name below the
    folder that the shard is unpacked in.

    Raises FileExistsError if the folder holds recordings or another
    manifest.csv, ValueError if the manifest is of shards itself or too many
    utterances are bad.
    """
    check_from(0.001, shard_mb=shard_mb)
    check_from(1, num_workers=num_workers)
    check_from(0, max_bad_share=max_bad_share)
    folder = pathlib.Path(folder)
    if "settings" not in read_json(folder / RECORD):  # shards not begun
        refuse_recordings(folder, data_root)
    utterances = load_manifest(manifest, data_root, allow_outside)
    if utterances.places is not None:
        raise ValueError(f"{manifest} is a manifest of shards already")
    settings = {
        "manifest": checksum(manifest),
        "data_root": os.path.abspath(data_root),
        "shard_mb": float(shard_mb),
        "decode": decode,
    }
    target = folder / "manifest.csv"
    record = read_json(folder / RECORD)
    if target.exists() and record.get("settings") == settings:
        logger.info(f"Reusing {target}; delete {folder} to make it again.")
        return target
    lock_folder(folder)
    plan = _plan(folder, settings, utterances)
    shards = _split_rows(utterances.durations, plan["shards"])
    index = _Index(folder, utterances, max_bad_share)
    missing = [n for n in range(len(shards)) if not index.add(n)]
    for part in folder.glob(".shard-*.part"):
        part.unlink()  # left by a run that was killed
    _check_room(folder, plan["bytes"] * len(missing) / len(shards))
    write_one = functools.partial(_write_shard, folder, decode)
    _write_missing(utterances, shards, missing, index, num_workers, write_one)
    index.write_bad_files()
    index.write_manifest(manifest, target)
    for n in range(len(shards)):
        _index_path(folder, n).unlink()
    logger.info(
        f"{target}: {len(utterances) - len(index.bad)} utterances in "
        f"{len(shards)} shards."
    )
    return target


def _shard_name(n):
    """Returns the file name of the n-th shard."""
    return f"shard-{n:06d}.tar"


def _index_path(folder, n):
    """Returns the path of the csv that marks the n-th shard as complete."""
    return (folder / _shard_name(n)).with_suffix(".csv")


def _plan(folder, settings, utterances):
    """Reads or makes shards.json; deletes shards of other settings."""
    plan, target = read_json(folder / RECORD), folder / "manifest.csv"
    if plan.get("settings") == settings:
        return plan
    if "settings" not in plan and (plan or target.exists()):
        raise FileExistsError(
            f"{target} is not of shards made here, or {RECORD} beside it is "
            "damaged. Choose another folder, empty or new."
        )
    n_bytes = _estimated_bytes(
        utterances, settings["data_root"], settings["decode"]
    )
    n_shards = math.ceil(n_bytes / (settings["shard_mb"] * 2**20))
    new = {
        "settings": settings,
        "bytes": n_bytes,
        "shards": min(n_shards, len(utterances)),
    }
    if plan:
        changed = ", ".join(
            k for k in settings if settings[k] != plan["settings"].get(k)
        )
        logger.warning(f"Writing all shards again: other {changed}.")
    # The manifest goes first: after a kill between the two deletions it must
    # not name shards of other settings.
    target.unlink(missing_ok=True)
    for pattern in ("shard-*.csv", "shard-*.tar"):
        for old in folder.glob(pattern):
            old.unlink()
    write_json(folder / RECORD, new)
    return new


def _estimated_bytes(utterances, data_root, decode):
    """Estimates the bytes of all utterances from the headers of some files."""
    rng = np.random.default_rng(1)
    n = len(utterances)
    seconds = n_bytes = 0
    for row in rng.choice(n, min(n, N_SAMPLED), replace=False):
        path = utterances.wavs[row]
        # A bad file is counted as such when its shard is written.
        with contextlib.suppress(BadAudio):
            header = probe(path)
            seconds += header.seconds
            decoded = 2 * header.frames * header.channels
            n_bytes += decoded if decode else os.path.getsize(path)
    if not seconds:
        raise FileNotFoundError(
            f"none of {min(n, N_SAMPLED)} audio files tried can be read, such "
            f"as {path}. Set --data_root, now {data_root}, to what $data_root "
            "stands for in the manifest."
        )
    return math.ceil(n_bytes / seconds * utterances.durations.sum())


def _split_rows(durations, n_shards):
    """Splits all rows at random into shards of about the same duration."""
    # Random: in the manifest's order a shard would hold one speaker. Seeded: a
    # resumed run must split as the interrupted one did.
    order = np.random.default_rng(1).permutation(len(durations))
    ends = np.cumsum(durations[order])
    shares = ends[-1] * np.arange(1, n_shards) / n_shards
    return np.split(order, np.searchsorted(ends, shares))


def _check_room(folder, n_bytes):
    """Raises OSError if a folder's disk has less than `n_bytes` free."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"The shards need about {n_bytes / 1e9:.1f} GB, and "
            f"{free / 1e9:.1f} GB are free. Make room and start the same "
            "command again",
            str(folder),
        )


def _write_missing(utterances, shards, missing, index, num_workers, write_one):
    """Writes the missing shards in parallel and adds them to the index."""
    done = len(utterances) - sum(len(shards[n]) for n in missing)
    if done:
        logger.info(f"Going on: {done} utterances are in shards already.")
    # A generator, and a short queue below: the rows of all shards at once
    # would be a second manifest in memory, made of Python objects.
    jobs = (
        (n, [(i, utterances.ids[i], utterances[i]) for i in shards[n].tolist()])
        for n in missing
    )
    with (
        tqdm(
            desc="writing shards",
            unit=" files",
            total=len(utterances),
            initial=done,
        ) as bar,
        # Not parallel_map's own pool: without the initializer, workers would
        # outlive a parent that was killed.
        ProcessPoolExecutor(num_workers, initializer=start_worker) as pool,
    ):
        try:
            for n in parallel_map(
                write_one,
                jobs,
                chunk_size=1,
                queue_size=num_workers + 1,
                executor=pool,
                progress_bar=False,
            ):
                index.add(n)
                bar.update(len(shards[n]))
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a process that writes shards died, perhaps for want of "
                "memory. The same command goes on from there; a smaller "
                "--num_workers needs less."
            ) from error


def _write_shard(folder, decode, job):
    """Writes a shard, then its index; returns the shard's number.

    A line of the index is (row, first byte, bytes, frames, problem). Frames
    are those of an utterance that was decoded, 0 for a file copied whole.
    """
    n, utterances = job
    lines = []
    keys = set()
    # A member's offset is the position in `out`: TarFile sets `offset_data`
    # only when it reads, and its close() would pad each shard to 10 KiB.
    with atomic_write(folder / _shard_name(n), "wb") as out:
        for row, name, utterance in utterances:
            try:
                extension, audio, frames = _read_utterance(decode, **utterance)
            except BadAudio as error:
                lines.append((row, 0, 0, 0, one_line(str(error))))
                continue
            key = _member_key(name)
            while key in keys:  # a.wav and a.flac
                key += "~"
            keys.add(key)
            header = tarfile.TarInfo(f"{key}.{extension}")
            header.size = len(audio)
            out.write(header.tobuf(tarfile.PAX_FORMAT))
            lines.append((row, out.tell(), len(audio), frames, ""))
            out.write(audio)
            out.write(bytes(-len(audio) % tarfile.BLOCKSIZE))
        out.write(bytes(2 * tarfile.BLOCKSIZE))
    with atomic_write(_index_path(folder, n)) as out:
        csv.writer(out).writerows(lines)
    return n


def _read_utterance(decode, wav, offset, duration, **_):
    """Returns an utterance's extension and bytes; frames if it was decoded."""
    with open_audio(wav) as audio:
        rate = audio.samplerate
        first, n_frames = round(offset * rate), round(duration * rate)
        if min(audio.frames - first, n_frames) <= 0:
            raise BadAudio("holds no samples")
        # Durations in manifests are rounded, some to a tenth of a second:
        # an exact comparison would cut and decode every whole file.
        whole = first == 0 and audio.frames - n_frames <= rate / 10
        if whole:
            probe(wav)  # a copied file is not decoded otherwise
        if whole and not decode:
            extension = pathlib.Path(wav).suffix[1:] or audio.format
            return extension.lower(), pathlib.Path(wav).read_bytes(), 0
        audio.seek(first)
        kind, subtype = PART_FORMATS.get(audio.subtype, ("wav", "FLOAT"))
        if decode:
            loud = _exceeds_full_scale(audio, n_frames)
            kind, subtype = "wav", "FLOAT" if loud else "PCM_16"
            # Reads the end by itself. Decoded from the beginning, an mp3 that
            # is cut short would repeat earlier samples there.
            end = min(first + n_frames, audio.frames) / rate
            read_audio(wav, max(end - 0.05, 0.0), 0.05)
        content, n_written, channels = io.BytesIO(), 0, audio.channels
        with soundfile.SoundFile(
            content, "w", rate, channels, subtype, format=kind
        ) as part:
            # In blocks: as floats, a part of many channels would fill memory.
            for block in audio.blocks(BLOCK // channels, frames=n_frames):
                part.write(block)
                n_written += len(block)
    return kind, content.getvalue(), n_written


def _exceeds_full_scale(audio, n_frames):
    """Tells whether 16 bits would clip the next samples of an open file."""
    # Lossy codings overshoot by a little, which is not worth twice the room
    # and a second decoding.
    if audio.subtype not in ("FLOAT", "DOUBLE"):
        return False
    first = audio.tell()
    blocks = audio.blocks(BLOCK // audio.channels, frames=n_frames)
    loud = any(not np.abs(block).max() <= 1 for block in blocks)  # or NaN
    audio.seek(first)
    return loud


def _member_key(name):
    """Returns an ID as webdataset's key: no extension, no further dots."""
    # Backslash and colon lead to another folder or disk on Windows.
    name = name.replace("\\", "%5C").replace(":", "%3A")
    *folders, last = name.split("/")
    stem, extension = os.path.splitext(last)
    if extension.lower() in EXTENSIONS:
        last = stem
    # tar would unpack /a and ../a outside of the folder that it is called in.
    folders = [
        folder.replace(".", "%2E") if folder in (".", "..") else folder
        for folder in folders
        if folder
    ]
    # webdataset ends the key at the first dot after the folder: a.b.wav and
    # a.c.wav would be one sample.
    return "/".join([*folders, last.replace(".", "%2E")])


class _Index:
    """The shard and place of each utterance, from the csvs of the shards."""

    def __init__(self, folder, utterances, max_bad_share):
        self._folder = folder
        self._utterances = utterances
        self._limit = int(max_bad_share * len(utterances))
        # Per row of the manifest: shard, first byte, bytes, frames.
        self._places = np.zeros((len(utterances), 4), np.int64)
        self.bad = {}  # row: problem

    def add(self, n):
        """Adds the n-th shard; returns whether it is complete."""
        if not (self._folder / _shard_name(n)).exists():
            return False
        try:
            with open(_index_path(self._folder, n), encoding="utf-8") as source:
                for row, *place, problem in csv.reader(source):
                    self._places[int(row)] = n, *map(int, place)
                    if problem:
                        self.bad[int(row)] = problem
        except FileNotFoundError:
            return False
        if len(self.bad) > self._limit:
            path = self.write_bad_files()
            first = "".join(
                f"  {self._utterances.ids[row]}: {problem}\n"
                for row, problem in itertools.islice(self.bad.items(), 10)
            )
            raise ValueError(
                f"{len(self.bad)} bad utterances so far, more than the "
                f"{self._limit} that max_bad_share allows. All are named in "
                f"{path}; the first:\n{first}"
                f"Raise max_bad_share to go on without them; or repair them "
                f"and delete {self._folder}; or take them out of the manifest."
            )
        return True

    def write_bad_files(self):
        """Writes bad_files.txt, lines of `utterance<TAB>reason`."""
        path = self._folder / "bad_files.txt"
        with atomic_write(path) as out:
            for row, problem in sorted(self.bad.items()):
                out.write(f"{self._utterances.ids[row]}\t{problem}\n")
        return path

    def write_manifest(self, manifest, target):
        """Writes the good rows of a manifest with their places in shards."""
        with (
            open(manifest, newline="", encoding="utf-8-sig") as source,
            atomic_write(target) as out,
        ):
            reader = csv.DictReader(source, skipinitialspace=True)
            columns = reader.fieldnames or ()
            more = [column for column in (CHANNEL,) if column in columns]
            out.write(",".join((*COLUMNS, *SHARD_COLUMNS, *more)) + "\n")
            # Text is quoted for the reason that `prepare_manifest` gives.
            writer = csv.writer(
                out, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n"
            )
            for row, fields in enumerate(reader):
                if row in self.bad:
                    continue
                n, first_byte, n_bytes, frames = self._places[row].tolist()
                cut_out = frames > 0
                writer.writerow(
                    (
                        self._utterances.ids[row],
                        float(fields["duration"]),
                        f"$data_root/{_shard_name(n)}",
                        0 if cut_out else int(fields["start"]),
                        frames if cut_out else int(fields["stop"]),
                        fields["spk_id"],
                        first_byte,
                        n_bytes,
                        *(fields[column] for column in more),
                    )
                )
