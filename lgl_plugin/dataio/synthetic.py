"""The embedded demo corpus: synthetic speakers over changing channels.

espeak-ng, whose library and language data pip installs with espeakng-loader,
speaks random English sentences. A speaker is an espeak-ng voice of its own
(accent, formants, glottal quality, pitch, range, rate); a session is a channel
of its own (frequency response, room, noise, level). The layout is VoxCeleb's,
with a trial list over held-out speakers. Nothing is downloaded.

Run as `lgl corpus FOLDER --speakers 60`.
"""

import ctypes
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import wave

import espeakng_loader
import numpy as np
import scipy.fft
from tqdm import tqdm

from lgl_plugin.utils.files import atomic_write, write_json

RATE = 16000  # of the corpus, in Hz
ESPEAK_RATE = 22050
# Spectra are as long as the longest utterance and its reverberation. Lengths
# are multiples of 320 samples at 16 kHz, which are 441 at espeak's rate: then
# resampling is the same spectrum cut at 8 kHz.
RESAMPLING = (320, 441)
MAX_RT60 = 0.6

# Bumped whenever the same settings would give other bytes.
VERSION = 1

TRIALS_PER_SPEAKER = 100  # of each kind, at most

# espeak-ng's voice files for accents; the foreign ones read English text by
# their own rules. They are few: an accent should hint at a speaker, not name
# one.
ACCENTS = (
    "gmw/en",
    "gmw/en-029",
    "gmw/en-GB-scotland",
    "gmw/en-GB-x-gbclan",
    "gmw/en-GB-x-gbcwmd",
    "gmw/en-GB-x-rp",
    "gmw/en-US",
    "gmw/en-US-nyc",
    "gmw/de",
    "roa/es",
    "roa/it",
)

NAMES = (
    "Alice Amara Boris Carmen Chen Dmitri Elena Farid Greta Hannah Hugo Ingrid"
    " Ivan Jamal Keiko Leila Marcus Nadia Oliver Pedro Quentin Rosa Samuel"
    " Tomas Ursula Victor Wanda Xavier Yusuf Zoe"
).split()
NOUNS = (
    "answer bicycle bridge camera captain castle doctor engine farmer garden"
    " harbour island journey kitchen lantern letter market mountain museum"
    " neighbour orchard painter passenger picture question river school"
    " soldier station teacher theatre valley village waiter window winter"
).split()
VERBS = (
    "admired asked bought carried described drew followed found forgot"
    " heard ignored invited kept liked measured noticed opened painted"
    " photographed remembered repaired sold thanked visited watched"
).split()
ADJECTIVES = (
    "ancient blue broken careful cheerful dark elegant famous gentle heavy"
    " hidden hungry large lonely modern narrow old patient quiet rough"
    " small sudden thin warm yellow young"
).split()
PLACES = (
    "behind the church; near the old harbour; in the evening; on Thursday;"
    " after the concert; without a word; at the corner; before the rain;"
    " for the first time; under the bridge; across the border; every morning"
).split("; ")


def sentence(rng):
    """Draws one random English sentence.

    Arguments
    ---------
    rng : numpy.random.Generator
        The source of randomness.

    Returns
    -------
    str

    Example
    -------
    >>> sentence(np.random.default_rng(0)).endswith(".")
    True
    """

    def pick(words):
        return words[rng.integers(len(words))]

    def thing():
        return f"the {pick(ADJECTIVES)} {pick(NOUNS)}"

    number = int(rng.integers(2, 10 ** rng.integers(1, 5)))
    patterns = (
        lambda: f"{pick(NAMES)} {pick(VERBS)} {thing()} {pick(PLACES)}",
        lambda: f"{thing()} {pick(VERBS)} {thing()}",
        lambda: f"{pick(NAMES)} and {pick(NAMES)} {pick(VERBS)} {thing()}",
        lambda: f"there were {number} {pick(NOUNS)}s {pick(PLACES)}",
        lambda: f"{pick(PLACES)}, {pick(NAMES)} {pick(VERBS)} {number} of them",
        lambda: f"why has {pick(NAMES)} never {pick(VERBS)} {thing()}",
    )
    text = pick(patterns)()
    return text[0].upper() + text[1:] + "."


