"""Files of weights that cannot be read."""

import errno

import pytest
import torch

from lgl_plugin.runs.weights import read_weights, save_weights


@pytest.mark.parametrize(
    "number, expected", [(errno.EINVAL, ValueError), (errno.EIO, OSError)]
)
def test_damage_is_told_from_a_failing_disk(
    number, expected, tmp_path, monkeypatch
):
    """torch seeks to where a damaged archive points, which is no place."""
    path = tmp_path / "a.ckpt"
    save_weights(torch.nn.Linear(3, 2), path)
    assert read_weights(path).keys() == {"weight", "bias"}

    def load(*arguments, **options):
        raise OSError(number, "from the file")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(expected):
        read_weights(path)


def test_altered_weights_are_not_loaded(tmp_path):
    """torch alone takes them, and the encoder scores at chance."""
    path = tmp_path / "a.ckpt"
    module = torch.nn.Linear(300, 200)
    save_weights(module, path)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2  # of the numbers, which fill the file
    content[middle] ^= 0xFF
    path.write_bytes(content)
    altered = torch.load(path, weights_only=True)["weight"]
    assert not torch.equal(altered, module.weight)
    with pytest.raises(ValueError, match="a.ckpt .* has been altered"):
        read_weights(path)
