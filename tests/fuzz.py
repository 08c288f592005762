"""Feeds damaged files to whatever reads files that others may have written.

Each input must give a value, or the error that the reader documents; no other
error, no crash, no wait without end, no memory without end.

> python tests/fuzz.py --minutes 5 --json fuzz.json

`test_fuzz.py` does the same for a few seconds. The command tries each target
in turn, in a process of its own, and keeps what failed under `--keep`.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import math
import multiprocessing
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable

import numpy as np
import soundfile
import torch

from lgl_plugin.dataio import labels, manifest, prepare
from lgl_plugin.dataio.audio import BadAudio, probe
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.crops import read_crops
from lgl_plugin.dataio.labels import read_labels
from lgl_plugin.dataio.manifest import Strings, load_manifest
from lgl_plugin.dataio.trials import read_trials
from lgl_plugin.inference.inference_model import read_state_dict
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.runs.metrics_log import read_metrics, summarise, table
from lgl_plugin.runs.run import Run
from lgl_plugin.runs.weights import load_weights
from lgl_plugin.utils.files import is_outside, load_arrays

KINDS = ("overwrite", "insert", "delete", "repeat", "cut", "word")
NASTY = [
    *(b"", b"\0", b'"', b"'", b"\n", b"\r", b"\t", b",", b"|", b"\\", b" "),
    *(b"nan", b"inf", b"-inf", b"-1", b"0", b"1.5", b"1e999", b"1e-320"),
    *(b"9" * 19, b"9" * 40, b"9" * 5000, b"0x10", b"1_0", b"true", b"null"),
    *(b"[]", b"{}", b"[", b"[" * 5000, b'{"a":' * 5000, b"{", b"}"),
    *(b"..", b"/etc/passwd", b"$data_root/../x", b"$data_root", b"/../"),
    *(b"\xe9", b"\xff\xfe", b"\xed\xb3\xa9", "é\u2028😀\x85".encode()),
    *(b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\1\0\0\0"),
    *(b"\xff" * 8, b"\x7f\xff\xff\xff", b"\0" * 16, b"x" * 140_000),
]
SECONDS = 20  # that an input may take


@dataclasses.dataclass(frozen=True)
class Target:
    """A reader with files that it takes.

    Arguments
    ---------
    file : str
        The name that the file must have.
    seeds : list of bytes
        Whole files.
    read : callable
        Takes the path; whatever it raises beyond `errors` is a failure.
    errors : tuple of type
        What the reader documents.
    """

    file: str
    seeds: list
    read: Callable
    errors: tuple = (ValueError,)


def damage(data, edits):
    """Applies edits, (kind, place, length, payload) each, to a file.

    Arguments
    ---------
    data : bytes
        The file.
    edits : list of (str, float, float, bytes)
        One of `KINDS`, where and how long as shares of what is there, and
        what to put there.
    """
    for kind, place, length, payload in edits:
        start = int(place * len(data))
        end = start + int(length**3 * (len(data) - start))  # mostly short
        if kind == "overwrite":
            data = data[:start] + payload + data[start + len(payload) :]
        elif kind == "insert":
            data = data[:start] + payload + data[start:]
        elif kind == "delete":
            data = data[:start] + data[end:]
        elif kind == "repeat":
            data = data[:end] + data[start:end] + data[end:]
        elif kind == "cut":
            data = data[:start]
        elif words := list(re.finditer(rb'[^\s,:{}\[\]"]+', data)):
            word = words[int(place * len(words))]
            data = data[: word.start()] + payload + data[word.end() :]
    return data


# The readers, each with a look at what it gives.


def read_manifest(path):
    manifest = load_manifest(path, "/corpus")
    assert not any(is_outside(wav, "/corpus") for wav in manifest.wavs)
    assert np.isfinite(manifest.offsets).all()
    assert (manifest.offsets >= 0).all() and (manifest.durations > 0).all()
    assert len(manifest.ids) == len(manifest) == len(set(manifest.ids))
    assert [manifest[row] for row in range(len(manifest))]


def read_list(path):
    read_trials(path)
    read_trials(path, path.parent)


def read_run(path):
    run = Run(path.parent, 1, {"lr": 0.001})
    assert all(isinstance(result, dict) for result in run.done.values())


def read_figures(path):
    table([summarise(read_metrics(path.parent))])


def read_bad_files(path):
    bad = BadFiles(path, limit=10**6)
    bad.add([("new", "silent")])
    assert BadFiles(path).reasons["new"] == "silent"


def read_sound(path):
    with contextlib.suppress(BadAudio):
        assert 0 < probe(path).seconds < math.inf
    crops = read_crops(path, 0.0, 0.4, 0.15, 2)
    assert crops.shape == (2, 2400) and crops.isfinite().all()


def read_shard(path):
    place = 512, max(path.stat().st_size - 512, 1)
    read_crops(path, 0.0, 0.4, 0.15, place=place)


def read_encoder(path):
    read_state_dict(path)
    load_weights(torch.nn.Linear(3, 2), path)


def read_store(path):
    found = Embeddings.load(path.parent)
    assert np.array(found.vectors).ndim == 2 and list(found.utterances)


def read_sidecar(path):
    made = prepare._finished(path.with_name("m.csv"))
    assert made is None or prepare._changes(made, {"max_bad_share": 0.0})


def _sounds():
    """A short utterance in each form, as bytes."""
    rng = np.random.default_rng(0)
    samples = 0.1 * rng.normal(size=6400)
    kinds = [
        *(("WAV", s) for s in ("PCM_16", "PCM_24", "FLOAT", "ULAW")),
        *(("WAVEX", "PCM_16"), ("FLAC", "PCM_16"), ("FLAC", "PCM_24")),
        *(("OGG", "VORBIS"), ("MP3", "MPEG_LAYER_III")),
    ]
    for kind, subtype in kinds:
        out = io.BytesIO()
        soundfile.write(out, samples, 16000, subtype, format=kind)
        yield out.getvalue()


def _saved(save, value):
    out = io.BytesIO()
    save(out, value)
    return out.getvalue()


def targets():
    """Every target by name."""
    head = "ID,duration,wav,start,stop,spk_id"
    rows = (
        f"{head}\n"
        "a.wav,2.5,$data_root/a.wav,0,40000,ann\n"
        '"b, c.wav",1.5,"$data_root/b, c.wav",8000,20000,\n'
        "d.wav,1.0,/corpus/d.wav,0,16000,\n"
    )
    placed = f"{head},first_byte,n_bytes\n" + "".join(
        f"{n},1.0,$data_root/0.tar,0,16000,,{512 + n},32044\n" for n in range(3)
    )
    state = {
        "settings": {"stage 1": {"lr": 0.001}, "stage 2": {"n_iterations": 2}},
        "done": {"stage1": {"epochs": 3}, "iter1/labels": {"n_clusters": 5}},
        **{name: {} for name in ("inputs", "sources", "failed", "files")},
    }
    size = {"bytes": 3, "sha256": "0" * 64}
    files = {"files": {"stage1": {"a.npz": size}}, "metrics": size}
    records = {"inputs": {"stage 1": {}}, "sources": {"stage1": None}, **files}
    metrics = [
        {"stage": 0, "phase": "untrained", "eer": 38.0},
        {"stage": 1, "phase": "simclr", "epoch": 1, "seconds": 60.0},
        {"stage": 2, "iteration": 1, "phase": "gated", "tau": None, "nmi": 1},
    ]
    sounds = list(_sounds())
    made = {"settings": {"a": 1}, "found": 9, "kept": 8, "excluded": 0}
    made |= {"bad": 1, "short": 0, "hours": 0.5, "manifest_bytes": 0}
    weights = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)}
    trials = "1 ann/1.wav ann/2.wav\n0 ann/1.wav bob/1.wav\n\n"
    return {
        "manifest": Target(
            "manifest.csv", [rows.encode(), placed.encode()], read_manifest
        ),
        "trial list": Target(
            "trials.txt",
            [trials.encode(), b"\xef\xbb\xbf" + trials.encode()],
            read_list,
            (ValueError, FileNotFoundError),
        ),
        "state.json": Target(
            "state.json", [_json(state), _json({**state, **records})], read_run
        ),
        "metrics.jsonl": Target(
            "metrics.jsonl", [b"\n".join(map(_json, metrics))], read_figures
        ),
        "labels": Target(
            "labels.csv", [b'ID,label\na.wav,4\n"b, c.wav",0\n'], read_labels
        ),
        "bad_files.txt": Target(
            "bad_files.txt", [b"a.wav\tsilent\nb\tempty\n"], read_bad_files
        ),
        "audio": Target("audio.wav", sounds, read_sound, (BadAudio,)),
        "shard": Target(
            "shard.tar",
            [bytes(512) + sound for sound in sounds],
            read_shard,
            (BadAudio,),
        ),
        "encoder": Target(
            "encoder.ckpt", [_saved(lambda o, v: torch.save(v, o), weights)],
            read_encoder,
        ),
        "embeddings": Target(
            "vectors.npy", [_saved(np.save, np.eye(3, dtype="f4"))], read_store
        ),
        "npz": Target(
            "gate.npz",
            [_saved(lambda o, v: np.savez(o, losses=v), np.arange(9.0))],
            load_arrays,
        ),
        "sidecar": Target("m.csv.json", [_json(made)], read_sidecar),
    }  # fmt: skip


def _json(value):
    return json.dumps(value).encode()


def lay_out(folder):
    """Puts beside the damaged files what their readers look for."""
    for name in ("ann/1.wav", "ann/2.wav", "bob/1.wav"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    (folder / "m.csv").touch()
    with open(folder / "utterances.txt", "wb") as out:
        Strings("abc").save(out)


class TooLong(BaseException):
    """An input that takes for ever; no `except Exception` may hide it."""


def attempt(target, folder, data):
    """Reads a damaged file.

    Returns
    -------
    str
        "value" or the name of the documented error.
    """

    def too_long(*_):
        raise TooLong(f"not done after {SECONDS} s")

    path = folder / target.file
    path.write_bytes(data)
    # Two inputs may agree in size and in time, by which the readers cache.
    for module in (labels, manifest):
        module._parse.cache_clear()
    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        target.read(path)
        return "value"
    except target.errors as error:
        return type(error).__name__
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def random_edits(rng):
    """As the hypothesis strategy of `test_fuzz.py` draws them."""
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        payload = rng.choice(NASTY)
        if rng.random() < 0.4:
            payload = rng.randbytes(rng.randrange(1, 9))
        yield rng.choice(KINDS), rng.random(), rng.random(), payload


def work(name, seed, until, folder, memory_gib):
    """Tries inputs until a time; leaves counts and failures as JSON."""
    torch.set_num_threads(1)
    limit = memory_gib * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # decoders complain there
    target, rng = targets()[name], random.Random(seed)
    tried, failures = collections.Counter(), {}
    while time.monotonic() < until:
        data = damage(rng.choice(target.seeds), random_edits(rng))
        try:
            tried[attempt(target, folder, data)] += 1
        except (Exception, TooLong) as error:
            tried["failure"] += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{pathlib.Path(where.filename).name}:{where.lineno}"
            what = f"{type(error).__name__} at {at}: {error}"[:300]
            key = f"{type(error).__name__} at {at}"
            if key not in failures:
                failures[key] = what
                kept = folder / f"failure-{zlib.crc32(key.encode()):08x}"
                kept.write_bytes(data)
        if sum(tried.values()) % 50 == 0:
            report = {"tried": tried, "failures": failures}
            (folder / "report.json").write_text(json.dumps(report))
    report = {"tried": tried, "failures": failures}
    (folder / "report.json").write_text(json.dumps(report))


def fuzz(name, seed, seconds, folder, memory_gib):
    """Tries a target in a process of its own, again if that one dies."""
    lay_out(folder)
    until = time.monotonic() + seconds
    tried, failures = collections.Counter(), {}
    while time.monotonic() < until:
        (folder / "report.json").unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(
            target=work, args=(name, seed, until, folder, memory_gib)
        )
        process.start()
        process.join(until - time.monotonic() + 3 * SECONDS)
        hangs = process.is_alive()
        if hangs:
            process.kill()
            process.join()
        if (folder / "report.json").exists():
            report = json.loads((folder / "report.json").read_text())
            tried.update(report["tried"])
            failures.update(report["failures"])
        if hangs or process.exitcode:
            key = "hangs" if hangs else f"ends by signal {-process.exitcode}"
            failures[key] = f"{key}, seed {seed}"
            tried["failure"] += 1
            shutil.copy(
                folder / targets()[name].file, folder / f"failure-{seed}"
            )
        seed += 1
    return tried, failures


def main():
    """Fuzzes from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="*", help="targets; all")
    parser.add_argument("--memory_gib", type=int, default=8)
    parser.add_argument("--keep", help="folder for inputs that failed")
    parser.add_argument("--json", help="where to write the figures")
    options = parser.parse_args()
    names = options.only or list(targets())
    root = pathlib.Path(options.keep or tempfile.mkdtemp(prefix="fuzz"))
    rows, found = [], {}
    print("| target | inputs | values | documented errors | failures |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        folder = root / name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        seconds = 60 * options.minutes / len(names)
        tried, failures = fuzz(
            name, options.seed, seconds, folder, options.memory_gib
        )
        failed, values = tried.pop("failure", 0), tried.pop("value", 0)
        errors = sum(tried.values())
        total = failed + values + errors
        print(f"| {name} | {total} | {values} | {errors} | {failed} |")
        rows.append(
            {"target": name, "inputs": total, "values": values}
            | {"errors": errors, "failures": failed}
        )
        found.update({f"{name}: {key}": what for key, what in failures.items()})
    inputs = sum(row["inputs"] for row in rows)
    print(f"\n{inputs} inputs, {len(found)} distinct failures")
    for key, what in found.items():
        print(f"- {key.split(':')[0]}: {what}")
    if options.json:
        report = {"inputs": inputs, "rows": rows, "failures": found}
        pathlib.Path(options.json).write_text(json.dumps(report, indent=1))
    if not options.keep:
        shutil.rmtree(root)
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