def voice_file(rng, sex):
    """Draws a speaker: an espeak-ng voice file.

    The vocal tract's length scales all formants together and its shape moves
    each a little; strengths, widths, breath and roughness give the timbre.

    Arguments
    ---------
    rng : numpy.random.Generator
        The source of randomness.
    sex : str
        "f" or "m".

    Returns
    -------
    str
        The voice file: an accent's, then this speaker's attributes.

    Example
    -------
    >>> voice = voice_file(np.random.default_rng(0), "f")
    >>> "formant 1" in voice and "pitch" in voice
    True
    """
    accent = ACCENTS[rng.integers(len(ACCENTS))]
    accent_file = pathlib.Path(espeakng_loader.get_data_path(), "lang", accent)
    # Hz, and a formant scale of which 1 is espeak-ng's own, male voice. Within
    # a sex voices are close, or pitch alone would tell them apart.
    usual_pitch, usual_scale = {"f": (200, 1.14), "m": (112, 0.98)}[sex]
    pitch = usual_pitch * np.exp(rng.normal(0, 0.10))
    scale = usual_scale * np.exp(rng.normal(0, 0.05))
    lines = [
        accent_file.read_text(encoding="utf-8"),
        f"pitch {pitch:.0f} {pitch * rng.uniform(1.15, 1.6):.0f}",
        f"speed {rng.uniform(85, 115):.0f}",
        f"flutter {rng.integers(1, 8)}",
        f"roughness {rng.integers(0, 4)}",
        f"voicing {rng.uniform(80, 120):.0f}",
        f"consonants {rng.uniform(60, 130):.0f} {rng.uniform(60, 130):.0f}",
        "breath " + " ".join(f"{b}" for b in rng.integers(0, 5, size=8)),
    ]
    for formant in range(9):
        # Formant 0 is the voice bar under the first formant.
        shape = scale * np.exp(rng.normal(0, 0.03)) if formant else 1
        strength, width = np.exp(rng.normal(0, 0.2, size=2))
        lines.append(
            f"formant {formant} {100 * shape:.0f} "
            f"{100 * strength:.0f} {100 * width:.0f}"
        )
    return "\n".join(lines) + "\n"


