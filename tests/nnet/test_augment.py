"""Augmentation against measurements of what comes out."""

import copy
import math
import pickle

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from devices import DEVICES
from pretended_device import DEVICE, nothing_waits, present

from lgl_plugin.dataio.audio import BadAudio
from lgl_plugin.nnet import noise
from lgl_plugin.nnet.augment import Augmenter, audio_files
from lgl_plugin.nnet.noise import (
    SNR,
    TALKERS,
    NoiseBank,
    babble,
    blanked,
    coloured_noise,
    mean_square,
)
from lgl_plugin.nnet.rooms import draw_channels, draw_rooms, impulse_responses

RATE = 16000


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(5)


@pytest.fixture
def musan(tmp_path):
    """A MUSAN of one second per kind, recognisable by its level."""
    for kind in SNR:
        (tmp_path / "musan" / kind / "sub").mkdir(parents=True)
        samples = np.random.default_rng(len(kind)).normal(0, 0.1, RATE)
        path = tmp_path / "musan" / kind / "sub" / "a.wav"
        soundfile.write(path, samples, RATE)
    return tmp_path / "musan"


@pytest.fixture
def rirs(tmp_path):
    """Two impulse responses, each an echo; one with a delay before it."""
    (tmp_path / "rirs" / "real").mkdir(parents=True)
    for delay, gain, echo in ((0, 0.5, 100), (37, 0.9, 700)):
        room = np.zeros(RATE)
        room[delay], room[delay + echo] = gain, -gain / 2
        path = tmp_path / "rirs" / "real" / f"{delay}.wav"
        soundfile.write(path, room, RATE, subtype="FLOAT")
    return tmp_path / "rirs"


def wavs(rows=6, samples=4000):
    """Waveforms of different loudness."""
    return torch.randn(rows, samples) * torch.logspace(-3, 0, rows)[:, None]


def noise_of(augment, clean, draw):
    """The noise that the next forward would mix in, zeros where none."""
    state = torch.get_rng_state()
    noise = torch.zeros_like(clean)
    for rows, drawn in augment._noises(clean, draw):
        noise[rows] = drawn
    torch.set_rng_state(state)
    return noise


def kinds_of(draw):
    """The kind of noise of each row, -1 for none."""
    kinds = torch.full(draw.snr.shape, -1)
    for index, rows in enumerate(draw.noisy):
        kinds[rows] = index
    assert (kinds >= 0).sum() == sum(map(len, draw.noisy))
    return kinds


def decibels(ratio):
    return 10 * np.log10(np.asarray(ratio, np.float64))


# Signal-to-noise ratios and loudness


@pytest.mark.parametrize("folder", [None, "musan"])
def test_measured_snr_is_the_drawn_one(folder, musan):
    """What is left of the output without the speech is the noise."""
    augment = Augmenter(
        reverb_only=0.0,
        noise_only=1.0,
        musan_folder=musan if folder else None,
    )
    clean = wavs(64, RATE)
    draw = augment.draw(*clean.shape)
    assert (kinds_of(draw) >= 0).all()
    # The noise again, by the same random numbers. The output must be a sum of
    # speech and noise; how much of each follows by least squares.
    noise = noise_of(augment, clean, draw)
    out = augment(clean, draw)
    basis = torch.stack([clean, noise], dim=2).double()
    parts = torch.linalg.lstsq(basis, out.double()[:, :, None])
    rebuilt = (basis @ parts.solution)[:, :, 0]
    np.testing.assert_allclose(rebuilt, out, atol=1e-4)
    speech, added = (basis * parts.solution.transpose(1, 2)).unbind(2)
    np.testing.assert_allclose(rebuilt - speech, added, atol=1e-9)
    measured = decibels(mean_square(speech) / mean_square(added))[:, 0]
    np.testing.assert_allclose(measured, draw.snr, atol=0.05)


def test_snr_lies_in_the_range_of_its_kind(musan):
    augment = Augmenter(musan_folder=musan)
    draw = augment.draw(3000, 100)
    for index, kind in enumerate(augment.kinds):
        if kind == "speech":  # of several talkers: see below
            continue
        low, high = SNR[kind]
        snr = draw.snr[draw.noisy[index]]
        assert low <= snr.min() < low + 0.3
        assert high - 0.3 < snr.max() <= high


