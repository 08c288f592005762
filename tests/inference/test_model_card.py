"""The model card's parts; cards of whole runs are in test_export.py."""

import pytest

from lgl_plugin.inference.model_card import last_name, model_card


@pytest.mark.parametrize(
    "text, last",
    [("/home/ann/vox", "vox"), ("D:\\vox\\", "vox"), ("bf16", "bf16")],
)
def test_paths_lose_their_folders(text, last):
    assert last_name(text) == last


def test_label_free_figures_stand_for_a_missing_error_rate():
    settings = {"stage 1": {"sample_rate": 16000}}
    rows = {"Stage I": {"pseudo_eer": 12.34, "mean_cosine": 0.2, "seconds": 9}}
    card = model_card(settings, "ECAPA_TDNN", "stage1", rows=rows)
    assert "| phase | pseudo-EER % | mean cosine |" in card
    assert "| **Stage I** | 12.3 | 0.20 |" in card
    assert "measured without labels" in card
    rows["Stage I"]["eer"] = 9.0
    card = model_card(settings, "ECAPA_TDNN", "stage1", rows=rows)
    assert "pseudo-EER" not in card and "| **Stage I** | 9.0 |" in card


ROWS = {
    "Stage I": {"eer": 9.0},
    "iteration 1, gated": {"eer": 8.0},
    "iteration 2, gated": {"eer": 7.0},
}


@pytest.mark.parametrize(
    "step, shown, own",
    [
        ("stage1", 1, "Stage I"),
        ("iter1/gated", 2, "iteration 1, gated"),
        ("stage1/average10", 1, None),
        ("iter1/gated/average2", 2, None),
    ],
)
def test_an_average_has_no_figure_of_another_model(step, shown, own):
    settings = {"stage 2": {"sample_rate": 16000}}
    card = model_card(settings, "ECAPA_TDNN", step, rows=ROWS)
    assert [name in card for name in ROWS] == [n < shown for n in range(3)]
    for name, figures in ROWS.items():
        assert (f"**{name}**" in card) == (name == own)
        assert (f"value: {figures['eer']}" in card) == (name == own)


@pytest.mark.parametrize(
    "stage, setting, value, said",
    [
        ("stage 1", "method", {"!name:a.dino.DINO": {}}, "by `DINO`."),
        ("stage 2", "gate", {"!new:b.NoGate": {}}, "a gate, `NoGate`, let"),
        ("stage 2", "log_mel_share", 0.33, "embeddings and by log-mel"),
        ("stage 2", "log_mel_share", 0, "embeddings into pseudo-speakers"),
    ],
)
def test_the_method_is_the_one_of_the_settings(stage, setting, value, said):
    settings = {stage: {"sample_rate": 16000, setting: value}}
    assert said in model_card(settings, "ECAPA_TDNN")


def test_a_ceiling_is_not_said_to_be_self_supervised():
    settings = {"stage 2": {"sample_rate": 16000}}
    rows = {"true labels": {"eer": 4.0, "nmi": 1.0}}
    card = model_card(settings, "ECAPA_TDNN", "ceiling", rows=rows)
    assert "trained with all labels" in card and "**true labels**" in card
    for said in ("without labels", "- self-supervised", "pseudo-speakers"):
        assert said not in card