class Espeak:
    """espeak-ng's library with one voice.

    The library has one voice at a time, is not thread safe, and carries state
    from one utterance to the next (its flutter and gain control), which no
    call resets. So each instance loads a copy of its own, and says the same
    after the same calls; the noise is seeded at each utterance.

    Arguments
    ---------
    voice : str
        The voice file's text.

    Raises
    ------
    RuntimeError
        When the library does not start or refuses the voice.

    Example
    -------
    >>> voice = voice_file(np.random.default_rng(0), "f")
    >>> speech = Espeak(voice).say("Hello.", n_samples=441, pitch=50, seed=0)
    >>> speech.dtype, speech.shape
    (dtype('int16'), (441,))
    """

    RETRIEVAL_AND_SYNCHRONOUS = 2
    UTF8 = 1
    PITCH = 3
    CALLBACK = ctypes.CFUNCTYPE(
        ctypes.c_int,
        ctypes.POINTER(ctypes.c_short),
        ctypes.c_int,
        ctypes.c_void_p,
    )

    def __init__(self, voice):
        data = espeakng_loader.get_data_path()
        before = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            # The same file would be loaded once per process.
            self.library = ctypes.CDLL(
                shutil.copy(espeakng_loader.get_library_path(), folder)
            )
            rate = self.library.espeak_Initialize(
                self.RETRIEVAL_AND_SYNCHRONOUS, 0, data.encode(), 0
            )
            if rate != ESPEAK_RATE:
                raise RuntimeError(
                    f"espeak-ng did not start with its data in {data} (it "
                    f"answered {rate}): reinstall espeakng-loader"
                )
            # espeak-ng takes 59 characters of path and makes them lower case,
            # so the file is named from within its folder.
            pathlib.Path(folder, "voice").write_text(voice, encoding="utf-8")
            os.chdir(folder)
            try:
                status = self.library.espeak_SetVoiceByFile(b"voice")
            finally:
                os.chdir(before)
        if status != 0:
            raise RuntimeError(f"espeak-ng refused the voice:\n{voice}")
        self.callback = self.CALLBACK(self._collect)
        self.library.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, _events):
        if samples and count > 0:
            self.chunks.append(ctypes.string_at(samples, 2 * count))
            self.missing -= count
        return int(self.missing <= 0)  # 1 stops the synthesis

    def say(self, text, n_samples, pitch, seed):
        """Speaks a text until there are enough samples or the text ends.

        Arguments
        ---------
        text : str
            What to say.
        n_samples : int
            At most so many, at 22,050 Hz.
        pitch : int
            0 to 99; 50 is the voice's own.
        seed : int
            Of the library's noise generator.

        Returns
        -------
        numpy.ndarray
            int16, (samples,).

        Raises
        ------
        RuntimeError
            When the library gives no sound.
        """
        self.chunks, self.missing = [], n_samples
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self.library.espeak_SetParameter(self.PITCH, pitch, 0)
        data = text.encode() + b"\0"
        self.library.espeak_Synth(
            data, len(data), 0, 0, 0, self.UTF8, None, None
        )
        if not self.chunks:
            raise RuntimeError(f"espeak-ng said nothing for the text {text!r}")
        return np.frombuffer(b"".join(self.chunks), np.int16)[:n_samples]


def smooth_response(rng, frequencies, deviation):
    """Draws a random frequency response, smooth over log frequency.

    Arguments
    ---------
    rng : numpy.random.Generator
        The source of randomness.
    frequencies : numpy.ndarray
        Hz, (bins,).
    deviation : float
        Of the gain, in dB.

    Returns
    -------
    numpy.ndarray
        Magnitudes, (bins,).

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> smooth_response(rng, np.linspace(0, 8000, 5), 0.0)
    array([1., 1., 1., 1., 1.])
    """
    # About three knots an octave: under a coarser response, whitened long-term
    # spectra alone would tell the voices apart.
    knots = np.geomspace(60, RATE / 2, 24)
    gains = rng.normal(0, deviation, size=len(knots))
    decibels = np.interp(np.log(frequencies + 1), np.log(knots), gains)
    return 10 ** (decibels / 20)


