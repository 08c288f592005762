"""Reading audio: files, spans, members of shards, why a file is bad."""

import errno
import io
import os

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings, strategies as st

from lgl_plugin.dataio import audio, storage
from lgl_plugin.dataio.audio import BadAudio, Member, probe, read_audio
from lgl_plugin.dataio.crops import read_crops
from lgl_plugin.dataio.storage import StorageFailure


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_whole_file_as_soundfile_reads_it(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    tone = 0.3 * np.sin(np.arange(16000) / 20)
    soundfile.write(path, tone, 16000)
    expected = soundfile.read(path, dtype="float32")[0]
    np.testing.assert_array_equal(read_audio(path).numpy(), expected)


@given(start=st.integers(0, 31000), length=st.integers(1, 1000), data=st.data())
def test_part_of_a_file(tmp_path_factory, start, length, data):
    path = tmp_path_factory.getbasetemp() / "part.flac"
    if not path.exists():
        samples = np.random.default_rng(0).uniform(-0.5, 0.5, 32000)
        soundfile.write(path, samples, 16000)
    expected, _ = soundfile.read(
        path, frames=length, start=start, dtype="float32"
    )
    found = read_audio(path, start / 16000, length / 16000)
    np.testing.assert_array_equal(found.numpy(), expected)


def test_stereo_becomes_the_mean_of_its_channels(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (1000, 2))
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    expected = samples.astype(np.float32).mean(axis=1)
    found = read_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(found, expected, atol=1e-7)


def test_resampling_keeps_duration_pitch_and_level(tmp_path):
    hertz, seconds = 440.0, 1.5
    tone = 0.4 * np.sin(2 * np.pi * hertz * np.arange(12000) / 8000)
    soundfile.write(tmp_path / "a.wav", tone, 8000, subtype="FLOAT")
    wav = read_audio(tmp_path / "a.wav", sample_rate=16000).numpy()
    assert len(wav) == seconds * 16000
    spectrum = np.abs(np.fft.rfft(wav * np.hanning(len(wav))))
    assert spectrum.argmax() * 16000 / len(wav) == pytest.approx(hertz, abs=1)
    expected = 0.4 * np.sin(2 * np.pi * hertz * np.arange(24000) / 16000)
    middle = slice(1000, -1000)  # the filter rings at the edges
    np.testing.assert_allclose(wav[middle], expected[middle], atol=2e-3)


def test_start_counts_seconds_at_any_rate(tmp_path):
    step = np.r_[np.zeros(4000), np.full(4000, 0.5)]
    soundfile.write(tmp_path / "a.wav", step, 8000)
    wav = read_audio(tmp_path / "a.wav", 0.5, 0.25, sample_rate=16000)
    assert len(wav) == 4000
    np.testing.assert_allclose(wav[100:-100], 0.5, atol=2e-3)


def test_bad_files_are_bad_audio(tmp_path):
    second = np.zeros(16000, dtype=np.float32)
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "corrupt.wav").write_bytes(b"RIFF, but no more than that")
    soundfile.write(tmp_path / "header.wav", second[:0], 16000)
    for bad in (np.nan, np.inf):
        second[77] = bad
        path = tmp_path / f"{bad}.wav"
        soundfile.write(path, second, 16000, subtype="FLOAT")
    second[77] = 1e30
    soundfile.write(tmp_path / "huge.wav", second, 16000, "FLOAT")
    second[77] = 0.5
    soundfile.write(tmp_path / "odd.wav", second, 15999)
    (tmp_path / "text.mp3").write_text("hello")
    (tmp_path / "bare.raw").write_bytes(bytes(99))
    os.mkfifo(tmp_path / "pipe.wav")
    for name, words in {
        "missing.wav": "cannot be opened: No such file",
        "empty.wav": "is empty",
        "corrupt.wav": "cannot be read",
        "text.mp3": "cannot be read: it holds no audio",
        "huge.wav": r"samples up to 1e\+30",
        "odd.wav": "15999 Hz, too odd",
        "bare.raw": "has no header",
        "pipe.wav": "is not a regular file",
        "header.wav": "no samples",
        "nan.wav": "not finite",
        "inf.wav": "not finite",
    }.items():
        with pytest.raises(BadAudio, match=words):
            read_audio(tmp_path / name)


@pytest.mark.parametrize("times", [2, 4])
def test_a_server_that_is_away_makes_no_bad_audio(times, noise, monkeypatch):
    """It is asked again; if it stays away, the run ends."""
    left = [times]

    def away(path):
        left[0] -= 1
        return left[0] < 0

    def refuse(path, mode):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(storage, "WAITS", (0, 0, 0))
    monkeypatch.setattr(audio.os.path, "isfile", away)
    monkeypatch.setattr(audio.os.path, "exists", lambda path: False)
    monkeypatch.setattr(audio, "open", refuse, raising=False)
    if times == 2:
        assert len(read_audio(noise[0])) == 32000
        return
    with pytest.raises(StorageFailure, match="Stale .* not count as a bad"):
        read_audio(noise[0])


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 96000])
def test_usual_rates_are_not_odd(rate):
    audio.check_rate(rate, 16000)


