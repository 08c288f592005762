"""Plants bad files of every kind in a corpus and says what became of them.

> python tests/integration/planted.py --utterances 1500 --json planted.json

makes a corpus of noise of which 2 % are planted, lets some of these turn bad
between preparation and training, trains both stages with tiny networks, and
prints for each kind how many were planted, refused and used.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import re
import struct
import tempfile
from collections.abc import Callable

import numpy as np
import soundfile
import torch
from tiny import STAGE1, STAGE2, train

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.manifest import Strings, load_manifest, one_line
from lgl_plugin.dataio.prepare import prepare_manifest

RATE = 16000


def audio(rate=RATE, seconds=1.5, change=lambda x: x, **options):
    """Something that writes noise, changed."""

    def write(path):
        rng = np.random.default_rng(len(path))
        samples = 0.1 * rng.normal(size=round(seconds * rate))
        # Bytes: not every name is text.
        soundfile.write(os.fsencode(path), change(samples), rate, **options)

    return write


def holding(value):
    """Something that writes floats, one of which is a value."""

    def change(samples):
        samples[len(samples) // 2] = value
        return samples

    return audio(change=change, subtype="FLOAT")


def content(data):
    """Something that writes bytes."""
    return lambda path: pathlib.Path(path).write_bytes(data)


def half_of(write):
    """Something that cuts a file in two."""

    def cut(path):
        write(path)
        os.truncate(path, os.path.getsize(path) // 2)

    return cut


def secret(path):
    audio()(path)
    os.chmod(path, 0)


def three_hours(path):
    """20 s of noise, then silence, which takes no room on most disks."""
    noise = np.random.default_rng(1).normal(0, 3000, 20 * RATE)
    n_bytes = 3 * 3600 * RATE * 2
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, RATE, 2 * RATE, 2, 16)
    with open(path, "wb") as out:
        out.write(struct.pack("<4sI4s", b"RIFF", 36 + n_bytes, b"WAVE") + form)
        out.write(struct.pack("<4sI", b"data", n_bytes))
        out.write(noise.astype("<i2").tobytes())
        out.truncate(44 + n_bytes)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to be bad, or only odd.

    Arguments
    ---------
    file : str or bytes
        The name.
    make : callable
        Writes it, given its path.
    reason : str, optional
        A pattern of why it is refused; None if it is to be used; HIDDEN if
        nothing is to be said of it.
    later : callable, optional
        What happens to the path between preparation and training.
    """

    file: str | bytes
    make: Callable
    reason: str | None = None
    later: Callable | None = None


# The system lets root read everything.
DENIED = None if os.geteuid() == 0 else "Permission denied"
NAME = "name holds a "
HIDDEN = "not looked at"
KINDS = {
    "zero bytes": Kind("empty.wav", content(b""), "is empty"),
    "header only": Kind("header.wav", audio(seconds=0), "no samples"),
    "text called .wav": Kind("text.wav", content(b"text" * 99), "recognised"),
    "mp3 called .wav": Kind("mp3.wav", audio(format="MP3")),
    "truncated wav": Kind("cut.wav", half_of(audio())),
    "truncated flac": Kind(
        "cut.flac", half_of(audio(seconds=4)), "cannot be read"
    ),
    "a NaN": Kind("nan.wav", holding(np.nan), "not finite"),
    "an Inf": Kind("inf.wav", holding(-np.inf), "not finite"),
    "a sample of 1e30": Kind("huge.wav", holding(1e30), r"up to 1e\+30"),
    "all zeros": Kind("silent.wav", audio(change=np.zeros_like), "silent"),
    "clipped": Kind(
        "clipped.wav", audio(change=lambda x: np.clip(50 * x, -1, 1))
    ),
    "8 kHz": Kind("8khz.wav", audio(8000)),
    "44.1 kHz stereo": Kind(
        "stereo.flac", audio(44100, change=lambda x: np.c_[x, -x / 2])
    ),
    "15,999 Hz": Kind("odd.wav", audio(15999), "too odd"),
    "a header of 500 Hz": Kind("slow.wav", audio(500), "500 Hz by its header"),
    "GSM 6.10": Kind(
        "gsm.wav", audio(8000, subtype="GSM610"), "only be read from the begin"
    ),
    "channels that cancel": Kind(
        "phase.wav",
        audio(change=lambda x: np.c_[x, 1 / 32767 - x]),
        "cancel each other",
    ),
    "a fork of macOS": Kind("._fork.wav", content(b"\0\5\x16\7" * 20), HIDDEN),
    "a hidden copy": Kind(".copy.wav", audio(), HIDDEN),
    "two writers": Kind("a (conflicted copy 2020-01-01).wav", audio(), HIDDEN),
    "0.05 s": Kind("short.wav", audio(seconds=0.05), "lasts 0.050 s"),
    "3 hours": Kind("long.wav", three_hours),
    "unreadable": Kind("secret.wav", secret, DENIED),
    "vanished later": Kind("gone.wav", audio(), "No such file", os.unlink),
    "emptied later": Kind("late.wav", audio(), "is empty", content(b"")),
    "corrupted later": Kind(
        "worse.wav", audio(), "cannot be read", content(b"damage" * 99)
    ),
    "blanks": Kind(" two words .wav", audio()),
    "quotes": Kind('it\'s "a".wav', audio()),
    "commas": Kind("a, b.wav", audio()),
    "harmless $": Kind("5 $ each.wav", audio()),
    "$ of a variable": Kind("$HOME.wav", audio(), re.escape(NAME + "$")),
    "newline": Kind("two\nlines.wav", audio(), NAME + "line break"),
    "tab": Kind("tab\t.wav", audio(), NAME + "line break or another"),
    "not UTF-8": Kind(b"latin-\xe9.wav", audio(), "not UTF-8"),
    "link to itself": Kind(
        "self.wav", lambda path: os.symlink(path, path), "broken link"
    ),
    "link to nowhere": Kind(
        "lost.wav", lambda path: os.symlink("nowhere", path), "broken link"
    ),
}