@pytest.mark.parametrize("folder", [None, "musan"])
def test_each_talker_of_babble_has_the_release_s_ratio(folder, musan):
    """Measured in the output: 9 dB in sum, where one talker has 16.5.

    By the release 3 to 8 talkers are added, each at 13 to 20 dB.
    """
    augment = Augmenter(
        reverb_only=0.0,
        noise_only=1.0,
        musan_folder=musan if folder else None,
    )
    clean, measured = wavs(100, 4000), []
    for _ in range(20):
        draw = augment.draw(*clean.shape)
        noise = noise_of(augment, clean, draw)
        out = augment(clean, draw)
        basis = torch.stack([clean, noise], dim=2).double()
        parts = torch.linalg.lstsq(basis, out.double()[:, :, None]).solution
        speech, added = (basis * parts.transpose(1, 2)).unbind(2)
        ratio = decibels(mean_square(speech) / mean_square(added))[:, 0]
        babble = kinds_of(draw) == augment.kinds.index("speech")
        assert draw.talkers[babble].min() >= 3
        assert (draw.talkers[~babble] == 1).all()
        measured.extend(ratio[babble])
    rng = np.random.default_rng(0)
    expected = []
    for _ in range(20000):
        each = rng.uniform(13, 20, size=rng.integers(3, 9))
        expected.append(-decibels(np.sum(10 ** (-each / 10))))
    assert 8.5 < np.mean(expected) < 9.5
    assert np.mean(measured) == pytest.approx(np.mean(expected), abs=0.4)
    for share in (0.1, 0.5, 0.9):
        measure, expect = (np.quantile(x, share) for x in (measured, expected))
        assert measure == pytest.approx(expect, abs=0.7)


@pytest.mark.parametrize("channel", [0.0, 0.5])
@pytest.mark.parametrize("folders", [False, True])
def test_the_batch_is_augmented_as_each_waveform_alone(
    folders, channel, musan, rirs
):
    """One waveform at a time, in float64, by the definitions."""
    augment = Augmenter(
        musan_folder=musan if folders else None,
        rir_folder=rirs if folders else None,
        channel=channel,
    )
    clean = wavs(24)
    draw = augment.draw(*clean.shape)
    noise = noise_of(augment, clean, draw).double().numpy()
    out = augment(clean, draw).double().numpy()
    responses = dict(zip(draw.filtered.tolist(), draw.response))
    kinds = kinds_of(draw)
    assert len(responses) == len(draw.filtered) < 24
    for row, x in enumerate(clean.double().numpy()):
        y = x
        if row in responses:
            response = responses[row].to(torch.complex128).numpy()
            y = np.fft.rfft(x, draw.n_fft) * response
            y = np.fft.irfft(y, draw.n_fft)[: len(x)]
        if kinds[row] >= 0:
            ratio = 10 ** (draw.snr[row].item() / 10)
            power = np.mean(y**2) / np.mean(noise[row] ** 2) / ratio
            y = y + np.sqrt(power) * noise[row]
        y = y * np.sqrt(np.mean(x**2) / np.mean(y**2))
        scale = np.sqrt(np.mean(x**2))
        np.testing.assert_allclose(out[row], y, atol=1e-5 * scale)


def test_each_row_is_as_loud_as_it_came():
    clean = wavs(32)
    out = Augmenter(channel=0.5)(clean)
    np.testing.assert_allclose(mean_square(out), mean_square(clean), rtol=1e-3)


def test_silence_stays_finite_and_silent():
    out = Augmenter(channel=0.5)(torch.zeros(16, 4000))
    assert out.isfinite().all()
    assert out.abs().max() < 1e-3


# What is drawn


