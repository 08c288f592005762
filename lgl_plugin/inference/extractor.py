"""Embeds whole utterances, in batches, on every rank."""

import dataclasses
import os
import pathlib

import numpy as np
import torch
from hyperpyyaml import load_hyperpyyaml
from speechbrain.utils.autocast import AMPConfig, TorchAutocast
from speechbrain.utils.logger import get_logger

from lgl_plugin.dataio.audio import BadAudio, read_beginning
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.dataset import loader_options
from lgl_plugin.dataio.manifest import Manifest, Strings
from lgl_plugin.inference.shares import (
    JoinedShares,
    Share,
    fingerprint,
    remove_shares,
)
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.runs.pretrained import (
    PARTS,
    YAML,
    build_encoder,
    encoder_settings,
    where_encoder_is,
)
from lgl_plugin.runs.tried import explained
from lgl_plugin.runs.weights import AFFINE, ENCODER, load_weights, read_weights
from lgl_plugin.utils.distributed import (
    gather_objects,
    rank,
    unwrapped,
    world_size,
)
from lgl_plugin.utils.files import explain_full_disk
from lgl_plugin.utils.progress import tqdm
from lgl_plugin.utils.signals import stop

logger = get_logger(__name__)

MAX_SECONDS = 60.0  # the most that is read of an utterance
BATCH_SECONDS = 960.0  # seconds of speech in a batch on a GPU


