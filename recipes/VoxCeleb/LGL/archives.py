"""Unpacks VoxCeleb's downloads to wav: stages 1 and 2 of reproduce.sh."""

import io
import os
import pathlib
import shutil
import subprocess
import tarfile
import zipfile
from multiprocessing.pool import ThreadPool

# For each folder of audio: its archives. A `*` stands for the names of parts.
ARCHIVES = {
    "vox1": ("vox1_dev_wav*", "vox1_test_wav.zip"),
    "vox2": ("vox2_dev_aac*",),
    "musan": ("musan.tar.gz",),
    "RIRS_NOISES": ("rirs_noises.zip",),
}
LISTS = {
    "veri_test2": "Vox1-O",
    "list_test_all2": "Vox1-E",
    "list_test_hard2": "Vox1-H",
}


class Joined(io.RawIOBase):
    """Files that are read as one seekable file."""

    def __init__(self, paths):
        self.files = [open(path, "rb") for path in paths]
        sizes = [path.stat().st_size for path in paths]
        self.starts = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
        self.place = 0

    def readable(self):
        """Returns True."""
        return True

    def seekable(self):
        """Returns True."""
        return True

    def seek(self, offset, whence=0):
        """Moves to a position in the whole."""
        self.place = offset + (0, self.place, self.starts[-1])[whence]
        return self.place

    def readinto(self, buffer):
        """Reads at most up to the end of a part."""
        for file, start, end in zip(self.files, self.starts, self.starts[1:]):
            if start <= self.place < end:
                file.seek(self.place - start)
                n = file.readinto(memoryview(buffer)[: end - self.place])
                self.place += n
                return n
        return 0

    def close(self):
        """Closes all parts."""
        for file in self.files:
            file.close()
        super().close()


def parts_of(archives, pattern):
    """Finds an archive's file, or all its parts in order.

    Raises FileNotFoundError if the archive or a part is missing.
    """
    found = sorted(pathlib.Path(archives).glob(pattern))
    parts = [path for path in found if "_part" in path.name]
    if not found:
        raise FileNotFoundError(
            f"{archives} holds no {pattern}: docs/voxceleb.md says where it is "
            "from"
        )
    for n, path in enumerate(parts):
        name = path.name[:-2] + chr(ord("a") + n // 26) + chr(97 + n % 26)
        if path.name != name:  # the last part alone would hide a gap
            raise FileNotFoundError(
                f"{archives} holds no {name}, but a later part"
            )
    return parts or found[:1]


def unpack(options, rest):
    """Writes the audio of all archives, and copies the trial lists."""
    from tqdm import tqdm

    found = [
        (kind, parts_of(options.archives, pattern))
        for kind, patterns in ARCHIVES.items()
        for pattern in patterns
    ]
    for name in LISTS:  # a missing list shows before hours of work
        (source,) = parts_of(options.archives, f"{name}.txt")
        target = options.data / "lists" / source.name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
    for kind, parts in found:
        title = parts[0].name.partition("_part")[0]
        for name, size, read in tqdm(members(parts), title, unit=" files"):
            target = place_of(options.data, kind, pathlib.PurePosixPath(name))
            if target is None:
                continue
            if target.exists() and target.stat().st_size == size:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(target.name + ".part")
            with read() as source, open(part, "wb") as out:
                shutil.copyfileobj(source, out, 2**20)
            os.replace(part, target)


def members(parts):
    """Yields name, size and a function that opens it, of each archived file."""
    if parts[0].name.endswith(".tar.gz"):
        with tarfile.open(parts[0], "r|gz") as archive:
            for member in archive:
                if member.isfile():
                    yield (
                        member.name,
                        member.size,
                        lambda m=member: archive.extractfile(m),
                    )
        return
    with io.BufferedReader(Joined(parts), 2**20) as whole:
        try:
            archive = zipfile.ZipFile(whole)
        except zipfile.BadZipFile as error:
            names = ", ".join(path.name for path in parts)
            raise ValueError(
                f"{names} make no zip archive ({error}): is a part missing or "
                "cut short?"
            ) from error
        for member in archive.infolist():
            yield (
                member.filename,
                member.file_size,
                lambda m=member: archive.open(m),
            )


def place_of(data, kind, name):
    """Returns the target of an archived file; None if it is no audio.

    Archives differ in the folders above speaker, session and utterance.
    """
    if name.suffix not in (".wav", ".m4a") or ".." in name.parts:
        return None
    if kind.startswith("vox"):
        folder = "wav" if name.suffix == ".wav" else "aac"
        return data.joinpath(kind, folder, *name.parts[-3:])
    parts = name.parts[name.parts.index(kind) :] if kind in name.parts else ()
    return data.joinpath(*parts) if parts else None


def convert(options, rest):
    """Converts VoxCeleb2's m4a files that have no wav yet."""
    from tqdm import tqdm

    aac, wav = (options.data / "vox2" / kind for kind in ("aac", "wav"))
    pairs = [
        (path, wav / path.relative_to(aac).with_suffix(".wav"))
        for path in sorted(aac.rglob("*.m4a"))
    ]
    waiting = [pair for pair in pairs if not pair[1].exists()]
    if not waiting:
        return
    if shutil.which("ffmpeg") is None:
        raise FileNotFoundError("ffmpeg, which reads m4a, is not installed")
    with ThreadPool(options.jobs) as pool:
        lines = pool.imap_unordered(convert_one, waiting, 4)
        bad = [*filter(None, tqdm(lines, "m4a to wav", len(waiting)))]
    (options.exp / "not_converted.txt").write_text("\n".join(bad))
    # The share is of all files: on a second start most waiting files are bad.
    if len(bad) > 0.01 * len(pairs):
        raise ValueError(
            f"{len(bad)} of {len(pairs)} files cannot be converted; the "
            f"first: {bad[0]}"
        )


def convert_one(pair):
    """Converts a file; returns a line for the log if that fails."""
    source, target = pair
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    done = subprocess.run(
        ["ffmpeg", "-nostdin", "-loglevel", "error", "-y", "-i", source]
        + ["-ac", "1", "-ar", "16000", "-f", "wav", part],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return f"{source}\t{(done.stderr.splitlines() or ['no word'])[-1]}"
    os.replace(part, target)