@pytest.mark.parametrize(
    "options, neither, room, noise, both",
    [
        # The paper's release: in Stage I, and in Stage II, where room and
        # noise are drawn independently.
        ({}, 0.0, 0.25, 0.25, 0.5),
        ({"clean": 0.25}, 0.25, 0.25, 0.25, 0.25),
        ({"clean": 1.0, "reverb_only": 0, "noise_only": 0}, 1.0, 0, 0, 0),
        ({"clean": 0.2, "reverb_only": 0.1}, 0.2, 0.1, 0.25, 0.45),
    ],
)
def test_shares_of_reverberation_and_noise(options, neither, room, noise, both):
    """Counted over 10,000 draws; a share is 4 deviations off at most."""
    n = 10_000
    draw = Augmenter(**options).draw(n, 10)
    noisy = kinds_of(draw) >= 0
    dry = torch.ones(n, dtype=torch.bool)
    dry[draw.filtered] = False
    for rows, share in (
        (~noisy & dry, neither),
        (~noisy & ~dry, room),
        (noisy & dry, noise),
        (noisy & ~dry, both),
    ):
        bound = 4 * math.sqrt(n * share * (1 - share))
        assert abs(int(rows.sum()) - n * share) <= bound


def test_a_band_and_a_stretch_are_dropped_from_the_share_asked_for():
    augment = Augmenter(clean=1, reverb_only=0, noise_only=0, drop=0.3)
    n = 10_000
    dropped = len(augment.draw(n, 10).dropped)
    assert abs(dropped - 0.3 * n) <= 4 * math.sqrt(n * 0.3 * 0.7)
    clean = torch.randn(60, RATE)
    draw = augment.draw(*clean.shape)
    out = augment(clean, draw)
    rows = torch.zeros(60, dtype=torch.bool)
    rows[draw.dropped] = True
    torch.testing.assert_close(out[~rows], clean[~rows])
    assert ((out != clean).float().mean(1)[rows] > 0.9).all()
    np.testing.assert_allclose(mean_square(out), mean_square(clean), rtol=1e-3)


def test_a_dropped_stretch_has_up_to_90_ms(monkeypatch):
    monkeypatch.setattr(noise, "BLANKED_BAND", 0.0)
    clean = torch.randn(200, RATE)
    out = blanked(clean, RATE)
    lost = [np.flatnonzero(wav == 0) for wav in out.numpy()]
    assert all((np.diff(places) == 1).all() for places in lost)
    lengths = [len(places) for places in lost]
    assert max(lengths) <= 0.09 * RATE + 1
    assert np.mean(lengths) == pytest.approx(0.045 * RATE, rel=0.15)
    assert min(p.min() for p in lost if len(p)) < 0.05 * RATE
    assert max(p.max() for p in lost if len(p)) > 0.95 * RATE
    kept = out != 0
    torch.testing.assert_close(out[kept], clean[kept], atol=1e-5, rtol=0)


def test_a_dropped_band_has_up_to_5_of_80_mel_bands(monkeypatch):
    """In white noise it is a hole of the spectrum."""
    monkeypatch.setattr(noise, "BLANKED_SECONDS", 0.0)
    spectrum = torch.fft.rfft(blanked(torch.randn(200, RATE), RATE)).abs()
    widths, ends = [], []
    for row in spectrum.numpy():
        hole = np.flatnonzero(row < 1e-2)  # elsewhere about 100
        if len(hole) < 2:
            continue
        assert (np.diff(hole) == 1).all()
        low, high = 2595 * np.log10(1 + hole[[0, -1]] / 700)
        widths.append((high - low) / (2595 * np.log10(1 + 8000 / 700)))
        ends.extend(hole[[0, -1]])
    assert max(widths) <= 5 / 80
    assert np.mean(widths) == pytest.approx(2.5 / 80, rel=0.15)
    assert min(ends) < 100 and max(ends) > 7500


def test_a_clean_waveform_comes_out_as_it_came():
    clean = wavs()
    augment = Augmenter(clean=1.0, reverb_only=0.0, noise_only=0.0)
    torch.testing.assert_close(augment(clean), clean)


