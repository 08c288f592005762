#!/usr/bin/env python3
"""A VoxCeleb of 240 tiny files, in archives, and reproduce.sh tried on it.

> python tests/fake_voxceleb.py downloads  # the archives alone
> python tests/fake_voxceleb.py downloads --trial  # 20 minutes or more

The archives are named and split as the real ones. VoxCeleb2 is m4a if there is
an ffmpeg; otherwise wav under that name, which the trial has copied by a stub.
The trial kills reproduce.sh and all that it started once in each stage,
starts the same command again, and in the end reads RESULTS.md.
"""

import argparse
import io
import itertools
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import wave
import zipfile

import numpy as np
from scipy.signal import lfilter

ROOT = pathlib.Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "VoxCeleb" / "LGL"
RATE = 16000
TINY = """\
__base__: {base}
batch_size: 8
crop_seconds: 0.5
held_out_share: 0.1
precision: fp32
eval_precision: fp32
dataloader_options: {{num_workers: 0}}
new_encoder:
    network: {{channels: [16, 16, 16, 16, 48], attention_channels: 16}}
"""
HEADS = "method: {n_prototypes: 16, hidden_size: 32, bottleneck_size: 16}\n"
OWN = {
    "stage1": "number_of_epochs: 2\n",
    "stage2": "n_iterations: 2\nn_clusters: 8\nclassifier_epochs: 1\n"
    "gated_epochs: 2\nnew_last_encoder:\n"
    "    network: {channels: [24, 24, 24, 24, 72], attention_channels: 16}\n",
    "moco": "number_of_epochs: 2\nmethod: {queue_size: 16}\n",
    "vicreg": "number_of_epochs: 2\n"
    "method: {hidden_size: 32, output_size: 16}\n",
    "dino": "number_of_epochs: 2\n" + HEADS,
    "rdino": "number_of_epochs: 2\n" + HEADS,
    "sdpn": "number_of_epochs: 2\n" + HEADS,
}


