"""The model card's parts; cards of whole runs are in test_export.py."""

import pytest

from lgl_plugin.inference.model_card import last_name


@pytest.mark.parametrize(
    "text, last",
    [("/home/ann/vox", "vox"), ("D:\\vox\\", "vox"), ("bf16", "bf16")],
)
def test_paths_lose_their_folders(text, last):
    assert last_name(text) == last
