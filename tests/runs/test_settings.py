"""Settings: all of a preset is checked, each error names what was typed."""

import io
import json
import pathlib
import re
import string

import hypothesis
import pytest
import ruamel.yaml
import torch
from hyperpyyaml import load_hyperpyyaml
from hypothesis import strategies as st
from speechbrain.utils.run_opts import RunOptions

from lgl_plugin.nnet.gates import FixedGate
from lgl_plugin.runs import settings as settings_module, tried
from lgl_plugin.runs.differences import changes, identity
from lgl_plugin.runs.plain import dump_settings, plain_settings
from lgl_plugin.runs.schema import REFERRED_TO, Stage1Settings, Stage2Settings
from lgl_plugin.runs.settings import (
    SETTINGS_TOO,
    load_settings,
    plain_settings_of,
    read_preset,
    settings_of,
    without_helpers,
)
from lgl_plugin.utils import distributed, progress

HPARAMS = pathlib.Path(__file__).parents[2] / "hparams"
PRESETS = ["stage1", "stage2", "small_stage1", "small_stage2"]
MARGIN_EPOCHS = "large_margin_epochs"
STAGES = {"stage1": Stage1Settings, "stage2": Stage2Settings}


def load(preset="small_stage2", **settings):
    """Loads a preset with overrides as a command line gives them."""
    settings = {"data_folder": "/corpus", **settings}
    text = "".join(f"{name}: {value}\n" for name, value in settings.items())
    return load_settings(HPARAMS / f"{preset}.yaml", text)[0]


def refusal(preset="small_stage2", **settings):
    """Returns the lines of the error, without the path of the yaml."""
    with pytest.raises(ValueError) as error:
        load(preset, **settings)
    path = f"{HPARAMS / preset}.yaml: "
    assert str(error.value).startswith(path)
    return str(error.value).removeprefix(path).splitlines()


def write(folder, text, name="mine.yaml"):
    """Writes a user's yaml beside the repository's presets."""
    if not (folder / "hparams").exists():
        (folder / "hparams").symlink_to(HPARAMS)
    (folder / name).write_text(text)
    return folder / name


def small_encoder(size):
    """Returns a yaml's entry for an encoder that refers to no other entry."""
    return (
        "!name:lgl_plugin.nnet.encoders.Encoder {"
        "features: !name:speechbrain.lobes.features.Fbank {n_mels: 20}, "
        "network: !name:speechbrain.lobes.models.ECAPA_TDNN.ECAPA_TDNN {"
        "input_size: 20, channels: [8, 8, 24], kernel_sizes: [5, 3, 1], "
        f"dilations: [1, 2, 1], lin_neurons: {size}}}}}"
    )


def load_yaml(path, overrides="", run_opts=None):
    return load_settings(path, f"data_folder: /x\n{overrides}", run_opts)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_loads_and_has_all_settings_of_its_stage(preset):
    settings = load(preset)
    stage = STAGES[preset.removeprefix("small_")]
    assert type(settings) is stage
    assert set(dict(settings)) == set(stage.model_fields)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_entry_of_a_preset_is_a_setting_or_referred_to(preset):
    """As the check of names is made over bases and overrides together."""
    tree = read_preset(HPARAMS / f"{preset}.yaml")
    fields = STAGES[preset.removeprefix("small_")].model_fields
    others = {name for name in tree if name not in fields}
    assert others == {"__set_seed", "compute_features", "mean_var_norm"}


def test_every_setting_is_read():
    """By the code, by SpeechBrain's Brain or by other entries of the yamls."""
    root = HPARAMS.parent
    files = [
        *(root / "lgl_plugin").rglob("*.py"),
        *root.glob("recipes/**/*.py"),
    ]
    code = "".join(
        path.read_text() for path in files if path.name != "schema.py"
    )
    yamls = "".join(path.read_text() for path in HPARAMS.glob("*.yaml"))
    of_speechbrain = set(SETTINGS_TOO) - {"eval_precision"}
    for name in {**Stage1Settings.model_fields, **Stage2Settings.model_fields}:
        if name in REFERRED_TO:
            assert f"<{name}>" in yamls, f"no entry refers to {name}"
        elif name not in of_speechbrain:
            # Of the settings, of what holds them, or of a Brain's.
            pattern = rf"settings\.{name}\b|hparams\.{name}\b"
            assert re.search(pattern, code), f"{name} is never read"


def test_a_name_of_the_loaders_options_is_refused_with_their_setting():
    (line,) = refusal("small_stage1", num_workers=4)
    assert "; write --dataloader_options='{num_workers: …}'" in line


