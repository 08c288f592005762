"""A step of each Stage I method beside its own floor.

> python benchmarks/methods.py --batch=32 --crop=1.0 --channels=96

The floor is the bare encoder on a method's own views, already made: forward and
backward for those of the student, forward for those of a teacher. What a step
has beyond that is augmentation, heads, the loss, the optimiser and the
teacher's move. Steps and floors alternate in one process; the time is that of
the processor, which a busy machine disturbs less than the clock.
"""

import functools
import json
import pathlib
import statistics
import sys
import tempfile
import time

import torch
from common import RATE, arguments, report, synchronize
from speechbrain.dataio.batch import PaddedBatch

from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.methods.method import embedded
from lgl_plugin.methods.stage1 import Stage1Brain
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.runs.settings import load_settings
from lgl_plugin.utils.device import keep_freed_memory

RECIPE = pathlib.Path(__file__).parents[1] / "recipes" / "VoxCeleb" / "LGL"
sys.path.append(str(RECIPE))

from gallery import METHODS  # noqa: E402

N_UTTERANCES = 4096


class Case:
    """A method's Brain of the small preset, and its views of one batch."""

    def __init__(self, entry, options, folder):
        width = options.channels
        given = {
            "data_folder": str(folder),
            "new_encoder": {"network": {"channels": [width] * 4 + [2 * width]}},
        }
        text = json.dumps(given)[:-1]
        text += f", method: {entry.option.removeprefix('--method=')}\n}}"
        yaml = RECIPE / "hparams" / "small_stage1.yaml"
        settings, _ = load_settings(yaml, text)
        encoder = settings.new_encoder()
        method = settings.method(encoder, settings.embedding_size, N_UTTERANCES)
        self.device = options.device
        self.brain = Stage1Brain(
            {
                "encoder": encoder,
                "augment": settings.augment,
                "method": method,
            },
            functools.partial(torch.optim.Adam, lr=1e-3, fused=True),
            {k: v for k, v in dict(settings).items() if v is not None},
            {"device": options.device, "noprogressbar": True},
            WholeCheckpointer(folder / "checkpoints"),
            bad_files=BadFiles(folder / "bad_files.txt", 0),
            log=print,
            steps_per_epoch=1000,
        )
        self.brain.on_fit_start()
        self.brain.is_training, self.brain.epoch = True, 1
        self.brain.modules.train()
        crops = torch.randn(options.batch, 2, round(options.crop * RATE))
        self.batch = PaddedBatch(
            [
                {"id": str(row), "sig": pair, "row": row, "bad": ""}
                for row, pair in enumerate(crops)
            ]
        )
        self.crops = self.brain.crops(self.batch)
        self.views, self.taught = self.augment()

    def augment(self):
        """Makes the method's views."""
        return self.brain.method.views(self.crops, self.brain.modules.augment)

    def step(self):
        """A whole step of training."""
        self.brain.step += 1
        self.brain.fit_batch(self.batch)

    def floor(self):
        """The bare encoder on the same views."""
        encoder = self.brain.modules.encoder
        sum(embedded(encoder, v).sum() for v in self.views).backward()
        encoder.zero_grad()
        with torch.no_grad():
            for group in self.taught:
                embedded(encoder, group)


def seconds(work, device):
    """Processor time of a call; on a GPU, the clock's."""
    clock = time.perf_counter if "cuda" in device else time.process_time
    synchronize(device)
    started = clock()
    work()
    synchronize(device)
    return clock() - started


def main(options, folder):
    """Alternates each method's step and floor, and reports their ratio."""
    torch.manual_seed(1)
    if "cpu" in options.device:
        keep_freed_memory()
    rows = []
    for entry in METHODS:
        case = Case(entry, options, folder / entry.name)
        times = {"step": [], "floor": [], "augmentation": []}
        for repeat in range(options.repeats + 1):
            for name, work in (
                ("step", case.step),
                ("floor", case.floor),
                ("augmentation", case.augment),
            ):
                spent = seconds(work, options.device)
                if repeat > 0:
                    times[name].append(spent)
        found = {name: statistics.median(all_) for name, all_ in times.items()}
        rest = found["step"] - found["floor"] - found["augmentation"]
        ratio = found["step"] / found["floor"]
        row = {"method": entry.title, **found, "the rest": rest, "ratio": ratio}
        rows.append(row)
        print({k: v if k == "method" else round(v, 4) for k, v in row.items()})
    title = (
        f"Stage I, seconds of a step: batches of {options.batch} x "
        f"{options.crop:g} s, {options.channels} channels"
    )
    report(rows, title, options.json, options.device)


if __name__ == "__main__":
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--crop", type=float, default=1.0, help="seconds")
    parser.add_argument("--channels", type=int, default=96)
    with tempfile.TemporaryDirectory() as temporary:
        main(parser.parse_args(), pathlib.Path(temporary))
