"""Folder to manifest: what is kept, what is not, and what survives a crash."""

import csv
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor

import pytest
import soundfile
from hypothesis import HealthCheck, given, settings, strategies as st
from speechbrain.dataio.dataset import DynamicItemDataset

from lgl_plugin.dataio import prepare, probing
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.dataio.prepare import prepare_manifest

HEADER = "ID,duration,wav,start,stop,spk_id\n"


@pytest.fixture(autouse=True)
def logs(caplog):
    caplog.set_level(logging.INFO, logger="lgl_plugin.dataio.prepare")
    return caplog


def put(path, seconds=0.5, rate=16000, channels=1):
    """Writes a tone-free audio file of the given shape."""
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = [[0.1] * channels] * round(seconds * rate)
    soundfile.write(path, samples, rate, format=path.suffix[1:].upper())
    return path


def scan(folder, **arguments):
    """Prepares `folder`/wav into `folder`/m.csv."""
    arguments = {"data_root": folder, **arguments}
    return prepare_manifest(folder / "wav", folder / "m.csv", **arguments)


def rows(folder):
    with open(folder / "m.csv", newline="", encoding="utf-8") as source:
        return list(csv.DictReader(source))


def ids(folder):
    return [row["ID"] for row in rows(folder)]


def bad_lines(folder, name="bad_files.txt"):
    text = (folder / name).read_text(encoding="utf-8")
    return dict(line.split("\t") for line in text.splitlines())


def test_rows_by_hand(tmp_path):
    put(tmp_path / "wav/bob/s1/2.WAV", 1.0, rate=8000)
    put(tmp_path / "wav/ann/s1/1.flac", 0.5, rate=44100, channels=2)
    put(tmp_path / "wav/cy.ogg", 0.75)
    put(tmp_path / "wav/ann/s0/9.mp3", 0.5)
    (tmp_path / "wav/notes.txt").write_text("no audio")
    made = scan(tmp_path)
    expected = [
        ["ann/s0/9.mp3", 0.5, "$data_root/wav/ann/s0/9.mp3", 0, 8000, "ann"],
        ["ann/s1/1.flac", 0.5, "$data_root/wav/ann/s1/1.flac", 0, 22050, "ann"],
        ["bob/s1/2.WAV", 1.0, "$data_root/wav/bob/s1/2.WAV", 0, 8000, "bob"],
        ["cy.ogg", 0.75, "$data_root/wav/cy.ogg", 0, 12000, ""],
    ]
    with open(tmp_path / "m.csv", newline="") as source:
        header, *found = csv.reader(source)
    assert ",".join(header) + "\n" == HEADER
    for row, want in zip(found, expected, strict=True):
        assert [row[0], float(row[1]), row[2]] == want[:3]
        assert [int(row[3]), int(row[4]), row[5]] == want[3:]
    assert made["folders"] == 2
    assert made["found"] == made["kept"] == 4
    assert made["hours"] == round(2.75 / 3600, 3)
    assert json.loads((tmp_path / "m.csv.json").read_text()) == made
    assert len(load_manifest(tmp_path / "m.csv", tmp_path)) == 4


def test_no_speaker_folder(tmp_path):
    put(tmp_path / "wav/ann/1.wav")
    scan(tmp_path, speaker_folder=False)
    assert [row["spk_id"] for row in rows(tmp_path)] == [""]


def test_order_is_that_of_the_parts_and_same_for_any_workers(
    tmp_path, monkeypatch
):
    names = ["a/z.wav", "a.b/y.wav", "a.wav", "a/b/x.wav", "B.wav", "ä.wav"]
    names += [f"many/{n}.wav" for n in range(3 * probing.BATCH)]
    for name in names:
        put(tmp_path / "wav" / name, 0.3)
    monkeypatch.setattr(prepare, "WORKERS", 1)
    scan(tmp_path)
    first = (tmp_path / "m.csv").read_bytes()
    assert ids(tmp_path) == sorted(names, key=lambda name: name.split("/"))
    (tmp_path / "m.csv").unlink()
    monkeypatch.setattr(prepare, "WORKERS", 3)
    scan(tmp_path)
    assert (tmp_path / "m.csv").read_bytes() == first


