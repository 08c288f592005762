"""Shards: the same samples as from files, and every utterance once."""

import collections
import csv
import errno
import io
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import soundfile
import torch

from lgl_plugin.cli.main import main
from lgl_plugin.dataio import shards
from lgl_plugin.dataio.audio import Member
from lgl_plugin.dataio.dataset import crop_dataset
from lgl_plugin.dataio.manifest import load_manifest
from lgl_plugin.dataio.shards import write_shards

HEADER = "ID,duration,wav,start,stop,spk_id\n"


@pytest.fixture(autouse=True)
def logs(caplog):
    caplog.set_level(logging.INFO, logger="lgl_plugin.dataio.shards")
    return caplog


def noise(n, channels=1, seed=0):
    shape = (n, channels) if channels > 1 else n
    return np.random.default_rng(seed).uniform(-0.9, 0.9, shape)


def put(path, n=4000, rate=16000, channels=1, subtype=None, seed=0):
    """Writes noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(n, channels, seed), rate, subtype)


def row(name, wav, start, stop, rate=16000, speaker=""):
    """A line of a manifest."""
    seconds = round((stop - start) / rate, 6)
    return f'"{name}",{seconds},"$data_root/{wav}",{start},{stop},"{speaker}"\n'


def make_manifest(folder, lines):
    (folder / "in.csv").write_text(HEADER + "".join(lines), encoding="utf-8")
    return folder / "in.csv"


def make_corpus(folder, n=40):
    """n files of 0.25 s by eight speakers, and their manifest."""
    lines = []
    for i in range(n):
        name = f"s{i % 8}/{i:03d}.wav"
        put(folder / "wav" / name, seed=i)
        lines.append(row(name, f"wav/{name}", 0, 4000, speaker=f"s{i % 8}"))
    return make_manifest(folder, lines)


def write(folder, **arguments):
    """Writes `folder`/in.csv into `folder`/shards."""
    arguments = {"num_workers": 1, "shard_mb": 0.05, **arguments}
    return write_shards(
        folder / "in.csv", folder, folder / "shards", **arguments
    )


def read_all(path, data_root):
    """Samples by ID, whole, at the file's own rate."""
    manifest = load_manifest(path, data_root)
    samples = {}
    for i, name in enumerate(manifest.ids):
        part = manifest[i]
        source = part["wav"]
        if part["place"]:
            source = Member(source, *part["place"])
        with soundfile.SoundFile(source) as audio:
            audio.seek(round(part["offset"] * audio.samplerate))
            frames = round(part["duration"] * audio.samplerate)
            samples[name] = audio.samplerate, audio.read(frames, "float32")
    return samples


def check_equal(folder, made):
    """Compares shards with files."""
    expected = read_all(folder / "in.csv", folder)
    found = read_all(made, made.parent)
    assert list(found) == list(expected)
    for name, (rate, samples) in expected.items():
        assert found[name][0] == rate
        assert np.array_equal(found[name][1], samples), name


def members(folder):
    """(shard, name, content) in the order of the tars."""
    for path in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                yield path.name, member.name, tar.extractfile(member).read()


def test_whole_files_are_copied(tmp_path):
    lines = []
    for i, (kind, rate, channels) in enumerate(
        itertools.product(("wav", "flac", "ogg", "mp3"), (8000, 44100), (1, 2))
    ):
        name = f"s{i % 3}/{i}.{kind}"
        put(tmp_path / "wav" / name, 5000 + i, rate, channels, seed=i)
        frames = soundfile.info(tmp_path / "wav" / name).frames
        lines.append(row(name, f"wav/{name}", 0, frames, rate, f"spk {i % 3}"))
    make_manifest(tmp_path, lines)
    made = write(tmp_path)
    check_equal(tmp_path, made)
    packed = list(members(tmp_path / "shards"))
    assert len({shard for shard, _, _ in packed}) == 3
    assert len(packed) == len(lines)
    for _, name, content in packed:
        assert content == (tmp_path / "wav" / name).read_bytes()
    # All else in the manifest is as it was.
    with open(tmp_path / "in.csv") as old, open(made) as new:
        for was, now in zip(
            csv.DictReader(old), csv.DictReader(new), strict=True
        ):
            assert {**was, "wav": ""} == {
                **{key: now[key] for key in was},
                "wav": "",
            }
            assert re.fullmatch(r"\$data_root/shard-\d{6}\.tar", now["wav"])
    # What is left lies there for a purpose.
    names = {path.name for path in (tmp_path / "shards").iterdir()}
    assert names == {shard for shard, _, _ in packed} | {
        "manifest.csv",
        "shards.json",
        "bad_files.txt",
        ".lock",
    }