def test_shares_of_rooms_and_channels():
    """A channel falls on wet and dry alike; the rest is left untouched."""
    augment = Augmenter(channel=0.4, noise_only=1.0, reverb_only=0.0)
    draw = augment.draw(3000, 10)
    assert len(draw.filtered) / 3000 == pytest.approx(0.4, abs=0.03)
    draw = Augmenter(channel=0.4).draw(3000, 10)
    changed = (draw.response[:, 0].imag == 0) & (draw.response.real >= 0).all(1)
    assert draw.filtered.unique().numel() == len(draw.filtered)
    assert len(draw.filtered) / 3000 == pytest.approx(0.85, abs=0.03)
    only = changed & (draw.response.imag == 0).all(1)
    assert only.sum() / 3000 == pytest.approx(0.4 * 0.25, abs=0.02)


def test_every_row_has_its_own_augmentation():
    one = torch.randn(1, 4000).expand(12, -1)
    out = Augmenter(channel=1.0)(one)
    correlation = np.corrcoef(out.numpy())
    assert (correlation - np.eye(12)).max() < 0.9999


def test_a_draw_gives_two_crops_the_same_room_and_channel():
    """Without noise the output is the drawn linear filter of the input."""
    augment = Augmenter(reverb_only=1.0, noise_only=0.0, channel=1.0)
    draw = augment.draw(5, 4000)
    first, second = torch.randn(2, 5, 4000)
    state = torch.get_rng_state()
    a, b = augment(first, draw), augment(second, draw)
    assert torch.equal(torch.get_rng_state(), state)  # nothing more is drawn
    response = torch.fft.irfft(draw.response, draw.n_fft).double().numpy()
    for crop, out in ((first, a), (second, b)):
        for x, h, y in zip(crop.double().numpy(), response, out.numpy()):
            wet = np.fft.irfft(
                np.fft.rfft(x, draw.n_fft) * np.fft.rfft(h), draw.n_fft
            )[:4000]
            wet *= np.sqrt(np.mean(x**2) / np.mean(wet**2))
            np.testing.assert_allclose(y, wet, atol=1e-4)
    other = augment(first, augment.draw(5, 4000))
    assert not torch.allclose(a, other, atol=1e-2)


def test_same_seed_same_augmentation(musan, rirs):
    clean = wavs()
    augment = Augmenter(musan_folder=musan, rir_folder=rirs, channel=0.5)
    outs = []
    for number in (1, 1, 2):
        torch.manual_seed(number)
        outs.append(augment(clean))
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


def test_float32_under_autocast():
    clean = wavs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        out = Augmenter()(clean)
    torch.manual_seed(1)
    assert out.dtype == torch.float32
    assert torch.equal(out, Augmenter()(clean))


# Rooms and channels


def test_a_bank_of_nothing_is_refused():
    with pytest.raises(ValueError, match="bank_seconds must be above 0"):
        Augmenter(bank_seconds=0)


def test_a_folder_of_noise_has_no_rooms(tmp_path):
    folder = tmp_path / "pointsource_noises"
    folder.mkdir()
    soundfile.write(folder / "1.wav", np.ones(9) / 9, RATE)
    with pytest.raises(FileNotFoundError, match="recordings of noise alone"):
        Augmenter(rir_folder=folder)


