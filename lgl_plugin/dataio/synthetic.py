"""The synthetic demo corpus: invented speakers over changing channels.

A speaker is an espeak-ng voice of its own (accent, formants, glottal quality,
pitch, range, rate); a session is a channel of its own (frequency response,
room, noise, level). The layout is VoxCeleb's, with a trial list over held-out
speakers. Nothing is downloaded.

Run as `lgl corpus FOLDER --speakers 60`.
"""

import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import shutil
import wave

import numpy as np
import scipy.fft

from lgl_plugin.dataio.espeak import (
    ESPEAK_RATE,
    Espeak,
    loader,
    sentence,
    voice_file,
)
from lgl_plugin.utils.checks import check_from
from lgl_plugin.utils.files import (
    atomic_write,
    check_writable,
    explain_full_disk,
    write_json,
)
from lgl_plugin.utils.progress import tqdm

RATE = 16000  # of the corpus, in Hz
# Spectra are as long as the longest utterance and its reverberation. Lengths
# are multiples of 320 samples at 16 kHz, which are 441 at espeak's rate: then
# cutting the spectrum at 8 kHz resamples exactly.
RESAMPLING = (320, 441)
MAX_RT60 = 0.6  # seconds

# Raise it whenever the same settings would give other bytes.
VERSION = 1

TRIALS_PER_SPEAKER = 100  # of each kind, at most


def _smooth_response(rng, frequencies, deviation):
    """Draws gains at `frequencies` (Hz), smooth; the deviation is in dB."""
    # About three knots an octave: a coarser response would leave the voices'
    # long-term spectra distinct after whitening, and clustering too easy.
    knots = np.geomspace(60, RATE / 2, 24)
    gains = rng.normal(0, deviation, size=len(knots))
    decibels = np.interp(np.log(frequencies + 1), np.log(knots), gains)
    return 10 ** (decibels / 20)


class Channel:
    """The channel of a session, from the mouth to the file, drawn at random.

    The room is a direct path and an exponentially decaying tail of noise.
    Microphone and line are a smooth random response, in a third of the
    sessions limited to the telephone band. The noise is coloured and
    stationary. `n_samples` is the length of the spectra at 16 kHz, a multiple
    of 320.
    """

    def __init__(self, rng: np.random.Generator, n_samples: int) -> None:
        self.n_samples = n_samples
        frequencies = scipy.fft.rfftfreq(n_samples, 1 / RATE)
        line = _smooth_response(rng, frequencies, 6.0)
        if rng.random() < 1 / 3:
            low = 1 / (1 + (300 / (frequencies + 1)) ** 8)
            high = 1 / (1 + (frequencies / 3400) ** 16)
            line *= np.sqrt(low * high)
        rt60 = rng.uniform(0.1, MAX_RT60)
        time = np.arange(int(rt60 * RATE)) / RATE
        tail = rng.normal(size=len(time)) * 10 ** (-3 * time / rt60)
        direct_to_reverberant = 10 ** (rng.uniform(0, 12) / 10)
        tail /= np.sqrt(np.sum(tail**2) * direct_to_reverberant)
        tail[0] += 1
        room = scipy.fft.rfft(tail, n_samples)
        self.response = (room * line).astype(np.complex64)
        slope = rng.uniform(-1.0, 0.2)
        colour = _smooth_response(rng, frequencies, 4.0)
        colour *= np.maximum(frequencies, 50) ** slope
        self.noise = (colour * line).astype(np.float32)
        self.snr = rng.uniform(8, 28)
        self.peak = 10 ** (rng.uniform(-20, -1) / 20)

    def apply(self, rng: np.random.Generator, speech: np.ndarray) -> np.ndarray:
        """Resamples espeak's int16 speech to 16 kHz and distorts it."""
        narrow, wide = RESAMPLING
        seconds = len(speech) / ESPEAK_RATE
        spectrum = scipy.fft.rfft(
            speech.astype(np.float32), self.n_samples // narrow * wide
        )[: len(self.response)]
        spectrum *= self.response
        noise = rng.standard_normal((len(spectrum), 2), dtype=np.float32)
        noise = noise.view(np.complex64)[:, 0] * self.noise
        # By Parseval: energy over duration; the noise lasts for the spectrum's
        # whole length. np.sum and not BLAS, whose order of summation depends on
        # the number of threads: the last bits of the corpus would, too.
        signal_power = np.sum(np.abs(spectrum) ** 2) / seconds
        noise_power = np.sum(np.abs(noise) ** 2) * RATE / self.n_samples
        snr = 10 ** ((self.snr + rng.normal(0, 1)) / 10)
        spectrum += noise * np.sqrt(signal_power / noise_power / snr)
        signal = scipy.fft.irfft(spectrum, self.n_samples)
        signal = signal[: round(seconds * RATE)]
        signal *= 32767 * self.peak / np.abs(signal).max()
        return signal.astype(np.int16)