def plant(folder, places, number=None):
    """Puts files in a corpus, and a linked folder that leads back to it.

    Arguments
    ---------
    folder : pathlib.Path
        The corpus, the recipe's train_folder.
    places : list of pathlib.Path
        Folders in it, which get them in turn.
    number : int, optional
        How many, of each kind in turn; one of each if not given.

    Returns
    -------
    list of (str, str)
        Kind and path below the folder of each.
    """
    planted = []
    for index in range(number or len(KINDS)):
        turn, kind = divmod(index, len(KINDS))
        name = list(KINDS)[kind]
        place = places[index % len(places)] / f"planted{turn}"
        place.mkdir(exist_ok=True)
        path = os.path.join(place, os.fsdecode(KINDS[name].file))
        KINDS[name].make(path)
        planted.append((name, os.path.relpath(path, folder)))
    (places[0] / "loop").symlink_to(folder)
    return planted


def prepare_and_spoil(corpus, run, planted, share, trials=None):
    """Prepares as the recipe does, then lets what is to turn bad do so."""
    prepare_manifest(
        corpus / "wav",
        run / "manifest.csv",
        data_root=corpus,
        trials=trials,
        trial_folder=corpus / "wav",
        max_bad_share=share,
    )
    for name, path in planted:
        if KINDS[name].later:
            KINDS[name].later(os.path.join(corpus, "wav", path))


def outcomes(run, planted):
    """What became of each kind.

    Returns
    -------
    dict
        From the kind to counts of "planted", "refused early" (by the
        preparation), "refused" (in all), "used" and "as expected".
    """
    bad = BadFiles(run / "bad_files.txt").reasons
    listed = set(load_manifest(run / "manifest.csv", "").ids)
    used = set(Strings.load(run / "iter1" / "embeddings" / "utterances.txt"))
    found = collections.defaultdict(collections.Counter)
    for name, path in planted:
        reason, wanted = bad.get(one_line(path)), KINDS[name].reason
        refused = reason is not None and path not in used
        counts = found[name]
        counts["planted"] += 1
        counts["refused early"] += refused and path not in listed
        counts["refused"] += refused
        counts["used"] += path in used
        if wanted is None:
            counts["as expected"] += path in used and reason is None
        elif wanted == HIDDEN:
            seen = path in listed or path in used or reason is not None
            counts["as expected"] += not seen
        else:
            counts["as expected"] += bool(refused and re.search(wanted, reason))
    return found


def not_finite(run):
    """The weights of a run that are not all finite."""
    paths = [*run.rglob("embedding_model.ckpt"), *run.rglob("classifier.ckpt")]
    assert paths
    return [
        path
        for path in paths
        for value in torch.load(path, weights_only=True).values()
        if not value.isfinite().all()
    ]


def make_corpus(folder, utterances, speakers=40):
    """Noise with a spectrum for each speaker."""
    rng = np.random.default_rng(0)
    filters = rng.normal(size=(speakers, 16))
    for index in range(utterances):
        speaker = index % speakers
        noise = 0.05 * rng.normal(size=rng.integers(RATE, 2 * RATE))
        path = folder / "wav" / f"s{speaker:02}" / f"{index:06}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.convolve(noise, filters[speaker]), RATE)


def main():
    """Plants and trains from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--utterances", type=int, default=1500)
    parser.add_argument("--share", type=float, default=0.02)
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        corpus, run = (
            pathlib.Path(folder, "corpus"),
            pathlib.Path(folder, "run"),
        )
        number = round(options.share * options.utterances)
        make_corpus(corpus, options.utterances - number)
        places = sorted((corpus / "wav").iterdir())
        planted = plant(corpus / "wav", places, number)
        prepare_and_spoil(corpus, run, planted, options.share)
        shared = [
            "--verification_file=null",
            f"--max_bad_share={options.share}",
        ]
        for yaml, steps in (
            ("small_stage1.yaml", STAGE1),
            ("small_stage2.yaml", [*STAGE2, "--n_iterations=1"]),
        ):
            train(yaml, corpus, run, *steps, *shared, timeout=3600)
        found = outcomes(run, planted)
        lines = (run / "bad_files.txt").read_text("utf-8").splitlines()
        skipped = sum(
            json.loads(line).get("skipped_steps") or 0
            for line in (run / "metrics.jsonl").open()
        )
        facts = {
            "utterances": options.utterances,
            "planted": number,
            "as expected": sum(c["as expected"] for c in found.values()),
            "lines in bad_files.txt": len(lines),
            "steps skipped": skipped,
            "weights not finite": len(not_finite(run)),
        }
    columns = ["planted", "refused early", "refused", "used", "as expected"]
    print("| kind | " + " | ".join(columns) + " |")
    print("| --- |" + " --- |" * len(columns))
    for name, counts in found.items():
        print(f"| {name} |", " | ".join(str(counts[c]) for c in columns), "|")
    print("\n" + ", ".join(f"{key}: {value}" for key, value in facts.items()))
    if options.json:
        report = {**facts, "kinds": found}
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
