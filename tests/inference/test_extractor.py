"""Extraction of whole utterances."""

import copy
import dataclasses
import datetime
import os
import pickle
import shutil
import signal
import time

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, strategies as st
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization

from lgl_plugin.dataio.audio import BadAudio, read_beginning
from lgl_plugin.dataio.bad_files import BadFiles
from lgl_plugin.dataio.manifest import Manifest, Strings
from lgl_plugin.inference import extractor
from lgl_plugin.inference.extractor import Extractor
from lgl_plugin.inference.store import Embeddings
from lgl_plugin.nnet.encoders import Encoder, LogMelStatistics
from lgl_plugin.utils.signals import stop

RATE = 16000


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Coloured noises of several lengths and colours, as a manifest."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    rows = []
    for number, seconds in enumerate([1.0, 2.5, 1.7, 1.3, 3.0, 1.0]):
        samples = rng.normal(0, 0.1, round(seconds * RATE))
        width = 1 + 3 * number
        samples = np.convolve(samples, np.ones(width) / width, "same")
        samples *= 1 + np.sin(np.arange(len(samples)) / (300 + 200 * number))
        path = folder / f"{number}.wav"
        soundfile.write(path, samples, RATE)
        rows.append((f"{number}.wav", str(path), 0.0, seconds, ""))
    return Manifest.of(rows)


def make_encoder():
    """SpeechBrain's features and ECAPA-TDNN, narrow, past its first steps."""
    torch.manual_seed(0)
    network = ECAPA_TDNN(
        80,
        channels=[32, 32, 32, 32, 96],
        attention_channels=16,
        lin_neurons=24,
    )
    norm = InputNormalization(norm_type="sentence", std_norm=False)
    encoder = Encoder(Fbank(n_mels=80), network, norm)
    with torch.no_grad():  # for running statistics unlike the initial ones
        for _ in range(20):
            encoder(torch.randn(8, RATE) / 9)
    return encoder.eval()


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


def statistics():
    """An encoder without weights, of any length of audio."""
    return Encoder(Fbank(n_mels=80), LogMelStatistics())


def cosine(a, b):
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / lengths


def with_bad(speech, folder):
    """A manifest with two utterances in front that cannot be embedded."""
    soundfile.write(folder / "silent.wav", np.zeros(RATE), RATE)
    soundfile.write(folder / "short.wav", np.full(639, 0.1), RATE)
    rows = [
        ("missing", str(folder / "no.wav"), 0.0, 1.0, ""),
        ("silent", str(folder / "silent.wav"), 0.0, 1.0, ""),
        ("short", str(folder / "short.wav"), 0.0, 639 / RATE, ""),
    ]
    for row, name in enumerate(speech.ids):
        item = speech[row]
        rows.append((name, item["wav"], 0.0, item["duration"], ""))
    return Manifest.of(rows)


def lone(speech, encoder):
    """What SpeechBrain gives for each utterance by itself."""
    found = []
    for path in speech.wavs:
        wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        one = torch.ones(1)
        with torch.no_grad():
            features = encoder.normalise(encoder.features(wav[None]), one)
            found.append(encoder.network(features, one)[0, 0])
    return torch.stack(found).numpy()


@pytest.mark.parametrize("batch_seconds", [0.1, 5.0, 100.0])
def test_embeddings_are_those_of_lone_utterances(
    speech, encoder, batch_seconds
):
    extract = Extractor(encoder, batch_seconds=batch_seconds)
    found, bad = extract(speech, np.arange(6))
    assert bad == [] and found.utterances == speech.ids
    expected = lone(speech, encoder)
    assert found.vectors.dtype == np.float32
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
    assert cosine(found.vectors, expected).min() > 1 - 1e-9
    # The test would see utterances that are mixed up.
    assert cosine(found.vectors, expected[::-1]).max() < 0.995


def test_rows_are_embedded_in_their_order(speech, encoder):
    found, _ = Extractor(encoder)(speech, [4, 0, 2])
    assert list(found.utterances) == ["4.wav", "0.wav", "2.wav"]
    expected = lone(speech, encoder)[[4, 0, 2]]
    np.testing.assert_allclose(found.vectors, expected, atol=1e-5)


def test_workers_agree_with_the_main_process(speech, encoder):
    alone, _ = Extractor(encoder)(speech, np.arange(6))
    together, _ = Extractor(encoder, num_workers=1)(speech, np.arange(6))
    np.testing.assert_array_equal(alone.vectors, together.vectors)