def speaker_names(count: int, first: int = 0) -> list[str]:
    """Names speakers by sex and number, the sexes in turn: f000, m001, f002."""
    return [f"{'fm'[n % 2]}{n:03d}" for n in range(first, first + count)]


def make_speaker(folder: str | os.PathLike, name: str, settings: dict) -> int:
    """Writes `<speaker>/<session>/<utt>.wav`; returns how many utterances.

    The settings are those that `make_corpus` records.
    """
    shortest, longest = settings["seconds"]
    speaker = int(name[1:])
    step = RESAMPLING[0]
    n_samples = step * scipy.fft.next_fast_len(
        int(np.ceil((longest + MAX_RT60) * RATE / step)), real=True
    )

    def generator(*indices):
        return np.random.default_rng([settings["seed"], speaker, *indices])

    espeak = Espeak(voice_file(generator(), name[0]))
    for session in range(settings["sessions"]):
        rng = generator(1 + session)
        channel = Channel(rng, n_samples)
        pitch = 50 + rng.normal(0, 5)
        place = pathlib.Path(folder, name, f"s{session:02d}")
        place.mkdir(parents=True)
        for utterance in range(settings["utterances"]):
            rng = generator(1 + session, 1 + utterance)
            seconds = rng.uniform(shortest, longest)
            # No voice says a sentence in less than a second.
            text = " ".join(
                sentence(rng) for _ in range(1 + int(np.ceil(seconds)))
            )
            speech = espeak.say(
                text,
                n_samples=int(seconds * ESPEAK_RATE),
                pitch=int(np.clip(pitch + rng.normal(0, 3), 30, 70)),
                seed=int(rng.integers(2**31)),
            )
            signal = channel.apply(rng, speech)
            with wave.open(str(place / f"{utterance:03d}.wav"), "wb") as out:
                out.setparams((1, 2, RATE, len(signal), "NONE", ""))
                out.writeframes(signal.astype("<i2").tobytes())
    return settings["sessions"] * settings["utterances"]


def draw_trials(
    rng: np.random.Generator,
    speakers: list[str],
    sessions: int,
    utterances: int,
) -> list[tuple[int, str, str]]:
    """Draws (1 for target or 0, utterance, utterance), no pair twice.

    Every speaker has the same number of target trials, each across two
    sessions, and of non-target trials, with the other speakers of the same sex
    in turn. At least two speakers of each sex and two sessions are needed.
    """
    files = [
        (session, f"s{session:02d}/{utterance:03d}.wav")
        for session in range(sessions)
        for utterance in range(utterances)
    ]
    across = [
        (a, b)
        for (session, a), (other, b) in itertools.combinations(files, 2)
        if session != other
    ]
    per_speaker = min(TRIALS_PER_SPEAKER, len(across))
    targets, nontargets = [], set()
    for position, name in enumerate(speakers):
        others = speakers[position + 1 :] + speakers[:position]
        others = [other for other in others if other[0] == name[0]]
        for index in rng.choice(len(across), per_speaker, replace=False):
            a, b = across[index]
            targets.append((1, f"{name}/{a}", f"{name}/{b}"))
        drawn = 0
        while drawn < per_speaker:
            other = others[drawn % len(others)]
            a, b = (files[i][1] for i in rng.integers(len(files), size=2))
            a, b = f"{name}/{a}", f"{other}/{b}"
            if not {(0, a, b), (0, b, a)} & nontargets:
                nontargets.add((0, a, b))
                drawn += 1
    return sorted(targets) + sorted(nontargets)


