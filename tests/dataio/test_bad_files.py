"""The log of bad files and its limit."""

import os

import pytest
from hypothesis import given, strategies as st

from lgl_plugin.dataio.bad_files import BadFiles


def test_bad_files_are_tolerated_up_to_the_limit(tmp_path):
    bad = BadFiles(tmp_path / "bad_files.txt", limit=2)
    bad.add([])
    assert not bad.path.exists()
    bad.add([("a", "silent"), ("b", "cannot be read:\n no such\tfile")])
    bad.add([("a", "silent")])  # known
    with pytest.raises(ValueError, match=r"3 bad .* the 2 that max_bad_share"):
        bad.add([("c", "silent")])
    assert bad.path.read_text().splitlines() == [
        "a\tsilent",
        "b\tcannot be read: no such file",
        "c\tsilent",
    ]


def test_bad_files_are_remembered_by_the_next_process(tmp_path):
    path = tmp_path / "bad_files.txt"
    BadFiles(path, limit=2).add([("a", "silent"), ("b", "silent")])
    again = BadFiles(path, limit=2)
    again.add([("b", "silent")])
    with pytest.raises(ValueError, match="3 bad utterances"):
        again.add([("c", "silent")])


def test_processes_count_each_others_bad_files(tmp_path):
    path = tmp_path / "bad_files.txt"
    one, other = BadFiles(path, 2), BadFiles(path, 2)
    one.add([("x", "silent")])
    other.add([("y", "silent")])
    assert set(other.reasons) == {"x", "y"}
    with pytest.raises(ValueError, match="3 bad utterances"):
        one.add([("z", "silent")])


def test_starting_again_does_not_lift_the_limit(tmp_path):
    path = tmp_path / "bad_files.txt"
    found = [("a", "silent"), ("b", "silent")]
    for _ in range(2):
        with pytest.raises(ValueError, match="2 bad utterances"):
            BadFiles(path, limit=1).add(found)
    with pytest.raises(ValueError, match="a: silent\n  b: silent"):
        BadFiles(path, limit=1).check()


def test_the_first_ten_are_shown(tmp_path):
    bad = BadFiles(tmp_path / "bad_files.txt", limit=3)
    with pytest.raises(ValueError, match="12 bad utterances") as error:
        bad.add([(f"u{n:02}", "silent") for n in range(12)])
    shown = [f"u{n:02}: silent" in str(error.value) for n in range(12)]
    assert shown == [True] * 10 + [False] * 2


@given(
    st.dictionaries(
        st.text(st.sampled_from("a\t\n\r\x1b\x85\u2028é\udce9\\")),
        st.text(),
        max_size=5,
    )
)
def test_any_name_and_reason_stay_one_line(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("bad") / "bad_files.txt"
    bad = BadFiles(path, limit=9)
    bad.add(found.items())
    lines = path.read_text("utf-8").splitlines() if found else []
    assert [line.count("\t") for line in lines] == [1] * len(bad.reasons)
    assert BadFiles(path, limit=9).reasons == bad.reasons
    bad.add(found.items())  # known
    assert (path.read_text("utf-8").splitlines() if found else []) == lines


def test_a_damaged_log_of_bad_files_is_read_as_far_as_it_goes(tmp_path):
    """A name that was cut off is of no file."""
    path = tmp_path / "bad_files.txt"
    path.write_bytes(b"a\tsilent\n\xff\xfe\nb\tcut\nspk1/0")
    bad = BadFiles(path, limit=3)
    assert bad.reasons == {"a": "silent", "b": "cut"}
    bad.add([("spk1/01.wav", "silent")])
    assert set(BadFiles(path).reasons) == {"a", "b", "spk1/01.wav"}


def test_bad_files_outlast_a_power_cut(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def spy(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        content = (tmp_path / "bad_files.txt").read_text()
        assert content == "a\tsilent\n"  # before it is synced
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", spy)
    BadFiles(tmp_path / "bad_files.txt", limit=1).add([("a", "silent")])
    assert synced == [str(tmp_path / "bad_files.txt"), str(tmp_path)]