# Names that this file system takes, csv, SpeechBrain and log files may not.
AWKWARD = st.text(
    st.one_of(
        st.sampled_from(" ,'\"$\\;#\t\n\r\x85\u2028éß中.😀"),
        st.characters(codec="utf-8", exclude_characters="/\0"),
    ),
    min_size=1,
    max_size=12,
)


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(names=st.sets(AWKWARD, min_size=1, max_size=8), in_folder=st.booleans())
def test_names_reach_speechbrain_or_are_bad(tmp_path_factory, names, in_folder):
    folder = tmp_path_factory.mktemp("names")
    source = put(folder / "source.wav", 0.3)
    paths = {f"{n} /1.wav" if in_folder else f"{n}.wav" for n in names}
    paths = {path for path in paths if not path.startswith(("./", "../"))}
    put(folder / "wav/good.wav")
    for path in paths:
        (folder / "wav" / path).parent.mkdir(exist_ok=True)
        os.link(source, folder / "wav" / path)
    # `.wav` alone is a hidden file without an extension.
    audio = {p for p in paths if not p.startswith(".")} | {"good.wav"}
    made = scan(folder, max_bad_share=1.0)
    assert made["found"] == len(audio)
    assert made["bad"] == len(bad_lines(folder))
    data = DynamicItemDataset.from_csv(
        folder / "m.csv", replacements={"data_root": str(folder)}
    )
    ours = load_manifest(folder / "m.csv", folder)
    assert len(data) == made["kept"] == len(ours)
    assert set(data.data_ids) <= audio
    for name in data.data_ids:
        row = data.data[name]
        assert row["wav"] == str(folder / "wav" / name)
        assert row["duration"] == pytest.approx(
            soundfile.info(row["wav"]).duration
        )
        assert row["spk_id"] == (name.split("/")[0] if "/" in name else "")
    # Nothing is refused without need.
    unsafe = [
        name
        for name in audio - set(data.data_ids)
        if name.isprintable() and "$" not in name
    ]
    assert unsafe == []


