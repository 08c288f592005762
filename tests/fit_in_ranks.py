"""Fits tiny encoders, in one process or under torchrun; see test_ranks.py.

Then runs the recipe, if its command lines follow. The encoders are fitted
without batch statistics and augmentation, which differ by process, so that
the same global batch must give the same losses and weights. In several
processes two methods with local views are then fitted as they are.
"""

import functools
import json
import pathlib
import sys
import types

import numpy as np
import speechbrain as sb
import torch
import train_lgl  # of the recipe's folder
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.nnet.schedulers import StepScheduler
from speechbrain.utils.epoch_loop import EpochCounter
from tiny_brains import (
    BRAINS,
    CLASSES,
    DIM,
    Crops,
    Network,
    method_modules,
    tiny_encoder,
)
from torch.utils.data import DataLoader

from lgl_plugin.dataio.partners import Partners
from lgl_plugin.methods.dino import DINO
from lgl_plugin.methods.sdpn import SDPN
from lgl_plugin.nnet.augment import NoAugmentation
from lgl_plugin.nnet.gates import NoGate
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.utils.distributed import rank, world_size

GLOBAL_BATCH, UTTERANCES = 8, 40
# The encoder has two forward passes a step in DINO, one in SDPN.
WITH_LOCAL_VIEWS = ("dino", "sdpn")
# The first twenty are pairs, of both processes.
ROWS = np.arange(UTTERANCES)
GROUPS = (
    np.where(ROWS < 20, ROWS // 2, ROWS),
    20 + (ROWS + 7) % 20,
    ROWS,
)


class EverySecond(NoGate):
    """Selects every second of a global batch: of two processes, all of one."""

    def forward(self, losses):
        places = world_size() * torch.arange(len(losses)) + rank()
        return places % 2 == 0


class NormedNetwork(Network):
    """With batch normalisation, as speaker networks have it.

    Its statistics are what a second forward pass of a step could spoil.
    """

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(DIM)

    def forward(self, features, lengths=None):
        return self.norm(super().forward(features)[:, 0])[:, None]


class LoudCrops(Crops):
    """Crops whose loudness tells the label."""

    def __getitem__(self, index):
        item = super().__getitem__(index)
        return {**item, "sig": item["sig"] * (1 + index % CLASSES)}


def without_what_differs_by_process(method):
    """Takes away batch normalisation, random views, and KoLeo's neighbours."""
    for part in list(method.modules()):
        for name, child in part.named_children():
            if isinstance(child, torch.nn.BatchNorm1d):
                setattr(part, name, torch.nn.Identity())
    if isinstance(method, DINO):
        method.n_local = 0
        # Sharper, the teacher would multiply what rounding differs by.
        method.teacher_temperatures = (0.04, 0.07)
    if isinstance(method, SDPN):
        method.weights["koleo"] = 0.0
        method.views = lambda crops, augment: (
            [crops.transpose(0, 1)],
            [crops[None, :, 0]],
        )


def main(kinds, output, commands=()):
    run_opts = {"device": "cpu", "distributed_backend": "gloo"}
    run_opts["noprogressbar"] = True
    sb.utils.distributed.ddp_init_group(run_opts)
    for kind in kinds:
        fit(kind, output / kind, run_opts)
    for kind in WITH_LOCAL_VIEWS if world_size() > 1 else ():
        fit(kind, output / f"{kind} as it is", run_opts, as_it_is=True)
    for command in commands:
        train_lgl.train(*sb.parse_arguments(command))


def fit(kind, output, run_opts, as_it_is=False):
    sb.utils.seed.seed_everything(7)
    encoder = tiny_encoder()
    if as_it_is:
        encoder.network = NormedNetwork()
    made = method_modules(kind, UTTERANCES, encoder)
    modules = {"augment": NoAugmentation(), **made}
    options, partners = {}, None
    if kind == "ssps":
        options["group"] = lambda encoder: GROUPS
        options["partners"] = partners = Partners(UTTERANCES)
    if "gate" in modules:
        modules["gate"] = EverySecond()
    elif not as_it_is:
        without_what_differs_by_process(modules["method"])
    records = []
    brain = BRAINS[kind](
        modules,
        functools.partial(torch.optim.SGD, lr=0.05),
        {
            "selection": "last",
            "lr_annealing": StepScheduler(0.05, 0.5, 1),
        },
        run_opts,
        WholeCheckpointer(
            output / "checkpoints", {"embedding_model": encoder.network}
        ),
        bad_files=types.SimpleNamespace(add=list),
        log=records.append,
        **options,
    )
    # In order, and so that all together have a global batch at a time:
    # SpeechBrain shuffles otherwise in several processes than in one.
    order = range(rank(), UTTERANCES, world_size())
    share = GLOBAL_BATCH // world_size()
    data = LoudCrops(UTTERANCES, partners)
    brain.fit(
        EpochCounter(2),
        DataLoader(data, share, sampler=order, collate_fn=PaddedBatch),
        DataLoader(data, UTTERANCES, collate_fn=PaddedBatch),
    )
    if as_it_is:
        state = {**brain.modules.state_dict(), "records": records}
        output.mkdir(exist_ok=True)
        torch.save(state, output / f"{rank()}.ckpt")
        return
    saved = brain.checkpointer.find_checkpoint()
    if sb.utils.distributed.if_main_process():
        weights = {
            name.replace("module.", ""): value
            for name, value in brain.modules.state_dict().items()
        }
        torch.save(weights, output / "weights.ckpt")
        (output / "records.json").write_text(json.dumps(records))
        state = torch.load(saved.paramfiles["embedding_model"])
        # Data parallelism leaves no trace in what SpeechBrain loads.
        assert list(state) == list(encoder.network.state_dict())


if __name__ == "__main__":
    main(BRAINS, pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))