def test_parts_are_cut_out(tmp_path):
    lines = []
    for kind, subtype in (
        ("wav", "PCM_U8"),
        ("wav", "PCM_16"),
        ("wav", "ULAW"),
        ("wav", "PCM_24"),
        ("wav", "PCM_32"),
        ("wav", "FLOAT"),
        ("wav", "DOUBLE"),
        ("flac", "PCM_16"),
        ("flac", "PCM_24"),
        ("ogg", "VORBIS"),
    ):
        wav = f"{subtype}.{kind}"
        put(tmp_path / wav, 48000, 16000, 2, subtype)
        for start, stop in ((0, 16000), (16000, 30001), (24000, 48000)):
            name = f"{kind}-{subtype}-{start}"
            lines.append(row(name, wav, start, stop))
    make_manifest(tmp_path, lines)
    made = write(tmp_path)
    check_equal(tmp_path, made)
    with open(made, newline="") as source:
        for line in csv.DictReader(source):
            frames = int(line["stop"]) - int(line["start"])
            assert line["start"] == "0"
            assert float(line["duration"]) == round(frames / 16000, 6)
    # No part holds more than itself.
    for _, name, content in members(tmp_path / "shards"):
        exact = re.search("PCM_(U8|16|24)|ULAW", name)
        assert name.endswith(".flac" if exact else ".wav")
        assert soundfile.info(io.BytesIO(content)).frames <= 24000


def test_decoded_shards_are_wav_of_16_bits(tmp_path):
    lines = []
    for kind, channels in itertools.product(("wav", "flac", "ogg"), (1, 2)):
        name = f"{channels}.{kind}"
        put(tmp_path / name, 6000, 8000, channels)
        lines.append(row(name, name, 0, 6000, 8000))
        lines.append(row(f"part of {name}", name, 3000, 6000, 8000))
    make_manifest(tmp_path, lines)
    made = write(tmp_path, decode=True)
    expected = read_all(tmp_path / "in.csv", tmp_path)
    found = read_all(made, made.parent)
    assert list(found) == list(expected)
    for name, (rate, samples) in expected.items():
        assert found[name][0] == rate
        # A bit by libsndfile's scale (32,767), half a bit by rounding.
        clipped = np.clip(samples, -1, 1)
        assert np.allclose(found[name][1], clipped, atol=2**-14), name
    for _, name, content in members(made.parent):
        assert name.endswith(".wav")
        assert soundfile.info(io.BytesIO(content)).subtype == "PCM_16"
    # The room that was asked for beforehand is about that needed.
    record = json.loads((made.parent / "shards.json").read_text())
    n_samples = 6000 + 3000
    assert record["bytes"] == pytest.approx(2 * n_samples * 3 * (1 + 2))


def test_floats_beyond_full_scale_are_not_clipped_when_decoded(tmp_path):
    """Some programs write the integers of 16 or 32 bits as floats."""
    lines = []
    for name, peak in (("in.wav", 0.9), ("over.wav", 1.5), ("int.wav", 3e4)):
        samples = peak * np.sin(np.arange(16000) / 9)
        samples[8000:] *= 0.5 / peak
        soundfile.write(tmp_path / name, samples, 16000, subtype="FLOAT")
        lines.append(row(name, name, 0, 16000))
        lines.append(row(f"{name} loud", name, 2000, 6000))
        lines.append(row(f"{name} quiet", name, 9000, 16000))
    make_manifest(tmp_path, lines)
    made = write(tmp_path, decode=True)
    expected = read_all(tmp_path / "in.csv", tmp_path)
    found = read_all(made, made.parent)
    assert list(found) == list(expected)
    kinds = {
        name: soundfile.info(io.BytesIO(content)).subtype
        for _, name, content in members(made.parent)
    }
    floats = {name for name, kind in kinds.items() if kind == "FLOAT"}
    assert len(kinds) == 9 and len(floats) == 4
    for name, (rate, samples) in expected.items():
        assert found[name][0] == rate
        if "in." in name or "quiet" in name:
            np.testing.assert_allclose(found[name][1], samples, atol=2**-14)
        else:
            np.testing.assert_array_equal(found[name][1], samples)


@pytest.mark.parametrize("record", ['{"settings": {', '{"of": "another"}'])
def test_a_damaged_or_foreign_record_is_named(tmp_path, record):
    make_corpus(tmp_path, 4)
    (write(tmp_path).parent / "shards.json").write_text(record)
    with pytest.raises(FileExistsError, match="or shards.json beside it is"):
        write(tmp_path)