def test_what_spawned_workers_get_can_be_pickled(speech):
    whole = extractor._Waveforms(
        *(speech, np.arange(6), speech.durations),
        *(np.arange(6), np.array([2, 6]), RATE, 1),
    )
    copied = pickle.loads(pickle.dumps(whole))
    for batch in (0, 1):
        rows, wavs, n_samples, bad = whole[batch]
        again = copied[batch]
        assert rows.tolist() == again[0].tolist() and bad == again[3] == []
        assert torch.equal(wavs, again[1])
        assert torch.equal(n_samples, again[2])


def test_the_encoder_is_in_evaluation_mode_without_graph(speech, encoder):
    encoder.train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    Extractor(encoder)(speech, np.arange(6))
    assert not encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


def test_bf16_embeddings_are_close(speech, encoder):
    expected, _ = Extractor(encoder)(speech, np.arange(6))
    found, _ = Extractor(encoder, precision="bf16")(speech, np.arange(6))
    assert found.vectors.dtype == np.float32
    assert 1e-8 < 1 - cosine(found.vectors, expected.vectors).min() < 1e-3
    with pytest.raises(ValueError, match="fp32"):
        Extractor(encoder, precision="int8")


def test_features_stay_in_float32(speech):
    class Spy(LogMelStatistics):
        def forward(self, features, lengths):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(features, lengths)

    found, seen = {}, []
    for precision in ("fp32", "bf16"):
        extract = Extractor(
            Encoder(Fbank(n_mels=80), Spy()), precision=precision
        )
        found[precision] = extract(speech, [0])[0].vectors
    assert seen == [False, True]
    np.testing.assert_array_equal(found["fp32"], found["bf16"])


@given(
    seconds=st.lists(st.floats(0.1, 60), min_size=1, max_size=40),
    limit=st.floats(1, 100),
)
def test_batches_hold_every_utterance_once_within_the_limit(seconds, limit):
    extract = Extractor(statistics(), batch_seconds=limit)
    order, ends = extract._batches(np.array(seconds))
    batches = np.split(order, ends)
    assert len(batches.pop()) == 0
    assert sorted(np.concatenate(batches)) == list(range(len(seconds)))
    shortest = 60.0
    for batch in batches:
        longest = max(seconds[position] for position in batch)
        assert longest <= shortest
        shortest = min(seconds[position] for position in batch)
        assert len(batch) == 1 or len(batch) * longest <= limit * (1 + 1e-9)


def test_long_utterances_are_read_up_to_a_limit(speech, encoder, monkeypatch):
    read = []

    def spy(**given):
        wav = read_beginning(**given)
        read.append(len(wav))
        return wav

    monkeypatch.setattr(extractor, "read_beginning", spy)
    monkeypatch.setattr(extractor, "MAX_SECONDS", 1.0)
    cut, _ = Extractor(encoder)(speech, [4])
    item = speech[4]
    short = Manifest.of([("4.wav", item["wav"], 0.0, 1.0, "")])
    expected, _ = Extractor(encoder)(short, [0])
    np.testing.assert_array_equal(cut.vectors, expected.vectors)
    assert read == [RATE, RATE]


