"""Embeddings of whole utterances: extraction and the store on disk."""

import dataclasses
import pathlib

import numpy as np
import torch
from tqdm import tqdm

from lgl_plugin.data import BadAudio, read_audio, wrap
from lgl_plugin.files import atomic_write


@dataclasses.dataclass
class Embeddings:
    """Embeddings with the utterances that they belong to.

    Arguments
    ---------
    utterances : list of str
        IDs.
    vectors : numpy.ndarray
        Shape (n_utterances, dim), float32, not normalised.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> Embeddings(["a", "b"], np.eye(2, dtype=np.float32)).save(folder)
    >>> Embeddings.load(folder).rows(["b"])
    array([[0., 1.]], dtype=float32)
    """

    utterances: list
    vectors: np.ndarray

    def save(self, folder):
        """Writes `utterances.txt` and `vectors.npy` into a folder."""
        folder = pathlib.Path(folder)
        with atomic_write(folder / "vectors.npy", "wb") as out:
            np.save(out, self.vectors)
        with atomic_write(folder / "utterances.txt") as out:
            out.writelines(f"{utterance}\n" for utterance in self.utterances)

    @classmethod
    def load(cls, folder):
        """Opens what `save` wrote; the vectors stay on disk until used."""
        folder = pathlib.Path(folder)
        names = (folder / "utterances.txt").read_text(encoding="utf-8")
        vectors = np.load(folder / "vectors.npy", mmap_mode="r")
        return cls(names.split("\n")[:-1], vectors)

    def rows(self, utterances):
        """The vectors of some utterances, in their order."""
        place = {name: row for row, name in enumerate(self.utterances)}
        return self.vectors[[place[name] for name in utterances]]


class Extractor:
    """Embeds whole utterances, clean, in batches of like length.

    A shorter utterance of a batch is filled up with its own beginning, and
    its length tells SpeechBrain's modules to leave the filling out of their
    means: filled up with zeros, the last frames would see an edge that a lone
    utterance does not have.

    Arguments
    ---------
    compute_features : torch.nn.Module
        Waveforms (batch, time) to features (batch, frames, bands).
    mean_var_norm : torch.nn.Module or None
        SpeechBrain's InputNormalization, or any (features, lengths).
    embedding_model : torch.nn.Module
        (features, lengths) to embeddings (batch, 1, dim).
    device : str
        Where they run.
    sample_rate : int
        In Hz.
    batch_seconds : float
        Speech in a batch.
    max_seconds : float
        What is read of a longer utterance, from its beginning.
    num_workers : int
        Processes that read audio; 0 reads in this one.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> import soundfile
    >>> path = getfixture("tmp_path") / "noise.wav"
    >>> soundfile.write(path, np.random.randn(16000) / 9, 16000)
    >>> extract = Extractor(Fbank(n_mels=80), None, LogMelStatistics())
    >>> a = {"wav": str(path), "offset": 0.0, "duration": 1.0}
    >>> found, bad = extract({"a": a, "b": {**a, "wav": "missing.wav"}})
    >>> found.utterances, found.vectors.shape, [name for name, _ in bad]
    (['a'], (1, 160), ['b'])
    """

    def __init__(
        self,
        compute_features,
        mean_var_norm,
        embedding_model,
        device="cpu",
        sample_rate=16000,
        batch_seconds=60.0,
        max_seconds=60.0,
        num_workers=0,
    ):
        self.compute_features = compute_features
        self.mean_var_norm = mean_var_norm
        self.embedding_model = embedding_model
        self.device = device
        self.sample_rate = sample_rate
        self.batch_seconds = batch_seconds
        self.max_seconds = max_seconds
        self.num_workers = num_workers

    @torch.no_grad()
    def __call__(self, utterances):
        """Embeds utterances.

        Arguments
        ---------
        utterances : dict
            From ID to wav, offset and duration, see `data.load_manifest`.

        Returns
        -------
        (Embeddings, list of (str, str))
            In the order given, without the bad utterances; and those, with
            the reason.
        """
        batches = self._batches(utterances)
        loader = torch.utils.data.DataLoader(
            _WaveformBatches(batches, self.sample_rate),
            batch_size=None,
            num_workers=self.num_workers,
        )
        self.compute_features.to(self.device)
        if self.mean_var_norm is not None:
            self.mean_var_norm.to(self.device).eval()
        self.embedding_model.to(self.device).eval()
        found, bad = {}, []
        progress = tqdm(
            total=len(utterances), desc="embeddings", unit="utt", leave=False
        )
        for names, wavs, lengths, failures in loader:
            bad.extend(failures)
            progress.update(len(names) + len(failures))
            if not names:
                continue
            lengths = lengths.to(self.device)
            features = self.compute_features(wavs.to(self.device))
            if self.mean_var_norm is not None:
                features = self.mean_var_norm(features, lengths)
            vectors = self.embedding_model(features, lengths)
            vectors = vectors[:, 0].float().cpu()
            finite = vectors.isfinite().all(1)
            for name, vector, usable in zip(names, vectors.numpy(), finite):
                if usable:
                    found[name] = vector
                else:
                    bad.append((name, "has an embedding that is not finite"))
        progress.close()
        if not found:
            raise BadAudio(
                f"none of {len(utterances)} utterances could be embedded; "
                f"the first: {bad[0][0]} {bad[0][1]}"
            )
        names = [name for name in utterances if name in found]
        return Embeddings(names, np.stack([found[n] for n in names])), bad

    def _batches(self, utterances):
        """Cuts utterances, longest first, into batches of so much speech."""
        batches, room, longest = [], 0.0, 0.0
        order = sorted(utterances, key=lambda u: -utterances[u]["duration"])
        for name in order:
            item = utterances[name]
            seconds = min(item["duration"], self.max_seconds)
            if not batches or room < longest:
                batches.append([])
                # Filling counts: every member takes the first one's length.
                room, longest = self.batch_seconds, seconds
            batches[-1].append((name, item["wav"], item["offset"], seconds))
            room -= longest
        return batches