def test_a_rounded_duration_cuts_nothing(tmp_path):
    put(tmp_path / "a.wav", 40037)
    make_manifest(tmp_path, ["a,2.5,$data_root/a.wav,0,40037,\n"])
    made = write(tmp_path)
    ((_, name, content),) = members(made.parent)
    assert name == "a.wav"
    assert content == (tmp_path / "a.wav").read_bytes()
    check_equal(tmp_path, made)


def by_key(names):
    """Groups names as webdataset does: by key, where they are neighbours."""
    pattern = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
    split = [pattern.match(name).groups() for name in names]
    return [
        (key, [extension for _, extension in group])
        for key, group in itertools.groupby(split, lambda pair: pair[0])
    ]


def test_members_have_one_key_each(tmp_path):
    ids = [
        "s1/v.1/00001.wav",
        "s1/v.1/00001.flac",
        "s1/v.1/00001",
        "s1/00002.mp3.wav",
        "s1/00002%2Emp3.wav",
        ".hidden.wav",
        "a.b",
        "a.c",
        "dots.../x.y.z",
        "Zürich/Łódź-" + "x" * 120 + ".wav",
        *("../../up.wav", "/abs/root.wav", "s/./../..", "C:/disk.wav", "..\\b"),
    ]
    put(tmp_path / "a.wav")
    make_manifest(tmp_path, [row(name, "a.wav", 0, 4000) for name in ids])
    write(tmp_path, shard_mb=512)
    names = [name for _, name, _ in members(tmp_path / "shards")]
    assert len(names) == len(ids)
    groups = by_key(names)
    assert all(extensions == ["wav"] for _, extensions in groups)
    assert len({key for key, _ in groups}) == len(ids)
    assert {"%2Ehidden.wav", "a%2Eb.wav", "a%2Ec.wav"} < set(names)
    # Unpacked by whatever tool, every member stays below the folder.
    for name in names:
        assert not name.startswith("/") and not set("\\:") & set(name)
        assert not {"", ".", ".."} & set(name.split("/"))
    assert {"%2E%2E/%2E%2E/up.wav", "abs/root.wav"} < set(names)