@pytest.mark.parametrize(
    "name, reason",
    [
        ("a$b.wav", "$ that SpeechBrain"),
        ("cost$.wav", "$ that SpeechBrain"),
        ("x$data_root/1.wav", "$ that SpeechBrain"),
        ("line\nbreak.wav", "line break"),
        ("tab\t.wav", "control character"),
        (b"latin-\xe9.wav", "not UTF-8"),
    ],
)
def test_unusable_names(tmp_path, name, reason):
    put(tmp_path / "wav/good.wav")
    path = tmp_path / "wav" / os.fsdecode(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((tmp_path / "wav/good.wav").read_bytes())
    made = scan(tmp_path, max_bad_share=0.5)
    assert ids(tmp_path) == ["good.wav"]
    assert made["bad"] == 1
    assert reason in "".join(bad_lines(tmp_path).values())


def test_harmless_dollar_and_leading_blank(tmp_path):
    names = [" a.wav", "a.wav", "5 $ each.wav", "$,x.wav", '"q".wav']
    for name in names:
        put(tmp_path / "wav" / name)
    scan(tmp_path)
    data = DynamicItemDataset.from_csv(
        tmp_path / "m.csv", replacements={"data_root": "/r"}
    )
    assert {n: data.data[n]["wav"] for n in data.data_ids} == {
        n: f"/r/wav/{n}" for n in names
    }


def test_bad_files(tmp_path, monkeypatch, logs):
    wav = tmp_path / "wav"
    put(wav / "good.wav")
    put(wav / "edge.wav", 0.3)
    put(wav / "short.wav", 0.29)
    put(wav / "zero.wav", 0.0)
    (wav / "empty.wav").touch()
    (wav / "junk.wav").write_bytes(b"no header" * 50)
    (wav / "gone.wav").symlink_to(wav / "nowhere")
    (wav / "self.wav").symlink_to("self.wav")
    os.mkfifo(wav / "pipe.wav")
    # A FLAC file made from a stream: 36 bits of length are zero.
    flac = bytearray(put(wav / "stream.flac").read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    (wav / "stream.flac").write_bytes(flac)
    put(wav / "odd.wav", 0.5, rate=15999)
    # Tests may run as root, who may read everything.
    put(wav / "secret.wav")
    really_open, secret = open, str(wav / "secret.wav")

    def refuse(path, *arguments, **options):
        if path == secret:
            raise PermissionError(13, "Permission denied", path)
        return really_open(path, *arguments, **options)

    really_read = soundfile.SoundFile

    def refuse_sound(path):
        if path == secret:
            raise soundfile.LibsndfileError(2)
        return really_read(path)

    put(wav / "slow.wav", 2.0, rate=500)
    soundfile.write(wav / "gsm.wav", [0.1] * 8000, 8000, "GSM610")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(soundfile, "SoundFile", refuse_sound)
    made = scan(tmp_path, max_bad_share=0.9)
    assert ids(tmp_path) == ["edge.wav", "good.wav"]
    load_manifest(tmp_path / "m.csv", tmp_path)  # takes what was kept
    assert bad_lines(tmp_path) == {
        "empty.wav": "is empty",
        "gone.wav": "is a broken link or not a regular file",
        "gsm.wav": "is coded as GSM 6.10, which can only be read from the "
        "beginning: convert it to wav of 16 bits",
        "junk.wav": "cannot be read: Format not recognised.",
        "odd.wav": "has 15999 Hz, too odd to convert to 16000 Hz",
        "pipe.wav": "is a broken link or not a regular file",
        "secret.wav": "cannot be opened: Permission denied",
        "self.wav": "is a broken link or not a regular file",
        "slow.wav": "has 500 Hz by its header, which is outside 1,000 to "
        "10,000,000 Hz",
        "short.wav": "lasts 0.290 s, under 0.3 s",
        "stream.flac": "header does not give the length: encode it again",
        "zero.wav": "holds no samples",
    }
    assert (made["bad"], made["short"], made["found"]) == (11, 1, 14)
    assert "11 unusable and 1 short files are left out" in logs.text


def test_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    put(tmp_path / "wav/ann/1.wav")
    put(tmp_path / "wav/bob/1.wav")
    really = os.scandir

    def refuse(path):
        if str(path).endswith("bob"):
            raise PermissionError(13, "Permission denied")
        return really(path)

    monkeypatch.setattr(os, "scandir", refuse)
    scan(tmp_path, max_bad_share=0.5)
    reason = "folder cannot be listed: Permission denied"
    assert bad_lines(tmp_path) == {"bob": reason}


def test_too_many_bad(tmp_path):
    for n in range(85):
        put(tmp_path / f"wav/good{n}.wav", 0.3)
    for n in range(15):
        (tmp_path / f"wav/bad{n:02}.wav").touch()
    (tmp_path / "m.csv").write_text("of before")
    with pytest.raises(ValueError, match="15 of 100 audio files") as error:
        scan(tmp_path, max_bad_share=0.14)
    shown = [f"bad{n:02}.wav: is empty" in str(error.value) for n in range(15)]
    assert shown == [True] * 10 + [False] * 5
    assert (tmp_path / "m.csv").read_text() == "of before"
    assert len(bad_lines(tmp_path, "bad_files.txt.refused")) == 15
    assert not (tmp_path / "m.csv.json").exists()
    # Repaired files are read anew, also those that were fine before.
    put(tmp_path / "wav/good0.wav", 2.0)
    put(tmp_path / "wav/bad00.wav")
    put(tmp_path / "wav/bad01.wav")
    assert scan(tmp_path, max_bad_share=0.14)["kept"] == 87
    assert {r["ID"]: r["stop"] for r in rows(tmp_path)}["good0.wav"] == "32000"


def test_all_bad_is_an_error_at_any_share(tmp_path):
    put(tmp_path / "wav/a.wav", 0.1)
    with pytest.raises(ValueError, match="0 are left"):
        scan(tmp_path, max_bad_share=1.0)


def test_links_and_loops(tmp_path, logs):
    put(tmp_path / "wav/ann/1.wav")
    put(tmp_path / "elsewhere/bob/2.wav")
    (tmp_path / "wav/bob").symlink_to(tmp_path / "elsewhere/bob")
    (tmp_path / "elsewhere/bob/up").symlink_to(tmp_path / "wav")
    (tmp_path / "wav/ann/again").symlink_to(tmp_path / "wav/ann")
    (tmp_path / "wav/zoe").symlink_to(tmp_path / "wav/ann")
    scan(tmp_path)
    assert ids(tmp_path) == ["ann/1.wav", "bob/2.wav"]
    assert "3 folders are reached by a link, too" in logs.text


def write_trials(path, *utterances):
    lines = [f"{n % 2} {u} {u}\n" for n, u in enumerate(utterances)]
    path.write_text("".join(lines))
    return path


def test_tested_speakers_are_left_out(tmp_path, logs):
    for name in ("ann/s0/1", "ann/s1/2", "bob/s0/1", "cy/1", "cy2/1", "x", "y"):
        put(tmp_path / f"wav/{name}.wav")
    put(tmp_path / "test/dan/1.wav")
    trials = write_trials(
        tmp_path / "trials.txt",
        "wav/ann/s0/1.wav",
        "wav/cy/of_another_name.wav",
        "wav/x.wav",
        "test/dan/1.wav",
    )
    made = scan(tmp_path, trials=trials)
    assert ids(tmp_path) == ["bob/s0/1.wav", "cy2/1.wav", "y.wav"]
    assert made["excluded"] == 4
    assert made["found"] == 7
    assert "4 files in 3 folders are left out" in logs.text
    # Another list is another setting.
    write_trials(trials, "wav/bob/s0/1.wav", "test/dan/1.wav")
    assert scan(tmp_path, trials=trials)["excluded"] == 1


def test_tested_speakers_are_left_out_through_links(tmp_path):
    for name in ("store/ann/1", "store/dan", "wav/bob/1", "wav/cy/1"):
        put(tmp_path / f"{name}.wav")
    for link, target in {
        "wav/ann": "store/ann",
        "test/b.wav": "wav/bob/1.wav",
        "wav/dan/1.wav": "store/dan.wav",
    }.items():
        (tmp_path / link).parent.mkdir(exist_ok=True)
        (tmp_path / link).symlink_to(tmp_path / target)
    trials = write_trials(
        tmp_path / "trials.txt",
        "store/ann/1.wav",
        "test/b.wav",
        "wav/dan/1.wav",
    )
    scan(tmp_path, trials=trials)
    assert ids(tmp_path) == ["cy/1.wav"]


def test_trial_folder(tmp_path):
    put(tmp_path / "wav/ann/1.wav")
    put(tmp_path / "wav/bob/1.wav")
    trials = write_trials(tmp_path / "trials.txt", "ann/1.wav", "ann/2.wav")
    scan(tmp_path, trials=trials, trial_folder=tmp_path / "wav")
    assert ids(tmp_path) == ["bob/1.wav"]


def test_nothing_left_but_tested_speakers(tmp_path):
    put(tmp_path / "wav/ann/1.wav")
    trials = write_trials(tmp_path / "t.txt", "wav/ann/1.wav", "wav/ann/2.wav")
    with pytest.raises(ValueError, match="none is left to train on"):
        scan(tmp_path, trials=trials)


def test_missing_trial_list(tmp_path):
    put(tmp_path / "wav/ann/1.wav")
    with pytest.raises(FileNotFoundError, match="no file .*absent.txt"):
        scan(tmp_path, trials=tmp_path / "absent.txt")


def test_finished_manifest_is_reused(tmp_path, logs, monkeypatch):
    put(tmp_path / "wav/ann/1.wav")
    made = scan(tmp_path)
    monkeypatch.setattr(prepare, "find_audio", None)  # no scan
    assert scan(tmp_path) == made
    assert "Reusing" in logs.text
    assert "Delete it to scan" in logs.text


def test_a_manifest_is_reused_while_the_folder_has_its_files(
    tmp_path, monkeypatch
):
    for name in ("a/1.wav", "a/2.wav", "b.wav"):
        put(tmp_path / "wav" / name)
    (tmp_path / "wav/bad.wav").write_text("no audio")
    options = {"max_bad_share": 1.0, "list_again": True}
    scan(tmp_path, **options)
    # As a file that turned out bad when it was embedded.
    with open(tmp_path / "bad_files.txt", "a") as bad:
        bad.write("a/2.wav\tis silent\n")
    before = (tmp_path / "m.csv").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_scan", pytest.fail)
        scan(tmp_path, **options)
    later = (tmp_path / "m.csv").stat().st_mtime + 1
    put(tmp_path / "wav/bad.wav")  # repaired
    os.utime(tmp_path / "wav/bad.wav", (later, later))
    assert scan(tmp_path, **options)["bad"] == 0
    (tmp_path / "wav/bad.wav").unlink()
    assert scan(tmp_path, **options)["kept"] == 3
    assert (tmp_path / "m.csv").read_bytes() == before
    put(tmp_path / "wav/c.wav")
    assert scan(tmp_path, **options)["kept"] == 4
    for name in ("a/1.wav", "c.wav"):
        (tmp_path / "wav" / name).unlink()
        scan(tmp_path, **options)
    assert ids(tmp_path) == ["a/2.wav", "b.wav"]


def test_a_copy_that_keeps_an_older_time_is_seen(tmp_path):
    """As by cp -p, rsync -a or unzip, over a good file and over a bad one."""
    good, bad = tmp_path / "wav/good.wav", tmp_path / "wav/bad.wav"
    put(good), put(tmp_path / "longer.wav", seconds=3)
    bad.write_text("no audio")
    options = {"max_bad_share": 1.0, "list_again": True}
    scan(tmp_path, **options)
    os.utime(tmp_path / "longer.wav", (10**9, 10**9))
    for path, seconds in ((good, ["3.0"]), (bad, ["3.0", "3.0"])):
        shutil.copy2(tmp_path / "longer.wav", path)
        scan(tmp_path, **options)
        assert [row["duration"] for row in rows(tmp_path)] == seconds


def test_a_repair_of_the_same_size_and_time_is_seen(tmp_path):
    """Such as the original, by rsync -c, over what a disk has damaged."""
    path = tmp_path / "wav/1.wav"
    put(path), put(tmp_path / "wav/2.wav")
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(bytes(len(whole)))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    options = {"max_bad_share": 1.0, "list_again": True}
    assert scan(tmp_path, **options)["bad"] == 1
    time.sleep(0.02)  # a tick of the disk's clock
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert scan(tmp_path, **options)["bad"] == 0


def test_deleted_manifest_is_made_again(tmp_path):
    put(tmp_path / "wav/ann/1.wav")
    scan(tmp_path)
    put(tmp_path / "wav/ann/2.wav")
    (tmp_path / "m.csv").unlink()
    assert scan(tmp_path)["kept"] == 2


def test_other_settings_are_never_reused(tmp_path, logs, monkeypatch):
    put(tmp_path / "wav/ann/1.wav", 0.5)
    put(tmp_path / "wav/ann/2.wav", 0.9)
    put(tmp_path / "other/zoe/1.wav")
    scan(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "MIN_SECONDS", 0.6)
        made = scan(tmp_path, max_bad_share=0.5)
    assert made["kept"] == 1
    assert "min_seconds was 0.3, is 0.6" in logs.text
    prepare_manifest(tmp_path / "other", tmp_path / "m.csv")
    assert ids(tmp_path) == ["zoe/1.wav"]
    # What was made here needs no copy aside.
    assert not (tmp_path / "m.csv.old").exists()


def test_what_is_refused_is_not_announced(tmp_path, logs):
    """Neither other audio than a run was begun with, nor too many bad files."""

    def refuse(checksum):
        raise ValueError("other audio")

    put(tmp_path / "wav/ann/1.wav")
    (tmp_path / "wav/ann/2.wav").touch()
    scan(tmp_path, max_bad_share=0.5)
    before = rows(tmp_path)
    with pytest.raises(ValueError, match="other audio"):
        scan(tmp_path, speaker_folder=False, accept=refuse, max_bad_share=0.5)
    with pytest.raises(ValueError, match="max_bad_share: 0.4 allows 0"):
        scan(tmp_path, max_bad_share=0.4)
    assert "again:" not in logs.text and rows(tmp_path) == before
    scan(tmp_path, speaker_folder=False, max_bad_share=0.5)
    assert "again: speaker_folder was True, is False." in logs.text


def test_what_is_refused_leaves_the_list_of_bad_files(tmp_path):
    """It is of the manifest that stays; those refused have a list of theirs."""
    put(tmp_path / "wav/ann/1.wav", channels=2)
    (tmp_path / "wav/ann/2.wav").touch()
    made = scan(tmp_path, max_bad_share=0.5, channel=1)
    refused = tmp_path / "bad_files.txt.refused"
    with pytest.raises(ValueError, match=f"named in {refused}") as error:
        scan(tmp_path, max_bad_share=1.0, channel=2)
    assert "ann/1.wav: has 2 channels" in str(error.value)
    assert "ann/1.wav\thas 2 channels" in refused.read_text()
    assert bad_lines(tmp_path) == {"ann/2.wav": "is empty"}
    assert scan(tmp_path, max_bad_share=0.5, channel=1) == made
    shutil.move(tmp_path / "wav", tmp_path / "elsewhere")
    (tmp_path / "wav").mkdir()
    with pytest.raises(ValueError, match="no audio below"):
        scan(tmp_path, max_bad_share=1.0, channel=0)
    assert bad_lines(tmp_path) == {"ann/2.wav": "is empty"}
    put(tmp_path / "wav/ann/1.wav")
    scan(tmp_path)
    assert bad_lines(tmp_path) == {} and not refused.exists()


def test_more_tolerance_needs_no_other_scan(tmp_path, monkeypatch):
    """Too little of it does, and says so."""
    put(tmp_path / "wav/ann/1.wav")
    (tmp_path / "wav/ann/2.wav").touch()
    made = scan(tmp_path, max_bad_share=0.5)
    with pytest.raises(ValueError, match="max_bad_share: 0.4 allows 0"):
        scan(tmp_path, max_bad_share=0.4)
    monkeypatch.setattr(prepare, "find_audio", None)  # no scan
    assert scan(tmp_path, max_bad_share=0.9) == made


@pytest.mark.parametrize("text", ["[]", "{}", "[" * 9999, '"', '{"found": 1}'])
def test_damaged_sidecar_vouches_for_nothing(tmp_path, text):
    put(tmp_path / "wav/ann/1.wav")
    made = scan(tmp_path)
    (tmp_path / "m.csv.json").write_text(text)
    assert scan(tmp_path) == made


def test_a_manifest_of_the_users_own_is_kept_aside(tmp_path, logs):
    put(tmp_path / "wav/ann/1.wav")
    (tmp_path / "m.csv").write_text("mine")
    scan(tmp_path)
    assert (tmp_path / "m.csv.old").read_text() == "mine"
    assert "m.csv.old" in logs.text
    with open(tmp_path / "m.csv", "a") as out:
        out.write("an edit\n")
    scan(tmp_path)
    assert "an edit" in (tmp_path / "m.csv.old").read_text()
    assert ids(tmp_path) == ["ann/1.wav"]


def test_crash_before_the_sidecar(tmp_path, monkeypatch):
    """A sidecar never vouches for a manifest of other settings."""
    put(tmp_path / "wav/ann/1.wav")
    put(tmp_path / "new/bob/1.wav")  # a manifest of the same size
    scan(tmp_path)
    size = (tmp_path / "m.csv").stat().st_size

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_json", full)
        with pytest.raises(OSError, match="No space"):
            prepare_manifest(tmp_path / "new", tmp_path / "m.csv", tmp_path)
    assert (tmp_path / "m.csv").stat().st_size == size
    scan(tmp_path)
    assert ids(tmp_path) == ["ann/1.wav"]


def test_a_kill_before_the_manifest_is_in_place_costs_no_scan(
    tmp_path, monkeypatch, logs
):
    """Nor does a manifest of before stand in the way, or a warning come."""
    put(tmp_path / "wav/ann/1.wav")
    scan(tmp_path)
    put(tmp_path / "wav/bob/1.wav")

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_finish", lambda manifest: None)
        scan(tmp_path, speaker_folder=False)  # up to the sidecar
    assert ids(tmp_path) == ["ann/1.wav"]
    logs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "find_audio", None)  # no scan
        assert scan(tmp_path, speaker_folder=False)["kept"] == 2
    assert ids(tmp_path) == ["ann/1.wav", "bob/1.wav"]
    assert "Reusing" in logs.text and "was not made here" not in logs.text
    # Before the sidecar, a scan is needed, and nothing else is said.
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "write_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            scan(tmp_path)
    assert scan(tmp_path)["kept"] == 2
    assert "was not made here" not in logs.text
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"wav", "m.csv", "m.csv.json", "bad_files.txt"}


