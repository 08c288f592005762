"""The search for audio: what is found, what is passed over."""

import collections
import errno
import os

import pytest
import soundfile

from lgl_plugin.dataio.cohort import draw_cohort
from lgl_plugin.dataio.folder import find_audio, is_hidden, names_and_sizes
from lgl_plugin.dataio.prepare import prepare_manifest
from lgl_plugin.dataio.storage import StorageFailure

# From operating systems, disk stations, tools, clouds and editors.
LEFT_BEHIND = [
    "ann/._1.wav",  # macOS: a file's fork, on other file systems and in zips
    "__MACOSX/ann/._1.wav",
    "__MACOSX/ann/1.wav",
    ".Trashes/501/ann/1.wav",
    ".AppleDouble/1.wav",
    "Network Trash Folder/1.wav",
    "$RECYCLE.BIN/S-1-5-21/$R2.wav",  # Windows
    "RECYCLER/S-1-5-21/Dc1.wav",
    "System Volume Information/1.wav",
    "FOUND.000/1.wav",
    ".Trash-1000/files/ann/1.wav",  # Linux
    "lost+found/ann/1.wav",
    ".snapshot/hourly.0/ann/1.wav",
    "~snapshot/hourly.0/ann/1.wav",
    "@eaDir/1.wav/SYNOAUDIO_01.mp3",  # Synology, QNAP
    "#recycle/ann/1.wav",
    "#snapshot/ann/1.wav",
    "@Recycle/ann/1.wav",
    "@Recently-Snapshot/ann/1.wav",
    ".~tmp~/ann/1.wav",  # rsync
    "ann/.1.wav.x7Gq2.wav",
    "ann/.nfs0000001.wav",
    ".git/annex/objects/1.wav",
    ".dvc/cache/1.wav",
    ".ipynb_checkpoints/1-checkpoint.wav",
    ".dropbox.cache/1.wav",
    ".stversions/ann/1~20200101-000000.wav",  # Syncthing
    "ann/1.sync-conflict-20200101-000000-ABCDEFG.wav",
    "ann/1 (Bob's conflicted copy 2020-01-01).wav",
    "ann (Selective Sync Conflict)/1.wav",
    "ann (Case Conflict 1)/1.wav",
    "ann/1_conflict-20200101-000000.wav",
]
# Names that people give.
GIVEN = [
    "@ann/1.wav",
    "#1/a.wav",
    "$5/a.wav",
    "~/a.wav",
    "conflict/a.wav",
    "conflict_data/a (conflict resolution).wav",
    "found/a.wav",
    "recycling/a.wav",
    "tmp/a.wav",
    "x_data/a.wav",
]


def put(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, [0.1] * 8000, 16000)


def test_a_server_that_is_away_ends_the_listing(tmp_path, monkeypatch):
    """Its folders would count as bad, and their speakers be lost."""
    (tmp_path / "ann").mkdir()
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("ann"):
            raise OSError(errno.ESTALE, "Stale file handle")
        return scandir(path)

    monkeypatch.setattr("lgl_plugin.dataio.storage.WAITS", (0, 0))
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageFailure, match="ann cannot be read now: Stale"):
        list(find_audio(tmp_path))


def test_files_by_path_and_others_by_extension(tmp_path):
    for name in ("b.flac", "a.WAV", "notes.txt", "README", ".DS_Store"):
        (tmp_path / name).touch()
    passed_over = collections.Counter()
    found = list(find_audio(tmp_path, passed_over))
    assert found == [("a.WAV", None), ("b.flac", None)]
    assert passed_over == {".txt": 1, "no extension": 1}


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_systems_leave_behind_is_not_looked_at(tmp_path, name, caplog):
    put(tmp_path / "bob/1.wav")
    put(tmp_path / name)
    passed_over = collections.Counter()
    assert list(find_audio(tmp_path, passed_over)) == [("bob/1.wav", None)]
    assert passed_over == {"hidden": 1}
    assert "1 files and folders are not looked at" in caplog.text


@pytest.mark.parametrize("name", GIVEN)
def test_names_that_people_give_are_found(tmp_path, name):
    put(tmp_path / name)
    assert list(find_audio(tmp_path)) == [(name, None)]


def test_links_into_a_hidden_store_are_followed(tmp_path):
    """git-annex keeps files below .git, and links to them in place."""
    put(tmp_path / ".git/annex/objects/1.wav")
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann/1.wav").symlink_to(tmp_path / ".git/annex/objects/1.wav")
    assert list(find_audio(tmp_path)) == [("ann/1.wav", None)]


def test_a_hidden_folder_may_hold_the_corpus(tmp_path):
    put(tmp_path / ".cache/corpus/1.wav")
    found = list(find_audio(tmp_path / ".cache/corpus"))
    assert found == [("1.wav", None)]


def test_deleted_copies_of_tested_speakers_are_not_trained_on(tmp_path):
    for name in ("ann/1.wav", "ann/2.wav", "bob/1.wav"):
        put(tmp_path / name)
        for trash in (".Trash-1000/files", "#recycle", "lost+found/#12"):
            put(tmp_path / trash / name)
    put(tmp_path / "ann (Case Conflict)/1.wav")
    trials = tmp_path / "trials.txt"
    trials.write_text("1 ann/1.wav ann/2.wav\n0 ann/1.wav ann/2.wav\n")
    made = prepare_manifest(tmp_path, tmp_path / "m/m.csv", trials=trials)
    assert (made["kept"], made["excluded"]) == (1, 2)
    assert made["passed_over"]["hidden"] == 4
    cohort = draw_cohort(tmp_path, [trials], tmp_path, 99)
    assert list(cohort.ids) == ["bob/1.wav"]


def test_hidden_names():
    assert is_hidden(".a") and is_hidden("$Recycle.Bin")
    assert not is_hidden("a.wav") and not is_hidden("lost+found.wav")


def test_a_checksum_of_names_and_sizes(tmp_path):
    """Of audio alone, wherever the folder lies."""

    def made(name, files):
        for path, size in files.items():
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / path).write_bytes(bytes(size))
        return names_and_sizes(tmp_path / name)

    files = {"a/1.wav": 3, "b/1.flac": 4}
    whole = made("one", files)
    assert whole == made("two", {**files, "README": 1})
    others = {"a/1.wav": 3}, {**files, "a/1.wav": 4}, {**files, "b/2.wav": 4}
    found = {made(f"other{n}", other) for n, other in enumerate(others)}
    assert len(found) == 3 and whole not in found
