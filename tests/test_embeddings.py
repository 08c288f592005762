"""Extraction, the store and the floor."""

import math

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, strategies as st
from speechbrain.lobes.features import Fbank
from speechbrain.lobes.models.ECAPA_TDNN import ECAPA_TDNN
from speechbrain.processing.features import InputNormalization

from lgl_plugin.data import BadAudio
from lgl_plugin.embeddings import (
    Embeddings,
    Extractor,
    LogMelStatistics,
    whiten,
)

RATE = 16000


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Coloured noises of several lengths and colours, as a manifest."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    utterances = {}
    for number, seconds in enumerate([1.0, 2.5, 1.7, 1.3, 3.0, 1.0]):
        samples = rng.normal(0, 0.1, round(seconds * RATE))
        width = 1 + 3 * number
        samples = np.convolve(samples, np.ones(width) / width, "same")
        samples *= 1 + np.sin(np.arange(len(samples)) / (300 + 200 * number))
        path = folder / f"{number}.wav"
        soundfile.write(path, samples, RATE)
        utterances[f"{number}.wav"] = {
            "wav": str(path),
            "offset": 0.0,
            "duration": seconds,
        }
    return utterances


@pytest.fixture(scope="module")
def modules():
    """SpeechBrain's features and ECAPA-TDNN, narrow, past its first steps."""
    torch.manual_seed(0)
    encoder = ECAPA_TDNN(
        80,
        channels=[32, 32, 32, 32, 96],
        attention_channels=16,
        lin_neurons=24,
    )
    norm = InputNormalization(norm_type="sentence", std_norm=False)
    features = Fbank(n_mels=80)
    with torch.no_grad():  # for running statistics unlike the initial ones
        for _ in range(20):
            encoder(norm(features(torch.randn(8, RATE) / 9), torch.ones(8)))
    return features, norm, encoder.eval()


def cosine(a, b):
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return (a * b).sum(1) / lengths


def test_lone_utterance_is_what_speechbrain_gives(speech, modules):
    features, norm, encoder = modules
    extract = Extractor(*modules, batch_seconds=0.1)
    found, bad = extract(speech)
    assert bad == [] and found.utterances == list(speech)
    for item, vector in zip(speech.values(), found.vectors):
        wav = torch.from_numpy(soundfile.read(item["wav"], dtype="float32")[0])
        one = torch.ones(1)
        with torch.no_grad():
            expected = encoder(norm(features(wav[None]), one), one)
        np.testing.assert_allclose(vector, expected[0, 0], atol=1e-5)


def test_batches_agree_with_lone_utterances(speech, modules):
    lone, _ = Extractor(*modules, batch_seconds=0.1)(speech)
    batched, _ = Extractor(*modules, batch_seconds=100.0)(speech)
    assert batched.utterances == lone.utterances
    assert cosine(batched.vectors, lone.vectors).min() > 0.999
    # The test would see utterances that are mixed up.
    assert cosine(batched.vectors, lone.vectors[::-1]).max() < 0.995


def test_workers_agree_with_the_main_process(speech, modules):
    alone, _ = Extractor(*modules)(speech)
    together, _ = Extractor(*modules, num_workers=1)(speech)
    np.testing.assert_array_equal(alone.vectors, together.vectors)


def test_the_encoder_is_in_evaluation_mode_without_graph(speech, modules):
    features, norm, encoder = modules
    encoder.train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    Extractor(*modules)(speech)
    assert not encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])


@given(
    seconds=st.lists(st.floats(0.1, 90), min_size=1, max_size=40),
    limit=st.floats(1, 100),
)
def test_batches_hold_every_utterance_once_within_the_limit(seconds, limit):
    extract = Extractor(None, None, None, batch_seconds=limit, max_seconds=60.0)
    utterances = {
        str(i): {"wav": "", "offset": 0.0, "duration": s}
        for i, s in enumerate(seconds)
    }
    batches = extract._batches(utterances)
    names = [name for batch in batches for name, *_ in batch]
    assert sorted(names) == sorted(utterances)
    for batch in batches:
        longest = max(length for *_, length in batch)
        assert longest <= 60.0
        assert len(batch) == 1 or len(batch) * longest <= limit * (1 + 1e-9)


def test_long_utterances_are_read_up_to_a_limit(speech, modules):
    name = "4.wav"
    cut, _ = Extractor(*modules, max_seconds=1.0)({name: speech[name]})
    short = {name: {**speech[name], "duration": 1.0}}
    expected, _ = Extractor(*modules)(short)
    np.testing.assert_array_equal(cut.vectors, expected.vectors)