class Channel:
    """A session's way from the mouth to the file, drawn at random.

    The room is a direct path and an exponentially decaying tail of noise; the
    microphone and line a smooth random response, telephone band in a third of
    the sessions; the noise coloured and stationary.

    Arguments
    ---------
    rng : numpy.random.Generator
        The source of randomness.
    n_samples : int
        The length of the spectra that it is applied to, at 16 kHz; a multiple
        of 320.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> speech = (1000 * rng.normal(size=ESPEAK_RATE)).astype(np.int16)
    >>> Channel(rng, n_samples=32000).apply(rng, speech).shape
    (16000,)
    """

    def __init__(self, rng, n_samples):
        self.n_samples = n_samples
        frequencies = scipy.fft.rfftfreq(n_samples, 1 / RATE)
        line = smooth_response(rng, frequencies, 6.0)
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
        colour = smooth_response(rng, frequencies, 4.0)
        colour *= np.maximum(frequencies, 50) ** slope
        self.noise = (colour * line).astype(np.float32)
        self.snr = rng.uniform(8, 28)
        self.peak = 10 ** (rng.uniform(-20, -1) / 20)

    def apply(self, rng, speech):
        """Resamples espeak's speech and passes it through the channel.

        Arguments
        ---------
        rng : numpy.random.Generator
            The source of the noise.
        speech : numpy.ndarray
            int16, (samples,) at 22,050 Hz.

        Returns
        -------
        numpy.ndarray
            int16, (samples,) at 16 kHz.
        """
        narrow, wide = RESAMPLING
        seconds = len(speech) / ESPEAK_RATE
        spectrum = scipy.fft.rfft(
            speech.astype(np.float32), self.n_samples // narrow * wide
        )[: len(self.response)]
        spectrum *= self.response
        noise = rng.standard_normal((len(spectrum), 2), dtype=np.float32)
        noise = noise.view(np.complex64)[:, 0] * self.noise
        # By Parseval, energy over duration; the noise fills the spectrum's
        # length. np.sum, not BLAS: the same bits for any number of threads.
        signal_power = np.sum(np.abs(spectrum) ** 2) / seconds
        noise_power = np.sum(np.abs(noise) ** 2) * RATE / self.n_samples
        snr = 10 ** ((self.snr + rng.normal(0, 1)) / 10)
        spectrum += noise * np.sqrt(signal_power / noise_power / snr)
        signal = scipy.fft.irfft(spectrum, self.n_samples)
        signal = signal[: round(seconds * RATE)]
        signal *= 32767 * self.peak / np.abs(signal).max()
        return signal.astype(np.int16)


def speaker_names(count, first=0):
    """Names speakers by sex and number, the sexes in turn.

    Arguments
    ---------
    count : int
        How many.
    first : int
        The first one's number.

    Returns
    -------
    list of str

    Example
    -------
    >>> speaker_names(3, first=8)
    ['f008', 'm009', 'f010']
    """
    return [f"{'fm'[n % 2]}{n:03d}" for n in range(first, first + count)]