def test_two_processes_never_write_into_one_folder(tmp_path):
    make_corpus(tmp_path)
    holder = "from lgl_plugin.runs.lock import lock_folder; import sys, time; "
    holder += f"lock_folder({str(tmp_path / 'shards')!r}); print(flush=True); "
    command = [sys.executable, "-c", holder + "time.sleep(600)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        try:
            with pytest.raises(RuntimeError, match="is being written by proc"):
                write(tmp_path)
            assert not list((tmp_path / "shards").glob("shard*"))
        finally:
            process.kill()
    check_equal(tmp_path, write(tmp_path))


def test_the_column_of_channels_is_kept(tmp_path):
    put(tmp_path / "a.wav", 8000, channels=2)
    lines = [row("a", "a.wav", 0, 8000), row("b", "a.wav", 4000, 8000)]
    make_manifest(tmp_path, [f"{line[:-1]},1\n" for line in lines])
    text = (tmp_path / "in.csv").read_text("utf-8")
    named = "\ufeff" + text.replace("spk_id", "spk_id,channel")
    (tmp_path / "in.csv").write_text(named, "utf-8")
    made = write(tmp_path)
    check_equal(tmp_path, made)
    assert load_manifest(made, made.parent)[1]["channel"] == 1


def test_shards_are_fair_samples(tmp_path):
    make_corpus(tmp_path, 80)
    made = write(tmp_path, shard_mb=0.08)  # about ten files
    packed = collections.defaultdict(list)
    for shard, name, _ in members(made.parent):
        packed[shard].append(name)
    assert len(packed) == 8
    for names in packed.values():
        assert 8 <= len(names) <= 12
        assert names != sorted(names)
        # Ten files of one speaker, or of neighbours, would show few.
        assert len({name.split("/")[0] for name in names}) >= 4


def test_crops_and_labels_are_those_of_the_files(tmp_path):
    make_corpus(tmp_path)
    made = write(tmp_path)
    labels = np.arange(40) % 5 - 1
    rows = np.arange(3, 40)
    from_files, from_shards = (
        crop_dataset(load_manifest(path, root), rows, 0.1, 2, labels)
        for path, root in ((tmp_path / "in.csv", tmp_path), (made, made.parent))
    )
    assert len(from_files) == len(from_shards) == (labels[3:] >= 0).sum()
    for i in range(len(from_files)):
        old, new = from_files[i], from_shards[i]
        assert torch.equal(old.pop("sig"), new.pop("sig"))
        assert old == new


def test_bad_files_are_named_and_left_out(tmp_path):
    make_corpus(tmp_path, 20)
    (tmp_path / "wav/s0/000.wav").write_bytes(b"no audio")
    (tmp_path / "wav/s1/001.wav").unlink()
    made = write(tmp_path, max_bad_share=0.1)
    assert len(load_manifest(made, "")) == 18
    assert len(list(members(made.parent))) == 18
    lines = (made.parent / "bad_files.txt").read_text().splitlines()
    named = dict(line.split("\t") for line in lines)
    assert list(named) == ["s0/000.wav", "s1/001.wav"]
    assert "Format not recognised" in named["s0/000.wav"]
    assert "No such file" in named["s1/001.wav"]


@pytest.mark.parametrize("decode", [False, True])
def test_damaged_files_are_bad_whether_decoded_or_not(tmp_path, decode):
    put(tmp_path / "odd.wav", 48000, 47911)
    put(tmp_path / "cut.mp3", 160000)
    content = (tmp_path / "cut.mp3").read_bytes()
    (tmp_path / "cut.mp3").write_bytes(content[: len(content) // 2 - 99])
    put(tmp_path / "good.wav")
    lines = [row("odd", "odd.wav", 0, 48000, 47911)]
    lines += [row("cut", "cut.mp3", 0, 160000), row("a", "good.wav", 0, 4000)]
    make_manifest(tmp_path, lines)
    write(tmp_path, max_bad_share=0.7, decode=decode)
    bad = (tmp_path / "shards/bad_files.txt").read_text()
    assert [line.split("\t")[0] for line in bad.splitlines()] == ["odd", "cut"]


def test_too_many_bad_files_end_it(tmp_path):
    make_corpus(tmp_path, 20)
    (tmp_path / "wav/s1/001.wav").unlink()
    with pytest.raises(ValueError, match="1 bad .*\n.*s1/001.wav: .*No such"):
        write(tmp_path, max_bad_share=0.04)
    assert not (tmp_path / "shards/manifest.csv").exists()
    # As the message says: it goes on without them.
    made = write(tmp_path, max_bad_share=0.05)
    assert len(load_manifest(made, "")) == 19


def test_nothing_is_packed_that_training_would_refuse(tmp_path):
    put(tmp_path / "gsm.wav", 8000, 8000, subtype="GSM610")
    put(tmp_path / "good.wav")
    lines = [row("g", "gsm.wav", 0, 8000, 8000), row("a", "good.wav", 0, 4000)]
    make_manifest(tmp_path, lines)
    write(tmp_path, max_bad_share=0.7)
    bad = (tmp_path / "shards/bad_files.txt").read_text()
    assert bad.startswith("g\tis coded as GSM 6.10")


def test_parts_without_samples_are_bad(tmp_path):
    put(tmp_path / "a.wav", 16000)
    make_manifest(
        tmp_path,
        [
            row("a", "a.wav", 0, 8000),
            row("b", "a.wav", 16000, 20000),
            "c,0.00001,$data_root/a.wav,0,1,\n",
        ],
    )
    write(tmp_path, max_bad_share=0.7)
    bad = (tmp_path / "shards/bad_files.txt").read_text()
    assert bad == "b\tholds no samples\nc\tholds no samples\n"


def run_slowly(folder):
    """Writes shards in another process, a tenth of a second each."""
    write_shard = shards._write_shard

    def slowly(*arguments):
        write_shard(*arguments)
        time.sleep(0.1)

    # Workers find it, being forked after this.
    shards._write_shard = slowly
    slowly.__module__, slowly.__qualname__ = (
        "lgl_plugin.dataio.shards",
        "_write_shard",
    )
    write(folder)


def test_goes_on_after_a_kill(tmp_path, logs):
    make_corpus(tmp_path)
    folder = tmp_path / "shards"
    context = multiprocessing.get_context("fork")
    process = context.Process(target=run_slowly, args=(tmp_path,))
    process.start()
    try:
        deadline = time.monotonic() + 30
        while len(list(folder.glob("*.csv"))) < 2:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.01)
    finally:  # or the tests would wait for it at their end
        process.kill()
        process.join()
    assert not (folder / "manifest.csv").exists()
    kept = {path: path.stat() for path in folder.glob("shard-*.tar")}
    whole = [p for p in kept if p.with_suffix(".csv").exists()]
    assert len(whole) >= 2
    (folder / ".shard-000099.tar.abc.part").write_bytes(b"half a shard")

    made = write(tmp_path)
    assert "Going on" in logs.text
    for path in whole:
        assert path.stat().st_mtime_ns == kept[path].st_mtime_ns
        assert path.stat().st_ino == kept[path].st_ino
    check_equal(tmp_path, made)
    assert len(list(members(folder))) == 40
    assert not list(folder.glob(".*.part"))

    # As if it had never been interrupted.
    write_shards(
        tmp_path / "in.csv", tmp_path, tmp_path / "once", 0.05, num_workers=2
    )
    assert made.read_text() == (tmp_path / "once/manifest.csv").read_text()
    assert list(members(folder)) == list(members(tmp_path / "once"))


def test_a_killed_worker_is_reported(tmp_path, monkeypatch):
    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    die.__module__, die.__qualname__ = (
        "lgl_plugin.dataio.shards",
        "_write_shard",
    )
    make_corpus(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_write_shard", die)
        with pytest.raises(RuntimeError, match="writes shards died"):
            write(tmp_path, num_workers=2)
    assert not (tmp_path / "shards/manifest.csv").exists()
    check_equal(tmp_path, write(tmp_path))


def test_a_finished_run_is_reused(tmp_path, logs):
    make_corpus(tmp_path)
    made = write(tmp_path)
    before = made.stat()
    for path in (tmp_path / "wav").rglob("*.wav"):
        path.unlink()  # which nobody reads again
    assert write(tmp_path) == made
    assert made.stat() == before
    assert "Reusing" in logs.text


def test_other_settings_start_over(tmp_path, logs):
    manifest = make_corpus(tmp_path)
    made = write(tmp_path)
    n_shards = len(list(made.parent.glob("*.tar")))
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:-30]))
    write(tmp_path)
    assert "other manifest" in logs.text
    assert len(list(made.parent.glob("*.tar"))) < n_shards
    check_equal(tmp_path, made)
    write(tmp_path, shard_mb=0.02)
    assert "other shard_mb" in logs.text
    check_equal(tmp_path, made)


