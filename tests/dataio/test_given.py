"""Labels that a user gives: what is read, and what is refused."""

import re

import numpy as np
import pytest

from lgl_plugin.dataio.given import GivenLabels, read_given

IDS = ["a/1.wav", "a/2.wav", "b/1.wav", "ü, x.wav"]


def write(folder, text):
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_spreadsheets_file_is_read(tmp_path, caplog):
    """A byte-order mark, further columns in any order, quotes, lines' ends."""
    path = write(
        tmp_path,
        "\ufeffspeaker,note,utterance\r\nbob,,b/1.wav\r\n"
        'ann,sure,"ü, x.wav"\r\nbob,,a/1.wav\r\n',
    )
    given = read_given(path, IDS)
    assert given.speakers == ("bob", "ann") or given.speakers == ("ann", "bob")
    names = [given.speakers[n] if n >= 0 else None for n in given.by_row]
    assert names == ["bob", None, "bob", "ann"]
    assert "1 speakers have a single utterance ('ann')" in caplog.text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file,speaker\na,b\n", "lacks utterance: the first line must name"),
        ("", "lacks speaker and utterance"),
        ("utterance;speaker\na;b\n", "and names ['utterance;speaker']"),
        ("utterance,speaker\n", "labels no utterance"),
        ("utterance,speaker\na/1.wav,\n", "line 2: utterance or speaker is em"),
        ("utterance,speaker\na/1.wav\n", "line 2: utterance or speaker is em"),
        (
            "utterance,speaker\na/1.wav,x\na/1.wav,x\n",
            "line 3: 'a/1.wav' occurs a second time",
        ),
        # A quote that is not closed would make one name of all lines after.
        ('utterance,speaker\na/1.wav,"x\na/2.wav,y\n', "quote that is not clo"),
        ('utterance,speaker\na/1.wav,"x"y\n', "is no csv up to line 2 "),
        # The part behind a comma would be lost, and two people be one.
        (
            "utterance,speaker\na/1.wav,Smith, Ann\n",
            "line 2 has more fields than the first line",
        ),
        (
            "utterance,speaker\n1.wav,x\n2.wav,x\n3.wav,x\n4.wav,x\n",
            "labels 4 utterances that are not there, such as '1.wav', '2.wav', "
            "'3.wav', …. Name files by their path",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, text, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_given(write(tmp_path, text), IDS)


def test_a_name_in_another_form_is_the_same_file(tmp_path):
    """A Mac writes ü as u and a diaeresis; `find .` puts ./ in front."""
    rows = 'u\u0308,x\n./a/1.wav,y\n"u\u0308, x.wav",z\n'
    path = write(tmp_path, f"utterance,speaker\n{rows}")
    given = read_given(path, [*IDS, "ü"])
    names = [given.speakers[n] if n >= 0 else None for n in given.by_row]
    assert names == ["y", None, None, "z", "x"]
    path = write(tmp_path, "utterance,speaker\na/1.wav,x\n./a/1.wav,y\n")
    with pytest.raises(ValueError, match="'a/1.wav' a second time as"):
        read_given(path, IDS)


def test_blanks_make_no_other_speaker(tmp_path):
    rows = "a/1.wav,Ann \nb/1.wav, Ann\n"
    given = read_given(write(tmp_path, f"utterance,speaker\n{rows}"), IDS)
    assert given.speakers == ("Ann",)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="labels: there is no file .*no"
    ):
        read_given(tmp_path / "no.csv", IDS)


def test_a_spreadsheets_other_encoding_is_named(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_bytes("utterance,speaker\na/1.wav,Jürgen\n".encode("latin-1"))
    with pytest.raises(ValueError, match="labels.csv is not in UTF-8: save it"):
        read_given(path, IDS)


def test_a_speaker_of_whom_nothing_can_be_read_is_named():
    given = GivenLabels(("ann", "bob"), np.array([0, 1, -1]))
    with pytest.raises(ValueError, match="labelled 'bob' can be read"):
        given.of([0, 2])