class _WaveformBatches(torch.utils.data.Dataset):
    """Reads the waveforms of a batch; runs in the loader's processes."""

    def __init__(self, batches, sample_rate):
        self.batches = batches
        self.sample_rate = sample_rate

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        names, wavs, failures = [], [], []
        for name, path, offset, seconds in self.batches[index]:
            try:
                wav = read_audio(path, offset, seconds, self.sample_rate)
                if not wav.any():
                    raise BadAudio("is silent from end to end")
            except BadAudio as error:
                failures.append((name, str(error)))
            else:
                names.append(name)
                wavs.append(wav)
        if not names:
            return [], None, None, failures
        longest = max(len(wav) for wav in wavs)
        lengths = torch.tensor([len(wav) / longest for wav in wavs])
        filled = torch.stack([wrap(wav, longest) for wav in wavs])
        return names, filled, lengths, failures


class LogMelStatistics(torch.nn.Module):
    """Mean and deviation of the log-mel bands: the floor, with no network.

    Takes the place of an encoder in `Extractor`; see `whiten`.

    Example
    -------
    >>> LogMelStatistics()(torch.randn(2, 50, 80), torch.ones(2)).shape
    torch.Size([2, 1, 160])
    """

    def forward(self, features, lengths):
        """Summarises features.

        Arguments
        ---------
        features : torch.Tensor
            Shape (batch, frames, bands).
        lengths : torch.Tensor
            Share of the frames that belong to each utterance, (batch,).

        Returns
        -------
        torch.Tensor
            Shape (batch, 1, 2 * bands).
        """
        frames = features.shape[1]
        # As SpeechBrain counts a frame that is begun.
        counted = (lengths * frames - 1e-3).ceil().clamp(min=1)[:, None, None]
        place = torch.arange(frames, device=features.device)[None, :, None]
        weight = (place < counted) / counted
        mean = (features * weight).sum(1)
        variance = ((features - mean[:, None]).square() * weight).sum(1)
        deviation = variance.clamp(min=1e-10).sqrt()
        return torch.cat([mean, deviation], dim=1)[:, None]


def whiten(reference, vectors):
    """Turns vectors to zero mean and unit covariance of a reference set.

    Arguments
    ---------
    reference : numpy.ndarray
        Shape (n, dim): where mean and covariance come from, no labels.
    vectors : numpy.ndarray
        Shape (m, dim): what is turned.

    Returns
    -------
    numpy.ndarray
        Shape (m, dim), float32.

    Example
    -------
    >>> rng = np.random.default_rng(0)
    >>> sample = rng.normal(size=(500, 3)) @ rng.normal(size=(3, 3)) + 5
    >>> bool(np.allclose(np.cov(whiten(sample, sample).T), np.eye(3), 1e-2))
    True
    """
    mean = reference.mean(axis=0)
    covariance = np.cov((reference - mean).T.astype(np.float64))
    values, axes = np.linalg.eigh(covariance)
    # Bands that hardly vary would be blown up to pure noise.
    scale = 1.0 / np.sqrt(np.maximum(values, 1e-3 * values.max()))
    return ((vectors - mean) @ (axes * scale)).astype(np.float32)
