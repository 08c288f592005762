"""A verdict without labels: whether one encoder is better than another.

Both encoders score the same pseudo-trials of unlabelled audio. A target trial
joins two disjoint parts of one recording, a non-target trial parts of two
recordings. One part stays as recorded; the other gets another channel and, half
the time, another room. Otherwise an encoder would win by knowing microphones
and lines. The interval comes from drawing recordings, not trials: thousands of
trials share a recording.

What can mislead: some recordings that count as different speakers are of the
same one, and nothing here can know which. The nearest few of each recording
are therefore left out, by both encoders' scores alike. What two parts share
beside the voice stays a cue: the noise behind it, the words' style, the mood
of the day. An encoder that drops such a cue may look worse than it is; one that
learns it, or was trained on these recordings, may look better. Parts are short,
so whitening, which amplifies the noise of short speech, looks worse than it is.
With few speakers, recordings are not independent and the interval is too
narrow. `benchmarks/verdict.py` measures all this
where labels exist.
"""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import torch
from numpy.typing import ArrayLike

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.dataio.crops import read_crops
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.inference.backends import Backend
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.metrics.error_rates import Resampled
from lgl_plugin.nnet.augment import Augmenter
from lgl_plugin.utils.progress import tqdm

# Seconds of a recording below which half of it says little about a voice, and
# the longest part that is heard.
SHORTEST, LONGEST_PART = 1.0, 4.0
BATCH = 16  # recordings whose parts are augmented together
# Other recordings, nearest first: the share that is left out as perhaps the
# same speaker, and how many of the next are trials, beside as many of the
# rest.
SAME_SPEAKER, TRIALS = 0.05, 20
# An interval of fewer says nothing.
FEWEST = 10
RESAMPLES, LEVEL = 1000, 0.95


@dataclasses.dataclass(frozen=True)
class Parts:
    """Embeddings of two disjoint parts of each recording, in pairs of copies.

    Arguments
    ---------
    rows : numpy.ndarray
        The recordings' rows in their manifest, int64 (N,).
    first, second : numpy.ndarray
        The parts', float32 (N, copies, D). A trial compares parts of one
        place in the second axis.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> parts = Parts(np.arange(9), *rng.normal(size=(2, 9, 2, 4)))
    >>> from lgl_plugin.inference.backends import Centring
    >>> parts.through(Centring().fit(rng.normal(size=(9, 4)))).first.shape
    (9, 2, 4)
    """

    rows: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def through(self, backend: Backend) -> Parts:
        """Returns the parts behind a back-end."""

        def transformed(vectors):
            flat = backend(vectors.reshape(-1, vectors.shape[-1]))
            return flat.reshape(*vectors.shape[:-1], -1)

        return Parts(
            self.rows, transformed(self.first), transformed(self.second)
        )

    def scores(self) -> np.ndarray:
        """Returns the cosines of all parts (N, N, copies), float32."""
        first, second = (
            part / np.linalg.norm(part, axis=-1, keepdims=True)
            for part in (self.first, self.second)
        )
        return np.einsum("icd,jcd->ijc", first, second).astype(np.float32)