class Extractor:
    """Embeds whole utterances, unaugmented, in batches of similar length.

    In float32 an utterance's embedding does not depend on its batch, as
    `Encoder` promises. Of an utterance longer than 60 s (`MAX_SECONDS`) the
    first 60 s are embedded; if these are silent, the 60 s from the first sound
    on. Under torch.distributed all ranks must call; each embeds its share, and
    all get all embeddings.

    Arguments
    ---------
    encoder : torch.nn.Module
        Maps waveforms (batch, samples) and relative lengths (batch,) to
        embeddings (batch, dim): `lgl_plugin.nnet.encoders.Encoder`.
    device : str
        Where the encoder runs.
    sample_rate : int
        In Hz.
    batch_seconds : float, optional
        Speech in a batch, padding included. On a CPU the default is 20 in
        float32, so that the cache holds a layer, and 120 in 16 bits, because
        the weights are cast for each batch. On a GPU it is 960.
    num_workers : int
        Processes that read audio; 0 reads in this one.
    precision : str
        The encoder's precision: fp32, bf16 or fp16, by autocast.
    keep_seconds : float
        The interval at which embeddings are saved in the store's folder. An
        interrupted extraction resumes from there.

    Example
    -------
    >>> from speechbrain.lobes.features import Fbank
    >>> from lgl_plugin.dataio.manifest import Manifest
    >>> from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics
    >>> import soundfile
    >>> path = str(getfixture("tmp_path") / "noise.wav")
    >>> soundfile.write(path, np.random.randn(16000) / 9, 16000)
    >>> manifest = Manifest.of(
    ...     [("a", path, 0.0, 1.0, ""), ("b", "missing.wav", 0.0, 1.0, "")]
    ... )
    >>> extract = Extractor(Encoder(Fbank(n_mels=80), LogMelStatistics()))
    >>> found, bad = extract(manifest, [0, 1])
    >>> list(found.utterances), found.vectors.shape, [name for name, _ in bad]
    (['a'], (1, 160), ['b'])
    """

    def __init__(
        self,
        encoder: torch.nn.Module,
        device: str = "cpu",
        sample_rate: int = 16000,
        batch_seconds: float | None = None,
        num_workers: int = 0,
        precision: str = "fp32",
        keep_seconds: float = 600.0,
    ):
        # Data parallelism would wait for all ranks in each batch, but ranks
        # have different numbers of batches.
        self.encoder = unwrapped(encoder)
        self.device = torch.device(device)
        self.sample_rate = sample_rate
        if batch_seconds is None:
            on_cpu = 20.0 if precision == "fp32" else 120.0
            batch_seconds = (
                on_cpu if self.device.type == "cpu" else BATCH_SECONDS
            )
        self.batch_seconds = batch_seconds
        self.num_workers = num_workers
        self.precision = AMPConfig.from_name(precision).dtype
        self.keep_seconds = keep_seconds

    @torch.no_grad()
    def __call__(
        self,
        manifest: Manifest,
        rows: np.ndarray,
        folder: str | pathlib.Path | None = None,
        bad_files: BadFiles | None = None,
        version: str = "",
    ) -> tuple[Embeddings, list[tuple[str, str]]]:
        """Embeds utterances.

        Arguments
        ---------
        manifest : Manifest
            The utterances and their audio.
        rows : array_like
            The rows of the manifest to embed, int64 (N,).
        folder : str or pathlib.Path, optional
            The folder for the store, on a disk that all ranks share. Without
            it the vectors are kept in memory.
        bad_files : BadFiles, optional
            The log of utterances that cannot be embedded, written at once.
            Above its limit extraction stops; the next call resumes there.
        version : str, optional
            The version of the audio, such as a checksum of the files' times. A
            call resumes an interrupted one only if this is the same.

        Returns
        -------
        Embeddings, list of (str, str)
            The embeddings, in the order of `rows`; and (ID, reason) of the
            utterances that could not be embedded: bad audio, fewer frames than
            the encoder needs, or an embedding that is not finite.

        Raises
        ------
        BadAudio
            If no utterance can be embedded.
        ValueError
            If more fail than the limit of `bad_files`.
        """
        rows = np.asarray(rows, np.int64)
        with explain_full_disk(folder or ""):
            share = self._embed_share(
                manifest, rows, folder, bad_files, version
            )
            shares = gather_objects(
                (share.positions(), share.close(), share.bad)
            )
            bad = sorted(
                failure for *_, failures in shares for failure in failures
            )
            bad = [(manifest.ids[rows[p]], reason) for p, reason in bad]
            if len(bad) == len(rows):
                if folder and rank() == 0:
                    remove_shares(folder)
                raise BadAudio(
                    f"none of {len(rows)} utterances could be embedded; "
                    f"the first: {' '.join(bad[0])}"
                )
            joined = JoinedShares(s[:2] for s in shares if len(s[0]))
            names = (manifest.ids[row] for row in rows[joined.positions])
            if not folder:
                return Embeddings(Strings(names), joined[:]), bad
            if rank() == 0:
                store = Embeddings(Strings(names), joined)  # type: ignore[arg-type]
                store.save(folder)
            # Waits until the store is written, and until every process has
            # opened the shares that it reads.
            gather_objects(None)
            if rank() == 0:
                remove_shares(folder)
        return Embeddings.load(folder), bad

    def embed_all(
        self, manifest: Manifest, rows: np.ndarray | None = None
    ) -> np.ndarray:
        """Embeds utterances in memory, float (N, D); none may fail.

        They are the manifest's `rows`, by default all. Raises ValueError, with
        the first utterance that failed, if one cannot be embedded.
        """
        rows = np.arange(len(manifest)) if rows is None else rows
        embeddings, bad = self(manifest, rows)
        if bad:
            raise ValueError(
                f"{len(bad)} of {len(rows)} utterances cannot be embedded; "
                f"the first: {' '.join(bad[0])}"
            )
        return embeddings.vectors

    def _embed_share(self, manifest, rows, folder, bad_files, version):
        """Embeds the batches of this rank."""
        seconds = np.minimum(manifest.durations[rows], MAX_SECONDS)
        order, ends = self._batches(seconds)
        options = (self.precision, self.sample_rate)
        parts = (self.encoder, rows, seconds, ends, *options)
        # Paths, offsets and version, too: other audio may have the same
        # durations.
        audio = (
            *(manifest.ids.block, manifest.wavs.block, manifest.offsets),
            *(manifest.channels, manifest.places, version),
        )
        key = fingerprint(*parts, *audio) if folder else ""
        shortest = getattr(self.encoder, "min_samples", 1)
        share = Share(folder, key, self.keep_seconds)
        if bad_files is not None:
            failed = (manifest.ids[rows[p]] for p, _ in share.bad)
            if not {*failed} <= bad_files.reasons.keys():
                share.begin()  # files were repaired, and the log was deleted
        if share.batches:
            logger.info(
                "%d utterances are embedded, going on",
                len(share.positions()) + len(share.bad),
            )
        batches = range(rank(), len(ends), world_size())
        waveforms = _Waveforms(
            *(manifest, rows, seconds, order, ends, self.sample_rate, shortest)
        )
        loader = torch.utils.data.DataLoader(
            waveforms,
            batch_size=None,
            sampler=batches[share.batches :],
            **loader_options(self.device, self.num_workers),
        )
        self.encoder.to(self.device).eval()
        # The bar counts seconds of speech, not utterances: the long utterances
        # come first, so that a count would promise far too long a time.
        done = np.cumsum(seconds[order])[ends - 1]
        lengths = np.diff(done, prepend=0)[rank() :: world_size()].round()
        progress = tqdm(
            total=int(lengths.sum()),
            initial=int(lengths[: share.batches].sum()),
            desc="embeddings",
            unit=" s of speech",
            leave=False,
            disable=rank() > 0,
        )
        with stop.defer() as may_leave, progress:
            for batch, wavs, n_samples, failures in loader:
                progress.update(int(lengths[share.batches]))
                # The loader has made lists of the tuples.
                bad = [tuple(failure) for failure in failures]
                vectors = None
                if len(batch):
                    vectors = self._embed(wavs, n_samples)
                    finite = np.isfinite(vectors).all(axis=1)
                    for position in batch[~finite].tolist():
                        bad.append(
                            (position, "has an embedding that is not finite")
                        )
                    batch, vectors = batch[finite], vectors[finite]
                if bad_files is not None:
                    named = ((manifest.ids[rows[p]], why) for p, why in bad)
                    try:
                        bad_files.add(named)
                    except ValueError:
                        share.save()
                        raise
                share.add(batch, vectors, bad)
                if may_leave and stop.requested is not None:
                    share.save()
                    stop.leave()
        return share

    def _embed(self, wavs, n_samples):
        """Returns embeddings of padded waveforms, float32 on the CPU."""
        wavs = wavs.to(self.device, non_blocking=True)
        n_samples = n_samples.to(self.device, non_blocking=True)
        with TorchAutocast(self.device.type, dtype=self.precision):
            vectors = self.encoder(wavs, n_samples / wavs.shape[1])
        return vectors.float().cpu().numpy()

    def _batches(self, seconds):
        """Orders utterances, longest first; returns where each batch ends."""
        order = np.argsort(-seconds, kind="stable")
        ends, end = [], 0
        while end < len(order):
            # Padding counts: all are padded to the length of the first.
            end += max(1, int(self.batch_seconds / seconds[order[end]]))
            ends.append(min(end, len(order)))
        return order, np.array(ends)