def test_rooms_are_convolutions(rirs):
    augment = Augmenter(rir_folder=rirs, reverb_only=1.0, noise_only=0.0)
    rooms = augment.rooms.double().numpy()
    assert rooms.shape == (2, RATE // 2)
    clean = torch.randn(8, 3000)
    found = set()
    for x, y in zip(clean.double().numpy(), augment(clean).numpy()):
        errors = []
        for room in rooms:
            wet = scipy.signal.fftconvolve(x, room)[:3000]
            wet *= np.sqrt(np.mean(x**2) / np.mean(wet**2))
            errors.append(np.abs(y - wet).max())
        assert min(errors) < 1e-4
        found.add(int(np.argmin(errors)))
    assert found == {0, 1}


def test_impulse_responses_start_at_their_peak(rirs):
    rooms = impulse_responses((*sorted(rirs.rglob("*.wav")),), RATE)
    assert rooms.dtype == torch.float16
    for room, echo in zip(rooms, (100, 700)):
        assert room.nonzero()[:, 0].tolist() == [0, echo]
        assert room[[0, echo]].tolist() == [1.0, -0.5]


def test_recordings_are_no_rooms(rirs, tmp_path):
    """Also where a few impulse responses lie among them."""
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{n}.wav" for n in range(3)]
    for path in paths:
        soundfile.write(path, 0.1 * rng.normal(size=3 * RATE), RATE)
    rooms = sorted(rirs.rglob("*.wav"))
    with pytest.raises(ValueError, match="rir_folder: most of 5 files, such"):
        impulse_responses((*rooms, *paths), RATE)
    assert len(impulse_responses((*rooms, paths[0]), RATE)) == 3


def test_of_several_microphones_the_first_is_a_room(tmp_path):
    """Their mean would have an echo for each."""
    response = np.zeros((800, 2), np.float32)
    response[0, 0] = response[100, 1] = 0.5
    path = tmp_path / "array.wav"
    soundfile.write(path, response, RATE)
    assert impulse_responses((path,), RATE)[0].nonzero()[:, 0].tolist() == [0]


def test_folders_are_read_once_for_all_augmenters(rirs, tmp_path, monkeypatch):
    """`lgl train` makes several, and a folder may be on a slow disk."""
    for kind in ("noise", "speech", "music"):
        (tmp_path / "musan" / kind).mkdir(parents=True)
        noise = np.random.default_rng(0).uniform(-0.1, 0.1, RATE)
        soundfile.write(tmp_path / "musan" / kind / "a.wav", noise, RATE)
    folders = str(tmp_path / "musan"), str(rirs)
    first = Augmenter(RATE, *folders)
    for module in ("noise", "rooms"):
        monkeypatch.setattr(f"lgl_plugin.nnet.{module}.read_audio", pytest.fail)
    second = Augmenter(RATE, *folders)
    assert torch.equal(first.rooms, second.rooms)
    for kind, bank in first.banks.items():
        assert torch.equal(bank.samples, second.banks[kind].samples)


def test_of_many_responses_an_even_selection_is_kept(rirs, monkeypatch):
    monkeypatch.setattr("lgl_plugin.nnet.rooms.MOST", 4)
    (path, _) = sorted(rirs.rglob("*.wav"))
    assert len(impulse_responses((path,) * 10, RATE)) == 4


def test_simulated_rooms_have_the_stated_direct_to_reverberant_ratio():
    rooms = draw_rooms(500, RATE).double()
    assert (rooms[:, 0] == 1).all()
    assert not rooms[:, 1:32].any()
    ratio = decibels(1 / rooms[:, 1:].square().sum(1))
    assert -3 <= ratio.min() < -2 and 14 < ratio.max() <= 15


def test_simulated_rooms_fade_exponentially():
    """Energy on a decibel scale falls linearly, by 60 dB in 0.1 to 0.8 s."""
    rooms = draw_rooms(300, RATE)
    energy = rooms[:, 32 : 32 + 1600].unflatten(1, (20, 80)).square().mean(2)
    time = np.arange(20) * 80 / RATE
    slopes = np.polyfit(time, decibels(energy).T, 1)[0]
    reverberation = -60 / slopes
    assert 0.08 < reverberation.min() < 0.15
    assert 0.65 < np.quantile(reverberation, 0.95) < 1.1


def test_one_channel_in_three_is_a_telephone_band():
    gains = decibels(draw_channels(3000, 801, RATE).square())
    hertz = np.linspace(0, 8000, 801)
    inside = gains[:, (hertz > 500) & (hertz < 2500)].mean(1)
    low = gains[:, hertz < 100].mean(1)
    high = gains[:, hertz > 6000].mean(1)
    # Either side is an octave or almost one outside, at 40 dB an octave.
    narrow = (inside - low > 25) & (inside - high > 15)
    assert narrow.mean() == pytest.approx(1 / 3, abs=0.05)
    wide = gains[~narrow]
    assert wide.max() < 8 + 4 * 4 + 0.1 and wide.min() > -8 - 4 * 4 - 0.1


# Noise


def test_coloured_noise_has_the_slope_asked_for():
    slopes = torch.tensor([-9.0, -6.0, -3.0, 0.0, 3.0])
    noise = coloured_noise(slopes, 65536).double().numpy()
    hertz, power = scipy.signal.periodogram(noise, RATE)
    band = (hertz > 50) & (hertz < 7500)
    octave = np.log2(hertz[band])
    fitted = np.polyfit(octave, decibels(power[:, band]).T, 1)[0]
    np.testing.assert_allclose(fitted, slopes, atol=0.2)
    np.testing.assert_allclose((noise**2).mean(1), 1, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 3, 6, 20])