@torch.no_grad()
def embed_parts(
    extract: Extractor, manifest: Manifest, rows: ArrayLike, seed: int = 0
) -> Parts:
    """Embeds two parts of each recording, either once as it is, once changed.

    The change is a channel, one in three a telephone band, and for half of the
    parts a room. Noise made the verdict no truer (docs/adapt_measured.md).

    Arguments
    ---------
    extract : Extractor
        Around the encoder.
    manifest, rows : Manifest, array-like
        Where the audio is, and which of its recordings, int64 (n,).
    seed : int
        Of parts and changes. One seed gives all encoders equal audio.

    Returns
    -------
    Parts
        Of the recordings that can be read and last a second, and whose
        embeddings are finite.

    Raises
    ------
    ValueError
        If these are too few for a verdict.

    Example
    -------
    >>> import soundfile
    >>> from speechbrain.lobes.features import Fbank
    >>> from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics
    >>> path = str(getfixture("tmp_path") / "noise.wav")
    >>> soundfile.write(path, np.random.randn(240000) / 9, 16000)
    >>> manifest = Manifest.of(
    ...     [(f"{n}", path, float(n), 1.5, "") for n in range(12)]
    ... )
    >>> extract = Extractor(Encoder(Fbank(n_mels=80), LogMelStatistics()))
    >>> embed_parts(extract, manifest, range(12)).first.shape
    (12, 2, 160)
    """
    rows = np.asarray(rows, np.int64)
    rows = rows[manifest.durations[rows] >= SHORTEST]
    half = float(np.median(manifest.durations[rows])) / 2 if len(rows) else 1.0
    crop, rate = min(half, LONGEST_PART), extract.sample_rate
    augment = Augmenter(
        rate, reverb_only=0.5, noise_only=0.0, clean=0.5, channel=1.0
    )
    augment, rng = augment.to(extract.device), random.Random(seed)
    encoder = extract.encoder.to(extract.device).eval()
    kept, vectors = [], []
    progress = tqdm(total=len(rows), desc="pseudo-trials", unit="rec")
    with torch.random.fork_rng(), progress:
        torch.manual_seed(seed)
        for start in range(0, len(rows), BATCH):
            crops, heard = [], []
            for row in rows[start : start + BATCH].tolist():
                try:
                    crops.append(
                        read_crops(
                            **manifest[row],
                            crop=crop,
                            n_crops=2,
                            sample_rate=rate,
                            rng=rng,
                        )
                    )
                except BadAudio:
                    continue
                heard.append(row)
            progress.update(len(rows[start : start + BATCH]))
            if not crops:
                continue
            wavs = torch.cat(crops).to(extract.device)
            both = torch.stack([encoder(wavs), encoder(augment(wavs))])
            both = both.unflatten(1, (-1, 2)).float().cpu()
            # One NaN would make the nearness of all recordings NaN.
            finite = both.isfinite().all(dim=(0, 2, 3))
            kept.extend(np.array(heard)[finite.numpy()])
            vectors.append(both[:, finite])
    if len(kept) < FEWEST:
        raise ValueError(
            f"{len(kept)} recordings of {SHORTEST:g} s or more can be read "
            f"and embedded, but a verdict needs {FEWEST}"
        )
    # By (as it is or changed, recording, part, dim).
    plain, changed = torch.cat(vectors, 1).numpy()
    return Parts(
        np.array(kept),
        np.stack([plain[:, 0], changed[:, 0]], axis=1),
        np.stack([changed[:, 1], plain[:, 1]], axis=1),
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Error rates on pseudo-trials before and after, in per cent.

    Arguments
    ---------
    recordings : int
        That the pseudo-trials are of.
    before, after : float
        Equal error rates.
    low, high : float
        Of after less before, a 95 % interval.

    Example
    -------
    >>> print(Verdict(200, before=4.0, after=2.5, low=-2.1, high=-0.8))
    better: 4.0 % to 2.5 % on pseudo-trials of 200 recordings (-2.1 to -0.8 \
points)
    """

    recordings: int
    before: float
    after: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """Says -1 for better, 1 for worse, 0 if the interval holds 0."""
        return (self.low > 0) - (self.high < 0)

    @property
    def word(self) -> str:
        """Returns the verdict in a word or two."""
        return {-1: "better", 0: "no difference", 1: "worse"}[self.sign]

    def __str__(self) -> str:
        shown = f" that these {self.recordings} recordings can show"
        return (
            f"{self.word}{'' if self.sign else shown}: {self.before:.1f} % to "
            f"{self.after:.1f} % on pseudo-trials of {self.recordings} "
            f"recordings ({self.low:+.1f} to {self.high:+.1f} points)"
        )


def judge(before: Parts, after: Parts, seed: int = 0) -> Verdict:
    """Compares two encoders by pseudo-trials of the same recordings.

    Arguments
    ---------
    before, after : Parts
        Of the same recordings and copies, N from 10.
    seed : int
        Of the non-target trials and of the interval.

    Raises
    ------
    ValueError
        If the recordings differ or are too few.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> voice = rng.normal(size=(60, 1, 8))
    >>> def heard(noise):
    ...     return Parts(
    ...         np.arange(60), *(voice + noise * rng.normal(size=(2, 60, 2, 8)))
    ...     )
    >>> judge(heard(1.0), heard(0.5)).sign
    -1
    """
    if not np.array_equal(before.rows, after.rows):
        raise ValueError("before and after are not of the same recordings")
    number = len(before.rows)
    if number < FEWEST:
        raise ValueError(f"a verdict needs {FEWEST} recordings, got {number}")
    rng = np.random.default_rng(seed)
    scores = before.scores(), after.scores()
    i, j = _trials(*scores, rng)
    sides = [np.repeat(side, scores[0].shape[2]) for side in (i, j)]
    curves = [
        Resampled(of_all[i, j].ravel(), sides[0] == sides[1], *sides)
        for of_all in scores
    ]
    once = np.ones(number, np.int64)
    rates = [100 * curve.eer(once) for curve in curves]
    changes = []
    for _ in range(RESAMPLES):
        times = np.bincount(rng.integers(number, size=number), minlength=number)
        changes.append(100 * (curves[1].eer(times) - curves[0].eer(times)))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(changes, [tail, 1 - tail])
    return Verdict(number, rates[0], rates[1], float(low), float(high))


def _trials(before, after, rng):
    """Draws trials (i, j) of recordings, targets first, from both's scores.

    Nearness is the mean of both encoders' scores, each in units of its own
    spread. Trials that are hard for one encoder would count against it.
    """
    number = len(before)
    nearness = np.zeros((number, number))
    for scores in (before, after):
        mean = scores.mean(axis=2, dtype=np.float64)
        nearness += (mean + mean.T) / mean.std()
    np.fill_diagonal(nearness, np.inf)  # itself comes first
    order = np.argsort(-nearness, axis=1, kind="stable")
    first = 1 + int(np.ceil(SAME_SPEAKER * (number - 1)))
    near, rest = np.split(order[:, first:], [TRIALS], axis=1)
    far = rng.permuted(rest, axis=1)[:, :TRIALS]
    others = np.hstack([near, far])
    own = np.arange(number)
    i = np.concatenate([own, np.repeat(own, others.shape[1])])
    return i, np.concatenate([own, others.ravel()])
