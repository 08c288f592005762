"""Fits a tiny encoder, in one process or under torchrun; see test_ranks.py.

Without batch statistics and augmentation, which differ by process, so that
the same global batch must give the same losses and weights.
"""

import functools
import json
import pathlib
import sys

import speechbrain as sb
import torch
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.schedulers import StepScheduler
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.epoch_loop import EpochCounter
from torch.utils.data import DataLoader

from lgl_plugin.methods.simclr import SimCLRBrain
from lgl_plugin.nnet.gates import LossMemory, NoGate
from lgl_plugin.nnet.losses import AAMSoftmax, AugmentationDiscriminator, NTXent
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.utils.distributed import rank, world_size

GLOBAL_BATCH, UTTERANCES, CLASSES = 8, 40, 4


class Frames(torch.nn.Module):
    """Frames of 20 samples, in the place of features."""

    def forward(self, wavs):
        return wavs.unflatten(1, (-1, 20))


class Same(torch.nn.Module):
    """In the place of augmentation: changes nothing."""

    def draw(self, *shape):
        return None

    def forward(self, wavs, draw=None):
        return wavs


class EverySecond(NoGate):
    """Selects every second of a global batch: of two processes, all of one."""

    def forward(self, losses):
        places = world_size() * torch.arange(len(losses)) + rank()
        return places % 2 == 0


class Encoder(torch.nn.Module):
    """The interface of SpeechBrain's ECAPA_TDNN, in two layers."""

    def __init__(self):
        super().__init__()
        self.frame = torch.nn.Linear(20, 16)
        self.utterance = torch.nn.Linear(16, 8)

    def forward(self, features, lengths=None):
        hidden = self.frame(features).tanh()
        return self.utterance(hidden.square().mean(1))[:, None]


class Crops(torch.utils.data.Dataset):
    """Utterances whose crops follow from their number."""

    def __len__(self):
        return UTTERANCES

    def set_epoch(self, epoch):
        pass

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        crops = torch.randn(2, 800, generator=generator) * (1 + index % CLASSES)
        item = {"id": str(index), "sig": crops, "row": index, "bad": ""}
        return {**item, "label": index % CLASSES}


def main(kind, output):
    sb.utils.seed.seed_everything(7)
    run_opts = {"device": "cpu", "distributed_backend": "gloo"}
    run_opts["noprogressbar"] = True
    sb.utils.distributed.ddp_init_group(run_opts)
    modules = {
        "compute_features": Frames(),
        "mean_var_norm": InputNormalization(
            norm_type="sentence", std_norm=False
        ),
        "augment": Same(),
        "embedding_model": Encoder(),
    }
    if kind == "simclr":
        brain_class = SimCLRBrain
        modules["contrastive"] = NTXent()
        modules["discriminator"] = AugmentationDiscriminator(8, 16)
        for name, part in modules["discriminator"].named_children():
            if isinstance(part, torch.nn.BatchNorm1d):
                modules["discriminator"][int(name)] = torch.nn.Identity()
    else:
        brain_class = LossGatedBrain
        modules["classifier"] = Classifier(8, out_neurons=CLASSES)
        modules["aam"] = AAMSoftmax()
        modules["gate"] = EverySecond()
        modules["memory"] = LossMemory(UTTERANCES, 0.0)
    brain = brain_class(
        modules,
        functools.partial(torch.optim.SGD, lr=0.05),
        {
            "selection": "last",
            "adversarial_weight": 1.0,
            "lr_annealing": StepScheduler(0.05, 0.5, 1),
        },
        run_opts,
        WholeCheckpointer(output / "checkpoints"),
    )
    records = []
    brain.log = records.append
    brain.bad_files = type("None", (), {"add": lambda self, bad: list(bad)})()
    # In order, and so that all together have a global batch at a time:
    # SpeechBrain shuffles otherwise in several processes than in one.
    order = range(rank(), UTTERANCES, world_size())
    share = GLOBAL_BATCH // world_size()
    brain.fit(
        EpochCounter(2),
        DataLoader(Crops(), share, sampler=order, collate_fn=PaddedBatch),
        DataLoader(Crops(), UTTERANCES, collate_fn=PaddedBatch),
    )
    if sb.utils.distributed.if_main_process():
        weights = {
            name.replace("module.", ""): value
            for name, value in brain.modules.state_dict().items()
        }
        torch.save(weights, output / "weights.ckpt")
        (output / "records.json").write_text(json.dumps(records))


if __name__ == "__main__":
    main(sys.argv[1], pathlib.Path(sys.argv[2]))
