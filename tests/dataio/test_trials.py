"""Trial lists: reading, errors, and the exclusion of tested speakers."""

import collections
import os

import numpy as np
import pytest
import soundfile

from lgl_plugin.dataio.trials import (
    exclude_tested,
    read_trials,
    trial_audio,
    trial_paths,
)
from lgl_plugin.evaluation.verification import write_scores


def test_read_trials(tmp_path):
    path = tmp_path / "trials.txt"
    path.write_text(
        "1 b/1.wav b/2.wav\n\n0\tb/1.wav  a/1.wav\r\n0 a/1.wav b/2.wav"
    )
    trials = read_trials(path)
    assert len(trials) == 3
    assert trials.utterances == ["a/1.wav", "b/1.wav", "b/2.wav"]
    assert trials.labels.dtype == bool
    assert trials.labels.tolist() == [True, False, False]
    assert trials.enrolment.tolist() == [1, 1, 0]
    assert trials.test.tolist() == [2, 0, 2]


def test_a_byte_order_mark_is_no_label(tmp_path):
    path = tmp_path / "trials.txt"
    path.write_text("1 a b\n0 a c\n", encoding="utf-8-sig")
    assert read_trials(path).labels.tolist() == [True, False]


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no file .*nowhere"):
        read_trials(tmp_path / "nowhere.txt")


@pytest.mark.parametrize(
    "line",
    ["1 a.wav", "1 a.wav b.wav 0.5", "2 a.wav b.wav", "a.wav b.wav 1"],
)
def test_malformed_line_is_shown(tmp_path, line):
    path = tmp_path / "trials.txt"
    path.write_text(f"1 a.wav c.wav\n\n{line}\n0 a.wav d.wav\n")
    with pytest.raises(ValueError, match="line 3") as error:
        read_trials(path)
    assert repr(line) in str(error.value)
    assert str(path) in str(error.value)


def test_tabs_let_names_hold_blanks(tmp_path):
    path = tmp_path / "trials.txt"
    path.write_text("1\ta b.wav\tc.wav\n0 c.wav\td.wav\n")
    trials = read_trials(path)
    assert trials.utterances == ["a b.wav", "c.wav", "d.wav"]
    scores = tmp_path / "scores.txt"
    write_scores(scores, trials, [0.5, -0.25])
    lines = scores.read_text().splitlines()
    assert lines[0].split("\t") == ["a b.wav", "c.wav", "1", "0.500000"]
    path.write_text("1 a.wav b.wav\t\t\n0 a.wav\tc.wav\n")
    assert read_trials(path).utterances == ["a.wav", "b.wav", "c.wav"]


def test_audio_in_place_of_a_list(tmp_path):
    path = tmp_path / "trials.wav"
    path.write_bytes(b"RIFF\xff\xfe\x00\x01" * 100)
    with pytest.raises(ValueError, match="line 1 is malformed") as error:
        read_trials(path)
    assert len(str(error.value)) < 1500


def test_empty_list(tmp_path):
    path = tmp_path / "trials.txt"
    path.write_text("\n \n")
    with pytest.raises(ValueError, match="trial list .* holds no trial"):
        read_trials(path)


@pytest.mark.parametrize("label", [0, 1])
def test_list_of_one_class(tmp_path, label):
    path = tmp_path / "trials.txt"
    path.write_text(f"{label} a b\n{label} a c\n")
    with pytest.raises(ValueError, match=f"all 2 trials .* label {label}"):
        read_trials(path)


def test_missing_utterances_are_counted_and_the_first_named(tmp_path):
    (tmp_path / "here.wav").touch()
    path = tmp_path / "trials.txt"
    lines = [f"{n % 2} here.wav lost{n}.wav" for n in range(1, 9)]
    path.write_text("\n".join(["1 here.wav here.wav", *lines, lines[0]]))
    with pytest.raises(FileNotFoundError) as error:
        read_trials(path, tmp_path)
    message = str(error.value)
    assert "8 of the 9 utterances" in message
    assert "trial_folder" in message
    named = [line for line in message.splitlines() if line.startswith("  ")]
    assert named == [f"  line {n + 1}: 'lost{n}.wav'" for n in range(1, 6)]


