"""Finds the audio of a folder, without the leftovers of operating systems.

Deleted files, resource forks and conflicted copies are often valid audio. A
run would train on them, and thus on copies of speakers that a trial list
tests. So hidden files and folders are skipped, and those that `SYSTEM` matches.
"""

import collections
import os
import pathlib
import re
from collections.abc import Iterator

from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.manifest import CONTROL, one_line
from lgl_plugin.dataio.storage import StorageFailure, patient, storage_failures
from lgl_plugin.runs.state import digest

logger = get_logger(__name__)

EXTENSIONS = (".flac", ".mp3", ".ogg", ".wav")
# Audio, alone or in a film, that must be converted before it can be read.
UNREAD = frozenset(
    ".3ga .3gp .aac .aif .aifc .aiff .alac .amr .ape .au .avi .awb .caf .dss"
    " .m4a .m4b .m4v .mka .mkv .mov .mp2 .mp4 .mpc .mpeg .mpg .oga .opus .ra"
    " .rm .snd .sph .spx .tta .voc .w64 .webm .wma .wmv .wv".split()
)
# Hidden names begin with a dot: .Trash-1000, ._a.wav (macOS, a file's fork),
# .snapshot, .nfs…, .~tmp~ (rsync), .git, .stversions (Syncthing),
# .dropbox.cache, .ipynb_checkpoints. The names below do not:
SYSTEM = re.compile(
    r"""
    __macosx | network\ trash\ folder | temporary\ items       # macOS
    | \$recycle\.bin | recycle[rd] | recycle\ bin              # Windows
    | system\ volume\ information | found\.\d{3} | dfsrprivate
    | lost\+found                                              # Linux
    | @eadir | @tmp | @sharebin | [#@](recycle|snapshot)       # Synology, QNAP
    | @recently-snapshot | ~snapshot                           # QNAP, NetApp
    # Copies of two writers: Dropbox, Nextcloud; Syncthing; ownCloud.
    | .*\([^()]*(conflicted\ copy|(sync|case|encoding)\ conflict)[^()]*\).*
    | .*\.sync-conflict-\d{8}-\d{6}.*
    | .*_conflict-\d{8}-\d{6}.*
    """,
    re.VERBOSE | re.IGNORECASE,
)


def find_audio(
    root: str | pathlib.Path, passed_over: collections.Counter | None = None
) -> Iterator[tuple[str, str | None]]:
    """Finds the audio files of a folder, at any depth, sorted by path.

    Yields (path below root, problem): why the file or folder cannot be read,
    or None. Links are followed, and every folder is listed once; files are not
    opened. `passed_over` counts "hidden" files and folders, and files with
    other extensions, by extension.
    """
    passed_over = collections.Counter() if passed_over is None else passed_over
    visited, repeated, hidden = set(), [], []
    stack = [("", "folder")]
    while stack:
        name, kind = stack.pop()
        path = os.path.join(root, name)
        extension = os.path.splitext(name)[1].lower()
        if is_hidden(os.path.basename(name)):
            # Not counted: other hidden files, such as .DS_Store in each folder.
            if kind == "folder" or extension in EXTENSIONS:
                hidden.append(name)
        elif kind == "folder":
            # A link may lead back up, and the search would never end; or to a
            # folder that is listed anyway, and its files would count twice.
            real = os.path.realpath(path)
            if real in visited:
                repeated.append(path)
                continue
            visited.add(real)
            try:
                below = _entries(path)
            except StorageFailure:
                raise
            except OSError as error:
                yield name, f"folder cannot be listed: {error.strerror}"
                continue
            stack += sorted(
                ((os.path.join(name, own), kind) for own, kind in below),
                reverse=True,
            )
        elif extension not in EXTENSIONS:
            passed_over[extension or "no extension"] += 1
        elif kind == "file":
            yield name, None
        else:
            yield name, "is a broken link or not a regular file"
    if hidden:
        passed_over["hidden"] += len(hidden)
        logger.warning(
            f"{len(hidden)} files and folders are not looked at, being hidden "
            "or left behind by a system or a cloud, "
            f"{one_line(hidden[0])} the first."
        )
    if repeated:
        logger.warning(
            f"{len(repeated)} folders are reached by a link, too, and are "
            "listed once, by the path that sorts first. Not listed is "
            f"{one_line(repeated[0])}, the first."
        )


def names_and_sizes(root: str | pathlib.Path) -> str:
    """Returns one checksum of the names and sizes of a folder's audio files.

    To read the content of 60,000 files would take minutes.
    """
    return digest(
        [
            (name, os.path.getsize(os.path.join(root, name)))
            for name, problem in find_audio(root)
            if problem is None
        ]
    )


def name_problem(path: str) -> str | None:
    """Returns why a list of files cannot hold a path, or None."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "name is not UTF-8"
    if CONTROL.search(path):
        return "name holds a line break or another control character"
    return None


def refuse_recordings(
    folder: str | pathlib.Path, audio: str | pathlib.Path | None = None
) -> None:
    """Raises FileExistsError if results would lie among recordings.

    This is so if `folder` has audio files, or is `audio` itself.
    """
    folder = pathlib.Path(folder)
    entries = folder.iterdir() if folder.is_dir() else ()
    if any(path.suffix.lower() in EXTENSIONS for path in entries) or (
        audio is not None and folder.resolve() == pathlib.Path(audio).resolve()
    ):
        raise FileExistsError(
            f"{folder} holds recordings, and the results would lie among them: "
            "name another folder"
        )


def is_hidden(name: str) -> bool:
    """Tells whether a name is hidden or that of a system's leftover."""
    return name.startswith(".") or SYSTEM.fullmatch(name) is not None


@patient
def _entries(path):
    """Lists the entries of a folder as (name, kind), see `_kind`."""
    with storage_failures(path), os.scandir(path) as entries:
        return [(entry.name, _kind(entry)) for entry in entries]


def _kind(entry):
    """Returns "folder", "file" or "neither"; for a link that of its target."""
    try:
        with storage_failures(entry.path):
            if entry.is_dir():
                return "folder"
            return "file" if entry.is_file() else "neither"
    except StorageFailure:
        raise
    except OSError:  # a link to itself
        return "neither"
