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