def test_a_silent_beginning_is_passed_over(
    speech, encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr(extractor, "MAX_SECONDS", 1.0)
    wav, _ = soundfile.read(speech[4]["wav"], dtype="float32")
    wav[0] = 0.1
    path = str(tmp_path / "late.wav")
    padded = np.concatenate([np.zeros(5 * RATE // 2), wav])
    soundfile.write(path, padded, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "now.wav", wav, RATE, subtype="FLOAT")
    whole = 2.5 + len(wav) / RATE
    rows = [
        ("late", path, 0.0, whole, ""),
        ("silent", path, 0.0, 2.4, ""),
        ("now", str(tmp_path / "now.wav"), 0.0, len(wav) / RATE, ""),
    ]
    found, bad = Extractor(encoder)(Manifest.of(rows), [0, 1, 2])
    assert list(found.utterances) == ["late", "now"]
    np.testing.assert_array_equal(*found.vectors)
    ((name, reason),) = bad
    assert name == "silent" and reason.startswith("is silent: no sample")


@pytest.mark.parametrize("batch_seconds", [0.1, 100.0])
def test_bad_utterances_are_named_and_the_rest_embedded(
    speech, encoder, tmp_path, batch_seconds
):
    manifest = with_bad(speech, tmp_path)
    extract = Extractor(encoder, batch_seconds=batch_seconds)
    for folder in (None, tmp_path / "store"):
        found, bad = extract(manifest, np.arange(9), folder)
        assert found.utterances == speech.ids
        expected = lone(speech, encoder)
        np.testing.assert_allclose(found.vectors, expected, atol=1e-5)
        assert [name for name, _ in bad] == ["missing", "silent", "short"]
        assert "No such file" in bad[0][1]
        assert "silent" in bad[1][1]
        assert "639 samples" in bad[2][1]
    with pytest.raises(BadAudio, match="none of 2 utterances.*missing cannot"):
        extract(manifest, [0, 1], tmp_path / "none")
    assert list((tmp_path / "none").iterdir()) == []


def test_a_model_without_convolutions_takes_short_utterances(tmp_path):
    soundfile.write(tmp_path / "short.wav", np.full(10, 0.1), RATE)
    path = str(tmp_path / "short.wav")
    manifest = Manifest.of([("short", path, 0.0, 10 / RATE, "")])
    extract = Extractor(statistics())
    assert extract(manifest, [0])[0].vectors.shape == (1, 160)


def test_embeddings_that_are_not_finite_are_bad(speech, encoder):
    class Diverged(torch.nn.Module):
        masks_padding = True

        def forward(self, features, lengths):
            vectors = torch.ones(len(features), 1, 3)
            vectors[lengths < 0.5, :, 1] = torch.nan
            return vectors

    extract = Extractor(Encoder(Fbank(n_mels=80), Diverged()))
    found, bad = extract(speech, np.arange(6))
    short = [speech.ids[row] for row in np.flatnonzero(speech.durations < 1.5)]
    assert [name for name, _ in bad] == short
    assert len(found.utterances) == len(found.vectors) == 6 - len(short)
    # And beside one that cannot be read.
    wavs = ["missing.wav", *list(speech.wavs)[1:]]
    speech = dataclasses.replace(speech, wavs=Strings(wavs))
    _, worse = extract(speech, np.arange(6))
    assert [name for name, _ in worse] == short
    assert worse[0][1].startswith("cannot be opened")


# Several ranks


def one_rank(rank, speech, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(minutes=1),
    )
    if rank == 1:  # it opens the shares late, and they must still be there
        joined = extractor.JoinedShares
        extractor.JoinedShares = lambda given: time.sleep(1) or joined(given)
    extract = Extractor(make_encoder(), batch_seconds=3.0)
    rows = np.arange(len(speech))
    stored, bad = extract(speech, rows, folder / "store")
    assert isinstance(stored.vectors, np.memmap)
    kept, bad_again = extract(speech, rows)
    assert bad == bad_again and stored.utterances == kept.utterances
    np.testing.assert_array_equal(stored.vectors, kept.vectors)
    one, _ = extract(speech, rows[3:4])  # nothing for the second rank
    np.testing.assert_allclose(one.vectors, kept.vectors[:1], atol=1e-5)
    torch.save(bad, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_embed_what_one_does(speech, encoder, tmp_path):
    manifest = with_bad(speech, tmp_path)
    torch.multiprocessing.spawn(one_rank, (manifest, tmp_path), nprocs=2)
    extract = Extractor(encoder, batch_seconds=3.0)
    expected, bad = extract(manifest, np.arange(len(manifest)))
    found = Embeddings.load(tmp_path / "store")
    assert found.utterances == expected.utterances
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-6)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == bad
    # The ranks' own files are gone.
    names = sorted(path.name for path in (tmp_path / "store").iterdir())
    assert names == ["utterances.txt", "vectors.npy"]


def test_what_waits_for_all_ranks_in_each_batch_is_taken_off(speech, encoder):
    class Wrapped(torch.nn.parallel.DistributedDataParallel):
        def __init__(self, module):  # without the processes that it needs
            torch.nn.Module.__init__(self)
            self.module = module

    found, _ = Extractor(Wrapped(encoder))(speech, [0])
    expected, _ = Extractor(encoder)(speech, [0])
    np.testing.assert_array_equal(found.vectors, expected.vectors)


def test_extraction_into_a_folder_is_extraction_into_memory(
    speech, encoder, tmp_path
):
    rows = [5, 1, 3, 0]
    kept, _ = Extractor(encoder)(speech, rows)
    extract = Extractor(encoder, batch_seconds=3.0)
    stored, bad = extract(speech, rows, tmp_path)
    assert bad == [] and stored.utterances == kept.utterances
    assert stored.vectors.dtype == np.float32
    assert isinstance(stored.vectors, np.memmap)
    np.testing.assert_allclose(stored.vectors, kept.vectors, rtol=0, atol=1e-5)


# Interruptions


class Killed(BaseException):
    """Nothing that the code under test would catch."""


@pytest.mark.parametrize("done", [0, 1, 3])
def test_interrupted_extraction_goes_on(
    speech, encoder, tmp_path, monkeypatch, done
):
    rows = np.arange(len(speech))
    options = {"batch_seconds": 1.0, "keep_seconds": 0.0}  # one in a batch
    whole, _ = Extractor(encoder, **options)(speech, rows, tmp_path / "whole")
    extract = Extractor(encoder, **options)
    embed, seen = extract._embed, []

    def until_killed(wavs, n_samples):
        if len(seen) == done:
            raise Killed
        seen.append(n_samples)
        return embed(wavs, n_samples)

    monkeypatch.setattr(extract, "_embed", until_killed)
    with pytest.raises(Killed):
        extract(speech, rows, tmp_path / "killed")
    seen.clear()
    before, done = done, len(rows)
    found, bad = extract(speech, rows, tmp_path / "killed")
    assert len(seen) == len(rows) - before
    assert not bad
    assert np.array_equal(found.vectors, whole.vectors)
    assert list(found.utterances) == list(whole.utterances)
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {"vectors.npy", "utterances.txt"}


def test_too_many_bad_files_end_it_at_once_and_lose_nothing(
    speech, encoder, tmp_path, monkeypatch
):
    manifest, rows = with_bad(speech, tmp_path), np.arange(9)
    extract = Extractor(encoder, batch_seconds=0.1)  # one in a batch
    embed, seen, log = extract._embed, [], tmp_path / "bad_files.txt"

    def count(wavs, n_samples):
        seen.append(n_samples)
        return embed(wavs, n_samples)

    monkeypatch.setattr(extract, "_embed", count)

    def run(limit):
        seen.clear()
        return extract(manifest, rows, tmp_path / "v", BadFiles(log, limit))

    with pytest.raises(ValueError, match="2 bad utterances, more than the 1"):
        run(limit=1)
    # The longest come first; missing and silent are before the short ones.
    assert len(seen) == 4
    found, bad = run(limit=3)
    assert len(seen) == 2 and len(bad) == 3
    whole, _ = extract(manifest, rows)
    np.testing.assert_array_equal(found.vectors, whole.vectors)
    # Repaired, and the log deleted: they are not bad for having been so.
    log.unlink()
    with pytest.raises(ValueError, match="more than the 1"):
        run(limit=1)
    log.unlink()
    for name in ("no", "silent"):
        shutil.copy(speech.wavs[0], tmp_path / f"{name}.wav")
    _, bad = run(limit=1)
    assert [name for name, _ in bad] == ["short"] and len(seen) == 8


def test_what_another_encoder_left_is_not_taken_up(
    speech, encoder, tmp_path, monkeypatch
):
    rows = np.arange(len(speech))
    extract = Extractor(encoder, keep_seconds=0.0)
    with monkeypatch.context() as patch:
        patch.setattr(extractor, "remove_shares", lambda folder: None)
        extract(speech, rows, tmp_path)
    assert list(tmp_path.glob(".share*"))
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.network.fc.conv.bias += 1.0
    found, _ = Extractor(other)(speech, rows, tmp_path)
    expected, _ = Extractor(other)(speech, rows)
    assert np.array_equal(found.vectors, expected.vectors)


def test_what_other_audio_left_is_not_taken_up(speech, tmp_path, monkeypatch):
    """Also of the same durations."""
    keys = []

    class Spy(extractor.Share):
        def __init__(self, folder, key, save_seconds):
            keys.append(key)
            super().__init__(folder, key, save_seconds)

    monkeypatch.setattr(extractor, "Share", Spy)
    changes = (
        {},
        {"ids": Strings("abcdef")},
        {"wavs": Strings([*speech.wavs][::-1])},
        {"offsets": speech.offsets + 0.1},
        {"channels": speech.channels + 1},
    )
    for change in changes:
        manifest = dataclasses.replace(speech, **change)
        Extractor(statistics())(manifest, [0, 5], tmp_path)
    Extractor(statistics())(speech, [0, 5], tmp_path, version="later")
    assert len({*keys}) == len(changes) + 1
    Extractor(statistics())(speech, [0, 5], tmp_path)
    assert keys[-1] == keys[0]


def test_told_to_stop_it_keeps_what_is_embedded(speech, encoder, tmp_path):
    rows = np.arange(len(speech))
    extract = Extractor(encoder, batch_seconds=1.0)
    embed = extract._embed

    def told(wavs, n_samples):
        os.kill(os.getpid(), signal.SIGTERM)
        return embed(wavs, n_samples)

    extract._embed = told
    with pytest.raises(SystemExit), stop.on_signals():
        extract(speech, rows, tmp_path)
    extract._embed = embed
    with np.load(tmp_path / ".share0.npz") as kept:
        assert len(kept["placed"]) == 1


def test_padding_does_not_enter_the_statistics(speech, encoder):
    extract = Extractor(statistics())
    found, _ = extract(speech, np.arange(6))
    for path, vector in zip(speech.wavs, found.vectors):
        wav = torch.from_numpy(soundfile.read(path, dtype="float32")[0])
        frames = Fbank(n_mels=80)(wav[None])[0].double().numpy()
        expected = np.concatenate([frames.mean(0), frames.std(0)])
        np.testing.assert_allclose(vector, expected, atol=1e-3)
