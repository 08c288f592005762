"""Both Brains with a tiny encoder on synthetic batches, for tests."""

import copy
import functools
import math
import random

import numpy as np
import speechbrain as sb
import torch
from pretended_device import nothing_waits
from speechbrain.dataio.batch import PaddedBatch
from speechbrain.lobes.models.ECAPA_TDNN import Classifier
from speechbrain.nnet.schedulers import StepScheduler
from speechbrain.processing.features import InputNormalization
from speechbrain.utils.filter_analysis import FilterProperties

from lgl_plugin.clustering.kmeans import TorchKMeans
from lgl_plugin.clustering.vectors import nearest_centroids
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.partners import Partners
from lgl_plugin.methods.dino import DINO
from lgl_plugin.methods.moco import MoCo
from lgl_plugin.methods.sdpn import SDPN
from lgl_plugin.methods.simclr import SimCLR
from lgl_plugin.methods.simsiam import SimSiam
from lgl_plugin.methods.ssps import SSPSBrain
from lgl_plugin.methods.stage1 import Stage1Brain
from lgl_plugin.methods.vicreg import BarlowTwins, VICReg
from lgl_plugin.nnet.augment import Augmenter
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.gates import NoGate, PosteriorGate
from lgl_plugin.nnet.losses import AAMSoftmax
from lgl_plugin.nnet.relabelling import TeacherLabels
from lgl_plugin.runs.checkpoints import WholeCheckpointer
from lgl_plugin.runs.metrics_log import read_metrics
from lgl_plugin.runs.run import Run
from lgl_plugin.training.brain import STEPS_PER_READING
from lgl_plugin.training.health import findings
from lgl_plugin.training.loss_gated import LossGatedBrain
from lgl_plugin.training.relabelling import RelabellingBrain

BATCH, TIME, DIM, CLASSES = 6, 800, 8, 4
SMALL = {"hidden_size": 16}
HEAD = {**SMALL, "bottleneck_size": 8, "n_prototypes": 6}
METHODS = {
    "simclr": SimCLR,
    "plain_simclr": functools.partial(SimCLR, adversarial_weight=0.0),
    "moco": functools.partial(MoCo, queue_size=16),
    "vicreg": functools.partial(VICReg, output_size=12, **SMALL),
    "barlowtwins": functools.partial(BarlowTwins, output_size=12, **SMALL),
    "simsiam": functools.partial(SimSiam, predictor_size=4, **SMALL),
    "dino": functools.partial(DINO, **HEAD),
    "rdino": functools.partial(DINO, regularisation=0.2, **HEAD),
    "sdpn": functools.partial(
        SDPN, queue_size=16, dimension=0.1, off_diagonal=0.1, **HEAD
    ),
}
BRAINS = {
    **dict.fromkeys(METHODS, Stage1Brain),
    "ssps": SSPSBrain,
    "gated": LossGatedBrain,
    "relabelled": RelabellingBrain,
}
STAGE2 = ("gated", "relabelled")


class Frames(torch.nn.Module):
    """Frames of 20 samples, in the place of features."""

    def forward(self, wavs):
        return wavs.unflatten(1, (-1, 20))

    def get_filter_properties(self):
        return FilterProperties(window_size=20, stride=20)


class Network(torch.nn.Module):
    """The interface of SpeechBrain's speaker networks, in two layers."""

    def __init__(self):
        super().__init__()
        self.frame = torch.nn.Linear(20, 16)
        self.utterance = torch.nn.Linear(16, DIM)

    def forward(self, features, lengths=None):
        hidden = self.frame(features).tanh()
        return self.utterance(hidden.square().mean(1))[:, None]


def tiny_encoder():
    """An encoder by the package's contract, of 20-sample frames."""
    normalise = InputNormalization(norm_type="sentence", std_norm=False)
    return Encoder(Frames(), Network(), normalise)


def method_modules(kind, n_utterances=BATCH, encoder=None):
    """A Brain's modules but augmentation."""
    encoder = encoder or tiny_encoder()
    modules = {"encoder": encoder}
    n_utterances = max(n_utterances, len(Crops()))
    if kind not in STAGE2:
        make = METHODS["simclr" if kind == "ssps" else kind]
        modules["method"] = make(encoder, DIM, n_utterances)
        return modules
    modules.update(
        classifier=Classifier(DIM, out_neurons=CLASSES),
        aam=AAMSoftmax(0.2, 30.0),
        gate=NoGate(),
    )
    if kind == "relabelled":
        modules["gate"] = PosteriorGate()
        labels = torch.arange(n_utterances) % CLASSES
        parts = encoder, modules["classifier"], labels, CLASSES
        # One vote, so that labels change after an epoch.
        modules["correction"] = TeacherLabels(*parts, momentum=0.5, epochs=1)
    return modules


def make_brain(
    kind,
    folder,
    modules=(),
    run_opts=(),
    fused=True,
    selection="last",
    checkpointer=None,
    encoder=None,
    **options,
):
    """A Brain on the CPU; `records` holds what it logs."""
    records = []
    if kind == "ssps":
        given = {"group": group_crops, "partners": Partners(len(Crops()))}
        options = {**given, **options}
    given = {"bad_files": BadFiles(folder / "bad_files.txt", 1)}
    brain = BRAINS[kind](
        {
            "augment": Augmenter(),
            **method_modules(kind, encoder=encoder),
            **dict(modules),
        },
        functools.partial(torch.optim.Adam, lr=0.01, fused=fused),
        {
            "selection": selection,
            "lr_annealing": StepScheduler(0.01, 0.5, 1),
        },
        {"device": "cpu", **dict(run_opts)},
        checkpointer or WholeCheckpointer(folder / "checkpoints"),
        **{**given, "log": records.append, **options},
    )
    brain.records = records
    return brain