def test_integers_written_as_floats_pass(tmp_path):
    tone = 32767 * np.sin(np.arange(16000) / 20)
    soundfile.write(tmp_path / "a.wav", tone, 16000, "FLOAT")
    assert read_audio(tmp_path / "a.wav").abs().max() > 30000


def test_probe_tells_the_size_of_a_file(tmp_path, noise):
    header = probe(noise[0])
    assert header == (32000, 16000, 1) and header.seconds == 2.0
    soundfile.write(tmp_path / "one.wav", [0.5], 16000)
    assert probe(tmp_path / "one.wav").frames == 1


UNUSABLE = {  # what training cannot read, by the reason that it gets
    "no samples": dict(data=np.zeros(0)),
    "has 999 Hz by its header": dict(samplerate=999),
    "has 500 Hz by its header": dict(samplerate=500),
    "has 1 Hz by its header": dict(samplerate=1),
    "15999 Hz, too odd": dict(samplerate=15999),
    "coded as GSM 6.10": dict(samplerate=8000, subtype="GSM610"),
    "coded as 32kbs G721": dict(samplerate=8000, subtype="G721_32"),
    "coded as 16kbs NMS": dict(samplerate=8000, subtype="NMS_ADPCM_16"),
    "not finite": dict(data=np.full(16000, np.nan), subtype="FLOAT"),
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_probe_refuses_what_training_would(tmp_path, reason):
    path = tmp_path / "a.wav"
    noise = np.random.default_rng(0).normal(0, 0.1, 16000)
    soundfile.write(
        path, **{"data": noise, "samplerate": 16000} | UNUSABLE[reason]
    )
    for read in (probe, lambda path: read_crops(path, 0.0, 1.0, 0.5)):
        with pytest.raises(BadAudio, match=reason):
            read(path)


def test_probe_seeks_and_decodes(tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 64000)
    soundfile.write(tmp_path / "cut.flac", noise, 16000)
    os.truncate(tmp_path / "cut.flac", 40000)
    assert soundfile.info(tmp_path / "cut.flac").frames == 64000
    with pytest.raises(BadAudio, match="cannot be read"):
        probe(tmp_path / "cut.flac")


def test_a_channel_can_be_chosen(tmp_path):
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (8000, 2))
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", samples, 16000)
    for name, tolerance in (("a.wav", 0), ("b.wav", 1e-4)):
        for channel in (0, 1):
            found = read_audio(tmp_path / name, channel=channel).numpy()
            expected = samples[:, channel].astype(np.float32)
            np.testing.assert_allclose(found, expected, atol=tolerance)
    for read in (probe, read_audio):
        with pytest.raises(BadAudio, match="2 channels, .* no channel 2"):
            read(tmp_path / "a.wav", channel=2)


def test_memory_does_not_grow_with_channels(tmp_path, monkeypatch):
    """Blocks are mixed down one by one, and give the same samples."""
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (5000, 5))
    sizes, read = [], soundfile.SoundFile.read

    def spy(self, frames, *arguments):
        sizes.append(frames)
        return read(self, frames, *arguments)

    monkeypatch.setattr(soundfile.SoundFile, "read", spy)
    for name in ("a.wav", "a.ogg", "a.flac"):
        soundfile.write(tmp_path / name, samples, 22050)
        with monkeypatch.context() as patch:
            whole = read_audio(tmp_path / name, 0.01)
            patch.setattr(audio, "BLOCK", 2000)
            sizes.clear()
            assert torch.equal(read_audio(tmp_path / name, 0.01), whole)
            assert len(sizes) > 10 and max(sizes) == 400
    # 5 s of 64 channels at 192 kHz are 246 MB.
    assert audio.BLOCK * 4 < 10e6