@pytest.mark.parametrize(
    "name, value, near",
    [
        ("number_of_epoch", 3, "number_of_epochs"),
        ("batchsize", 64, "batch_size"),
        ("output", "/x", "output_folder"),
        ("Lr", 0.1, "lr"),
        ("held_out", 0.1, "held_out_share"),
        ("compute_feature", "{n_fft: 400}", "compute_features"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, value, near):
    (line,) = refusal("small_stage1", **{name: value})
    assert line == f"there is no setting {name!r}; did you mean {near!r}?"


def test_an_unknown_name_that_resembles_none():
    assert refusal(zzz=1) == ["there is no setting 'zzz'"]


def test_a_setting_of_the_other_stage():
    assert refusal("small_stage1", n_clusters=80) == [
        "there is no setting 'n_clusters' of Stage I, only of Stage II"
    ]
    assert refusal("small_stage2", number_of_epochs=3) == [
        "there is no setting 'number_of_epochs' of Stage II, only of Stage I"
    ]


@st.composite
def typos(draw, name):
    """A name with one character too many, too few or another one."""
    place = draw(st.integers(0, len(name)))
    character = draw(st.sampled_from(string.ascii_letters + "_"))
    kept = draw(st.integers(0, 1))
    typed = name[:place] + draw(st.sampled_from(["", character]))
    return typed + name[place + kept :]


@hypothesis.settings(max_examples=30)
@hypothesis.given(data=st.data())
def test_any_typo_in_a_name_is_refused(data):
    """One of the other stage's names is no setting, either."""
    preset = data.draw(st.sampled_from(["small_stage1", "small_stage2"]))
    fields = STAGES[preset.removeprefix("small_")].model_fields
    typo = data.draw(st.sampled_from(sorted(fields)).flatmap(typos))
    hypothesis.assume(typo and typo not in fields)
    (line,) = refusal(preset, **{typo: 1})
    assert line.startswith(f"there is no setting {typo!r}")


@pytest.mark.parametrize(
    "name, value, problem",
    [
        # A choice that does not exist.
        (
            "encoder_init",
            "prev",
            "'prev' should be 'first' or 'previous'; did you mean 'previous'?",
        ),
        (
            "classifier_init",
            "centroid",
            "'centroid' should be 'random' or 'centroids'; "
            "did you mean 'centroids'?",
        ),
        ("precision", "bf-16", ".*; did you mean 'bf16'[?]"),
        ("eval_precision", "32", ".*; did you mean 'fp32'[?]"),
        ("selection", "eer", "'eer' should be 'last', .*"),
        # A value out of its range.
        ("crop_seconds", "0", "0 should be greater than or equal to 0.1"),
        ("crop_seconds", "3000", "3000 should be less than or equal to 60"),
        ("sample_rate", "0", "0 should be greater than or equal to 1000"),
        ("held_out_share", "1.5", "1.5 should be less than 1"),
        ("held_out_share", "0", "0 should be greater than 0"),
        ("max_bad_share", "2", "2 should be less than or equal to 1"),
        ("n_clusters", "1", "1 should be greater than or equal to 2"),
        ("n_iterations", "0", "0 should be greater than or equal to 1"),
        ("classifier_epochs", "0", "0 should be greater than or equal to 1"),
        ("gated_epochs", "-1", "-1 should be greater than or equal to 0"),
        ("lr", "-1", "-1 should be greater than 0"),
        ("lr", "0", "0 should be greater than 0"),
        ("channel", "-1", "-1 should be greater than or equal to 0"),
        ("seed", "5000000", "5000000 should be less than 4194304"),
        ("ckpt_interval_minutes", "-1", ".* greater than or equal to 0"),
        # A value of another type.
        ("n_clusters", "2.5", "2.5 should be a valid integer"),
        ("n_clusters", "many", "'many' should be a valid integer"),
        ("lr", ".nan", "'.nan' should be a valid number"),
        ("lr", ".inf", "'.inf' should be a valid number"),
        ("lr", "True", "True should be a valid number"),
        ("lr", "null", "None should be a valid number"),
        ("speaker_folder", "yes", "'yes' should be a valid boolean"),
        ("output_folder", "null", "None should be a valid string"),
        ("output_folder", "''", "'' should have at least 1 character"),
        ("dataloader_options", "8", "8 should be a valid dictionary.*"),
        # An entry that must make something.
        ("gate", "FixedGate", "'FixedGate' should be made by !new:.*"),
        ("new_encoder", "null", "None should be made by !name:.*"),
        (
            "opt_class",
            "!new:torch.nn.Linear [1, 1]",
            ".* should be made by !name:.*",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value, problem):
    (line,) = refusal(**{name: value})
    assert line.startswith(f"{name}: ")
    said = line.removeprefix(f"{name}: ")
    assert said == problem or re.fullmatch(problem, said), line


OBJECTS = (
    *("gate", "no_gate", "aam", "large_margin", "backend", "cluster"),
    *("cluster_backend", "augment", "train_logger", "lr_annealing"),
)
FACTORIES = ("new_encoder", "new_classifier", "opt_class", "relabel")


@pytest.mark.parametrize("name", [*OBJECTS, *FACTORIES])
def test_the_other_tag_is_refused(name):
    """`--gate='!name:…'` failed at the end of Stage I."""
    tag, needed = "!name:", "!new: or !apply:"
    if name in FACTORIES:
        tag, needed = "!new:", "!name:"
    made = f"{tag}lgl_plugin.nnet.gates.NoGate"
    (line,) = refusal("stage2", **{name: made, MARGIN_EPOCHS: 1})
    assert line == f"{name}: {made} should be made by {needed}…"


@pytest.mark.parametrize(
    ("speeds", "problem"),
    [
        ("[1.1]", ".0: 1.1 should be a"),
        ("[100, 20]", ".1: 20 should be greater"),
        ("[]", ": [] List should have at least 1 item"),
    ],
)
def test_a_speed_is_in_percent(speeds, problem):
    (line,) = refusal("small_stage1", speeds=speeds)
    assert line.startswith(f"speeds{problem}")


def test_stage2_changes_no_speed():
    """It made Stage II worse; `lgl train --speeds` goes to Stage I alone."""
    (line,) = refusal("small_stage2", speeds="[90, 100]")
    assert line.startswith("there is no setting 'speeds'")


def test_a_manifest_names_its_channels_itself():
    (line,) = refusal(manifest="my.csv", channel=0)
    assert "name it in a column `channel`" in line
    assert load(channel=1).channel == 1


def test_no_epochs_of_stage1():
    (line,) = refusal("small_stage1", number_of_epochs=0)
    assert line == "number_of_epochs: 0 should be greater than or equal to 1"


def test_settings_of_ssps():
    (line,) = refusal("small_stage1", ssps_source="nearby", ssps_epochs=1)
    assert line.startswith("ssps_source: 'nearby' should be 'own' or 'near")
    assert line.endswith("did you mean 'nearest'?")
    (line,) = refusal("small_stage1", ssps_cluster_epochs=0, ssps_epochs=1)
    assert line.startswith("ssps_cluster_epochs: 0 should be")


def test_another_method_keeps_the_presets_positives():
    moco = "!name:lgl_plugin.methods.moco.MoCo"
    positives = load("small_stage1").ssps_epochs
    assert load("small_stage1", method=moco).ssps_epochs == positives > 0
    (line,) = refusal("small_stage1", method="SimCLR")
    assert line.startswith("method: ")


def test_a_wrong_argument_inside_an_entry_is_named_by_its_place():
    (line,) = refusal(dataloader_options="{num_workers: -1}")
    assert line.startswith("dataloader_options.num_workers: -1 should be")


def test_all_problems_are_named_at_once():
    lines = refusal(lr=-1, n_clusters=1, encoder_init="last")
    assert [line.split(":")[0] for line in lines] == [
        "lr",
        "encoder_init",
        "n_clusters",
    ]


def test_centroids_of_another_space():
    """Reproduced as an initial accuracy of 0.07 in place of 1.00 on a toy."""
    pair = dict(encoder_init="first", classifier_init="centroids")
    (line,) = refusal("small_stage2", **pair, n_iterations=2)
    assert "classifier_init: centroids needs encoder_init: previous" in line
    # Round 1 clusters what the first encoder embeds.
    assert load("small_stage2", **pair, n_iterations=1)
    (line,) = refusal(
        "stage2", classifier_init="centroids", encoder_init="previous"
    )
    assert "does not go with new_last_encoder" in line
    assert "set classifier_init to random, or new_last_encoder to null" in line


def test_an_anchor_for_an_encoder_that_has_no_start():
    (line,) = refusal("stage2", anchor=0.1)
    assert "anchor holds an encoder near its start" in line
    assert load("small_stage2", anchor=0.1)


def test_statistics_to_keep_of_an_encoder_that_has_none():
    for preset, name in (
        ("stage2", "new_last_encoder"),
        ("wavlm_stage2", "new_first_encoder"),
    ):
        (line,) = refusal(preset, freeze_batch_statistics=True)
        assert "freeze_batch_statistics keeps those that an encoder" in line
        assert line.endswith(f"to False, or {name} to null")
    assert load("small_stage2", freeze_batch_statistics=True)


def test_weights_to_train_of_an_encoder_that_begins_at_random():
    (line,) = refusal("stage2", trained_weights="fc")
    assert "trained_weights leaves the others as an encoder came" in line
    (line,) = refusal("small_stage2", trained_weights="fc(")
    assert "'fc(' is no regular expression: missing )" in line
    (line,) = refusal("small_stage2", trained_weights="''")
    assert "trained_weights" in line and "at least 1 character" in line
    assert load("small_stage2", trained_weights="^fc|asp")


def test_large_margin_without_a_gated_phase():
    (line,) = refusal(large_margin_epochs=2, gated_epochs=0)
    assert line.startswith("large_margin_epochs trains on what the gate")
    assert "set gated_epochs to 1 or more, or large_margin_epochs to 0" in line
    settings = load(gated_epochs=0, correct_labels="null")
    assert settings.gated_epochs == 0


def test_the_large_margins_crop_is_checked():
    (line,) = refusal(large_margin_epochs=2, large_margin_crop_seconds=-1)
    assert line.endswith(
        "crop_seconds: -1 should be greater than or equal to 0.1"
    )


def test_relabelling_without_a_gated_phase():
    (line,) = refusal("small_ssrl", gated_epochs=0)
    assert "relabel works in the gated epochs" in line


def test_correcting_labels_where_nothing_is_rejected():
    (line,) = refusal(gated_epochs=0)
    assert line.endswith("1 or more, or correct_labels to null")
    gate = "!new:lgl_plugin.nnet.gates.NoGate"
    (line,) = refusal(gate=gate)
    assert "NoGate rejects nothing: set correct_labels to null" in line
    assert load(gate=gate, correct_labels="null").gate is not None


@pytest.mark.parametrize(
    "preset, value, needed",
    [
        ("small_stage1", {"ssps_source": "nearest"}, "ssps_epochs"),
        ("small_stage1", {"ssps_cluster_epochs": 5}, "ssps_epochs"),
        ("small_stage1", {"ssps_cluster": "{n_clusters: 9}"}, "ssps_epochs"),
        ("small_stage2", {"large_margin": "{margin: 1}"}, MARGIN_EPOCHS),
        ("small_stage2", {"large_margin_crop_seconds": 2}, MARGIN_EPOCHS),
        ("stage2", {"gate": "{taus: [1]}"}, "gated_epochs"),
    ],
)
def test_a_setting_of_epochs_that_there_are_none_of(preset, value, needed):
    """As the command line gives it; a preset's own is no mistake."""
    (name,) = value
    (line,) = refusal(preset, **value, **{needed: 0})
    assert line.startswith(f"{name} changes nothing where {needed} is 0: ")
    assert load(preset, **value, **{needed: 2})


@pytest.mark.parametrize(
    "name, value, place, argument",
    [
        # Of an object that the yaml makes at once ...
        ("gate", "!new:lgl_plugin.nnet.gates.FixedGate {tou: 3}", "", "tou"),
        ("augment", "{chanel: 0.5}", "", "chanel"),
        ("cluster", "{n_iteration: 3}", "", "n_iteration"),
        # ... and of one that is made days later.
        ("new_encoder", "{netwrk: 1}", "new_encoder: ", "netwrk"),
        (
            "new_encoder",
            "{network: {chanels: [16]}}",
            "new_encoder.network: ",
            "chanels",
        ),
        (
            "compute_features",
            "{n_mel: 4}",
            "new_encoder.features: ",
            "n_mel",
        ),
        ("opt_class", "{weight_decy: 0.1}", "opt_class: ", "weight_decy"),
        (
            "dataloader_options",
            "{num_worker: 4}",
            "dataloader_options: ",
            "num_worker",
        ),
    ],
)
def test_a_misspelt_argument_of_a_class(name, value, place, argument):
    (line,) = refusal(**{name: value})
    assert line.startswith(place)
    assert f"unexpected keyword argument '{argument}'" in line


def test_a_class_refuses_its_argument():
    assert refusal(cluster="{kmeans: {n_iterations: 0}}") == [
        "n_iterations must be an integer of at least 1, got 0"
    ]


SDPN = "!name:lgl_plugin.methods.sdpn.SDPN"
LATE = "new_last_encoder"


@pytest.mark.parametrize(
    "preset, name, value, problem",
    [
        # An encoder that cannot be made, of an assertion without words.
        (
            *("small_stage1", "new_encoder"),
            "{network: {channels: [16, 17, 16, 16, 48]}}",
            "new_encoder: AssertionError: assert in_channels % scale == 0",
        ),
        (
            *("stage2", LATE, "{network: {channels: [16, 16, 48]}}"),
            f"{LATE}: AssertionError: assert len(channels) == len(kernel_si",
        ),
        # Parts that do not fit each other.
        (
            *("small_stage1", "new_encoder", "{network: {input_size: 40}}"),
            "new_encoder: RuntimeError: Given groups=1, weight of size [96, 40",
        ),
        (
            *("small_stage1", "new_encoder", "{network: {lin_neurons: 8}}"),
            "embedding_size: new_encoder's embeddings have not 192 but 8 dim",
        ),
        (
            *("small_stage2", "new_classifier", "{input_size: 8}"),
            "new_classifier, on new_encoder's 192 dimensions: RuntimeError: ",
        ),
        (
            *("stage2", LATE, "{network: {lin_neurons: 8}}"),
            f"new_classifier, on {LATE}'s 8 dimensions: RuntimeError: ",
        ),
        # Another class than can be used.
        ("small_stage1", "method", "!name:torch.nn.Linear", "method: TypeEr"),
        (
            *("small_stage1", "method", "!name:torch.nn.Identity"),
            "method: Identity has no views, ",
        ),
        (
            *("small_stage2", "gate", "!new:torch.nn.Identity"),
            "gate: Identity has no tau, ",
        ),
        (
            *("small_stage2", "backend", "!new:torch.nn.Identity"),
            "backend: Identity has no fit, ",
        ),
        (
            *("small_stage2", "new_classifier", "!name:torch.nn.Identity"),
            "new_classifier, on new_encoder's 192 dimensions: it makes (8, 192",
        ),
        (
            *("small_stage2", "aam", "!new:torch.nn.CrossEntropyLoss"),
            "aam: it makes ",
        ),
        ("small_stage2", "opt_class", "!name:torch.nn.ReLU", "opt_class: ReLU"),
        # A class of the user's own that does something else than it should.
        (
            *("small_stage1", "method", "!name:wrong_parts.HoldsEncoder"),
            "method: HoldsEncoder keeps the encoder that it is given",
        ),
        (
            *("small_stage1", "method", "!name:wrong_parts.TakenFigure"),
            "method: its figure 'loss' would take the place of the run's own",
        ),
        (
            *("small_stage1", "method", "!name:wrong_parts.NoGraph"),
            "method: its loss does not depend on any trained weight",
        ),
        (
            *("small_stage1", "method", "!name:wrong_parts.ALossEach"),
            "method: it makes (8,) of a batch, in place of ()",
        ),
        (
            *("stage1", "augment", "!new:torch.nn.Identity"),
            "method: AttributeError: 'Identity' object has no attribute 'draw'",
        ),
        (
            *("small_stage2", "gate", "!new:wrong_parts.ScalarGate"),
            "gate: it makes () of a batch, in place of (8,)",
        ),
        (
            *("small_stage2", "gate", "!new:wrong_parts.SteepGate"),
            "gate: SteepGate must answer a mask, or weights from 0 to 1",
        ),
        (
            *("small_stage1", "lr_annealing"),
            "!new:speechbrain.nnet.schedulers.NewBobScheduler "
            "{initial_value: 0.1}",
            "lr_annealing: NewBobScheduler counts how often it is called",
        ),
        # A value that a class refuses.
        (
            *("small_stage1", "method", f"{SDPN} {{prototype_lr: .inf}}"),
            "method: prototype_lr must be above 0, got inf",
        ),
        (
            *("small_stage1", "method"),
            "!name:lgl_plugin.methods.vicreg.VICReg "
            "{invariance: 0, variance: 0, covariance: 0}",
            "method: one weight at least must be above 0",
        ),
        (
            *("small_stage1", "method", f"{SDPN} {{n_prototypes: -5}}"),
            "method: n_prototypes must be 2 or more, got -5",
        ),
        (
            *("small_stage2", "correct_labels", "{scale: -1}"),
            "correct_labels: scale must be above 0, got -1",
        ),
        (
            *("small_ssrl", "relabel", "{momentum: 2}"),
            "relabel: momentum must be in ",
        ),
        ("small_stage2", "opt_class", "{betas: 1}", "opt_class: TypeError: "),
    ],
)
def test_what_cannot_be_trained(preset, name, value, problem):
    """Each came up after files were written, some after a stage."""
    (line,) = refusal(preset, **{name: value})
    assert line.startswith(problem)


def test_a_part_that_an_encoder_replaces_is_not_set_in_vain(tmp_path):
    """Its own features stay, whatever compute_features says."""
    own = small_encoder(8)
    path = write(tmp_path, f"__base__: hparams/stage1.yaml\nnew_encoder: {own}")
    load_yaml(path, "embedding_size: 8")
    with pytest.raises(ValueError, match="compute_features changes nothing"):
        load_yaml(path, "embedding_size: 8\ncompute_features: {f_max: 4000}")


def test_a_trial_gathers_nothing(monkeypatch):
    """NCCL takes no tensors of the CPU, where what is tried is made."""
    monkeypatch.setattr(tried, "_tried", set())
    # As under torchrun; a collective fails, as there is no group.
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    for method in ("sdpn.SDPN", "moco.MoCo", "vicreg.VICReg", "simclr.SimCLR"):
        load("small_stage1", method=f"!name:lgl_plugin.methods.{method}")
    with pytest.raises(ValueError, match="process group has not been init"):
        distributed.all_gather(torch.zeros(2, 3))


def test_a_trial_draws_nothing(monkeypatch):
    """The second reading of the same settings tries nothing again."""
    monkeypatch.setattr(tried, "_tried", set())
    drawn = []
    for _ in range(2):
        load("small_stage1")  # which seeds
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1] and len(tried._tried) == 1


def test_a_class_that_does_not_exist():
    with pytest.raises(ValueError, match="lgl_plugin.nnet.gates.FixdGate"):
        load(gate="!new:lgl_plugin.nnet.gates.FixdGate [1.0]")


def test_an_own_module_that_is_not_on_the_path_says_how_to_name_it():
    """A newcomer's lay in the current folder, where `lgl` looks for none."""
    (line,) = refusal("small_stage1", method="!name:my_own_methods.Together")
    assert "no such entity as my_own_methods.Together" in line
    assert "`PYTHONPATH=. lgl …`" in line
    with pytest.raises(ValueError) as error:  # a slip in one that is found
        load("small_stage1", method="!name:lgl_plugin.methods.dino.DYNO")
    assert "PYTHONPATH" not in str(error.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("def f(:\n", "SyntaxError: invalid syntax (my_broken_module.py, line"),
        ("import no_such\n", "ModuleNotFoundError: No module named 'no_such'"),
    ],
)
def test_an_own_module_that_is_broken(text, said, tmp_path, monkeypatch):
    """The message was a traceback's address."""
    (tmp_path / "my_broken_module.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    (line,) = refusal("small_stage1", method="!name:my_broken_module.Mine")
    assert said in line and "traceback" not in line


@pytest.mark.parametrize("name", ["20261127", "2026-11-27", "0.5/x", "a b"])
def test_a_folder_may_be_called_anything(name):
    """Yaml takes the first for a number and the second for a date."""
    settings = load(output_folder=name)
    assert settings.output_folder == name


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    settings = load(output_folder="~/x", data_folder="~/corpus")
    assert settings.output_folder == "/home/ann/x"
    # What is made from it, too.
    assert settings.trial_folder == "/home/ann/corpus"


@pytest.mark.parametrize("typed", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_numbers_are_read_as_people_write_them(typed):
    settings = load(lr=typed)
    assert settings.lr == 0.001
    assert settings.opt_class.keywords["lr"] == 0.001


def test_values_and_objects_are_attributes():
    settings = load(gate="!new:lgl_plugin.nnet.gates.FixedGate {tau: 2}", lr=1)
    assert isinstance(settings.gate, FixedGate) and settings.gate.tau == 2
    assert settings.lr == 1.0 and settings.correct_labels is not None
    assert settings.dataloader_options.batch_size == 128
    encoder = settings.new_encoder()
    assert encoder(torch.randn(2, 8000), torch.ones(2)).shape[-1] == 192


def test_loader_options_of_torch_pass_through():
    settings = load(dataloader_options="{prefetch_factor: 4, num_workers: 2}")
    assert dict(settings.dataloader_options) == {
        "batch_size": 128,
        "num_workers": 2,
        "prefetch_factor": 4,
    }


@pytest.mark.parametrize("name", ["drop_last", "shuffle", "sampler"])
def test_loader_options_that_the_recipe_sets_itself(name):
    """drop_last would leave no held-out batch, and end after an epoch."""
    (line,) = refusal(dataloader_options=f"{{{name}: true}}")
    assert f"leave {name} out: the recipe sets it itself" in line


def test_loader_options_that_contradict_each_other():
    """torch would say so when Stage I's baselines are done."""
    (line,) = refusal(dataloader_options="{prefetch_factor: 4}")
    assert line.startswith("dataloader_options: prefetch_factor option could")


def test_an_override_that_is_no_yaml():
    path = HPARAMS / "small_stage2.yaml"
    with pytest.raises(ValueError, match="the options: it is not valid yaml"):
        load_settings(path, "gate: [")


# A user's own yaml.


def test_an_unknown_name_in_a_users_yaml(tmp_path):
    path = write(
        tmp_path, "__base__: hparams/small_stage2.yaml\nn_cluster: 5\n"
    )
    wanted = f"{path}: there is no setting 'n_cluster'; did you mean 'n_clust"
    with pytest.raises(ValueError, match=re.escape(wanted)):
        load_yaml(path)


def test_a_helper_that_is_referred_to_is_fine(tmp_path):
    path = write(
        tmp_path,
        "__base__: hparams/small_stage2.yaml\n"
        "width: 24\n"
        "new_encoder: {network: {attention_channels: !ref <width>}}\n",
    )
    settings, text = load_yaml(path, "width: 48")
    network = settings.new_encoder.keywords["network"]
    assert network.keywords["attention_channels"] == 48
    assert plain_settings(text)["width"] == 48
    # On the command line, too.
    settings, _ = load_yaml(path, "lr: !ref <my_lr> * 2\nmy_lr: 0.25")
    assert settings.lr == 0.5


def test_a_helper_whose_last_reference_was_replaced_is_fine(tmp_path):
    """An encoder of one's own leaves the base's features without a reader."""
    path = write(
        tmp_path,
        "__base__: hparams/stage2.yaml\n"
        "new_last_encoder: null\n"
        f"new_encoder: {small_encoder('!ref <embedding_size>')}\n",
    )
    settings, _ = load_yaml(path)
    assert settings.new_encoder().network.fc.conv.out_channels == 192
    # But to set what no entry takes any more is a mistake.
    with pytest.raises(ValueError, match="n_mels changes nothing here"):
        load_yaml(
            write(
                tmp_path,
                path.read_text() + "compute_features: null\n",
                "further.yaml",
            ),
            "n_mels: 40",
        )


@pytest.mark.parametrize(
    "name, entry",
    [
        ("margin", "aam: !new:lgl_plugin.nnet.losses.AAMSoftmax"),
        ("n_clusters", "cluster: !new:lgl_plugin.clustering.kmeans.FaissKMeans"
         " [7]"),
    ],
)  # fmt: skip
def test_a_setting_that_no_other_entry_refers_to(tmp_path, name, entry):
    path = write(tmp_path, f"__base__: hparams/small_stage2.yaml\n{entry}\n")
    load_yaml(path)
    value = {"margin": 0.3, "n_clusters": 5}[name]
    with pytest.raises(ValueError) as error:
        load_yaml(path, f"{name}: {value}")
    assert str(error.value) == (
        f"{path}: {name} changes nothing here, as no setting refers to it"
    )


def test_stage1_takes_a_size_that_no_other_entry_refers_to(tmp_path):
    """Its methods' heads are made for it."""
    encoder = f"new_encoder: {small_encoder(8)}"
    text = f"__base__: hparams/small_stage1.yaml\n{encoder}\n"
    path = write(tmp_path, text)
    assert load_yaml(path, "embedding_size: 8")[0].embedding_size == 8


def test_paths_of_data_are_absolute(monkeypatch, tmp_path):
    """An export reads them, wherever that starts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.csv").touch()
    given = "manifest: mine.csv\ndata_folder: 2026\nverification_file: ../a.txt"
    settings, text = load_settings(HPARAMS / "small_stage1.yaml", given)
    assert settings.manifest == str(tmp_path / "mine.csv")
    assert settings.train_folder == str(tmp_path / "2026" / "train")
    assert settings.verification_file == str(tmp_path.parent / "a.txt")
    assert settings.rir_folder is None
    plain = plain_settings(text)
    assert plain["data_folder"] == settings.data_folder
    assert plain["manifest"] == settings.manifest


def test_bases_in_order_then_the_yaml_itself(tmp_path):
    write(tmp_path, "a: 1\nb: 1\nc: 1\n", "first.yaml")
    write(tmp_path, "b: 2\nc: 2\n", "second.yaml")
    path = write(tmp_path, "__base__: [first.yaml, second.yaml]\nc: 3\n")
    assert dict(read_preset(path)) == {"a": 1, "b": 2, "c": 3}
    # And a base may have its own.
    path = write(tmp_path, "__base__: mine.yaml\na: 4\n", "further.yaml")
    assert dict(read_preset(path)) == {"a": 4, "b": 2, "c": 3}


def merged(folder, base, own):
    """Plain settings of a yaml over a base."""
    write(folder, base, "base.yaml")
    path = write(folder, f"__base__: base.yaml\n{own}")
    out = io.StringIO()
    ruamel.yaml.YAML().dump(read_preset(path), out)
    return plain_settings(out.getvalue())


@pytest.mark.parametrize(
    "base, own, whole",
    [
        # A mapping without a tag changes single keys, however deep,
        ("x: {a: 1, b: {c: 2, d: 3}}", "x: {b: {c: 9}}",
         {"a": 1, "b": {"c": 9, "d": 3}}),
        # also of what a tag makes,
        ("x: !new:m.C {a: 1, b: 2}", "x: {b: 9}", {"!new:m.C": {"a": 1,
                                                               "b": 9}}),
        # and gives arguments to a class that had none.
        ("x: !new:m.C", "x: {a: 1}", {"!new:m.C": {"a": 1}}),
        # What has a tag replaces all of it,
        ("x: !new:m.C {a: 1}", "x: !new:m.D {b: 2}", {"!new:m.D": {"b": 2}}),
        ("x: !new:m.C {a: 1}", "x: !new:m.C {b: 2}", {"!new:m.C": {"b": 2}}),
        ("x: !new:m.C {a: 1}", "x: !new:m.D", {"!new:m.D": ""}),
        # and so does anything that is no mapping.
        ("x: !new:m.C {a: 1}", "x: null", None),
        ("x: {a: [1, 2]}", "x: {a: [3]}", {"a": [3]}),
        ("x: null", "x: {a: 1}", {"a": 1}),
    ],
)  # fmt: skip
def test_how_an_entry_changes_its_base(tmp_path, base, own, whole):
    assert merged(tmp_path, base, own) == {"x": whole}


def test_a_mapping_on_the_command_line_changes_single_arguments():
    settings = load(new_encoder="{network: {attention_channels: 16}}")
    network = settings.new_encoder.keywords["network"].keywords
    assert network["attention_channels"] == 16
    assert network["channels"] == [96, 96, 96, 96, 192]
    # The gate of small_stage2.yaml stands there without arguments.
    with pytest.raises(ValueError, match="DynamicGate.*'taus'"):
        load(gate="{taus: [1.0]}")


def test_a_missing_base_is_named(tmp_path):
    path = write(tmp_path, "__base__: [hparams/stage1.yaml, smal.yaml]\n")
    problem = f"{path}: __base__: there is no {tmp_path}/smal.yaml"
    with pytest.raises(ValueError, match=problem):
        load_yaml(path)


@pytest.mark.parametrize("first", ["mine.yaml", "other.yaml"])
def test_a_yaml_that_is_its_own_base_is_named(tmp_path, first):
    path = write(tmp_path, f"__base__: {first}\n")
    write(tmp_path, "__base__: mine.yaml\n", "other.yaml")
    with pytest.raises(ValueError, match=f"{first}: __base__: {path} is based"):
        load_yaml(path)


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "- lr\n", "lr\n"])
def test_a_yaml_without_settings_is_named(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match=f"{path} holds no settings"):
        load_yaml(path)


def test_settings_that_are_missing_are_named(tmp_path):
    path = write(tmp_path, "__base__: hparams/common.yaml\nstage: 1\n")
    with pytest.raises(ValueError, match="number_of_epochs is missing"):
        load_yaml(path)


# Options of SpeechBrain's that a command line gives past the yaml.


def run_options(**options):
    return RunOptions.from_dictionary(options)


def test_run_options_that_are_settings():
    options = run_options(
        device="cpu",
        precision="bf16",
        eval_precision="fp16",
        ckpt_interval_minutes=7.0,
    )
    path = HPARAMS / "small_stage1.yaml"
    settings, text = load_yaml(path, run_opts=options)
    assert settings.precision == "bf16"
    assert settings.eval_precision == "fp16"
    assert settings.ckpt_interval_minutes == 7
    assert plain_settings(text)["precision"] == "bf16"
    with pytest.raises(ValueError, match="precision: 'fp8' should be"):
        load_yaml(path, run_opts=run_options(precision="fp8"))


@pytest.mark.parametrize(
    "name",
    [
        *("test_only", "data_parallel_backend"),
        *("auto_mix_prec", "bfloat16_mix_prec"),
    ],
)
def test_run_options_that_would_leave_no_trace_are_refused(name):
    path = HPARAMS / "small_stage1.yaml"
    with pytest.raises(ValueError, match=f"^--{name} is not taken here: "):
        load_yaml(path, run_opts=run_options(**{name: True}))
    load_yaml(path, run_opts=run_options(**{name: False}))


def test_noprogressbar_silences_bars_before_the_yaml_makes_objects(monkeypatch):
    """A yaml's augmenter reads its noise behind a bar."""
    path, seen = HPARAMS / "small_stage1.yaml", []
    make = settings_module.load_hyperpyyaml

    def look(text):
        seen.append(progress.tqdm.silent)
        return make(text)

    monkeypatch.setattr(settings_module, "load_hyperpyyaml", look)
    for silent in (True, False):
        load_yaml(path, run_opts=run_options(noprogressbar=silent))
    assert seen == [True, False]


def test_run_options_that_were_not_given_change_nothing():
    """They have defaults, which are not the yaml's."""
    path = HPARAMS / "small_stage1.yaml"
    settings, text = load_yaml(path, run_opts=run_options(device="cpu"))
    assert settings.precision == "fp32"
    assert "max_grad_norm" not in plain_settings(text)


@pytest.mark.parametrize(
    "name, value",
    [
        ("max_grad_norm", 1.0),
        ("grad_accumulation_factor", 2),
        ("optimizer_step_limit", 100),
        ("remove_vector_weight_decay", True),
    ],
)
def test_run_options_that_change_the_result_are_on_record(name, value):
    path = HPARAMS / "small_stage1.yaml"
    before = plain_settings(load_yaml(path)[1])
    options = run_options(**{name: value})
    now = plain_settings(load_yaml(path, run_opts=options)[1])
    shown = json.dumps(value)
    assert changes(before, now) == [f"{name}: was not set, is {shown}"]


# What tells two runs apart.


def test_the_tag_counts_and_layout_does_not():
    first = "gate: !new:a.Fixed\n    tau: 1  # why\noutput_folder: x\n"
    second = "output_folder: y\ngate: !new:a.Fixed {tau: 1}\n"
    other = "output_folder: y\ngate: !new:a.Other {tau: 1}\n"
    assert changes(plain_settings(first), plain_settings(second)) == []
    assert changes(plain_settings(first), plain_settings(other)) == [
        "gate: was a.Fixed, is a.Other"
    ]


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
def test_numbers_that_json_lacks_stay_text(value):
    text = f"gate: !new:a.Gate {{tau: {value}, scale: 0.5}}"
    settings = plain_settings(text)
    assert settings == {"gate": {"!new:a.Gate": {"tau": value, "scale": 0.5}}}
    assert json.loads(json.dumps(settings, allow_nan=False)) == settings


@pytest.mark.parametrize(
    "name, before, now",
    [
        ("num_workers", 8, 0),
        ("timeout", 600, 60),
        ("ckpt_interval_minutes", 10, 0),
        ("data_folder", "/a", "/b/"),
        ("train_logger", None, {"!new:a.Logger": ["x"]}),
        ("max_bad_share", 0.02, 1.0),
        ("pretrained_encoder", None, "/x/stage1"),
        ("musan_folder", "/a/musan", "/b/musan"),
    ],
)
def test_what_leaves_the_result_as_it_is(name, before, now):
    for wrap in (lambda x: x, lambda x: {"options": x}):
        one, two = wrap({name: before}), wrap({name: now})
        assert identity(one) == identity(two) and changes(one, two) == []


def test_to_have_a_noise_folder_or_none_counts():
    lines = changes({"musan_folder": None}, {"musan_folder": "/a"})
    assert lines == ["musan_folder: was false, is true"]


def test_a_difference_is_named_once_as_it_was_typed():
    """Not again by the arguments of objects that refer to it."""
    path = HPARAMS / "stage2.yaml"
    before, now = (
        plain_settings(load_yaml(path, overrides)[1])
        for overrides in ("", "n_clusters: 10\nlr: 0.01\nbatch_size: 64")
    )
    assert changes(before, now) == [
        "batch_size: was 256, is 64",
        "lr: was 0.001, is 0.01",
        "n_clusters: was 6000, is 10",
    ]


@pytest.mark.parametrize("name", ["stage1", "small_stage2"])
def test_the_yaml_that_a_run_keeps_can_be_trained_again(name, tmp_path):
    """Helpers that entries referred to are in these entries by then."""
    path = HPARAMS / f"{name}.yaml"
    _, text = load_settings(path, "data_folder: /x\nmax_grad_norm: 1.5")
    kept = tmp_path / "hyperparams.yaml"
    kept.write_text(without_helpers(text))
    settings, again = load_settings(kept)
    assert settings.max_grad_norm == 1.5
    before = plain_settings(text)
    for helper in ("compute_features", "mean_var_norm"):
        del before[helper]
    assert plain_settings(again) == before


@hypothesis.example("1e3")
@hypothesis.example("0o7")
@hypothesis.given(st.text("019eE+-.ox_:~yn", max_size=6))
def test_texts_that_look_like_numbers_stay_texts(text):
    """By yaml 1.1, which PyYAML writes, and by 1.2, which ruamel reads."""
    settings = {"one": text, "two": {"!new:x.X": {"three": [text, 1000.0, 7]}}}
    assert plain_settings(dump_settings(settings)) == settings
    assert load_hyperpyyaml(dump_settings({"one": text})) == {"one": text}


def test_the_settings_of_a_command_line():
    """Options, settings of one's own and SpeechBrain's options count."""
    words = [str(HPARAMS / "small_stage2.yaml"), "--lr=0.5", "--precision=bf16"]
    own = {"data_folder": "/a: b", "n_clusters": 7}
    settings, text = settings_of(words, own)
    plain = plain_settings_of(words, own)
    assert plain == plain_settings(text)
    for found in dict(settings), plain:
        assert found["lr"] == 0.5 and found["precision"] == "bf16"
        assert found["data_folder"] == "/a: b" and found["n_clusters"] == 7
    with pytest.raises(ValueError, match="no setting 'Lr'"):
        plain_settings_of([*words, "--Lr=1"], own)
    assert plain_settings_of([*words, "--seed=no"], own)["seed"] == "no"
    with pytest.raises(ValueError, match="seed: 'no'"):
        settings_of([*words, "--seed=no"], own)