def begin(brain):
    """Makes a Brain ready for the first batch of epoch 1."""
    brain.on_fit_start()
    brain.on_stage_start(sb.Stage.TRAIN, 1)
    brain.modules.train()
    return brain


def batch(n_crops, seed=0, bad=""):
    """A batch as SpeechBrain's loader collates it."""
    generator = torch.Generator().manual_seed(seed)
    sig = torch.randn(BATCH, n_crops, TIME, generator=generator)
    return PaddedBatch(
        [
            {
                "id": f"utterance {i}",
                "sig": sig[i],
                "label": i % CLASSES,
                "row": i,
                "partner": i,
                "bad": bad if i == 2 else "",
            }
            for i in range(BATCH)
        ]
    )


def broken(n_crops):
    """A batch whose loss is not finite."""
    given = batch(n_crops)
    given.sig.data[0, 0, 0] = math.nan
    return given


def n_crops(brain):
    """How many crops of an utterance a Brain trains on."""
    return 2 if isinstance(brain, Stage1Brain) else 1


def add_batch_norm(brain):
    """Gives the encoder's network batch normalisation; returns that."""
    network = brain.modules.encoder.network
    network.norm, whole = torch.nn.BatchNorm1d(DIM), network.forward
    network.forward = lambda x: network.norm(whole(x)[:, 0])[:, None]
    return network.norm


def weights(brain):
    """A copy of all parameters by module."""
    return {
        name: copy.deepcopy(list(module.parameters()))
        for name, module in brain.modules.items()
    }


def changed(brain, before):
    """The modules of which a parameter is another than before."""
    return {
        name
        for name, module in brain.modules.items()
        if any(
            not torch.equal(a, b)
            for a, b in zip(module.parameters(), before[name])
        )
    }


def train(brain, *kinds):
    """Steps on whole (False) and broken (True) batches, as `fit` does."""
    crops = n_crops(brain)
    for is_broken in kinds:
        brain.step += 1
        given = broken(crops) if is_broken else batch(crops)
        average = brain.update_average(brain.fit_batch(given), 0.0)
    return average


def watch_step(brain):
    """Does a step, and one more in which the host may wait for nothing.

    Returns the shapes of what the latter copies to a device that is pretended.
    """
    brain.steps_per_reading = STEPS_PER_READING
    brain.step = 1
    # AAMSoftmax reads its first batch, once.
    brain.fit_batch(batch(n_crops(brain)))
    given = batch(n_crops(brain))
    on_gpu = brain.device_type == "cuda"
    given = given.pin_memory() if on_gpu else given
    brain.step = 2
    with nothing_waits(brain.device, given.sig.data) as copies:
        loss = brain.fit_batch(given)
        brain.update_average(loss, 0.0)
    return copies


def run_epoch(brain, number, held_out):
    """One epoch of one batch, as `fit` runs it."""
    brain.on_stage_start(sb.Stage.TRAIN, number)
    brain.modules.train()
    brain.step = 1
    loss = brain.fit_batch(batch(n_crops(brain)))
    average = brain.update_average(loss, 0.0)
    brain.on_stage_end(sb.Stage.TRAIN, average, number)
    assert math.isclose(brain.record["loss"], loss.item(), rel_tol=1e-6)
    brain.on_stage_start(sb.Stage.VALID, number)
    brain.modules.eval()
    brain.step = 1
    brain.evaluate_batch(held_out, sb.Stage.VALID)
    brain.on_stage_end(sb.Stage.VALID, 0.0, number)


def warnings_of(brain):
    """What health.py finds in a Brain's records, as one text."""
    place = {"stage": 2, "iteration": 1, "phase": "gated"}
    if isinstance(brain, Stage1Brain):
        place = {"stage": 1, "phase": "simclr"}
    run = Run(brain.checkpointer.checkpoints_dir / "run", 2, {})
    for record in brain.records:
        run.log(**place, **record)
    return "\n".join(words for _, words in findings(read_metrics(run.folder)))


class Crops(torch.utils.data.Dataset):
    """Utterances whose crops follow from their number and the pass.

    The second one is of a partner, if there are any.
    """

    def __init__(self, n_utterances=10, partners=None):
        self.n_utterances = n_utterances
        self.partners = partners

    def __len__(self):
        return self.n_utterances

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        index %= self.n_utterances
        wavs = torch.randn(2, TIME, generator=generator)
        item = {"id": str(index), "sig": wavs, "row": index, "bad": ""}
        item["partner"] = index
        if self.partners is not None:
            rng = random.Random(wavs[0, 0].item())
            item["partner"] = partner = self.partners.draw(rng, index)
            wavs[1] += partner
        return {**item, "label": index % CLASSES}


@torch.no_grad()
def group_crops(encoder):
    """Groups the utterances of `Crops` for SSPS."""
    data, encoder = Crops(), encoder.eval()
    wavs = torch.stack([data[row]["sig"][0] for row in range(len(data))])
    wavs = wavs.to(next(encoder.parameters()).device)
    found = TorchKMeans(3)(encoder(wavs).cpu().numpy())
    nearest = nearest_centroids(found.centroids)
    return found.labels, nearest[found.labels], np.arange(len(data))
