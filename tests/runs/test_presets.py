"""Presets for VoxCeleb2 hold the values that their sources publish.

A preset's head says what it is by and where it departs from that. Values are
written as the sources give them, rounded as the presets round them.
"""

import inspect
import pathlib
import pydoc

import pytest

from lgl_plugin.runs.settings import read_plain

HPARAMS = pathlib.Path(__file__).parents[2] / "hparams"
ECAPA = [512, 512, 512, 512, 1536]
LARGE = [1024, 1024, 1024, 1024, 3072]

# MoCo and DINO are wespeaker's, RDINO and SDPN 3D-Speaker's; None where a
# method has no such argument. `augment.clean` is the argument `clean` of what
# the entry `augment` names. A batch is that of each of 1, 2, 4 and 4 processes.
COLUMNS = ("moco", "dino", "rdino", "sdpn")
ROWS = {
    "number_of_epochs": (150, 150, 70, 150),
    "batch_size": (256, 64, 52, 96),
    "crop_seconds": (None, 3, 4, 4),
    "lr": (0.1 * 256 / 64, 0.2 * 128 / 256, 0.4 * 208 / 256, 0.4 * 384 / 256),
    "lr_annealing.lr": (0.4, 0.1, 0.325, 0.6),
    "lr_annealing.warmup": (0.04, 0.133, 0.143, 0.067),  # 6, 20, 10, 10 epochs
    "lr_annealing.final": (  # 5e-5, 5e-5, 1e-5 and 1e-5
        *(5e-5 / 0.1, 5e-5 / 0.2),
        *(round(1e-5 / 0.325, 5), round(1e-5 / 0.6, 7)),
    ),
    "opt_class.lr": (0.4, 0.1, 0.325, 0.6),
    "opt_class.momentum": (0.9, 0.9, 0.9, 0.9),
    "opt_class.weight_decay": (1e-4, 5e-5, 5e-5, 5e-5),
    "embedding_size": (192, 192, 512, 512),
    "new_encoder.network.channels": (ECAPA, ECAPA, LARGE, LARGE),
    "method.teacher_momentum": (0.999, 0.996, 0.996, 0.996),
    "method.temperature": (0.07, 0.1, 0.1, 0.1),
    "method.queue_size": (65536, None, None, 0),
    "method.n_prototypes": (None, 65536, 65536, 1024),
    "method.hidden_size": (None, 2048, 2048, 2048),
    "method.bottleneck_size": (None, 256, 256, 256),
    "method.n_local": (None, 4, 4, 4),
    "method.clip_each": (None, 3, 3, 3),
    "method.teacher_temperatures": (None, [0.04, 0.07], [0.04, 0.04], None),
    "method.regularisation": (None, 0, 0.2, None),
    "method.frozen": (None, 1 / 150, round(1 / 70, 4), None),
    "method.mean_entropy": (None, None, None, 1),
    "method.koleo": (None, None, None, 0.1),
    # A room or noise; or nothing in 1 of 6, noise (0.75) or a room in 3, both
    # in 2.
    "augment.clean": (0, 0, 0.1667, 0.1667),
    "augment.noise_only": (0.5, 0.5, 3 / 6 * 0.75, 3 / 6 * 0.75),
    "augment.reverb_only": (0.5, 0.5, 3 / 6 * 0.25, 3 / 6 * 0.25),
    "augment.drop": (0, 0, 0, 0.2),
}
ADAM = {
    "batch_size": 256,
    "lr": 1e-3,
    "opt_class.lr": 1e-3,
    "lr_annealing.initial_value": 1e-3,
    "lr_annealing.decay_factor": 0.95,
    "lr_annealing.decay_drop": 5,
}
PUBLISHED = {
    **{
        preset: {
            name: values[column]
            for name, values in ROWS.items()
            if values[column] is not None
        }
        for column, preset in enumerate(COLUMNS)
    },
    # The paper's; the half that is in neither share has a room and noise.
    "stage1": {
        **ADAM,
        "number_of_epochs": 50,
        "crop_seconds": 1.8,
        "method.adversarial_weight": 3,
        "method.scale_init": 10,
        "augment.clean": 0,
        "augment.noise_only": 0.25,
        "augment.reverb_only": 0.25,
    },
    # sslsv's.
    "vicreg": {
        **ADAM,
        "number_of_epochs": 100,
        "crop_seconds": 2,
        "method.hidden_size": 2048,
        "method.output_size": 512,
        "method.invariance": 1,
        "method.variance": 1,
        "method.covariance": 0.1,
    },
    # That of Cai and Li's code; it has Stage II's loss.
    "ssrl": {
        "classifier_epochs": 5,
        "gated_epochs": 100,
        "n_iterations": 1,
        "n_clusters": 8000,
        "crop_seconds": 2,
        "lr": 5e-4,
        "lr_annealing.lr": 5e-4,
        "lr_annealing.warmup": round(5 / 105, 3),
        "lr_annealing.final": 1e-5 / 5e-4,
        "aam.margin": 0.2,
        "aam.scale": 32,
        "relabel.momentum": 0.999,
    },
}


def entries(plain, place=""):
    """Lists (dotted name, value) of a preset, with its classes' defaults."""
    for name, value in plain.items():
        tag, _, made = str(name).partition(":")
        if tag in ("!new", "!name"):
            parameters = inspect.signature(pydoc.locate(made)).parameters
            for parameter in parameters.values():
                yield f"{place}.{parameter.name}", parameter.default
            yield from entries(value or {}, place)
        elif isinstance(value, dict):
            yield from entries(value, f"{place}.{name}".strip("."))
        else:
            yield f"{place}.{name}".strip("."), value


@pytest.mark.parametrize("preset", PUBLISHED)
def test_a_preset_holds_the_published_values(preset):
    found = dict(entries(read_plain(HPARAMS / f"{preset}.yaml")))
    wanted = PUBLISHED[preset]
    assert {name: found.get(name, "absent") for name in wanted} == {
        name: value if isinstance(value, list) else pytest.approx(value)
        for name, value in wanted.items()
    }


@pytest.mark.parametrize("name", ["stage1", "small_stage1"])
def test_a_run_that_is_older_than_overlapping_crops_goes_on(name):
    """A key of the yaml would be a setting that the run was begun without."""
    assert "overlapping_crops" not in read_plain(HPARAMS / f"{name}.yaml")
