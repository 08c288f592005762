"""Embeddings of whole utterances: extraction and the store on disk."""

import dataclasses
import pathlib

import numpy as np
import torch
from speechbrain.utils.autocast import AMPConfig, TorchAutocast
from speechbrain.utils.logger import get_logger
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lgl_plugin.data import BadAudio, read_audio
from lgl_plugin.files import atomic_write, says_if_full
from lgl_plugin.manifest import Strings, find
from lgl_plugin.padding import as_if_alone, reach, relative
from lgl_plugin.pooling import lean_pooling
from lgl_plugin.ranks import gather, rank, world_size
from lgl_plugin.share import Share, key_of, remove_shares
from lgl_plugin.stopping import read_apart, stop

logger = get_logger(__name__)

ROWS = 65536  # that are copied at once


@dataclasses.dataclass
class Embeddings:
    """Embeddings with the utterances that they belong to.

    Arguments
    ---------
    utterances : Strings
        IDs.
    vectors : numpy.ndarray
        Shape (n_utterances, dim), float32 or float16, not normalised.

    Example
    -------
    >>> folder = getfixture("tmp_path")
    >>> vectors = np.eye(2, dtype=np.float32)
    >>> Embeddings(Strings(["a", "b"]), vectors).save(folder)
    >>> Embeddings.load(folder).rows(["b"])
    array([[0., 1.]], dtype=float32)
    """

    utterances: Strings
    vectors: np.ndarray

    def save(self, folder):
        """Writes `utterances.txt` and `vectors.npy` into a folder."""
        folder = pathlib.Path(folder)
        with atomic_write(folder / "vectors.npy", "wb") as out:
            np.lib.format.write_array_header_1_0(
                out,
                {
                    "descr": np.lib.format.dtype_to_descr(self.vectors.dtype),
                    "fortran_order": False,
                    "shape": self.vectors.shape,
                },
            )
            for start in range(0, len(self.vectors), ROWS):
                out.write(self.vectors[start : start + ROWS].tobytes())
        with atomic_write(folder / "utterances.txt", "wb") as out:
            self.utterances.save(out)

    @classmethod
    def load(cls, folder):
        """Opens what `save` wrote; the vectors stay on disk until used.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        folder = pathlib.Path(folder)
        utterances = Strings.load(folder / "utterances.txt")
        try:
            vectors = np.load(folder / "vectors.npy", mmap_mode="r")
            if vectors.ndim != 2 or len(vectors) != len(utterances):
                raise ValueError(
                    f"{len(utterances)} utterances, vectors {vectors.shape}"
                )
        except FileNotFoundError:
            raise
        except Exception as error:  # numpy reads the header as Python
            raise ValueError(f"{folder} is damaged: {error}") from error
        return cls(utterances, vectors)

    def rows(self, utterances):
        """The vectors of some utterances, in their order."""
        return self.vectors[find(self.utterances, utterances)]


class Extractor:
    """Embeds whole utterances, clean, in batches of like length.

    In float32 an utterance's embedding does not depend on its batch: see
    `padding.as_if_alone`. Under torch.distributed each rank embeds its share;
    all ranks call, and all get the whole.

    Arguments
    ---------
    compute_features : torch.nn.Module
        SpeechBrain's Fbank or MFCC: waveforms (batch, time) to features
        (batch, frames, bands), centred frames; always in float32.
    mean_var_norm : torch.nn.Module or None
        SpeechBrain's InputNormalization, or any (features, lengths).
    embedding_model : torch.nn.Module
        (features, lengths) to embeddings (batch, 1, dim).
    device : str
        Where they run.
    sample_rate : int
        In Hz.
    batch_seconds : float, optional
        Speech in a batch, filling included. By default 20 in float32 on a
        CPU, whose cache should hold a layer, 120 in 16 bits there, where
        casting the weights for each batch counts, and 960 elsewhere.
    max_seconds : float
        What is read of a longer utterance, from its beginning.
    num_workers : int
        Processes that read audio; 0 reads in this one.
    precision : str
        Of the embedding model: fp32, bf16 or fp16, by autocast.
    dtype : str
        Of the store: float32 or float16.
    keep_seconds : float
        How often what is embedded is kept in the store's folder; extraction
        that was interrupted goes on from there.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from lgl_plugin.manifest import Manifest
    >>> import soundfile
    >>> path = str(getfixture("tmp_path") / "noise.wav")
    >>> soundfile.write(path, np.random.randn(16000) / 9, 16000)
    >>> manifest = Manifest.of(
    ...     [("a", path, 0.0, 1.0, ""), ("b", "missing.wav", 0.0, 1.0, "")]
    ... )
    >>> extract = Extractor(Fbank(n_mels=80), None, LogMelStatistics())
    >>> found, bad = extract(manifest, [0, 1])
    >>> list(found.utterances), found.vectors.shape, [name for name, _ in bad]
    (['a'], (1, 160), ['b'])
    """

    def __init__(
        self,
        compute_features,
        mean_var_norm,
        embedding_model,
        device="cpu",
        sample_rate=16000,
        batch_seconds=None,
        max_seconds=60.0,
        num_workers=0,
        precision="fp32",
        dtype="float32",
        keep_seconds=600.0,
    ):
        self.compute_features = compute_features
        self.mean_var_norm = mean_var_norm
        if isinstance(embedding_model, DistributedDataParallel):
            # It would wait for all ranks in each batch, and they have
            # different numbers of them.
            embedding_model = embedding_model.module
        self.embedding_model = embedding_model
        self.device = torch.device(device)
        self.sample_rate = sample_rate
        if batch_seconds is None:
            on_cpu = 20.0 if precision == "fp32" else 120.0
            batch_seconds = on_cpu if self.device.type == "cpu" else 960.0
        self.batch_seconds = batch_seconds
        self.max_seconds = max_seconds
        self.num_workers = num_workers
        self.precision = AMPConfig.from_name(precision).dtype
        self.dtype = np.dtype(dtype)
        self.keep_seconds = keep_seconds
        self.hop = compute_features.get_filter_properties().stride

    @torch.no_grad()
    def __call__(self, manifest, rows, folder=None):
        """Embeds utterances.

        Arguments
        ---------
        manifest : Manifest
            Where the audio is.
        rows : array_like
            Which of its utterances, int64 (N,).
        folder : str or pathlib.Path, optional
            Gets the store, which is then opened; without one the vectors are
            kept in memory. On a disk that all ranks share.

        Returns
        -------
        Embeddings, list of (str, str)
            Those that could be embedded, in the order of `rows`; the IDs of
            those that could not, with the reason: bad audio, fewer frames
            than a lone utterance needs, or an embedding that is not finite.

        Raises
        ------
        BadAudio
            If that holds for all.
        """
        rows = np.asarray(rows, np.int64)
        with says_if_full(folder):
            share = self._embed_share(manifest, rows, folder)
            shares = gather(
                (share.positions(), share.dim, share.whole(), share.bad)
            )
            bad = sorted(failure for *_, share in shares for failure in share)
            bad = [(manifest.ids[rows[p]], reason) for p, reason in bad]
            if len(bad) == len(rows):
                if folder and rank() == 0:
                    remove_shares(folder)
                raise BadAudio(
                    f"none of {len(rows)} utterances could be embedded; "
                    f"the first: {' '.join(bad[0])}"
                )
            joined = _Joined([s[:3] for s in shares if len(s[0])], self.dtype)
            names = (manifest.ids[row] for row in rows[joined.positions])
            if not folder:
                return Embeddings(Strings(names), joined[:]), bad
            if rank() == 0:
                Embeddings(Strings(names), joined).save(folder)
                remove_shares(folder)
            gather(None)  # until the store is there
        return Embeddings.load(folder), bad

    def _embed_share(self, manifest, rows, folder):
        """What is this rank's to embed."""
        seconds = np.minimum(manifest.durations[rows], self.max_seconds)
        order, ends = self._batches(seconds)
        # A lone utterance of no more frames cannot be reflected.
        shortest = reach(self.embedding_model) * self.hop
        modules = (
            self.embedding_model,
            self.compute_features,
            self.mean_var_norm,
        )
        options = (self.precision, self.dtype, self.sample_rate)
        key = key_of(*modules, rows, seconds, ends, *options) if folder else ""
        share = Share(folder, key, self.keep_seconds)
        if share.batches:
            logger.info(
                "%d utterances are embedded, going on",
                len(share.positions()) + len(share.bad),
            )
        batches = range(rank(), len(ends), world_size())
        loader = torch.utils.data.DataLoader(
            _Waveforms(
                manifest, rows, seconds, order, ends, self.sample_rate, shortest
            ),
            batch_size=None,
            sampler=batches[share.batches :],
            num_workers=self.num_workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=read_apart,
        )
        self.compute_features.to(self.device)
        if self.mean_var_norm is not None:
            self.mean_var_norm.to(self.device).eval()
        self.embedding_model.to(self.device).eval()
        progress = tqdm(
            total=len(rows) // world_size(),
            initial=len(share.positions()) + len(share.bad),
            desc="embeddings",
            unit="utt",
            leave=False,
            disable=rank() > 0,
        )
        with stop.waiting(), progress:
            for batch, wavs, n_samples, failures in loader:
                progress.update(len(batch) + len(failures))
                bad = [tuple(failure) for failure in failures]  # lists by now
                vectors = None
                if len(batch):
                    vectors = self._embed(wavs, n_samples)
                    finite = np.isfinite(vectors).all(axis=1)
                    for position in batch[~finite].tolist():
                        bad.append(
                            (position, "has an embedding that is not finite")
                        )
                    batch, vectors = batch[finite], vectors[finite]
                share.add(batch, vectors, bad)
                if stop.told is not None:
                    share.keep()
                    stop.leave()
        return share

    def _embed(self, wavs, n_samples):
        """Embeddings of filled waveforms, as the store has them."""
        wavs = wavs.to(self.device, non_blocking=True)
        n_samples = n_samples.to(self.device, non_blocking=True)
        n_frames = 1 + n_samples // self.hop
        with as_if_alone(self.compute_features, self.embedding_model, n_frames):
            features = self.compute_features(wavs)
            lengths = relative(n_frames, features.shape[1])
            if self.mean_var_norm is not None:
                features = self.mean_var_norm(features, lengths)
            autocast = TorchAutocast(self.device.type, dtype=self.precision)
            with autocast, lean_pooling(self.embedding_model):
                vectors = self.embedding_model(features, lengths)
        dtype = getattr(torch, self.dtype.name)
        # (batch, 1, dim), or (batch, dim) of SpeechBrain's ResNet.
        return vectors.flatten(1).to(dtype).cpu().numpy()

    def _batches(self, seconds):
        """Utterances, longest first, and where each batch of them ends."""
        order = np.argsort(-seconds, kind="stable")
        ends, end = [], 0
        while end < len(order):
            # Filling counts: every member takes the first one's length.
            end += max(1, int(self.batch_seconds / seconds[order[end]]))
            ends.append(min(end, len(order)))
        return order, np.array(ends)


