"""What a page reads of a run's folder."""

import zipfile

import numpy as np
import pytest

from lgl_plugin.utils.files import load_arrays, save_arrays


def test_arrays_come_back(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"losses": rng.random(9), "selected": rng.random(9) < 0.5}
    save_arrays(tmp_path / "gate.npz", **arrays)
    read = load_arrays(tmp_path / "gate.npz")
    assert {name: array.tolist() for name, array in read.items()} == {
        name: array.tolist() for name, array in arrays.items()
    }
    with pytest.raises(FileNotFoundError):
        load_arrays(tmp_path / "scores.npz")


def test_an_array_that_inflates_is_refused(tmp_path):
    """0.5 MB on disk; a hundred times that in memory."""
    path = tmp_path / "gate.npz"
    np.savez_compressed(path, losses=np.zeros(50_000_000, np.uint8))
    assert path.stat().st_size < 10**6
    with pytest.raises(ValueError, match="gate.npz is damaged: its arrays"):
        load_arrays(path)


def test_a_header_that_claims_more_than_there_is(tmp_path):
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (%d,), }"
    header = (header % 10**12).ljust(117) + b"\n"
    with zipfile.ZipFile(tmp_path / "gate.npz", "w") as out:
        out.writestr("losses.npy", b"\x93NUMPY\1\0\x76\0" + header)
    with pytest.raises(ValueError, match="gate.npz is damaged"):
        load_arrays(tmp_path / "gate.npz")