def speech(rng, voice, seconds):
    """Pulses through three resonances, of a voice's own, as bytes of a wav."""
    n = int(seconds * RATE)
    pitch = 80 + 160 * voice.random()
    steps = pitch * (1 + 0.1 * np.sin(np.arange(n) / RATE * 6)) / RATE
    signal = np.diff(np.floor(np.cumsum(steps)), prepend=0.0)
    for centre in (500, 1500, 2500):
        angle = 2 * np.pi * centre * (0.7 + 0.6 * voice.random()) / RATE
        signal = lfilter([1], [1, -1.9 * np.cos(angle), 0.9025], signal)
    signal = signal + 0.05 * signal.std() * rng.normal(size=n)
    signal = np.int16(8000 * signal / np.abs(signal).max())
    made = io.BytesIO()
    with wave.open(made, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes(signal.tobytes())
    return made.getvalue()


def as_m4a(wav):
    """Encodes by ffmpeg, if there is one."""
    if shutil.which("ffmpeg") is None:
        return wav
    with tempfile.TemporaryDirectory() as folder:
        source, target = (f"{folder}/a.{end}" for end in ("wav", "m4a"))
        pathlib.Path(source).write_bytes(wav)
        command = ["ffmpeg", "-loglevel", "error", "-i", source, target]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
        return pathlib.Path(target).read_bytes()


def make_archives(folder, speakers=12, encode=as_m4a):
    """Writes all downloads that reproduce.sh asks for; returns names of files.

    `speakers` are VoxCeleb2's, with 15 utterances each; VoxCeleb1 has four in
    each of its two sets, with 6.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng, written = np.random.default_rng(1), []

    def utterances(first, n_speakers, sessions, each):
        for number in range(first, first + n_speakers):
            for session in range(sessions):
                for n in range(each):
                    voice = np.random.default_rng(number)
                    name = f"id{number:05d}/v{session:010d}/{n + 1:05d}"
                    yield name, speech(rng, voice, rng.uniform(1.0, 1.6))

    def pack(name, files, n_parts=0):
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            for path, data in files.items():
                archive.writestr(path, data)
        data = made.getvalue()
        if not n_parts:
            (folder / f"{name}.zip").write_bytes(data)
        size = len(data) // n_parts + 1 if n_parts else 0
        for n in range(n_parts):
            part = data[n * size : (n + 1) * size]
            (folder / f"{name}_parta{'abcdefgh'[n]}").write_bytes(part)
        written.extend(files)

    two = {n: encode(wav) for n, wav in utterances(12, speakers, 3, 5)}
    two = {f"dev/aac/{n}.m4a": data for n, data in two.items()}
    pack("vox2_dev_aac", two, 8)
    one = {}
    for name, first, n_parts in (("dev_wav", 10001, 4), ("test_wav", 10270, 0)):
        files = dict(utterances(first, 4, 2, 3))
        files = {f"wav/{n}.wav": wav for n, wav in files.items()}
        pack(f"vox1_{name}", files, n_parts)
        one[name] = [path.removeprefix("wav/") for path in files]
    rooms = "RIRS_NOISES/simulated_rirs/smallroom/Room001"
    impulse = speech(rng, np.random.default_rng(1), 0.3)
    pack("rirs_noises", {f"{rooms}/Room001-{n}.wav": impulse for n in (1, 2)})
    with tarfile.open(folder / "musan.tar.gz", "w:gz") as archive:
        for kind, n in itertools.product(("noise", "music", "speech"), (1, 2)):
            data = speech(rng, np.random.default_rng(n), 3.0)
            path = f"musan/{kind}/free/{kind}-{n:04d}.wav"
            member = tarfile.TarInfo(path)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            written.append(path)
    draw = random.Random(1)
    both = one["test_wav"] + one["dev_wav"]
    for name, among in (
        ("veri_test2", one["test_wav"]),
        ("list_test_all2", both),
        ("list_test_hard2", both),
    ):
        pairs = draw.sample([*itertools.combinations(among, 2)], 150)
        pairs += [(a, b) for a, b in itertools.pairwise(among)]
        lines = [f"{int(a[:7] == b[:7])} {a} {b}\n" for a, b in pairs]
        (folder / f"{name}.txt").write_text("".join(lines))
    return written


def tiny_yamls(folder):
    """Writes the yamls of all stages at a tiny size."""
    folder.mkdir(exist_ok=True)
    for name, text in OWN.items():
        base = ROOT / "hparams" / f"{name}.yaml"
        (folder / f"{name}.yaml").write_text(TINY.format(base=base) + text)


def trial(downloads, work):
    """Kills reproduce.sh once in each stage; returns its results."""
    tiny_yamls(work / "hparams")
    environment = dict(os.environ)
    if shutil.which("ffmpeg") is None:
        stub = work / "bin" / "ffmpeg"
        stub.parent.mkdir()
        stub.write_text('#!/bin/bash\ncp "$6" "${@: -1}"\n')
        stub.chmod(0o755)
        environment["PATH"] = f"{stub.parent}:{environment['PATH']}"
    environment["PATH"] = (
        f"{pathlib.Path(sys.executable).parent}:{environment['PATH']}"
    )
    command = ["bash", str(RECIPE / "reproduce.sh")]
    command += ["--archives", str(downloads), "--data", str(work / "data")]
    command += ["--exp", str(work / "exp"), "--hparams", str(work / "hparams")]
    command += ["--top", "50", "--workers", "0", "--average", "2", "--jobs"]
    command += ["2", "--device", "cpu", "--", "--noprogressbar"]
    log = open(work / "printed.txt", "ab")
    for number in (*range(1, 10), None):
        waits = [0.3, 1, 20, 15, 20, 30, 15, 60, 0.5]
        wait = waits[number - 1] if number else 0
        while True:
            run = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )
            for line in run.stdout:
                log.write(line)
                log.flush()
                if number and line.startswith(b"-- stage %d," % number):
                    break
            else:
                log.flush()
                end = (work / "printed.txt").read_text("utf-8")[-2000:]
                if number or run.wait():
                    raise SystemExit(f"ended before stage {number}:\n{end}")
                return (work / "exp" / "RESULTS.md").read_text()
            time.sleep(wait)
            os.killpg(run.pid, signal.SIGKILL)
            log.write(run.stdout.read())
            run.wait()
            mark = work / "exp" / "done" / str(number)
            if not mark.exists():
                print(f"killed in stage {number}, {wait:g} s after its start")
                break
            mark.unlink()  # it had ended: once more, and sooner
            wait /= 3


def main():
    """Makes the archives, and tries the whole if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--trial", action="store_true")
    options = parser.parse_args()
    folder = options.folder.absolute()
    print(len(make_archives(folder)), "files are in the archives")
    if not options.trial:
        return
    work = pathlib.Path(tempfile.mkdtemp(prefix="trial", dir=folder.parent))
    found = trial(folder, work)
    print(found)
    rows = re.findall(r"^\| \w+(?:, average)? \| \w+\.yaml .*$", found, re.M)
    assert len(rows) == 14, rows
    for row in rows:
        eers = re.findall(r" (\d+\.\d\d) \|", row)
        assert len(eers) == 6, row


if __name__ == "__main__":
    main()
