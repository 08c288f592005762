"""The manifest in memory: text in a block, columns, joins, the split."""

import pickle
import random

import numpy as np
import pytest
from hypothesis import given, strategies as st

from lgl_plugin.dataio.manifest import (
    Manifest,
    Strings,
    find,
    held_out,
    load_manifest,
    one_line,
    write_part,
)

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
    manifest = load_manifest(path, "/corpus", allow_outside=True)
    assert list(manifest.ids) == ["a", "b", "c"]
    assert manifest[0] == {
        "wav": "/corpus/a.flac",
        "offset": pytest.approx(1.0),
        "duration": 1.5,
        "place": None,
        "channel": None,
    }
    assert manifest[1]["wav"] == "/elsewhere/b.wav"
    assert manifest[1]["offset"] == pytest.approx(1.0)
    assert manifest.speakers.tolist() == [0, -1, 0]


HEADER = "ID,duration,wav,start,stop,spk_id\n"
PLACED = HEADER[:-1] + ",first_byte,n_bytes\n"
GOOD = "a.wav,2.5,$data_root/a.wav,0,40000,\n"


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "lacks ID, duration, wav, start, stop, spk_id"),
        ("ID,duration,wav,spk_id\na,1,a,\n", "lacks start, stop:"),
        ("ID;duration;wav\n", r"\['ID;duration;wav'\]"),
        (HEADER, "names no utterance"),
        (HEADER + GOOD + "\n" + GOOD, "line 4: ID 'a.wav' occurs a second"),
        (HEADER + GOOD + "b,long,b,0,1,\n", "line 3: duration 'long'"),
        (HEADER + GOOD + "b,nan,b,0,1,\n", "line 3: duration 'nan'"),
        (HEADER + GOOD + "b,,b,0,1,\n", "line 3: duration ''"),
        (HEADER + "b,-1,b,0,1,\n", "line 2: duration '-1'"),
        (HEADER + "b,1,b,5,5,\n", "line 2: start '5' and stop '5'"),
        (HEADER + "b,1,b,0,1.5,\n", "line 2: start '0' and stop '1.5'"),
        (HEADER + ",1,b,0,5,\n", "line 2: ID is empty"),
        (HEADER + "b,1,,0,5,\n", "line 2: wav is empty"),
        (HEADER + "b,1,b,0,5\n", "line 2: 5 fields under 6 columns"),
        (HEADER + "b,1,b,c,0,5,\n", "line 2: 7 fields under 6 columns"),
        (HEADER + '"b\nc",1,b,0,5,\n', "line 3: ID .* holds a line break"),
        (b"ID,dur\xe9e\n", "is not UTF-8"),
        (HEADER + "b,1,b,0,3,\n", "line 2: .*would be 3 samples a second"),
        (HEADER + "b,1e-320,b,0,9,\n", "would be inf samples a second"),
        (HEADER + "b,1,b,0," + "9" * 30 + ",\n", "line 2: start '0' and"),
        (HEADER + "b\tc,1,b,0,5,\n", r"line 2: ID 'b\\tc' holds a line"),
        (HEADER + "b,1,b\0c,0,5,\n", r"line 2: wav 'b\\x00c' holds|NUL"),
        (PLACED + GOOD[:-1] + ",512,-1\n", "line 2: first_byte '512' and"),
        (PLACED + GOOD[:-1] + ",x,1\n", "line 2: first_byte 'x' and"),
        (HEADER[:-1] + ",n_bytes\n", "n_bytes needs both"),
        (HEADER[:-1] + ",channel\nb,1,b,0,9000,,-1\n", "line 2: channel '-1'"),
        (HEADER + "b" * 200000 + ",1,b,0,5,\n", "line 2: field larger"),
    ],
)
def test_what_makes_no_sense_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "own.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as error:
        load_manifest(path, tmp_path)
    assert str(path) in str(error.value)


def test_other_orders_and_further_columns(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(
        "sex,spk_id,stop,start,wav,duration,ID\n"
        "f,x,9000,0,$data_root/w,1,a\nm,,9000,0,$data_root/w,1,b\n"
    )
    assert list(load_manifest(path, tmp_path).ids) == ["a", "b"]


def test_missing_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file .*own.csv"):
        load_manifest(tmp_path / "own.csv", tmp_path)


@pytest.mark.parametrize(
    "wav, outside",
    [
        ("$data_root/a.wav", False),
        ("$data_root/../a.wav", True),
        ("$data_root/a/../../../etc/a.wav", True),
        ("$data_root/a/../b.wav", True),  # a may be a link
        ("$data_root/a..wav", False),
        ("$data_root", True),
        ("$data_root2/a.wav", True),
        ("/corpus/a.wav", False),
        ("/corpus/../a.wav", True),
        ("/corpus2/a.wav", True),
        ("/etc/a.wav", True),
        ("a.wav", True),
    ],
)
@pytest.mark.parametrize("root", ["/corpus", "/x/../corpus"])
def test_audio_outside_the_data_folder(tmp_path, wav, outside, root):
    path = tmp_path / "own.csv"
    path.write_text(HEADER + GOOD + f"b,1,{wav},0,9000,\n")
    if outside:
        with pytest.raises(ValueError, match="line 3: .*leads out") as error:
            load_manifest(path, root)
        assert wav in str(error.value)
        assert "allow_outside_data_folder" in str(error.value)
    else:
        load_manifest(path, root)
    assert len(load_manifest(path, root, allow_outside=True)) == 2


def test_links_below_the_data_folder_are_followed(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "ann").symlink_to(tmp_path)
    path = tmp_path / "own.csv"
    path.write_text(HEADER + "b,1,$data_root/ann/b.wav,0,9000,\n")
    assert len(load_manifest(path, tmp_path / "corpus")) == 1


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
        "channel": None,
    }


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text("\ufeff" + HEADER + GOOD, encoding="utf-8")
    assert list(load_manifest(path, tmp_path).ids) == ["a.wav"]