def test_bad_utterances_are_named_and_the_rest_embedded(
    speech, modules, tmp_path
):
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    broken = {
        "missing": {**speech["0.wav"], "wav": str(tmp_path / "no.wav")},
        "silent": {**speech["0.wav"], "wav": str(tmp_path / "silent.wav")},
    }
    for batch_seconds in (0.1, 100.0):
        extract = Extractor(*modules, batch_seconds=batch_seconds)
        found, bad = extract({**broken, **speech})
        assert found.utterances == list(speech)
        reasons = dict(bad)
        assert set(reasons) == {"missing", "silent"}
        assert "cannot be read" in reasons["missing"]
        assert "silent" in reasons["silent"]
    with pytest.raises(BadAudio, match="none of 2 utterances"):
        extract(broken)


def test_embeddings_that_are_not_finite_are_bad(speech, modules):
    class Diverged(torch.nn.Module):
        def forward(self, features, lengths):
            vectors = torch.ones(len(features), 1, 3)
            vectors[lengths < 0.5, :, 1] = torch.nan
            return vectors

    found, bad = Extractor(modules[0], None, Diverged())(speech)
    short = [n for n, item in speech.items() if item["duration"] < 1.5]
    assert {name for name, _ in bad} == set(short)
    assert len(found.utterances) == len(speech) - len(short)


# The store


def test_store_round_trip(tmp_path):
    names = ["a/ü 1.wav", "b.wav", "c"]
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    Embeddings(names, vectors).save(tmp_path / "new" / "folder")
    found = Embeddings.load(tmp_path / "new" / "folder")
    assert found.utterances == names
    np.testing.assert_array_equal(found.vectors, vectors)
    assert found.vectors.dtype == np.float32
    assert isinstance(found.vectors, np.memmap)
    np.testing.assert_array_equal(
        found.rows(["c", "a/ü 1.wav"]), vectors[[2, 0]]
    )
    with pytest.raises(KeyError):
        found.rows(["nobody"])


# The floor


def test_log_mel_statistics_are_numpys_over_the_counted_frames():
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (4, 50, 6)).astype(np.float32)
    lengths = [1.0, 0.5, 0.02, 0.9]
    found = LogMelStatistics()(
        torch.from_numpy(features), torch.tensor(lengths)
    ).numpy()
    for row, length, frames in zip(found, lengths, features.astype(float)):
        counted = frames[: round(50 * length)]
        expected = np.concatenate([counted.mean(0), counted.std(0)])
        # A deviation of none is kept off zero, at 1e-5.
        np.testing.assert_allclose(row[0], expected, rtol=1e-4, atol=2e-5)


def test_filling_does_not_enter_the_statistics(speech, modules):
    extract = Extractor(modules[0], None, LogMelStatistics())
    found, _ = extract(speech)
    for item, vector in zip(speech.values(), found.vectors):
        wav = soundfile.read(item["wav"], dtype="float32")[0]
        filled = torch.from_numpy(np.resize(wav, 3 * RATE))  # the longest
        frames = modules[0](filled[None])[0].double().numpy()
        share = len(wav) / len(filled)
        counted = frames[: math.ceil(len(frames) * share - 1e-3)]
        expected = np.concatenate([counted.mean(0), counted.std(0)])
        np.testing.assert_allclose(vector, expected, atol=1e-3)


def test_whitening_gives_identity_covariance():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(6, 6)) + 3 * np.eye(6)
    sample = rng.normal(size=(4000, 6)) @ mixing + 7
    white = whiten(sample, sample)
    assert white.dtype == np.float32
    np.testing.assert_allclose(white.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(white.T), np.eye(6), atol=1e-3)


def test_whitening_takes_its_statistics_from_the_reference():
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(500, 3)) * [1, 2, 3] + [4, 5, 6]
    others = rng.normal(size=(20, 3)) * 10
    white = whiten(reference, others)
    # Mahalanobis distances to the reference's mean are the new lengths.
    inverse = np.linalg.inv(np.cov(reference.T))
    apart = others - reference.mean(0)
    expected = np.einsum("ij,jk,ik->i", apart, inverse, apart)
    np.testing.assert_allclose((white**2).sum(1), expected, rtol=1e-4)


def test_whitening_does_not_blow_up_a_constant_band():
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(100, 3)) * [1.0, 1.0, 0.0]
    others = sample + [0, 0, 1e-3]
    assert np.abs(whiten(sample, others)).max() < 10
