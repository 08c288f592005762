"""Files that are whole or absent."""

import errno
import hashlib
import json
import os
import stat
import tempfile
import zipfile

import numpy as np
import pytest

from lgl_plugin.utils.files import (
    atomic_write,
    check_writable,
    checksum,
    is_outside,
    load_arrays,
    save_arrays,
    write_json,
    written_files,
)


def test_a_failed_write_leaves_the_previous_file(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("before")
    with pytest.raises(RuntimeError, match="in the middle"):
        with atomic_write(path) as out:
            out.write("half of it")
            raise RuntimeError("in the middle")
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["labels.csv"]


def test_a_failed_first_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(tmp_path / "new.csv") as out:
            out.write("half of it")
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_the_previous_file_is_there_until_the_end(tmp_path):
    path = tmp_path / "state.json"
    path.write_text("before")
    with atomic_write(path) as out:
        out.write("after")
        out.flush()
        assert path.read_text() == "before"
    assert path.read_text() == "after"


def test_synced_before_it_takes_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: order.append("s") or fsync(f))
    monkeypatch.setattr(
        os, "replace", lambda a, b: order.append("r") or replace(a, b)
    )
    with atomic_write(tmp_path / "a") as out:
        out.write("x")
    # The name itself is in the folder, which is synced last.
    assert order == ["s", "r", "s"]


def test_a_file_that_may_not_grow_keeps_the_previous_one(tmp_path):
    """The kernel's own limit, as a stand-in for a full disk."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "vectors.npy"
    path.write_bytes(b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="grow so large.*Make room"):
            with atomic_write(path, "wb") as out:
                out.write(bytes(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["vectors.npy"]


def test_a_folder_that_cannot_be_written(tmp_path):
    """Below a file, since root may write anywhere else."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="a file is in .* place.*Name another"):
        with atomic_write(tmp_path / "file" / "run" / "labels.csv"):
            pass


def test_whether_a_folder_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "new" / "out"):
        check_writable(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(NotADirectoryError, match="Name another one"):
            check_writable(folder)

    def refuse(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(OSError, match="Read-only.*Make it writable.*out"):
        check_writable(tmp_path / "out")


def test_what_failed_does_not_count_as_written(tmp_path):
    with written_files() as outer:
        with written_files() as inner:
            write_json(tmp_path / "a.json", 1)
            with pytest.raises(TypeError):
                write_json(tmp_path / "b.json", object())
        write_json(tmp_path / "c.json", 1)
    write_json(tmp_path / "d.json", 1)
    assert [path.name for path in inner] == ["a.json"]
    assert [path.name for path in outer] == ["a.json", "c.json"]


def test_bytes_and_missing_folders(tmp_path):
    path = tmp_path / "deep" / "er" / "vectors.bin"
    with atomic_write(path, "wb") as out:
        out.write(b"\x00\r\n\xff")
    assert path.read_bytes() == b"\x00\r\n\xff"


def test_text_is_utf8_with_newlines_untouched(tmp_path):
    with atomic_write(tmp_path / "a") as out:
        out.write("Grüße\r\n\n")
    assert (tmp_path / "a").read_bytes() == b"Gr\xc3\xbc\xc3\x9fe\r\n\n"


def test_as_readable_as_any_other_file(tmp_path):
    (tmp_path / "plain").write_text("x")
    with atomic_write(tmp_path / "atomic") as out:
        out.write("x")
    plain, atomic = (
        stat.S_IMODE((tmp_path / name).stat().st_mode)
        for name in ("plain", "atomic")
    )
    assert atomic == plain


def test_json_that_cannot_be_written_keeps_the_state(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"done": {"stage1": {}}})
    with pytest.raises(TypeError):
        write_json(path, {"done": object()})
    assert json.loads(path.read_text()) == {"done": {"stage1": {}}}


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_checksum_over_block_edges(tmp_path, size):
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    (tmp_path / "a").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert checksum(tmp_path / "a") == expected


@pytest.mark.parametrize(
    "path, outside",
    [
        ("/corpus/ann/1.wav", False),
        ("/corpus/..ann/1.wav", False),
        ("/corpus/../etc/shadow", True),
        ("/corpus/ann/../../etc/shadow", True),
        ("/corpus2/1.wav", True),
        ("1.wav", True),
    ],
)
def test_paths_that_lead_out_of_a_folder(path, outside):
    assert is_outside(path, "/corpus") == outside


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
