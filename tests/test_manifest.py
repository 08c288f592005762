"""The manifest in memory: text in a block, columns, joins, the split."""

import pickle

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lgl_plugin.manifest import Manifest, Strings, find, held_out, load_manifest

texts = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n")))


@given(texts)
def test_strings_are_a_list_of_strings(expected):
    strings = Strings(expected)
    assert list(strings) == expected
    assert [strings[row] for row in range(len(strings))] == expected
    assert strings == Strings(iter(expected))
    for row in (-1, -len(expected)):
        if expected:
            assert strings[row] == expected[row]
    with pytest.raises(IndexError):
        strings[len(expected)]


def test_strings_longer_than_a_block_of_the_iteration():
    expected = [str(number) for number in range(150_000)]
    assert list(Strings(expected)) == expected


@pytest.mark.parametrize("expected", [[], [""], ["a", "", "\u00e9\r", "b"]])
def test_strings_come_back_from_disk(tmp_path, expected):
    with open(tmp_path / "ids.txt", "wb") as out:
        Strings(expected).save(out)
    loaded = Strings.load(tmp_path / "ids.txt")
    assert list(loaded) == expected
    assert list(pickle.loads(pickle.dumps(loaded))) == expected


def test_strings_differ():
    assert Strings("ab") != Strings("abc")
    assert Strings("ab") != Strings("ac")


def test_a_newline_would_part_a_string_in_two():
    with pytest.raises(ValueError, match="newline in 'a\\\\nb'"):
        Strings(["a\nb"])


@given(names=st.sets(st.text("abc")), data=st.data())
def test_find_inverts_getitem(names, data):
    names = sorted(names)
    order = data.draw(st.permutations(range(len(names))))
    found = find(Strings(names), [names[row] for row in order])
    assert found.tolist() == order
    assert found.dtype == np.int64


def test_find_names_what_is_missing():
    with pytest.raises(KeyError, match="nobody"):
        find(Strings(["a"]), ["nobody"])


def test_offset_comes_from_start_at_the_files_own_rate(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text(
        "ID,duration,wav,start,stop,spk_id\n"
        'a,1.5,$data_root/a.flac,8000,20000,"x, y"\n'  # 8 kHz
        "\n"
        "b,2.0,/elsewhere/b.wav,44100,132300,\n"
        'c,2.0,$data_root/c.wav,0,32000,"x, y"\n'
    )
    manifest = load_manifest(path, "/corpus")
    assert list(manifest.ids) == ["a", "b", "c"]
    assert manifest[0] == {
        "wav": "/corpus/a.flac",
        "offset": pytest.approx(1.0),
        "duration": 1.5,
        "place": None,
    }
    assert manifest[1]["wav"] == "/elsewhere/b.wav"
    assert manifest[1]["offset"] == pytest.approx(1.0)
    assert manifest.speakers.tolist() == [0, -1, 0]


def test_columns_in_any_order_and_places_in_shards(tmp_path):
    path = tmp_path / "manifest.csv"
    path.write_text(
        "first_byte,spk_id,wav,ID,duration,start,n_bytes,stop\n"
        "512,,$data_root/0.tar,a,1.0,0,32044,16000\n"
        "33280,,$data_root/0.tar,b,1.0,0,32044,16000\n"
    )
    manifest = load_manifest(path, "shards")
    assert manifest[1] == {
        "wav": "shards/0.tar",
        "offset": 0.0,
        "duration": 1.0,
        "place": [33280, 32044],
    }


def test_rows_join_by_id():
    manifest = Manifest.of((name, "wav", 0.0, 1.0, "") for name in "abc")
    assert manifest.rows(["c", "a"]).tolist() == [2, 0]


@given(n=st.integers(2, 300), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_held_out_is_a_deterministic_partition(n, share, seed):
    train, valid = held_out(n, share, seed)
    again = held_out(n, share, seed)
    assert np.array_equal(train, again[0]) and np.array_equal(valid, again[1])
    assert np.array_equal(np.union1d(train, valid), np.arange(n))
    assert len(train) + len(valid) == n
    assert len(valid) == max(2, round(share * n))
    assert (np.diff(train) > 0).all() and (np.diff(valid) > 0).all()


def test_held_out_depends_on_the_seed():
    first, second = (held_out(1000, 0.1, seed)[1] for seed in (1, 2))
    assert not np.array_equal(first, second)