def interrupt(*_, **__):
    raise KeyboardInterrupt


def interrupt_after(monkeypatch, n):
    """Has the scan stopped, as by Ctrl-C, at its n-th file."""

    def stop_after(files, *_, **__):
        yield from itertools.islice(files, n)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "tqdm", stop_after)


def test_interrupted_scan_leaves_nothing_half_written(tmp_path, monkeypatch):
    for name in "bdfh":
        put(tmp_path / f"wav/{name}.wav")
    (tmp_path / "wav/c.wav").touch()
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            scan(tmp_path, max_bad_share=1.0)
    assert [path.name for path in tmp_path.iterdir()] == ["wav"]
    # Files that change before the next scan are read as they are then.
    put(tmp_path / "wav/a.wav")
    put(tmp_path / "wav/c.wav")  # repaired
    put(tmp_path / "wav/e/e.wav")
    (tmp_path / "wav/d.wav").unlink()
    made = scan(tmp_path)
    names = ["a.wav", "b.wav", "c.wav", "e/e.wav", "f.wav", "h.wav"]
    assert ids(tmp_path) == names
    assert made["bad"] == 0


def slow_scan(folder):
    """A scan that takes seconds, for a process to be killed in."""
    really = prepare.tqdm

    def slowly(files, *arguments, **options):
        for file in really(files, *arguments, **options):
            time.sleep(0.002)
            yield file

    prepare.tqdm = slowly
    scan(folder)