def make_speaker(folder, name, settings):
    """Writes one speaker's utterances.

    Arguments
    ---------
    folder : str or pathlib.Path
        Where `<speaker>/<session>/<utt>.wav` goes.
    name : str
        One of `speaker_names`.
    settings : dict
        As `make_corpus` records them.

    Returns
    -------
    int
        How many utterances were written.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> size = dict(sessions=1, utterances=1, seconds=(1, 2), seed=0)
    >>> make_speaker(folder, "f000", size)
    1
    >>> (folder / "f000/s00/000.wav").exists()
    True
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
        mood = rng.normal(0, 5)
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
                pitch=int(np.clip(50 + mood + rng.normal(0, 3), 30, 70)),
                seed=int(rng.integers(2**31)),
            )
            signal = channel.apply(rng, speech)
            with wave.open(str(place / f"{utterance:03d}.wav"), "wb") as out:
                out.setparams((1, 2, RATE, len(signal), "NONE", ""))
                out.writeframes(signal.astype("<i2").tobytes())
    return settings["sessions"] * settings["utterances"]


def draw_trials(rng, speakers, sessions, utterances):
    """Draws a balanced trial list.

    Every speaker has the same number of target trials, all across sessions,
    and of non-target trials, all with speakers of the same sex in turn.

    Arguments
    ---------
    rng : numpy.random.Generator
        The source of randomness.
    speakers : list of str
        Names as `speaker_names` gives them, two or more of each sex.
    sessions : int
        Sessions of each speaker, two or more.
    utterances : int
        Utterances of each session.

    Returns
    -------
    list of (int, str, str)
        1 for a target trial and 0 for a non-target, and two utterances as
        `<speaker>/<session>/<utt>.wav`. No pair appears twice, in either
        order.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> trials = draw_trials(rng, speaker_names(4), sessions=2, utterances=1)
    >>> trials[0]
    (1, 'f000/s00/000.wav', 'f000/s01/000.wav')
    """
    files = [
        (session, f"s{session:02d}/{utterance:03d}.wav")
        for session in range(sessions)
        for utterance in range(utterances)
    ]
    across = [
        (a, b)
        for i, (session, a) in enumerate(files)
        for other, b in files[i + 1 :]
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


def _check_settings(settings):
    """Refuses settings that make no corpus; see `make_corpus`."""
    for name, least in (
        ("speakers", 1),
        ("test_speakers", 4),  # two of each sex, for non-target trials
        ("sessions", 2),  # target trials are across sessions
        ("utterances", 1),
        ("seed", 0),
    ):
        if settings[name] < least:
            raise ValueError(
                f"{name} is {settings[name]}: the corpus needs {least} or more"
            )
    shortest, longest = settings["seconds"]
    if not 0.5 <= shortest <= longest <= 60:
        raise ValueError(
            f"seconds is {shortest} to {longest}: give the shortest and the "
            "longest utterance, from 0.5 to 60"
        )


def _is_made(folder, settings):
    """Whether a folder holds this corpus; an error if it holds another."""
    record = folder / "corpus.json"
    if record.exists():
        found = json.loads(record.read_text(encoding="utf-8"))["settings"]
        differences = [
            f"{name} {found.get(name)} there, {value} asked for"
            for name, value in settings.items()
            if found.get(name) != value
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
    folder,
    speakers=60,
    test_speakers=20,
    sessions=4,
    utterances=5,
    seconds=(2.0, 8.0),
    seed=1,
    workers=None,
):
    """Makes the corpus, or finds it made.

    Writes `wav/<speaker>/<session>/<utt>.wav` (16 kHz, mono, 16 bit) for
    training and held-out speakers, `trials.txt` over the held-out ones and
    `corpus.json`, which names both groups and the settings. The bytes depend
    on the settings alone, not on `workers`. The corpus is made aside and
    takes its place whole.

    Arguments
    ---------
    folder : str or pathlib.Path
        Absent, empty, or holding a corpus of the same settings.
    speakers : int
        Speakers to train on, named by `speaker_names` from 0.
    test_speakers : int
        Held-out speakers, named from there on; four or more.
    sessions : int
        Of each speaker, each with its own channel; two or more.
    utterances : int
        Of each session.
    seconds : (float, float)
        The shortest and the longest utterance.
    seed : int
        Not negative.
    workers : int or None
        Processes; None for one per core.

    Returns
    -------
    bool
        Whether it was made now.

    Raises
    ------
    ValueError
        When a setting makes no sense.
    FileExistsError
        When the folder holds something else or other settings' corpus.

    Example
    -------
    >>> folder = getfixture("tmp_path") / "corpus"
    >>> size = dict(speakers=1, test_speakers=4, sessions=2, utterances=1)
    >>> make_corpus(folder, **size, seconds=(1, 2), workers=1)
    True
    >>> (folder / "trials.txt").read_text().splitlines()[0]
    '1 f002/s00/000.wav f002/s01/000.wav'
    >>> make_corpus(folder, **size, seconds=(1, 2), workers=1)
    False
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
    _check_settings(settings)
    if _is_made(folder, settings):
        return False

    training = speaker_names(speakers)
    held_out = speaker_names(test_speakers, first=speakers)
    aside = folder.with_name(folder.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
    speak = functools.partial(make_speaker, aside / "wav", settings=settings)
    # A worker is replaced now and then because each speaker leaves it a loaded
    # library and its data (1.4 MB).
    context = multiprocessing.get_context("spawn")
    with (
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
    with atomic_write(aside / "trials.txt") as out:
        out.writelines(f"{label} {a} {b}\n" for label, a, b in trials)
    write_json(
        aside / "corpus.json",
        {"settings": settings, "training": training, "held_out": held_out},
    )
    os.sync()  # the speech on disk before the name that vouches for it
    os.replace(aside, folder)
    return True