def test_utterances_in_place_and_a_missing_folder(tmp_path):
    for name in "abc":
        (tmp_path / name).touch()
    path = tmp_path / "trials.txt"
    path.write_text("1 a b\n0 a c\n")
    assert len(read_trials(path, tmp_path)) == 2
    with pytest.raises(
        FileNotFoundError, match="no folder of audio .*elsewhere"
    ):
        read_trials(path, tmp_path / "elsewhere")


@pytest.mark.parametrize(
    "utterance", ["../b", "/etc/passwd", "x/../b", "{elsewhere}/b"]
)
def test_utterances_outside_the_folder(tmp_path, utterance):
    folder = tmp_path / "audio"
    folder.mkdir()
    for place in (folder / "a", folder / "b", tmp_path / "b"):
        place.touch()
    (tmp_path / "far").mkdir()
    (folder / "x").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "b").touch()
    path = tmp_path / "trials.txt"
    utterance = utterance.format(elsewhere=tmp_path)
    path.write_text(f"1 a b\n0 a {utterance}\n")
    with pytest.raises(ValueError, match="line 2: .*leads out") as error:
        read_trials(path, folder)
    assert utterance in str(error.value)
    assert len(read_trials(path, folder, allow_outside=True)) == 2
    # Nothing is read without a folder; and a link of the user's own is.
    assert len(read_trials(path)) == 2
    path.write_text(f"1 a b\n0 a {folder}/x/b\n")
    assert len(read_trials(path, folder)) == 2


def test_paths_of_a_list_are_its_files_and_the_folders_above(tmp_path):
    folder = tmp_path.resolve()
    trials = folder / "trials.txt"
    trials.write_text("1 ann/1.wav ann/2.wav\n0 ann/1.wav bob/1.wav")
    paths = trial_paths(trials, folder)
    assert {str(folder / name) for name in ("ann", "ann/2.wav", "bob")} < paths
    assert str(folder / "cat") not in paths


def test_exclusion_goes_by_first_level_folder():
    files = [("ann/1.wav", None), ("ann/2.wav", None), ("bob/1.wav", None)]
    counts = collections.Counter()
    tested = {os.path.realpath("corpus/ann")}
    left = list(exclude_tested(files, "corpus", tested, counts))
    assert left == [("bob/1.wav", None)]
    assert (counts["excluded"], counts["excluded folders"]) == (2, 1)


def test_audio_of_a_list(tmp_path):
    for name in ("a.wav", "b.wav", "c.wav"):
        soundfile.write(tmp_path / name, [0.5] * 8000, 16000)
    (tmp_path / "trials.txt").write_text("1 a.wav b.wav\n0 a.wav c.wav")
    trials = read_trials(tmp_path / "trials.txt", tmp_path)
    audio = trial_audio(trials, tmp_path)
    assert np.array_equal(audio.durations, [0.5, 0.5, 0.5])
    assert list(audio.ids) == trials.utterances


def test_a_channel_of_a_lists_audio(tmp_path):
    """Of a list with calls and single channels, which are read as they are."""
    soundfile.write(tmp_path / "call.wav", np.full((8000, 2), 0.5), 16000)
    soundfile.write(tmp_path / "one.wav", np.full(8000, 0.5), 16000)
    (tmp_path / "trials.txt").write_text(
        "1 call.wav one.wav\n0 one.wav one.wav"
    )
    trials = read_trials(tmp_path / "trials.txt", tmp_path)
    audio = trial_audio(trials, tmp_path, channel=1)
    assert [row["channel"] for row in audio] == [1, None]
    with pytest.raises(ValueError, match=r"call\.wav has 2 .* no channel 2"):
        trial_audio(trials, tmp_path, channel=2)


def test_a_lists_audio_is_for_the_encoders_rates(tmp_path):
    """Not for 16 kHz where no encoder has it."""
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.full(8000, 0.5), 44101)
    (tmp_path / "trials.txt").write_text("1 a.wav b.wav\n0 a.wav a.wav")
    trials = read_trials(tmp_path / "trials.txt", tmp_path)
    assert len(trial_audio(trials, tmp_path, rates=[44101])) == 2
    for rates in [16000], [16000, 44101], [44101, 16000]:
        with pytest.raises(ValueError, match="too odd to convert to 16000 Hz"):
            trial_audio(trials, tmp_path, rates=rates)
