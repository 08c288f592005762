"""Embeddings of one rank, kept so that an extraction can go on."""

import json

import numpy as np
import pytest
import torch

from lgl_plugin.inference.shares import (
    JoinedShares,
    Share,
    fingerprint,
    remove_shares,
)
from lgl_plugin.utils.files import load_arrays

VECTORS = np.arange(4, dtype=np.float32).reshape(2, 2)


def first_batch(folder):
    """A share with one batch on disk."""
    share = Share(folder, "encoder 1", save_seconds=0.0)
    share.add(np.array([4, 2]), VECTORS, [(3, "is silent")])
    return share


def test_a_restart_goes_on_by_the_same_key_only(tmp_path):
    first_batch(tmp_path)
    again = Share(tmp_path, "encoder 1")
    assert again.batches == 1
    assert again.positions().tolist() == [4, 2]
    assert again.bad == [(3, "is silent")]
    again.add(np.array([], np.int64), None, [(0, "is missing")])
    again.add(np.array([1]), VECTORS[:1] + 9, [])
    stored = np.fromfile(again.close(), np.float32).reshape(-1, 2)
    np.testing.assert_array_equal(stored, [[0, 1], [2, 3], [9, 10]])
    assert Share(tmp_path, "encoder 2").batches == 0


def test_vectors_of_another_key_do_not_count_after_a_kill(tmp_path):
    first_batch(tmp_path)
    other = Share(tmp_path, "encoder 2")
    other.add(np.array([4, 2]), VECTORS + 9, [])
    other.file.flush()  # and killed before its first save
    assert Share(tmp_path, "encoder 1").batches == 0


def test_vectors_after_the_last_save_are_dropped(tmp_path):
    share = first_batch(tmp_path)
    share.save_seconds = 600.0
    share.add(np.array([7]), VECTORS[:1], [])
    share.file.flush()  # and killed
    again = Share(tmp_path, "encoder 1")
    assert again.positions().tolist() == [4, 2]
    assert (tmp_path / ".share0.bin").stat().st_size == VECTORS.nbytes


@pytest.mark.parametrize("suffix", [".npz", ".bin"])
def test_a_torn_file_means_a_fresh_start(tmp_path, suffix):
    first_batch(tmp_path)
    (tmp_path / f".share0{suffix}").write_bytes(b"torn")
    again = Share(tmp_path, "encoder 1")
    assert again.batches == 0 and len(again.positions()) == 0


def test_a_file_sets_no_other_attribute(tmp_path):
    first_batch(tmp_path)
    path = tmp_path / ".share0.npz"
    saved = load_arrays(path)
    known = json.loads(str(saved["known"])) | {"save_seconds": "never"}
    np.savez(path, known=json.dumps(known), placed=saved["placed"])
    again = Share(tmp_path, "encoder 1")
    assert again.batches == 1 and again.save_seconds == 600.0


def test_shares_are_joined_in_the_order_of_utterances(tmp_path):
    in_memory, on_disk = Share(None, ""), first_batch(tmp_path)
    in_memory.add(np.array([3, 0]), VECTORS + 10, [])
    on_disk.save()
    shares = [(s.positions(), s.close()) for s in (on_disk, in_memory)]
    joined = JoinedShares(shares)
    assert joined.positions.tolist() == [0, 2, 3, 4]
    assert joined.shape == (4, 2) and len(joined) == 4
    expected = np.array([[12, 13], [2, 3], [10, 11], [0, 1]])
    np.testing.assert_array_equal(joined[:], expected)
    np.testing.assert_array_equal(joined[1:3], expected[1:3])


def test_fingerprint_follows_weights_attributes_and_values():
    layer = torch.nn.Linear(2, 2)
    found = fingerprint(layer, np.arange(3), "bf16")
    assert found == fingerprint(layer.eval(), np.arange(3), "bf16")
    assert found != fingerprint(layer, np.arange(3), "fp32")
    assert found != fingerprint(layer, np.arange(3) + 1, "bf16")
    assert found != fingerprint(torch.nn.Linear(2, 2), np.arange(3), "bf16")
    conv, strided = torch.nn.Conv1d(1, 1, 3), torch.nn.Conv1d(1, 1, 3, 2)
    strided.load_state_dict(conv.state_dict())
    assert fingerprint(conv) != fingerprint(strided)
    dropout = torch.nn.Dropout
    assert fingerprint(dropout(0.1)) != fingerprint(dropout(0.2))


def test_all_shares_are_removed(tmp_path):
    first_batch(tmp_path)
    (tmp_path / ".share1.bin").touch()
    (tmp_path / "vectors.npy").touch()
    remove_shares(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npy"]
