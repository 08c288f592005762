"""Augmentation of a batch, against SpeechBrain's AddReverb and AddNoise.

> python benchmarks/augmentation.py --threads=2

Both get the same batch and the same generated files, and give every waveform a
room and a noise. SpeechBrain reads a batch of noises and one room from disk at
each call and gives the whole batch that room and one start of the noises. Its
recipes do not cut the noises beforehand: 23 s is the mean of MUSAN's (6 hours
in 930 files); 3 s is what its cutting (max_length) would give. It loads in this
process, since workers would run ahead while the others are timed. Ours reads
the files once into a bank, and each waveform has its own room, noise, start and
ratio. The floor is what the rooms cannot do without: the Fourier transforms of
the waveforms and of their responses, and back.
"""

import csv
import functools
import pathlib
import tempfile

import scipy.fft
import torch
from common import MIB, RATE, arguments, measure, report, write_audio
from speechbrain.augment.time_domain import AddNoise, AddReverb

from lgl_plugin.nnet.augment import Augmenter
from lgl_plugin.nnet.noise import SNR

COLUMNS = ["ID", "duration", "wav", "wav_format", "wav_opts"]


def write_csv(folder, paths, seconds):
    """The table from which SpeechBrain reads."""
    with open(folder / "files.csv", "w", encoding="utf-8") as out:
        table = csv.writer(out)
        table.writerow(COLUMNS)
        table.writerows([i, seconds, p, "wav", ""] for i, p in enumerate(paths))


def transforms(n_rows, n_samples, n_room, device):
    """A callable that does the bare transforms of `n_rows` rooms."""
    n_fft = scipy.fft.next_fast_len(n_samples + n_room, real=True)
    wavs = torch.randn(n_rows, n_fft, device=device)
    rooms = torch.randn(n_rows, n_fft, device=device)
    spectra = torch.fft.rfft(wavs)

    def transform():
        torch.fft.rfft(wavs)
        torch.fft.rfft(rooms)
        torch.fft.irfft(spectra, n_fft)

    return transform


def main(options, folder):
    """Times the variants on one batch."""
    torch.manual_seed(1)
    device = options.device
    n_samples = round(options.crop * RATE)
    wavs = 0.1 * torch.randn(options.batch, n_samples, device=device)
    lengths = torch.ones(options.batch, device=device)
    # Of half a second, fading by 60 dB in 0.4 s.
    rooms = write_audio(folder / "rooms", options.rooms, 0.5, 0.5, fade=0.4)
    write_csv(folder / "rooms", rooms, 0.5)

    def speechbrain(noises):
        reverb = AddReverb(folder / "rooms" / "files.csv")
        noise = AddNoise(noises / "files.csv", snr_low=0, snr_high=15)
        return lambda: noise(reverb(wavs), lengths)

    def ours(*folders):
        # By default a quarter goes without a room, and a quarter without noise.
        every = {"reverb_only": 0.0, "noise_only": 0.0}
        augment = Augmenter(RATE, *folders, bank_seconds=1e4, **every)
        return augment.to(device)

    augmenters = {"ours, no files": ours()}
    variants = {}
    for seconds in options.noise_seconds:
        noises = folder / f"{seconds}"
        number = options.noises // len(SNR)
        paths = [
            path
            for kind in SNR  # MUSAN's folders
            for path in write_audio(noises / kind, number, seconds, seconds)
        ]
        write_csv(noises, paths, seconds)
        same = f"noises of {seconds:g} s"
        variants[f"SpeechBrain, {same}"] = speechbrain(noises)
        augmenters[f"ours, {same}"] = ours(noises, folder / "rooms")
    baselines = list(variants)
    for name, augment in augmenters.items():
        variants[name] = functools.partial(augment, wavs)
    variants["floor: transforms"] = transforms(
        options.batch, n_samples, RATE // 2, device
    )
    found = measure(variants, options.repeats, device)
    rows = []
    for name, figures in found.items():
        row = {
            "what": name,
            "utt/s": options.batch / figures["median"],
            "lowest": options.batch / figures["highest"],
            "highest": options.batch / figures["lowest"],
            "ms": 1000 * figures["median"],
        }
        for baseline in baselines:
            ratio = found[baseline]["median"] / figures["median"]
            row[f"times {baseline}"] = ratio
        if name in augmenters:
            buffers = augmenters[name].buffers()
            bank = sum(b.numel() * b.element_size() for b in buffers)
            row["bank MiB"] = bank / MIB
        row["peak MiB"] = figures["host_mib"]
        if "gpu_mib" in figures:
            row["GPU MiB"] = figures["gpu_mib"]
        rows.append(row)
    title = f"Augmentation of {options.batch} x {options.crop:g} s"
    report(rows, title, options.json, device)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--crop", type=float, default=3.0, help="seconds")
    parser.add_argument("--noises", type=int, default=300, help="files")
    parser.add_argument(
        "--noise_seconds", type=float, nargs="+", default=[3.0, 23.0]
    )
    parser.add_argument("--rooms", type=int, default=200, help="files")
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args(), pathlib.Path(temporary))
