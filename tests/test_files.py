"""Files that are whole or absent."""

import hashlib
import json
import os
import stat

import pytest

from lgl_plugin.files import atomic_write, checksum, write_json


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
    assert order == ["s", "r"]


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