def load_extractor(
    source: str | pathlib.Path,
    device: str = "cpu",
    num_workers: int | None = 0,
) -> Extractor:
    """Makes an Extractor for an encoder on disk.

    All weights must fit: SpeechBrain's own loader only warns of weights that
    do not, and the encoder stays random. Only the source is read: paths in the
    yaml's `pretrainer`, which may lead to the Hugging Face Hub, are not
    followed.

    Arguments
    ---------
    source : str or pathlib.Path
        A SpeechBrain inference folder, with `embedding_model.ckpt` and
        `hyperparams.yaml`, whose `modules` name compute_features,
        embedding_model and, if there is one, mean_var_norm, of any classes; or
        a file with CAM++'s weights.
    device : str
        Where the encoder runs.
    num_workers : int, optional
        Processes that read audio; if None, 0 on a CPU and up to 8 beside a
        GPU.

    Raises
    ------
    FileNotFoundError
        If the source or one of its files is missing.
    ValueError
        If the yaml cannot be loaded, the weights do not fit it, or a file has
        other weights.

    Example
    -------
    >>> load_extractor("results/lgl/1")
    Traceback (most recent call last):
    FileNotFoundError: results/lgl/1: there is no such file or folder
    """
    source = pathlib.Path(source)
    if not source.exists():
        raise FileNotFoundError(f"{source}: there is no such file or folder")
    if num_workers is None:
        num_workers = min(8, os.cpu_count() or 1) if "cuda" in device else 0
    load = _load_file if source.is_file() else _load_folder
    encoder, sample_rate = load(source)
    return Extractor(encoder, device, sample_rate, num_workers=num_workers)