def test_a_full_disk_says_so(tmp_path, monkeypatch):
    make_corpus(tmp_path)
    write_shard = shards.atomic_write

    def full(path, mode="w"):
        """Fills up before the third shard is whole."""
        if path.name == "shard-000002.tar":
            with write_shard(path, mode):
                raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "atomic_write", full)
        with pytest.raises(OSError, match="No space left.*Make room"):
            write(tmp_path)
    assert not (tmp_path / "shards/manifest.csv").exists()
    assert not list((tmp_path / "shards").glob(".*.part"))
    check_equal(tmp_path, write(tmp_path))


def test_room_is_looked_for_first(tmp_path, monkeypatch):
    make_corpus(tmp_path)
    usage = collections.namedtuple("usage", "free")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda _: usage(free))
    free = 40 * 8044 - 1
    with pytest.raises(OSError, match="need about .* GB are free. Make room"):
        write(tmp_path)
    assert not list((tmp_path / "shards").glob("*.tar"))
    free += 1
    write(tmp_path)


def test_refuses_what_cannot_be_meant(tmp_path):
    make_corpus(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="--data_root, now .*/nowhere"):
        write_shards(tmp_path / "in.csv", tmp_path / "nowhere", tmp_path / "s")
    # Never over somebody's manifest, least of all the one it reads.
    listed = tmp_path / "list" / "manifest.csv"
    listed.parent.mkdir()
    shutil.copy(tmp_path / "in.csv", listed)
    with pytest.raises(FileExistsError, match="Choose another folder"):
        write_shards(listed, tmp_path, listed.parent)
    made = write(tmp_path)
    with pytest.raises(ValueError, match="of shards already"):
        write_shards(made, made.parent, tmp_path / "again")
    for wrong in ({"shard_mb": 0}, {"num_workers": 0}, {"max_bad_share": -1}):
        with pytest.raises(ValueError, match=f"{list(wrong)[0]} must"):
            write(tmp_path, **wrong)


def test_command_line(tmp_path, capsys):
    make_corpus(tmp_path, 4)
    main(
        [
            "pack",
            *(str(tmp_path / "in.csv"), str(tmp_path / "shards")),
            *("--data_root", str(tmp_path), "--num_workers", "1"),
        ]
    )
    check_equal(tmp_path, tmp_path / "shards/manifest.csv")
    shards = tmp_path / "shards"
    command = f"lgl train {shards} --manifest={shards}/manifest.csv"
    assert command in capsys.readouterr().out