def test_babble_is_of_others_and_of_a_talkers_number(batch):
    """Orthogonal waveforms: the babble's coordinates name its talkers."""
    voices = torch.eye(batch, 32) * torch.rand(batch, 1).clamp(min=0.1)
    low, high = TALKERS
    for _ in range(50):
        rows = torch.randperm(batch)[: max(1, batch // 2)]
        number = torch.randint(low, high + 1, (len(rows),))
        sums = babble(voices, rows, number)
        talkers = sums[:, :batch] / np.sqrt(32)  # of equal loudness
        assert not talkers[torch.arange(len(rows)), rows].any()
        np.testing.assert_allclose(talkers, talkers.round(), atol=1e-5)
        assert talkers.max() <= 1.001
        assert torch.equal(
            talkers.round().sum(1).long(), number.clamp(max=batch - 1)
        )


def test_bank_is_no_larger_than_stated(tmp_path):
    files = []
    for number in range(5):
        files.append(tmp_path / f"{number}.wav")
        soundfile.write(files[-1], np.random.randn(RATE) / 9, RATE)
    bank = NoiseBank(files, RATE, max_seconds=2.5)
    assert bank.samples.dtype == torch.int16
    assert len(bank.samples) == 2.5 * RATE
    assert len(NoiseBank(files, RATE, 100.0).samples) == 5 * RATE


def test_bank_gives_stretches_of_its_recordings_at_one_loudness(tmp_path):
    rng = np.random.default_rng(0)
    files = [tmp_path / "soft.wav", tmp_path / "loud.wav"]
    for path, level in zip(files, (0.001, 0.3)):
        soundfile.write(path, rng.normal(0, level, RATE), RATE, "FLOAT")
    bank = NoiseBank(files, RATE, 100.0)
    halves = bank.samples.double().view(2, RATE).square().mean(1).sqrt()
    np.testing.assert_allclose(halves / 32767, 0.05, rtol=0.01)
    doubled = torch.cat([bank.samples, bank.samples]).numpy() / 32767
    for row in bank(torch.rand(8), torch.ones(8).long(), 8, 500).numpy():
        starts = np.flatnonzero(np.isclose(doubled, row[0], atol=1e-7))
        assert any(
            np.allclose(doubled[s : s + 500], row, atol=1e-6)
            for s in starts
            if s + 500 <= len(doubled)
        )


def test_bank_leaves_out_bad_recordings(tmp_path, caplog):
    good, bad = tmp_path / "good.wav", tmp_path / "bad.wav"
    soundfile.write(good, np.random.randn(RATE) / 9, RATE)
    bad.write_bytes(b"")
    assert len(NoiseBank([bad, good], RATE, 9.0).samples) == RATE
    (message,) = caplog.messages
    assert message.startswith("1 noise recordings are left out; the first: ")
    with pytest.raises(BadAudio, match="no noise recording can be read"):
        NoiseBank([bad], RATE, 9.0)


def test_bank_speech_is_babble(musan):
    """The power of a sum of independent talkers counts them."""
    bank = Augmenter(musan_folder=musan).banks["speech"]
    count = torch.arange(400) % 6 + 3
    total = int(count.sum())
    power = bank(torch.rand(400), count, total, 2000).square().mean(1) / 0.05**2
    assert power.mean() == pytest.approx(np.mean(TALKERS), rel=0.1)
    assert np.corrcoef(power, count)[0, 1] > 0.9


# No waiting for the device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("folders", [False, True])
def test_nothing_waits_for_the_device(folders, device, musan, rirs):
    augment = Augmenter(
        musan_folder=musan if folders else None,
        rir_folder=rirs if folders else None,
        channel=0.5,
    )
    with present(device):
        augment.to(device)
        clean = wavs(32).to(device)
        augment(clean)  # plans and libraries may be loaded at first
        with nothing_waits(device) as copies:
            out = augment(clean)
        out, clean = out.cpu(), clean.cpu()
    assert len(copies) <= 1, copies
    assert out.isfinite().all()
    torch.testing.assert_close(mean_square(out), mean_square(clean))


def test_a_gpu_needs_few_plans_for_its_transforms(monkeypatch):
    """One for each shape; the results are those of the rows alone."""
    shapes, outs = {}, {}
    augment = Augmenter(sample_rate=1600, channel=0.3)

    def spied(transform):
        def call(rows, n_fft):
            seen.add((transform, len(rows), n_fft))
            return transform(rows, n_fft)

        return call

    for name in ("rfft", "irfft"):
        monkeypatch.setattr(torch.fft, name, spied(getattr(torch.fft, name)))
    for device in ("cpu", DEVICE):
        seen = shapes[device] = set()
        torch.manual_seed(0)
        with present(device):
            augment.to(device)
            clean = torch.randn(128, 800).to(device)
            outs[device] = [augment(clean).cpu() for _ in range(24)]
    torch.testing.assert_close(outs["cpu"], outs[DEVICE])
    assert len({n_fft for *_, n_fft in shapes[DEVICE]}) == 2
    assert len(shapes[DEVICE]) <= 12 and len(shapes["cpu"]) > 40


# Folders


@pytest.mark.parametrize("key", ["musan_folder", "rir_folder"])
def test_missing_and_empty_folders_name_the_key(key, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{key}: there is no folder"):
        Augmenter(**{key: tmp_path / "nowhere"})
    for kind in SNR:
        (tmp_path / kind).mkdir()
    with pytest.raises(FileNotFoundError, match=f"{key}: no .flac, .mp3, .ogg"):
        Augmenter(**{key: tmp_path})


def test_noise_may_have_every_format_that_speech_may_have(tmp_path):
    names = ["a/1.flac", "a/2.wav", "b.mp3", "c.OGG"]
    for name in (*names, "._c.wav", "__MACOSX/d.wav", "e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        kind = name.rpartition(".")[2].upper().replace("TXT", "WAV")
        soundfile.write(tmp_path / name, [0.1] * 16000, 16000, format=kind)
    found = audio_files(tmp_path, "musan_folder")
    assert found == [tmp_path / name for name in names]
    assert len(NoiseBank(found, 16000, 60.0).samples) >= 4 * 15000


def test_moves_to_another_device_and_leaves_no_state(musan, rirs):
    """Banks and rooms follow `to`, and stay out of checkpoints."""
    augment = Augmenter(musan_folder=musan, rir_folder=rirs)
    assert augment.state_dict() == {}
    names = {name for name, _ in augment.named_buffers()}
    assert "rooms" in names and "banks.music.samples" in names
    assert {b.device.type for b in augment.to("meta").buffers()} == {"meta"}


@pytest.mark.parametrize(
    "wrong",
    [{"reverb_only": -0.1}, {"reverb_only": 0.6, "noise_only": 0.5}]
    + [{"clean": 0.6}, {"clean": -0.1}]
    + [
        {name: value}
        for name in ("channel", "drop")
        for value in (-0.1, 1.1, math.nan)
    ],
)
def test_probabilities_are_checked(wrong):
    with pytest.raises(ValueError, match="are probabilities"):
        Augmenter(**wrong)
    Augmenter(reverb_only=1.0, noise_only=0.0, channel=1.0)


def test_an_augmenter_can_be_copied(musan):
    augment = Augmenter(RATE, musan, channel=0.5)
    wavs = torch.randn(3, 4000)
    found = []
    for same in (augment, copy.deepcopy(augment)):
        torch.manual_seed(0)
        found.append(pickle.loads(pickle.dumps(same))(wavs))
    assert torch.equal(*found)