def descendants(process):
    """Process ids whose parent is `process`."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as source:
                parent = source.read().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if int(parent) == process:
            found.append(int(entry))
    return found


def alive(process):
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        with open(f"/proc/{process}/stat") as source:
            return source.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
def test_killed_scan_leaves_no_manifest_and_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "WORKERS", 2)
    source = put(tmp_path / "source.wav", 0.3)
    (tmp_path / "wav").mkdir()
    for n in range(2000):
        os.link(source, tmp_path / f"wav/{n:04}.wav")
    fork = multiprocessing.get_context("fork")
    child = fork.Process(target=slow_scan, args=(tmp_path,))
    child.start()
    deadline = time.monotonic() + 60
    try:
        # Until a part of the manifest lies on disk.
        while not any(p.stat().st_size for p in tmp_path.glob(".m.csv.*")):
            assert child.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        workers = descendants(child.pid)
    finally:  # or the tests would wait for it at their end
        child.kill()
        child.join()
    assert len(workers) == 2
    while any(alive(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlive their scan"
        time.sleep(0.01)
    assert not (tmp_path / "m.csv").exists()
    assert scan(tmp_path)["kept"] == len(ids(tmp_path)) == 2000


def hang(path):
    """Reads the first file slowly, in the place of `probe`."""
    if path.endswith("/0.wav"):
        time.sleep(0.5)
    return 8000, 16000, 1


def test_a_file_that_hangs_keeps_few_others_in_memory(tmp_path):
    taken = []

    def files():
        for n in range(100 * probing.BATCH):
            taken.append(n)
            yield f"{n}.wav", None

    headers = probing.probe_all(hang, "corpus", files(), num_workers=2)
    assert next(headers) == ("0.wav", (8000, 16000, 1))
    assert len(taken) <= 9 * probing.BATCH
    names = ["0.wav", *(name for name, _ in headers)]
    assert names == [f"{n}.wav" for n in taken]


@pytest.mark.parametrize(
    "n_files, asked, cores, started",
    [(50, 8, 2, 1), (200, 8, 2, 4), (1000, 8, 1, 4), (1000, 3, 2, 3)],
)
def test_processes_are_bounded_by_the_files_and_the_cores(
    monkeypatch, n_files, asked, cores, started
):
    sizes = []

    def pool(size, initializer):
        sizes.append(size)
        return ThreadPoolExecutor(size)

    monkeypatch.setattr(probing, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    files = ((f"{n}.wav", None) for n in range(n_files))
    found = [*probing.probe_all(os.path.basename, "corpus", files, asked)]
    assert found == [(f"{n}.wav", f"{n}.wav") for n in range(n_files)]
    assert sizes == [started]


def test_workers_leave_ctrl_c_to_the_main_process():
    with ProcessPoolExecutor(1, initializer=probing.start_worker) as pool:
        handler = pool.submit(signal.getsignal, signal.SIGINT).result()
    assert handler == signal.SIG_IGN


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_dies_is_an_error(tmp_path, monkeypatch):
    put(tmp_path / "wav/a.wav")
    put(tmp_path / "wav/killer.wav")

    monkeypatch.setattr(prepare, "probe", die)
    with pytest.raises(RuntimeError, match="from a.wav to killer.wav"):
        scan(tmp_path)
    assert not (tmp_path / "m.csv").exists()


def test_notice_of_files_that_are_converted(tmp_path, logs):
    put(tmp_path / "wav/a.wav")
    put(tmp_path / "wav/b.wav", rate=8000)
    put(tmp_path / "wav/c.wav", rate=44100, channels=2)
    put(tmp_path / "wav/d.wav", channels=2)
    scan(tmp_path)
    notice = "3 files are not 16000 Hz mono (2 of another rate, 1 of them"
    assert logs.text.count(notice) == 1
    assert "a lower one, 2 of more channels, whose mean" in logs.text


@pytest.mark.parametrize("narrow, warned", [(0, 0), (1, 1), (3, 1), (4, 0)])
def test_warning_of_several_bandwidths(tmp_path, logs, narrow, warned):
    for n in range(4):
        put(tmp_path / f"wav/{n}.wav", rate=8000 if n < narrow else 44100)
    made = scan(tmp_path)
    assert made["narrow"] == narrow
    assert made["lowest_rate"] == (8000 if narrow else 44100)
    assert logs.text.count(f"{narrow} of 4 files are below 16000 Hz") == warned
    assert logs.text.count("--sample_rate=8000, their lowest") == warned


def test_train_folder_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_folder.*train_folder"):
        scan(tmp_path)
    (tmp_path / "wav").touch()
    with pytest.raises(FileNotFoundError, match="is no folder"):
        scan(tmp_path)


def test_a_corpus_in_part_is_said(tmp_path, logs):
    for n in range(4):
        put(tmp_path / f"wav/ann/{n}.wav")
    for n in range(100):
        (tmp_path / f"wav/ann/{n}.M4A").touch()
    (tmp_path / "wav/ann/b.opus").touch()
    (tmp_path / "wav/ann/a.txt").touch()
    made = scan(tmp_path)
    assert made["passed_over"] == {".m4a": 100, ".opus": 1, ".txt": 1}
    notice = "101 files of other audio formats are left out (100 .m4a, 1 .opus)"
    assert notice in logs.text and "ffmpeg" in logs.text
    assert ".txt" not in logs.text


def test_files_without_folders_get_a_hint(tmp_path, logs):
    put(tmp_path / "wav/1.wav")
    scan(tmp_path)
    assert f"1 utterances directly in {tmp_path / 'wav'}, 0.0 h." in logs.text
    assert "No folder names a speaker" in logs.text
    logs.clear()
    scan(tmp_path, speaker_folder=False)
    assert "No folder names a speaker" not in logs.text


def test_what_cannot_be_converted_to_the_rate_of_training_is_bad(tmp_path):
    put(tmp_path / "wav/1.wav")
    put(tmp_path / "wav/2.wav", rate=15999)
    scan(tmp_path, max_bad_share=0.5)
    assert ids(tmp_path) == ["1.wav"]
    scan(tmp_path, max_bad_share=0.5, sample_rate=15999)
    assert ids(tmp_path) == ["2.wav"]


def test_channel(tmp_path, logs):
    put(tmp_path / "wav/1.wav")
    put(tmp_path / "wav/2.wav", channels=2)
    scan(tmp_path, channel=0)
    assert "whose channel 0 is taken" in logs.text
    manifest = load_manifest(tmp_path / "m.csv", tmp_path)
    assert [manifest[row]["channel"] for row in (0, 1)] == [0, 0]
    scan(tmp_path, channel=1, max_bad_share=0.5)
    assert bad_lines(tmp_path) == {
        "1.wav": "has 1 channels, numbered from 0, and no channel 1"
    }
    assert "channel was 0, is 1" in logs.text
    scan(tmp_path)
    assert (tmp_path / "m.csv").read_text().startswith(HEADER)
    with pytest.raises(ValueError, match="channel must be 0 or more, got -1"):
        scan(tmp_path, channel=-1)


def test_no_audio(tmp_path):
    (tmp_path / "wav/ann").mkdir(parents=True)
    with pytest.raises(ValueError, match="found no file at all"):
        scan(tmp_path)
    for name in ("1.m4a", "2.M4A", "README"):
        (tmp_path / "wav/ann" / name).touch()
    with pytest.raises(ValueError, match="2 .m4a, 1 no extension") as error:
        scan(tmp_path)
    assert ".flac, .mp3, .ogg, .wav" in str(error.value)
    assert not (tmp_path / "m.csv").exists()


def test_data_root_not_above(tmp_path):
    put(tmp_path / "wav/ann/1.wav")
    (tmp_path / "wa").mkdir()  # a prefix of the text, not of the path
    with pytest.raises(ValueError, match="data_root.*not above train_folder"):
        scan(tmp_path, data_root=tmp_path / "wa")


def test_a_share_out_of_range(tmp_path):
    put(tmp_path / "wav/ann/1.wav")
    with pytest.raises(ValueError, match="max_bad_share"):
        scan(tmp_path, max_bad_share=-0.1)


@pytest.mark.parametrize("name", ["list.csv", "files.txt", "kaldi/wav.scp"])
def test_a_list_in_the_place_of_a_folder(name, tmp_path):
    """A verb without --manifest does not advise it."""
    path = tmp_path / "audio" / name
    path.parent.mkdir(parents=True)
    path.write_text("utterance /of/somebody.wav\n")
    given = path.parent if path.parent.name == "kaldi" else path
    listed = tmp_path / "manifest.csv"
    for to_train in (True, False):
        with pytest.raises((FileNotFoundError, ValueError)) as refused:
            prepare_manifest(given, listed, to_train=to_train)
        hint = "by --manifest, as a csv with the columns ID,duration,wav,"
        assert (hint in str(refused.value)) == to_train
    with pytest.raises(FileNotFoundError) as refused:
        prepare_manifest(tmp_path / "audio.wav", listed)
    assert "--manifest" not in str(refused.value)