def _is_made(folder, settings):
    """Tells whether a folder holds this corpus; refuses other content."""
    record = folder / "corpus.json"
    if record.exists():
        recorded = json.loads(record.read_text(encoding="utf-8"))["settings"]
        differences = [
            f"{name} {recorded.get(name)} there, {value} asked for"
            for name, value in settings.items()
            if recorded.get(name) != value
        ]
        if differences:
            raise FileExistsError(
                f"{folder} holds a corpus of other settings "
                f"({'; '.join(differences)}): give another folder or remove it"
            )
        return True
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds files but no corpus.json, so it is not a "
            "synthetic corpus: give an empty or a new folder"
        )
    return False


def make_corpus(
    folder: str | os.PathLike,
    speakers: int = 60,
    test_speakers: int = 20,
    sessions: int = 4,
    utterances: int = 5,
    seconds: tuple[float, float] = (2.0, 8.0),
    seed: int = 1,
    workers: int | None = None,
) -> bool:
    """Makes the corpus, unless it exists.

    Writes `wav/<speaker>/<session>/<utt>.wav` (16 kHz, mono, 16 bit) for
    training and held-out speakers, `trials.txt` over the held-out ones and
    `corpus.json`, which names both groups and the settings. The bytes depend
    on the settings alone, not on `workers`. The folder appears once complete.

    Arguments
    ---------
    folder : str or pathlib.Path
        Absent, empty, or holding a corpus of the same settings.
    speakers : int
        Speakers to train on, named by sex and number from 0: f000, m001.
    test_speakers : int
        Held-out speakers, named from there on; four or more.
    sessions : int
        Sessions of each speaker, each with its own channel; two or more.
    utterances : int
        Utterances of each session.
    seconds : (float, float)
        The shortest and the longest utterance.
    seed : int
        The seed of everything; not negative.
    workers : int or None
        Processes; None for one per core.

    Returns
    -------
    bool
        True if it was made now.

    Raises
    ------
    ValueError
        When a setting is out of range.
    FileExistsError
        When the folder holds other files or a corpus of other settings.
    ModuleNotFoundError
        When espeakng-loader is not installed.
    OSError
        When the folder cannot be written, or the disk is full.

    Example
    -------
    >>> folder = getfixture("tmp_path") / "corpus"
    >>> make_corpus(folder, 1, 4, 2, 1, seconds=(1, 2), workers=1)
    True
    >>> (folder / "trials.txt").read_text().splitlines()[0]
    '1 f002/s00/000.wav f002/s01/000.wav'
    """
    folder = pathlib.Path(folder).resolve()
    settings = {
        "version": VERSION,
        "speakers": speakers,
        "test_speakers": test_speakers,
        "sessions": sessions,
        "utterances": utterances,
        "seconds": [float(bound) for bound in seconds],
        "seed": seed,
    }
    check_from(1, speakers=speakers, utterances=utterances)
    # Two a sex, for non-target trials; target trials are across sessions.
    check_from(4, test_speakers=test_speakers)
    check_from(2, sessions=sessions)
    check_from(0, seed=seed)
    shortest, longest = seconds
    if not 0.5 <= shortest <= longest <= 60:
        raise ValueError(
            f"seconds is {shortest} to {longest}: give the shortest and the "
            "longest utterance, from 0.5 to 60"
        )
    if _is_made(folder, settings):
        return False
    # Checked before the folder is made and processes are started.
    loader()
    check_writable(folder.parent)

    training = speaker_names(speakers)
    held_out = speaker_names(test_speakers, first=speakers)
    partial = folder.with_name(folder.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed run
    speak = functools.partial(make_speaker, partial / "wav", settings=settings)
    # Workers are replaced after 100 speakers, because each speaker leaves a
    # loaded library and its data (1.4 MB) in memory.
    context = multiprocessing.get_context("spawn")
    with (
        explain_full_disk(folder),
        context.Pool(workers or os.cpu_count(), maxtasksperchild=100) as pool,
        tqdm(
            total=(speakers + test_speakers) * sessions * utterances,
            desc="synthetic speech",
            unit="utt",
        ) as progress,
    ):
        for count in pool.imap_unordered(speak, training + held_out):
            progress.update(count)

    trials = draw_trials(
        np.random.default_rng(seed), held_out, sessions, utterances
    )
    with atomic_write(partial / "trials.txt") as out:
        out.writelines(f"{label} {a} {b}\n" for label, a, b in trials)
    write_json(
        partial / "corpus.json",
        {"settings": settings, "training": training, "held_out": held_out},
    )
    # Synced before the rename: after a power cut the finished folder must not
    # lack files.
    os.sync()
    os.replace(partial, folder)
    return True
