"""Embeddings of whole utterances against SpeechBrain, one by one.

> python benchmarks/extraction.py
> python benchmarks/extraction.py --device=cuda --n=4000 --workers=14
> python benchmarks/extraction.py --n=0 --store=1092009

Utterances of 2-12 s, 8 s on average, from wav files made for it; an ECAPA-TDNN
of random weights. Reading, features and network count. The floor is the
network's arithmetic at the rate of a large matrix product of the same
precision, or of one by way of a convolution if that is faster, in the same
run. `--store` writes a store of that many embeddings
into the temporary folder (768 bytes each) and opens it.
"""

import pathlib
import tempfile

import numpy as np
import soundfile
import torch
from common import RATE, arguments, give_freed_memory, measure, report
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization
from torch.utils.flop_counter import FlopCounterMode

from lgl_plugin.dataio.manifest import Manifest, Strings
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.utils.device import keep_freed_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--n", type=int, default=24, help="utterances")
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch_seconds", type=float)
    parser.add_argument("--store", type=int, default=0, help="its size")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if options.n:
            rows += extraction(pathlib.Path(folder), options)
        if options.store:
            rows += store(pathlib.Path(folder), options)
    report(rows, "extraction", options.json, options.device)


def extraction(folder, options):
    """Rows on utterances per second."""
    manifest = write_speech(folder, options.n)
    features = Fbank(n_mels=80).to(options.device)
    norm = InputNormalization(norm_type="sentence", std_norm=False)
    width = options.channels
    network = ECAPA_TDNN(80, channels=[width] * 4 + [3 * width])
    warm_up(features, norm, network.to(options.device), options.device)
    found = {}

    @torch.no_grad()
    def one_by_one():
        give_freed_memory()
        one, vectors = torch.ones(1, device=options.device), []
        for path in manifest.wavs:
            wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
            bands = norm(features(wav[None].to(options.device)), one)
            vectors.append(network(bands, one)[0, 0].cpu().numpy())
        found["one by one"] = np.stack(vectors)

    def batches(precision):
        extract = Extractor(
            Encoder(features, network, norm),
            options.device,
            batch_seconds=options.batch_seconds,
            num_workers=options.workers,
            precision=precision,
        )
        order, ends = extract._batches(manifest.durations)

        def embed():
            keep_freed_memory()  # as the recipe does
            vectors = extract(manifest, np.arange(options.n))[0].vectors
            found[f"batches, {precision}"] = vectors

        longest = manifest.durations[order[np.r_[0, ends[:-1]]]]
        filled = longest @ np.diff(ends, prepend=0)
        return embed, 1 - manifest.durations.sum() / filled

    variants, filling = {"one by one": one_by_one}, {}
    for precision in DTYPES:
        name = f"batches, {precision}"
        variants[name], filling[name] = batches(precision)
    products = {}
    for precision, dtype in DTYPES.items():
        for name, call in large_products(dtype, options.device).items():
            products[f"{name}, {precision}"] = call
    figures = measure({**variants, **products}, options.repeats, options.device)
    work = manifest.durations.sum() * flop_per_second(network, options.device)
    slow = figures["one by one"]["median"]
    rows = []
    for name in ("one by one", *filling):
        precision = "bf16" if "bf16" in name else "fp32"
        took = figures[name]
        fastest = min(
            figures[product]["median"]
            for product in products
            if product.endswith(precision)
        )
        floor = work / (2 * 16 * large(options.device) ** 3) * fastest
        rows.append(
            {
                "what": f"extraction, {name}",
                "size": options.n,
                **took,
                "utt/s": options.n / took["median"],
                "times one by one": slow / took["median"],
                "floor": floor,
                "times the floor": took["median"] / floor,
                "filling": filling.get(name, 0.0),
                "1 - lowest cosine": 1 - cosines(found, name).min(),
            }
        )
    return rows


def store(folder, options):
    """Rows on a large store: what is done once per extraction."""
    n = options.store
    rng = np.random.default_rng(0)
    seconds = rng.triangular(2, 10, 12, n)
    extract = Extractor(torch.nn.Identity(), options.device)
    names = Strings(
        f"id{row % 6000:05d}/{row:011d}/00001.m4a" for row in range(n)
    )
    vectors = np.lib.format.open_memmap(
        folder / "source.npy", "w+", np.float32, (n, 192)
    )
    for start in range(0, n, 65536):
        part = vectors[start : start + 65536]
        part[:] = rng.standard_normal(part.shape, np.float32)
    some = [names[row] for row in rng.integers(n, size=1000).tolist()]
    variants = {
        "planning the batches": lambda: extract._batches(seconds),
        "writing the store": Embeddings(names, vectors).save,
        "opening the store": Embeddings.load,
        "1,000 rows by name": lambda path: Embeddings.load(path).vectors_of(
            some
        ),
    }
    calls = {"planning the batches": variants.pop("planning the batches")}
    for name, call in variants.items():
        calls[name] = lambda call=call: call(folder / "store")
    figures = measure(calls, options.repeats, options.device)
    return [{"what": k, "size": n, **took} for k, took in figures.items()]


def write_speech(folder, n):
    """Wav files of modulated noise, as a manifest."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(n):
        seconds = round(rng.triangular(2, 10, 12), 2)
        samples = rng.normal(0, 0.1, round(seconds * RATE))
        width = rng.integers(1, 20)
        samples = np.convolve(samples, np.ones(width) / width, "same")
        samples *= np.sin(np.arange(len(samples)) / rng.integers(300, 3000))
        path = folder / f"{number}.wav"
        soundfile.write(path, samples, RATE)
        rows.append((path.name, str(path), 0.0, seconds, ""))
    return Manifest.of(rows)


@torch.no_grad()
def warm_up(features, norm, network, device):
    """Gives the batch normalisation statistics as after some training."""
    torch.manual_seed(0)
    ones = torch.ones(8, device=device)
    for _ in range(5):
        loudness = torch.rand(8, 1, device=device)
        wavs = torch.randn(8, 2 * RATE, device=device) * loudness
        network(norm(features(wavs), ones), ones)
    network.eval()


def large(device):
    """Rows and columns of a matrix whose product keeps the device busy."""
    return 1024 if torch.device(device).type == "cpu" else 4096


def large_products(dtype, device):
    """As matrix product and as convolution: libraries and speed differ."""
    size = large(device)
    weight = torch.randn(size, size, 1, device=device).to(dtype)
    x = torch.randn(16, size, size, device=device).to(dtype)
    rows = x.reshape(-1, size)
    return {
        "matrix product": lambda: rows @ weight[..., 0],
        "convolution": lambda: torch.nn.functional.conv1d(x, weight),
    }


def flop_per_second(network, device):
    """Arithmetic of the network per second of speech, a MAC being two."""
    frames = torch.randn(1, 300, 80, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(frames)
    return counter.get_total_flops() / 3


def cosines(found, name):
    """Of each utterance's embedding with the lone one."""
    a, b = found[name].astype(float), found["one by one"].astype(float)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / norms


if __name__ == "__main__":
    main()
