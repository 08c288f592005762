"""Training steps of both stages, from files on disk to updated weights.

> python benchmarks/step.py --stage=2
> python benchmarks/step.py --stage=1 --device=cuda --batch=256 --workers=16 \
    --steps=100 --warm=40 --compile

The baseline does what the LGL authors' release does: workers read each file
whole, crop it and augment it by itself on the CPU, opening a file for each
room and noise; an eager float32 step runs each view of Stage I by itself and
reads the loss. Ours is the yaml's trainer fed by its own loader. A corpus, a
MUSAN cut to 5 s and rooms are generated, and lie in the page cache. The floor
is the encoder's arithmetic at the speed of this device's matrix products.
"""

import contextlib
import functools
import itertools
import json
import pathlib
import random
import statistics
import tempfile
import time
import unittest.mock

import numpy as np
import scipy.signal
import soundfile
import speechbrain as sb
import torch
from common import (
    RATE,
    arguments,
    give_freed_memory,
    measure,
    peaks,
    report,
    reset_peaks,
    synchronize,
    write_audio,
)
from speechbrain.dataio.dataloader import make_dataloader
from speechbrain.utils.epoch_loop import EpochCounter
from torch.utils.flop_counter import FlopCounterMode

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.dataset import crop_dataset
from lgl_plugin.dataio.manifest import Manifest
from lgl_plugin.methods.stage1 import Stage1Brain
from lgl_plugin.nnet import encoders
from lgl_plugin.nnet.losses import (
    augmentation_adversarial_loss,
    gradient_reversal,
)
from lgl_plugin.nnet.noise import SNR, TALKERS
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.runs.settings import load_settings
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.utils.device import keep_freed_memory

LAST = "the last, loading nothing"
HPARAMS = pathlib.Path(__file__).parents[1] / "hparams"