def _load_file(path):
    """Returns the encoder of a file of weights and its sampling rate."""
    if path.name == ENCODER and (path.parent / YAML).exists():
        # Refused: it would be used without back-end and threshold, which are
        # in other files.
        raise ValueError(
            f"{path} is one part of an encoder: name its folder, {path.parent}"
        )
    settings = encoder_settings(path)
    if settings is None:
        read_weights(path)  # raises for a damaged file, which may be CAM++'s
        raise ValueError(
            f"{path} does not say of what network it holds the weights, and "
            "they are not CAM++'s: `lgl export` makes a folder of them and "
            "of the --yaml that they were trained with"
        )
    encoder = build_encoder(settings)
    load_weights(encoder.network, path)
    return encoder, settings["sample_rate"]


def _load_folder(folder):
    """Returns the encoder of a folder and its sampling rate."""
    for name in (YAML, ENCODER):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} is no exported encoder: it holds no {name}. "
                f"{where_encoder_is(folder)}"
            )
    path = folder / YAML
    try:
        hparams = load_hyperpyyaml(path.read_text(encoding="utf-8"))
        modules = {PARTS[1]: None, **hparams["modules"]}
        features, normalise, network = (modules[name] for name in PARTS)
        encoder = Encoder(features, network, normalise)
    except Exception as error:  # the yaml's classes may raise any error
        raise ValueError(
            f"{path} cannot be loaded, or its modules lack one of "
            f"{PARTS[0]} and {PARTS[2]}: {explained(error)}"
        ) from error
    # In our exports with a back-end, network and back-end have a file each.
    parts = getattr(hparams.get("pretrainer"), "loadables", {})
    load_weights(parts.get(PARTS[2], encoder.network), folder / ENCODER)
    if "backend" in parts:
        if not (folder / AFFINE).is_file():
            raise FileNotFoundError(
                f"{folder} is not whole: {AFFINE} is missing, the back-end "
                f"that its {YAML} names"
            )
        load_weights(parts["backend"], folder / AFFINE)
    return encoder, hparams.get("sample_rate", 16000)


@dataclasses.dataclass(eq=False)
class _Waveforms(torch.utils.data.Dataset):
    """Reads the waveforms of a batch; runs in the loader's processes."""

    manifest: Manifest
    rows: np.ndarray
    seconds: np.ndarray
    order: np.ndarray
    ends: np.ndarray
    rate: int
    shortest: int  # samples

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
            # Padded with zeros, as an encoder pads an utterance embedded alone.
            wavs = torch.nn.utils.rnn.pad_sequence(wavs, batch_first=True)
        return np.array(batch, np.int64), wavs, n_samples, failures

    def _read(self, position):
        """Reads a waveform, and checks that it is long enough."""
        wav = read_beginning(
            **self.manifest[self.rows[position]],
            limit=self.seconds[position],
            sample_rate=self.rate,
        )
        if len(wav) < self.shortest:
            raise BadAudio(
                f"lasts {len(wav)} samples, but the embedding model needs "
                f"{self.shortest}"
            )
        return wav