def test_silence_is_a_level(tmp_path):
    """Antiphase averages to half a step of 16 bits, which is no sound."""
    noise = np.random.default_rng(0).integers(-9999, 9999, 16000, np.int16)
    soundfile.write(tmp_path / "a.wav", np.c_[noise, 1 - noise], 16000)
    assert 0 < read_audio(tmp_path / "a.wav").abs().max() < 1.6e-5
    said = "silent as the mean of its channels, .* name one by --channel"
    with pytest.raises(BadAudio, match=said):
        read_crops(tmp_path / "a.wav", 0.0, 1.0, 0.3, 2)
    with pytest.raises(BadAudio, match=said):
        audio.read_beginning(tmp_path / "a.wav", 0.0, 1.0, 0.5)
    assert read_crops(tmp_path / "a.wav", 0.0, 1.0, 0.3, channel=1).any()
    # One channel that is silent by itself, beside one that is not; and both.
    for first, channel in ((noise, 1), (0 * noise, None)):
        soundfile.write(tmp_path / "c.wav", np.c_[first, 0 * noise], 16000)
        for read in (read_crops, audio.read_beginning):
            with pytest.raises(BadAudio, match="silent: no .* -80 dB"):
                read(tmp_path / "c.wav", 0.0, 1.0, 0.5, channel=channel)
    # A crop of dither gives way to sound, as one of zeros does.
    quiet = np.r_[np.full(60000, 1e-5), noise[:2000] / 32768]
    soundfile.write(tmp_path / "b.wav", quiet, 16000, subtype="FLOAT")
    crops = read_crops(tmp_path / "b.wav", 0.0, 62000 / 16000, 0.2, 4)
    assert (crops.abs().amax(dim=1) > 0.1).all()


def test_notes_of_libmpg123_are_not_shown(tmp_path, capfd):
    noise = np.random.default_rng(0).normal(0, 0.1, 160000)
    soundfile.write(tmp_path / "a.mp3", noise, 16000)
    content = bytearray((tmp_path / "a.mp3").read_bytes())
    for place in np.random.default_rng(1).integers(2000, len(content), 300):
        content[place] ^= 0x55
    (tmp_path / "a.mp3").write_bytes(content)
    with soundfile.SoundFile(tmp_path / "a.mp3") as damaged:
        damaged.read()
    assert "error: " in capfd.readouterr().err  # else there is none to hide
    with audio.open_audio(tmp_path / "a.mp3") as damaged:
        damaged.read()
        os.write(2, b"ours\nWarnings too\n")
    assert capfd.readouterr().err == "ours\nWarnings too\n"


def test_reading_past_the_end_is_bad_audio(noise):
    with pytest.raises(BadAudio, match="from 5.00 s on, but ends at 2.00 s"):
        read_audio(noise[0], start=5.0, seconds=1.0)


# Members of shards


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_member_is_like_a_file(tmp_path_factory, data):
    before, content, after = (
        data.draw(st.binary(max_size=50)) for _ in range(3)
    )
    path = tmp_path_factory.getbasetemp() / "member.bin"
    path.write_bytes(before + content + after)
    plain = io.BytesIO(content)
    with Member(path, len(before), len(content)) as member:
        assert member.readable() and member.seekable()
        assert not member.writable()
        for _ in range(data.draw(st.integers(1, 8))):
            if data.draw(st.booleans()):
                n = data.draw(st.integers(-1, 60))
                assert member.read(n) == plain.read(n)
            else:
                whence = data.draw(st.sampled_from([0, 1, 2]))
                base = (0, plain.tell(), len(content))[whence]
                offset = data.draw(st.integers(-base - 5, 60))
                if base + offset < 0:
                    with pytest.raises(ValueError, match="before the start"):
                        member.seek(offset, whence)
                else:
                    found = member.seek(offset, whence)
                    assert found == plain.seek(offset, whence)
            assert member.tell() == plain.tell()
    assert member.closed


def test_member_closes_its_file_and_says_what_is_missing(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        member = Member(tmp_path / "x", 1, 2)
        member.close()
        member.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="closed"):
        member.read()
    with pytest.raises(FileNotFoundError):
        Member(tmp_path / "y", 0, 1)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_audio_within_a_file_is_as_in_its_own(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    samples = np.random.default_rng(0).uniform(-0.9, 0.9, 20000)
    soundfile.write(path, samples, 16000)
    content = path.read_bytes()
    (tmp_path / "shard").write_bytes(b"x" * 700 + content + b"y" * 900)
    place = 700, len(content)
    for span in ((0.0, None), (0.3, 0.5), (1.0, 9.0)):
        expected = read_audio(path, *span)
        found = read_audio(tmp_path / "shard", *span, place=place)
        assert torch.equal(found, expected)


def test_a_name_that_is_not_utf8_is_named_as_such(tmp_path):
    path = os.fsencode(tmp_path / "a") + b"\xff.wav"
    with open(path, "wb") as out:
        soundfile.write(out, np.zeros(160), 16000, format="WAV")
    with pytest.raises(BadAudio, match="name is not UTF-8"):
        audio.probe(os.fsdecode(path))


def test_too_little_memory_blames_no_file(tmp_path, monkeypatch):
    """torch's error is a RuntimeError: good files would be left out."""
    soundfile.write(tmp_path / "a.wav", np.ones(8000) / 2, 8000)

    def resample(*given):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(audio.torchaudio.functional, "resample", resample)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        read_audio(tmp_path / "a.wav", sample_rate=16000)
