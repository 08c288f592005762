#!/usr/bin/env python3
"""Measures the verdict without labels, where labels exist.

> python benchmarks/verdict.py results/lgl/1/export/iter5 \
    --corpora an4_sessions --musan_folder=noise --rir_folder=rir

A corpus is a folder with `train`, `test` and `trials.txt`. Its audio is sent
over each carrier: as it is, a telephone band with mu-law or GSM, Opus at
8 kbit/s, far microphones in measured rooms, noise at 5 to 10 dB, and Opus that
a loudspeaker plays in a room to another microphone. There every encoder is
adapted by `adaptation.ladder`, which reads no label, and each verdict is held
against the labelled trials. These are few, too: their change has an interval
of its own, from drawing test speakers. Two encoders are also compared with
each other, as before and after a training. Nothing but the tables reads the
labels. The same command goes on where it was interrupted; audio and embeddings
stay in `--work`.
"""

import io
import itertools
import pathlib
import random

import common
import numpy as np
import soundfile
import torch
import torchaudio
from common import RATE

from lgl_plugin.adaptation.ladder import JUDGED, Ladder
from lgl_plugin.adaptation.verdict import judge
from lgl_plugin.dataio.audio import probe, read_audio
from lgl_plugin.dataio.folder import find_audio
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.dataio.trials import read_trials
from lgl_plugin.evaluation.verification import (
    as_norm,
    cosine_scores,
    speakers_of,
)
from lgl_plugin.inference.backends import load_backend
from lgl_plugin.inference.plda import fit_plda
from lgl_plugin.inference.ward_clusters import ward_labels
from lgl_plugin.metrics.error_rates import Resampled, eer
from lgl_plugin.nnet.augment import Augmenter
from lgl_plugin.runs.weights import BACKEND
from lgl_plugin.utils.files import atomic_write, read_json, write_json

# libsndfile's level from 0 (256 kbit/s) to 1 (6 kbit/s).
OPUS_8K = (256 - 8) / (256 - 6)
COHORT = 200  # nearest recordings that AS-norm takes
DRAWS = 200  # of test speakers, for the interval of the truth


def main():
    """Prints each verdict, each ladder's end, and what that amounts to."""
    parser = common.arguments(__doc__, repeats=False)
    parser.add_argument("encoders", nargs="+", type=pathlib.Path)
    parser.add_argument("--corpora", nargs="+", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, default="results/verdict")
    parser.add_argument("--recordings", type=int, default=800)
    parser.add_argument("--tested", type=int, default=400)
    parser.add_argument("--musan_folder", required=True)
    parser.add_argument("--rir_folder", required=True)
    parser.add_argument("--carriers", nargs="+")
    options = parser.parse_args()
    carriers = make_carriers(options)
    if unknown := {*(options.carriers or ())} - {*carriers}:
        parser.error(f"no carriers {unknown}; there are {', '.join(carriers)}")
    verdicts, ends = [], []
    for name in options.carriers or carriers:
        for corpus in options.corpora:
            folder = options.work / corpus.name / name
            claim(folder, corpus, options)
            trials = send(corpus, folder, carriers[name], options)
            rows, adapted = examine_all(options, folder, trials)
            what = {"corpus": corpus.name, "carrier": name}
            verdicts += [{**what, **row} for row in rows]
            ends += [{**what, **end} for end in adapted]
            # Of hours of work that may be cut short.
            common.report(verdicts, "verdicts", options.json, options.device)
    common.report(ends, "ladders", beside(options.json, "ladders"))
    worth = summary(verdicts)
    common.report(
        worth, "what the verdict is worth", beside(options.json, "worth")
    )


def beside(path, name):
    """A json file for a further table; None if there is none for the first."""
    return path and str(pathlib.Path(path).with_suffix(f".{name}.json"))


def claim(folder, corpus, options):
    """Refuses a folder that holds audio of another corpus or other options."""
    asked = {
        "corpus": str(corpus.resolve()),
        "recordings": options.recordings,
        "tested": options.tested,
        "musan_folder": str(pathlib.Path(options.musan_folder).resolve()),
        "rir_folder": str(pathlib.Path(options.rir_folder).resolve()),
    }
    begun = read_json(folder / "asked.json")
    if begun not in ({}, asked):
        raise ValueError(
            f"{folder} was begun with {begun}: bring that back, or name "
            "another --work"
        )
    write_json(folder / "asked.json", asked)


