"""Encoders of every kind, real features in front of narrow networks."""

import functools

from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.lobes.models.ResNet import ResNet
from speechbrain.lobes.models.Xvector import Xvector
from speechbrain.processing.features import InputNormalization
from tiny_brains import DIM

from lgl_plugin.nnet.campplus import CAMPPlus
from lgl_plugin.nnet.encoders import Encoder
from lgl_plugin.nnet.features import KaldiFbank

WIDTHS = [16, 16, 16, 16, 48]
FBANK = functools.partial(Fbank, n_mels=80)
MEAN_NORM = functools.partial(
    InputNormalization, norm_type="sentence", std_norm=False
)
ECAPA = functools.partial(
    *(ECAPA_TDNN, 80), channels=WIDTHS, attention_channels=8, lin_neurons=DIM
)
NETWORKS = {
    "ecapa": ECAPA,
    "xvector": functools.partial(
        Xvector, in_channels=80, tdnn_channels=WIDTHS, lin_neurons=DIM
    ),
    "resnet": functools.partial(
        *(ResNet, 80), channels=[8, 8, 16, 16], lin_neurons=DIM
    ),
}
CAMPP = functools.partial(
    CAMPPlus, 80, DIM, growth_rate=4, bn_size=2, init_channels=8
)
# Callables that make them.
ENCODERS = {
    **{
        name: functools.partial(Encoder, FBANK, network, MEAN_NORM)
        for name, network in NETWORKS.items()
    },
    "campplus": functools.partial(Encoder, KaldiFbank, CAMPP),
}