class _Waveforms(torch.utils.data.Dataset):
    """Reads the waveforms of a batch; runs in the loader's processes."""

    def __init__(self, manifest, rows, seconds, order, ends, rate, shortest):
        self.manifest = manifest
        self.rows = rows
        self.seconds = seconds
        self.order = order
        self.ends = ends
        self.rate = rate
        self.shortest = shortest  # samples

    def __len__(self):
        return len(self.ends)

    def __getitem__(self, index):
        start = self.ends[index - 1] if index else 0
        batch, wavs, failures = [], [], []
        for position in self.order[start : self.ends[index]].tolist():
            try:
                wavs.append(self._read(position))
                batch.append(position)
            except BadAudio as error:
                failures.append((position, str(error)))
        n_samples = torch.tensor([len(wav) for wav in wavs])
        if wavs:
            # With zeros, which are what lies behind a lone utterance too.
            wavs = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        return np.array(batch, np.int64), wavs, n_samples, failures

    def _read(self, position):
        """A waveform that can be embedded."""
        item = self.manifest[self.rows[position]]
        wav = read_audio(
            item["wav"],
            item["offset"],
            self.seconds[position],
            self.rate,
            item["place"],
        )
        if not wav.any():
            raise BadAudio("is silent from end to end")
        if len(wav) < self.shortest:
            raise BadAudio(
                f"lasts {len(wav)} samples, but the embedding model needs "
                f"{self.shortest}"
            )
        return wav


class _Joined:
    """The vectors of all ranks in the order of the utterances, by slices."""

    def __init__(self, shares, dtype):
        positions, dims, vectors = zip(*shares)
        self.parts = [
            np.memmap(part, dtype, "r").reshape(-1, dims[0])
            if isinstance(part, str)
            else np.frombuffer(part, dtype).reshape(-1, dims[0])
            for part in vectors
        ]
        self.starts = np.cumsum([0] + [len(part) for part in self.parts])
        positions = np.concatenate(positions)
        self.order = np.argsort(positions)
        self.positions = positions[self.order]
        self.shape, self.dtype = (len(positions), dims[0]), dtype

    def __len__(self):
        return len(self.order)

    def __getitem__(self, rows):
        wanted = self.order[rows]
        found = np.empty((len(wanted), self.shape[1]), self.dtype)
        source = np.searchsorted(self.starts, wanted, side="right") - 1
        for number, part in enumerate(self.parts):
            own = source == number
            found[own] = part[wanted[own] - self.starts[number]]
        return found


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
