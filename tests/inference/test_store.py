"""The store of embeddings on disk."""

import numpy as np
import pytest

from lgl_plugin.dataio.manifest import Strings
from lgl_plugin.inference import store
from lgl_plugin.inference.store import Embeddings


def test_store_round_trip(tmp_path):
    names = ["a/ü 1.wav", "b.wav", "c"]
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    Embeddings(Strings(names), vectors).save(tmp_path / "new" / "folder")
    found = Embeddings.load(tmp_path / "new" / "folder")
    assert list(found.utterances) == names
    np.testing.assert_array_equal(found.vectors, vectors)
    assert found.vectors.dtype == np.float32
    assert isinstance(found.vectors, np.memmap)
    np.testing.assert_array_equal(
        found.vectors_of(["c", names[0]]), vectors[[2, 0]]
    )
    with pytest.raises(KeyError):
        found.vectors_of(["nobody"])


def test_a_store_of_several_blocks_is_numpys_file(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROWS", 7)
    vectors = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float16)
    names = Strings(str(row) for row in range(30))
    Embeddings(names, vectors).save(tmp_path)
    np.save(tmp_path / "numpy.npy", vectors)
    written = (tmp_path / "vectors.npy").read_bytes()
    assert written == (tmp_path / "numpy.npy").read_bytes()


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((", b"text"]
)
def test_a_damaged_store_is_named(tmp_path, content):
    Embeddings(Strings("ab"), np.eye(2, dtype=np.float32)).save(tmp_path)
    (tmp_path / "vectors.npy").write_bytes(content)
    with pytest.raises(ValueError, match=f"{tmp_path} is damaged"):
        Embeddings.load(tmp_path)
    np.save(tmp_path / "vectors.npy", np.eye(3))
    with pytest.raises(ValueError, match="2 utterances, vectors"):
        Embeddings.load(tmp_path)
