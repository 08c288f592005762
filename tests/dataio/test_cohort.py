"""The cohort of score normalisation: seeded, untested, readable."""

import os
import shutil

import numpy as np
import pytest
import soundfile

from lgl_plugin.dataio.cohort import draw_cohort

TESTED, OTHERS, EACH = ("ann", "bob", "cat"), ("dan", "eve", "fay", "guy"), 3


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files each of seven speakers, and trials of three of them."""
    folder = tmp_path_factory.mktemp("corpus")
    for speaker in (*TESTED, *OTHERS):
        (folder / speaker).mkdir()
        for n in range(EACH):
            soundfile.write(folder / speaker / f"{n}.wav", [0.1] * 8000, 16000)
    lines = [f"1 {s}/0.wav {s}/1.wav\n0 {s}/0.wav {s}/2.wav" for s in TESTED]
    (folder / "trials.txt").write_text("\n".join(lines))
    return folder


def test_cohort_is_a_seeded_sample(corpus, capsys):
    def draw(size, seed=0):
        trials = [corpus / "trials.txt"]
        return list(draw_cohort(corpus, trials, corpus, size, seed).ids)

    everything = draw(100)
    assert "9 files of the cohort, of 3 folders" in capsys.readouterr().out
    assert everything == [f"{s}/{n}.wav" for s in OTHERS for n in range(EACH)]
    assert draw(5) == sorted(draw(5)) and len(set(draw(5))) == 5
    assert set(draw(5)) < set(everything)
    assert len({tuple(draw(5, seed)) for seed in range(5)}) > 1


def test_a_file_without_a_header_is_passed_over(corpus, tmp_path):
    (tmp_path / "zoe").mkdir()
    (tmp_path / "zoe" / "bad.wav").write_bytes(b"not audio")
    soundfile.write(tmp_path / "zoe" / "good.wav", [0.1] * 8000, 16000)
    cohort = draw_cohort(tmp_path, [corpus / "trials.txt"], corpus, 1)
    assert list(cohort.ids) == ["zoe/good.wav"]


def test_a_channel_of_a_cohort(corpus, tmp_path, capsys):
    (tmp_path / "zoe").mkdir()
    for name, channels in {"one": 1, "two": 2, "three": 3}.items():
        samples = np.full((8000, channels), 0.1)
        soundfile.write(tmp_path / "zoe" / f"{name}.wav", samples, 16000)
    trials = [corpus / "trials.txt"]
    cohort = draw_cohort(tmp_path, trials, corpus, 3, channel=2)
    found = {row["wav"][-7:]: row["channel"] for row in cohort}
    assert found == {"one.wav": None, "ree.wav": 2}
    assert "zoe/two.wav has 2 channels" in capsys.readouterr().out


def test_a_cohort_is_for_the_encoders_rate(corpus, tmp_path):
    (tmp_path / "zoe").mkdir()
    for rate in (16000, 44101):
        path = tmp_path / "zoe" / f"{rate}.wav"
        soundfile.write(path, [0.1] * 8000, rate)
    given = tmp_path, [corpus / "trials.txt"], corpus, 5
    for rate in (16000, 44101):
        found = draw_cohort(*given, rates=[rate])
        assert list(found.ids) == [f"zoe/{rate}.wav"]


@pytest.mark.parametrize(
    "name, problem",
    [
        (b"lat\xe9in.wav", r"lat\udce9in.wav name is not UTF-8"),
        (b"new\nline.wav", r"new\nline.wav name holds a line break"),
    ],
)
def test_a_name_that_no_list_holds_is_passed_over(
    corpus, tmp_path, capsys, name, problem
):
    """One such file among thousands ended `lgl verify`, and was not named."""
    path = tmp_path / "good.wav"
    soundfile.write(path, [0.1] * 8000, 16000)
    try:
        shutil.copy(path, tmp_path / os.fsdecode(name))
    except OSError:
        pytest.skip("the disk takes no such name")
    cohort = draw_cohort(tmp_path, [corpus / "trials.txt"], corpus, 5)
    assert list(cohort.ids) == ["good.wav"]
    printed = capsys.readouterr().out
    assert "1 files of the cohort cannot be used" in printed
    assert problem in printed


def test_a_cohort_needs_audio_of_others(corpus, tmp_path):
    trials = [corpus / "trials.txt"]
    with pytest.raises(FileNotFoundError, match="--cohort: there is no folder"):
        draw_cohort(tmp_path / "nowhere", trials, corpus, 5)
    with pytest.raises(ValueError, match="does not test on"):
        draw_cohort(corpus / "ann", trials, corpus, 5)
