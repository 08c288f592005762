"""Synthetic voices: espeak-ng speaks random English sentences.

The package espeakng-loader, an extra, brings espeak-ng's library and language
data.
"""

import ctypes
import os
import pathlib
import shutil
import tempfile
import types

import numpy as np

ESPEAK_RATE = 22050  # Hz

# espeak-ng's voice files for accents; the foreign ones read English text by
# their own rules. Few, so that an accent does not identify a speaker.
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


def loader() -> types.ModuleType:
    """Imports espeakng_loader; if it is missing, says how to install it."""
    try:
        import espeakng_loader
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the synthetic corpus is spoken by espeak-ng, which is missing: "
            "install it with `pip install espeakng-loader`"
        ) from error
    return espeakng_loader


def sentence(rng: np.random.Generator) -> str:
    """Draws one random English sentence."""

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


def voice_file(rng: np.random.Generator, sex: str) -> str:
    """Draws a speaker of a sex, "f" or "m"; returns a voice file's text.

    The length of the vocal tract scales all formants together, and its shape
    moves each a little. Strengths, widths, breath and roughness give the
    timbre.
    """
    accent = ACCENTS[rng.integers(len(ACCENTS))]
    accent_file = pathlib.Path(loader().get_data_path(), "lang", accent)
    # Pitch in Hz, and a scale of the formants; 1 is espeak-ng's own, male
    # voice. The voices of a sex are close: otherwise pitch alone would tell
    # them apart.
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
    """espeak-ng's library with one voice, given as the text of a voice file.

    The library has one voice at a time and is not thread safe. It also carries
    state (flutter and gain control) from one utterance to the next, which no
    call resets. So each instance loads its own copy of the library, and the
    noise is seeded at each utterance: the same calls give the same speech.
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

    def __init__(self, voice: str) -> None:
        data = loader().get_data_path()
        directory = os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            # A copy: dlopen would return the library that this process has
            # loaded already, with the state of the previous speaker.
            self.library = ctypes.CDLL(
                shutil.copy(loader().get_library_path(), folder)
            )
            rate = self.library.espeak_Initialize(
                self.RETRIEVAL_AND_SYNCHRONOUS, 0, data.encode(), 0
            )
            if rate != ESPEAK_RATE:
                raise RuntimeError(
                    f"espeak-ng did not start with its data in {data} (it "
                    f"answered {rate}): reinstall espeakng-loader"
                )
            # espeak-ng cuts a path after 59 characters and makes it lower
            # case, so the file is named from within its folder.
            pathlib.Path(folder, "voice").write_text(voice, encoding="utf-8")
            os.chdir(folder)
            try:
                status = self.library.espeak_SetVoiceByFile(b"voice")
            finally:
                os.chdir(directory)
        if status != 0:
            raise RuntimeError(f"espeak-ng refused the voice:\n{voice}")
        # Kept as an attribute: ctypes holds no reference, and espeak-ng would
        # call freed memory.
        self.callback = self.CALLBACK(self._collect)
        self.library.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, _events):
        """Keeps a chunk of speech; returns 1 to stop, 0 to go on."""
        if samples and count > 0:
            self.chunks.append(ctypes.string_at(samples, 2 * count))
            self.missing -= count
        return int(self.missing <= 0)

    def say(
        self, text: str, n_samples: int, pitch: int, seed: int
    ) -> np.ndarray:
        """Speaks a text; returns at most `n_samples`, int16 at 22,050 Hz.

        Pitch is from 0 to 99; 50 is the voice's own. Raises RuntimeError if
        the library gives no sound.
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