def examine_all(options, folder, trials):
    """Adapts each encoder, and compares it with those after it."""
    rows, ends, ladders = [], [], {}
    tested = manifest(folder, trials.utterances)
    for encoder in options.encoders:
        run = folder / "runs" / "-".join(encoder.parts[-3:])
        try:
            ladder = Ladder(encoder, folder / "train", run, options.device)
            ladder.try_backends()
        except ValueError as error:  # no groups: that, too, is a verdict
            ends.append({"encoder": run.name, "kept": f"refused: {error}"})
            continue
        every = range(len(tested))
        vectors = ladder.extract(tested, every, run / "tested")[0].vectors
        found, end = examine(ladder, vectors, trials)
        rows += [{"encoder": run.name, **row} for row in found]
        ends.append({"encoder": run.name, **end})
        scores = cosine_scores(vectors, trials)
        ladders[run.name] = ladder.embedded, ladder.n_speakers, scores
    for one, other in itertools.combinations(ladders, 2):
        before, after = ladders[one], ladders[other]
        both = np.intersect1d(before[0].rows, after[0].rows)[:JUDGED]
        sides = before[0].of(both), after[0].of(both)
        found = judge(*sides, before[1])
        row = held_against(found, before[2], after[2], trials)
        rows.append({"encoder": one, "rung": f"or {other}", **row})
    return rows, ends


def make_carriers(options):
    """Returns functions from a waveform (time,) at 16 kHz to another."""
    rooms = Augmenter(
        RATE, rir_folder=options.rir_folder, reverb_only=1.0, noise_only=0.0
    )
    noise = Augmenter(
        RATE,
        musan_folder=options.musan_folder,
        reverb_only=0.0,
        noise_only=1.0,
    )
    noise.snr_range[noise.kinds.index("noise")] = torch.tensor([5.0, 10.0])

    def coded(wav, **form):
        rate = form.pop("rate", RATE)
        file = io.BytesIO()
        soundfile.write(file, wav.numpy(), rate, **form)
        file.seek(0)
        return torch.from_numpy(soundfile.read(file, dtype="float32")[0])

    def telephone(wav, subtype):
        wav = torchaudio.functional.resample(wav, RATE, 8000)
        wav = torchaudio.functional.highpass_biquad(wav, 8000, 300.0)
        wav = coded(wav, rate=8000, format="WAV", subtype=subtype)
        return torchaudio.functional.resample(wav, 8000, RATE)

    def played_back(wav):
        """By Opus, a small loudspeaker, a room, and a cheap microphone."""
        wav = coded(wav, **opus)
        wav = torchaudio.functional.highpass_biquad(wav, RATE, 300.0)
        level = wav.square().mean().sqrt()
        wav = 2 * level * (wav / (2 * level)).tanh()  # it distorts what is loud
        wav = rooms(wav[None])[0]
        wav = torchaudio.functional.equalizer_biquad(wav, RATE, 2500.0, 6.0)
        hiss = torch.randn_like(wav) * wav.square().mean().sqrt()
        return wav + 10 ** (-25 / 20) * hiss

    opus = {"format": "OGG", "subtype": "OPUS", "compression_level": OPUS_8K}
    return {
        "as it is": lambda wav: wav,
        "mu-law": lambda wav: telephone(wav, "ULAW"),
        "GSM": lambda wav: telephone(wav, "GSM610"),
        "Opus 8k": lambda wav: coded(wav, **opus),
        "far": lambda wav: rooms(wav[None])[0],
        "noise": lambda wav: noise(wav[None])[0],
        "playback": played_back,
    }


def send(corpus, folder, carrier, options):
    """Writes a corpus's audio, or a part of it, behind a carrier.

    Returns the trials of the test utterances that were drawn.
    """
    train = [n for n, fault in find_audio(corpus / "train") if fault is None]
    random.Random(0).shuffle(train)
    trials = read_trials(corpus / "trials.txt", corpus)
    trials = draw(trials, options.tested)
    names = [f"train/{name}" for name in sorted(train[: options.recordings])]
    for seed, name in enumerate((*names, *trials.utterances)):
        path = folder / f"{name}.wav"
        if path.exists():  # the run goes on after an interruption
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        wav = carrier(read_audio(corpus / name)).numpy()
        with atomic_write(path, "wb") as out:
            soundfile.write(out, wav, RATE, format="WAV")
    return trials


def draw(trials, number):
    """Returns the trials between so many utterances, drawn at random."""
    names = list(trials.utterances)
    kept = np.zeros(len(names), bool)
    kept[np.random.default_rng(0).permutation(len(names))[:number]] = True
    chosen = kept[trials.enrolment] & kept[trials.test]
    place = np.cumsum(kept) - 1
    return type(trials)(
        trials.labels[chosen],
        [name for name, there in zip(names, kept) if there],
        place[trials.enrolment[chosen]],
        place[trials.test[chosen]],
    )