class PerFile(torch.utils.data.Dataset):
    """The baseline's data: each item read, cropped and augmented alone."""

    def __init__(self, paths, labels, n_samples, stage, clean, noises, rooms):
        self.paths, self.labels = paths, labels
        self.n_samples, self.stage, self.clean = n_samples, stage, clean
        self.noises, self.rooms = noises, rooms

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        wav = soundfile.read(self.paths[index])[0]
        if self.stage == 2:
            views = [self.augment(self.crop(wav), self.draw())]
        else:
            cut = random.randint(len(wav) // 3, 2 * len(wav) // 3)
            first, second = self.crop(wav[:cut]), self.crop(wav[cut:])
            shared = self.draw()
            views = [
                self.augment(first, shared),
                self.augment(second, shared),
                self.augment(second, self.draw()),
            ]
        return np.float32(views), self.labels[index]

    def crop(self, wav):
        """A random crop; what is too short is repeated."""
        if len(wav) <= self.n_samples:
            wav = np.pad(wav, (0, self.n_samples + 1 - len(wav)), "wrap")
        start = random.randrange(len(wav) - self.n_samples)
        return wav[start : start + self.n_samples]

    def draw(self):
        """A room or none, and recordings to add with their ratios."""
        profile = random.random()  # a quarter rooms, a quarter noise, or both
        room, added = None, []
        if profile >= 1 - self.clean:  # as many as the yaml leaves
            return room, added
        if profile < 0.25 or profile >= 0.5:
            room = random.choice(self.rooms)
        if profile >= 0.25:
            kind = random.choice(list(SNR))
            number = random.randint(*TALKERS) if kind == "speech" else 1
            paths = random.sample(self.noises[kind], number)
            added = [(path, random.uniform(*SNR[kind])) for path in paths]
        return room, added

    def augment(self, wav, drawn):
        """Reads what was drawn and applies it."""
        room, added = drawn
        if room is not None:
            response = soundfile.read(room)[0]
            response /= np.sqrt(np.sum(response**2))
            wav = scipy.signal.convolve(wav, response)[: self.n_samples]
        mixed = wav
        for path, snr in added:
            noise = self.crop(soundfile.read(path)[0])
            power = np.mean(wav**2) / (np.mean(noise**2) + 1e-4)
            mixed = mixed + noise * np.sqrt(power * 10 ** (-snr / 10))
        return mixed


class OneBatch(torch.utils.data.DataLoader):
    """The same batch again and again: a loader that costs nothing."""

    def __init__(self, batch, n_steps):
        super().__init__(range(n_steps))
        self.batch = batch

    def __iter__(self):
        return itertools.repeat(self.batch, len(self))


class Benchmark:
    """A generated corpus, and the ways to train on it."""

    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        self.n_steps = options.warm + options.steps
        self.n_loads = 16 + options.workers
        n_utterances = max(self.n_steps, self.n_loads) * options.batch
        files = write_audio(folder / "wav", options.files, 4, 12)
        self.rooms = write_audio(folder / "rooms", 100, 0.5, 1.0, fade=0.4)
        self.noises = {
            kind: write_audio(folder / "musan" / kind, 100, 5, 5)
            for kind in SNR
        }
        self.paths = [files[i % len(files)] for i in range(n_utterances)]
        seconds = {path: soundfile.info(path).duration for path in files}
        self.manifest = Manifest.of(
            (f"{i}", str(path), 0.0, seconds[path], "")
            for i, path in enumerate(self.paths)
        )
        self.labels = np.random.default_rng(0).integers(
            options.clusters, size=n_utterances
        )
        self.crop = options.crop or (1.8 if options.stage == 1 else 3.0)
        self.counter = 0
        folders = {
            "data_folder": str(folder),
            "musan_folder": str(folder / "musan"),
            "rir_folder": str(folder / "rooms"),
            "new_encoder": {"network": {"channels": self.channels()}},
        }
        path = HPARAMS / f"stage{options.stage}.yaml"
        settings, self.settings = load_settings(path, json.dumps(folders))
        # A setting that is not given leaves the run option's default.
        self.hparams = {k: v for k, v in settings if v is not None}

    def channels(self):
        """The encoder's width, as ECAPA-TDNN takes it."""
        width = self.options.channels
        return [width] * 4 + [3 * width]

    def modules(self, compiled=False):
        """Fresh modules, as the yaml makes them."""
        hparams = self.hparams
        encoder = hparams["new_encoder"]()
        if compiled:
            encoder.network.compile()
        modules = {"encoder": encoder, "augment": hparams["augment"]}
        if self.options.stage == 1:
            make, size = hparams["method"], hparams["embedding_size"]
            modules["method"] = make(encoder, size, len(self.labels))
        else:
            names = ("aam", "gate")
            n_clusters = self.options.clusters
            modules["classifier"] = hparams["new_classifier"](
                out_neurons=n_clusters
            )
            modules.update({name: hparams[name] for name in names})
        return torch.nn.ModuleDict(modules).to(self.options.device)

    def loader_options(self):
        """Returns the options of both loaders."""
        options = self.options
        return {
            "batch_size": options.batch,
            "num_workers": options.workers,
            "pin_memory": "cuda" in options.device,
            "drop_last": True,
        }

    def baseline_loader(self, n_utterances):
        """The loader that augments file by file."""
        data = PerFile(
            self.paths[:n_utterances],
            self.labels,
            round(self.crop * RATE),
            self.options.stage,
            self.hparams["augment"].clean,
            self.noises,
            self.rooms,
        )
        return torch.utils.data.DataLoader(
            data, shuffle=True, **self.loader_options()
        )

    def baseline(self, modules):
        """One epoch of the baseline; utterances per second after warming."""
        device, stage = self.options.device, self.options.stage
        method = modules.method if stage == 1 else None
        apart = set(method.adversary.parameters() if method else [])
        adam = functools.partial(torch.optim.Adam, lr=1e-3)
        optimizer = adam([p for p in modules.parameters() if p not in apart])
        second = adam(apart) if stage == 1 else None

        def embed(wavs):
            encoder = modules.encoder
            features = encoder.normalised(encoder.features(wavs))
            return encoder.network(features)[:, 0]

        # SpeechBrain turns it on; torch has it off.
        torch.backends.cuda.matmul.allow_tf32 = False
        give_freed_memory()
        modules.train()
        loader = self.baseline_loader(self.n_steps * self.options.batch)
        for step, (views, labels) in enumerate(loader, 1):
            views = views.to(device).unbind(1)
            embeddings = torch.stack([embed(view) for view in views])
            if stage == 1:
                loss, _ = method.contrastive(embeddings[0], embeddings[2])
                detached = method.adversary_loss([embeddings.detach()])
                second.zero_grad()
                detached.backward()
                second.step()
                loss = (
                    loss
                    + augmentation_adversarial_loss(
                        method.adversary,
                        *gradient_reversal(embeddings, 3.0),
                    )[0]
                )
            else:
                cosines = modules.classifier(embeddings[0][:, None])[:, 0]
                loss = modules.aam(cosines, labels.to(device)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
            if step == self.options.warm:
                started = time.perf_counter()
        synchronize(device)
        seconds = time.perf_counter() - started
        torch.backends.cuda.matmul.allow_tf32 = True
        return self.options.steps * self.options.batch / seconds

    def brain(self, modules, precision, fused):
        """The trainer of the stage, which keeps the time of its steps."""
        options = self.options
        base = Stage1Brain if options.stage == 1 else LossGatedBrain

        class Timed(base):
            """Keeps the time of the steps after warming."""

            def on_fit_batch_end(self, *args):
                super().on_fit_batch_end(*args)
                if self.step == options.warm:
                    synchronize(options.device)
                    self.begun = time.perf_counter()
                elif self.step == options.warm + options.steps:
                    synchronize(options.device)
                    self.lasted = time.perf_counter() - self.begun

        self.counter += 1
        brain = Timed(
            modules,
            functools.partial(torch.optim.Adam, lr=1e-3, fused=fused),
            {**self.hparams, "ckpt_interval_minutes": 0},
            {
                "device": options.device,
                "precision": precision,
                "noprogressbar": True,
            },
            WholeCheckpointer(self.folder / f"checkpoints{self.counter}"),
            bad_files=BadFiles(self.folder / "bad_files.txt", 0),
            log=lambda record: None,
        )
        return brain

    def dataset(self, n_utterances):
        """Our crops of the corpus."""
        stage1 = self.options.stage == 1
        return crop_dataset(
            self.manifest,
            np.arange(n_utterances),
            self.crop,
            2 if stage1 else 1,
            None if stage1 else self.labels,
        )

    def our_loader(self, n_utterances):
        """The loader that the trainer makes of them."""
        return make_dataloader(
            self.dataset(n_utterances), shuffle=True, **self.loader_options()
        )

    def ours(self, modules, precision, fused, data=None, keep=True, lean=True):
        """One epoch of ours; utterances per second after warming."""
        if self.options.device == "cpu":
            memory = keep_freed_memory if keep else give_freed_memory
            memory()
        brain = self.brain(modules, precision, fused)
        as_shipped = unittest.mock.patch.object(
            encoders, "lean_pooling", contextlib.nullcontext
        )
        with contextlib.nullcontext() if lean else as_shipped:
            brain.fit(
                EpochCounter(1),
                data or self.dataset(self.n_steps * self.options.batch),
                train_loader_kwargs={**self.loader_options(), "shuffle": True},
            )
        return self.options.steps * self.options.batch / brain.lasted

    def load(self, make_loader):
        """Loading alone; utterances per second."""
        batch = self.options.batch
        first = max(self.options.workers, 1)  # each worker is then at work
        for number, _ in enumerate(make_loader(self.n_loads * batch), 1):
            if number == first:
                started = time.perf_counter()
        seconds = time.perf_counter() - started
        return (self.n_loads - first) * batch / seconds

    def augmentation(self, augment):
        """A callable that augments a batch as a step of the stage does."""
        shape = (self.options.batch, round(self.crop * RATE))
        wavs = torch.randn(shape, device=self.options.device)

        def one_step():
            if self.options.stage == 2:
                augment(wavs)
                return
            shared = augment.draw(*shape)
            for draw in (shared, shared, None):
                augment(wavs, draw)

        return one_step

    def flop(self):
        """Arithmetic of the encoder per utterance, both passes."""
        network = self.modules()["encoder"].network
        views = 3 if self.options.stage == 1 else 1
        frames = round(self.crop * 100) + 1
        features = torch.randn(2, frames, 80, device=self.options.device)
        with FlopCounterMode(display=False) as flop:
            network(features).sum().backward()
        return views * flop.get_total_flops() / 2


def matmul_flops(device, dtype, size):
    """Floating-point operations a second of a square matrix product."""
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    found = measure({"mm": lambda: a @ b}, 5, device)
    return 2 * size**3 / found["mm"]["median"]


def bfloat16_runs(device):
    """Tells whether the device multiplies bfloat16 matrices in hardware."""
    if "cuda" in device:
        return torch.cuda.is_bf16_supported()
    cpu = torch.cpu
    return cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported()


def variants(benchmark, precisions):
    """Returns, by name, callables that give utterances per second."""
    options, partial = benchmark.options, functools.partial
    modules, best = benchmark.modules(), precisions[-1]
    ours = partial(benchmark.ours, modules)
    batch = next(iter(benchmark.our_loader(options.batch)))
    same = OneBatch(batch, benchmark.n_steps)
    found = {
        "baseline: eager fp32, augmented per file": partial(
            benchmark.baseline, modules
        ),
        "ours, fp32, Adam": partial(ours, "fp32", False),
    }
    for precision in precisions:
        name = f"ours, {precision}, fused Adam"
        found[name] = partial(ours, precision, True)
    for precision in precisions * options.without:
        one, name = partial(ours, precision, True), f"{precision}, fused Adam"
        found[f"{name}, freed memory given back"] = partial(one, keep=False)
        found[f"{name}, pooling as shipped"] = partial(one, lean=False)
    if options.compile:
        compiled = benchmark.modules(compiled=True)
        for precision in precisions:
            found[f"ours, {precision}, fused Adam, compiled"] = partial(
                benchmark.ours, compiled, precision, True
            )
        ours = partial(benchmark.ours, compiled)
    found[LAST] = partial(ours, best, True, same)
    found["loading alone, baseline"] = partial(
        benchmark.load, benchmark.baseline_loader
    )
    found["loading alone, ours"] = partial(benchmark.load, benchmark.our_loader)
    return found


def main(options, folder):
    """Alternates the variants and reports them beside the floor."""
    sb.utils.seed.seed_everything(1)
    device, batch = options.device, options.batch
    benchmark = Benchmark(options, folder)
    precisions = ["fp32"] + ["bf16"] * bfloat16_runs(device)
    runs = variants(benchmark, precisions)
    rates = {name: [] for name in runs}
    memory = {}
    for repeat in range(options.repeats):
        for name, run in runs.items():
            reset_peaks(device)
            rates[name].append(run())
            memory[name] = peaks(device)
            print(f"{repeat + 1}: {name}: {rates[name][-1]:.1f} utt/s")

    one_step = benchmark.augmentation(benchmark.hparams["augment"])
    augment = measure({"augment": one_step}, 5, device)["augment"]
    alone = batch / augment["median"]
    share = 100 * statistics.median(rates[LAST]) / alone
    rates[f"augmentation alone, ours: {share:.1f} % of the last step"] = [
        batch / augment[key] for key in ("lowest", "median", "highest")
    ]
    slow = statistics.median(next(iter(rates.values())))
    rows = []
    for name, found in rates.items():
        rate = statistics.median(found)
        row = {"what": name, "utt/s": rate}
        row.update(lowest=min(found), highest=max(found))
        rows.append({**row, "times": rate / slow, **memory.get(name, {})})
    flop, size = benchmark.flop(), 8192 if "cuda" in device else 2048
    for precision in precisions:
        dtype = torch.float32 if precision == "fp32" else torch.bfloat16
        speed = matmul_flops(device, dtype, size)
        what = f"floor, {precision}: {flop / 1e9:.1f} GFLOP"
        what += f" at {speed / 1e12:.2f} TFLOP/s"
        rate = speed / flop
        rows.append({"what": what, "utt/s": rate, "times": rate / slow})
    title = (
        f"Stage {options.stage}: batches of {batch} x {benchmark.crop:g} s, "
        f"{options.channels} channels, {options.workers} workers"
    )
    report(rows, title, options.json, device)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=2)
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--crop", type=float, help="s; the yaml's by default")
    parser.add_argument("--clusters", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument(
        "--warm", type=int, default=1, help="steps that are not timed"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument(
        "--without", action="store_true", help="each change left out, too"
    )
    parser.add_argument("--compile", action="store_true")
    parser.set_defaults(repeats=3)
    given = parser.parse_args()
    if given.warm < 1:
        parser.error("--warm: 1 or more, the clock starts at their end")
    with tempfile.TemporaryDirectory() as temporary:
        main(given, pathlib.Path(temporary))