def test_a_part_keeps_every_name(tmp_path):
    """Also a blank at its beginning, which a reader of csv would skip."""
    path = tmp_path / "own.csv"
    rows = [f'"{name}",1.0,a.wav,0,8000,"x, y"\n' for name in ("b", " a", "a")]
    path.write_text("\ufeff" + HEADER + "\n".join(rows), encoding="utf-8")
    whole = load_manifest(path, "", allow_outside=True)
    write_part(path, tmp_path / "part.csv", np.array([2, 1]))
    part = load_manifest(tmp_path / "part.csv", "", allow_outside=True)
    assert [*part.ids] == [whole.ids[2], whole.ids[1]] == ["a", " a"]


def test_channels_of_a_recording_may_be_utterances_of_their_own(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(
        HEADER[:-1]
        + ",channel\na,1,$data_root/c.wav,0,8000,,0\n"
        + "b,1,$data_root/c.wav,0,8000,,1\nc,1,$data_root/d.wav,0,8000,,\n"
    )
    manifest = load_manifest(path, tmp_path)
    found = [manifest[row]["channel"] for row in range(3)]
    assert found == [0, 1, None]


def test_rows_join_by_id():
    manifest = Manifest.of((name, "wav", 0.0, 1.0, "") for name in "abc")
    assert manifest.rows(["c", "a"]).tolist() == [2, 0]


@pytest.mark.parametrize("place", [None, (3, 5)])
def test_rows_are_taken_whole(place):
    manifest = Manifest.of(
        (name, f"{name}.wav", n, n + 1.0, name, n, place)
        for n, name in enumerate("abc")
    )
    taken = manifest.take([2, 0, 2])
    assert taken.ids == ["c", "a", "c"]
    assert [taken[n] for n in range(3)] == [manifest[n] for n in (2, 0, 2)]
    assert taken.speakers.tolist() == [2, 0, 2]


@given(st.data(), st.integers(3, 60), st.floats(0, 1), st.integers(0, 999))
def test_labelled_rows_are_trained_on(data, n, share, seed):
    labelled = data.draw(st.sets(st.integers(0, n - 1), max_size=n - 2))
    train, aside = held_out(n, share, seed, [*labelled])
    assert len(aside) == min(max(2, round(share * n)), n - len(labelled))
    assert {*train} | {*aside} == {*range(n)} and not {*train} & {*aside}
    assert labelled <= {*train.tolist()}
    # As if the others were all.
    others = sorted({*range(n)} - labelled)
    assert [*aside] == sorted(random.Random(seed).sample(others, len(aside)))
    whole = held_out(n, share, seed)
    for got, expected in zip(held_out(n, share, seed, range(1, n)), whole):
        assert np.array_equal(got, expected)


@given(n=st.integers(2, 300), share=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_held_out_is_a_deterministic_partition(n, share, seed):
    train, valid = held_out(n, share, seed)
    again = held_out(n, share, seed)
    assert np.array_equal(train, again[0]) and np.array_equal(valid, again[1])
    assert np.array_equal(np.union1d(train, valid), np.arange(n))
    assert len(train) + len(valid) == n
    assert len(valid) == max(2, round(share * n))
    assert (np.diff(train) > 0).all() and (np.diff(valid) > 0).all()


def test_one_utterance_is_held_out():
    train, aside = held_out(1, 0.5, seed=0)
    assert train.tolist() == [] and aside.tolist() == [0]


def test_held_out_depends_on_the_seed():
    first, second = (held_out(1000, 0.1, seed)[1] for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_an_unchanged_manifest_is_parsed_once(tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(HEADER + GOOD)
    manifest = load_manifest(path, tmp_path)
    assert load_manifest(str(path), tmp_path) is manifest
    for column in (manifest.offsets, manifest.durations, manifest.speakers):
        with pytest.raises(ValueError, match="read-only"):
            column[0] = 1
    assert load_manifest(path, "/", allow_outside=True) is not manifest
    path.write_text(HEADER + GOOD + GOOD.replace("a.wav,", "b.wav,"))
    assert list(load_manifest(path, tmp_path).ids) == ["a.wav", "b.wav"]


def test_one_line_escapes_what_would_break_a_line():
    escaped = [one_line(text) for text in ("a\tb", "\udce9.wav", "ß.wav")]
    assert escaped == ["a\\tb", "\\udce9.wav", "ß.wav"]