def manifest(folder, utterances):
    """Lists files for an extractor."""
    paths = ((name, str(folder / f"{name}.wav")) for name in utterances)
    return Manifest.of(
        (name, path, 0.0, probe(path).seconds, "") for name, path in paths
    )


def examine(ladder, vectors, trials):
    """Holds each back-end's verdict, and the ladder's end, against labels."""
    best, plain = np.asarray, cosine_scores(vectors, trials)
    bare = ladder.embedded.of(ladder.judged)
    rows, figures = [], {"as it came": percent(plain, trials)}
    for rung in ladder.rungs:
        backend = load_backend(ladder.folder / rung.name / BACKEND)
        scores = cosine_scores(backend(vectors), trials)
        found = judge(bare, backend(bare), ladder.n_speakers)
        row = held_against(found, plain, scores, trials)
        rows.append({"rung": rung.name, **row})
        figures[rung.name] = percent(scores, trials)
        best = backend if rung.kept else best
    kept = [rung.name for rung in ladder.rungs if rung.kept]
    scores = cosine_scores(best(vectors), trials)
    figures["kept"] = kept[-1] if kept else "none"
    figures["adapted"] = percent(scores, trials)
    cohort = best(ladder.embedded.vectors)
    normed = as_norm(scores, trials, best(vectors), cohort, COHORT)
    figures["with AS-norm"] = percent(normed, trials)
    own = ladder.embedded.vectors
    plda = fit_plda(own, ward_labels(own, ladder.n_speakers))
    ratios = plda.ratios(vectors, trials.enrolment, trials.test)
    figures["PLDA"] = percent(ratios, trials)
    return rows, figures


def percent(scores, trials):
    """The equal error rate of trials in per cent."""
    return 100 * eer(scores, trials.labels)[0]


def held_against(found, before, after, trials):
    """A verdict beside the truth."""
    low, high = true_interval(before, after, trials)
    return {
        "pseudo before": found.before,
        "pseudo after": found.after,
        "low": found.low,
        "high": found.high,
        "verdict": found.word,
        "true before": percent(before, trials),
        "true after": percent(after, trials),
        "true low": low,
        "true high": high,
    }


def true_interval(before, after, trials):
    """A 95 % interval of the change of the EER, by drawing test speakers."""
    number, speakers = speakers_of(trials)
    first, second = speakers[trials.enrolment], speakers[trials.test]
    curves = [
        Resampled(scores, trials.labels, first, second)
        for scores in (before, after)
    ]
    rng, changes = np.random.default_rng(0), []
    while len(changes) < DRAWS:
        drawn = rng.integers(number, size=number)
        times = np.bincount(drawn, minlength=number)
        change = 100 * (curves[1].eer(times) - curves[0].eer(times))
        if not np.isnan(change):  # a draw may have no target trial
            changes.append(change)
    return np.quantile(changes, [0.025, 0.975]).tolist()


def summary(verdicts):
    """How often the verdict was right, accepted harm, and covered the truth."""
    rows = []
    for what, of in {
        "back-ends": lambda row: not row["rung"].startswith("or "),
        "another encoder": lambda row: row["rung"].startswith("or "),
    }.items():
        chosen = [row for row in verdicts if of(row)]
        if not chosen:
            continue
        true = np.array([r["true after"] - r["true before"] for r in chosen])
        low, high = (np.array([r[n] for r in chosen]) for n in ("low", "high"))
        pseudo = np.array(
            [r["pseudo after"] - r["pseudo before"] for r in chosen]
        )
        better, worse = high < 0, low > 0
        clear = np.abs(true) >= 1
        rows.append(
            {
                "what": what,
                "comparisons": len(chosen),
                "true change of 1 point or more": int(clear.sum()),
                "of these, sign of the estimate right": int(
                    (np.sign(pseudo) == np.sign(true))[clear].sum()
                ),
                "better": int(better.sum()),
                "of these, truly worse": int((better & (true > 0)).sum()),
                "by at most": float(true[better].max(initial=0)),
                "worse": int(worse.sum()),
                "of these, truly better": int((worse & (true < 0)).sum()),
                "interval holds the true change": int(
                    ((low <= true) & (true <= high)).sum()
                ),
                "it meets the interval of the truth": sum(
                    row["low"] <= row["true high"]
                    and row["true low"] <= row["high"]
                    for row in chosen
                ),
                "correlation": float(np.corrcoef(pseudo, true)[0, 1]),
            }
        )
    return rows


if __name__ == "__main__":
    main()
