"""Whole speakers are kept out of training, and none of the labelled."""

import numpy as np
import pytest

from lgl_plugin.adaptation.split import RECORDINGS, SPEAKERS, kept_out


def voices(n_speakers, utterances, seed=0):
    """Embeddings around as many means, and the speaker of each."""
    rng = np.random.default_rng(seed)
    speakers = np.repeat(np.arange(n_speakers), utterances)
    means = rng.normal(size=(n_speakers, 16))
    noise = 0.1 * rng.normal(size=(len(speakers), 16))
    return (means[speakers] + noise).astype(np.float32), speakers


@pytest.mark.parametrize("seed", [0, 1])
def test_half_of_the_recordings_at_most_are_kept_out(seed):
    vectors, speakers = voices(12, 15, seed)
    out = kept_out(vectors, np.zeros(180, bool), seed)
    assert 0.4 < out.mean() <= 0.5
    assert not {*speakers[out]} & {*speakers[~out]}


def test_no_cluster_with_a_label_is_kept_out():
    vectors, speakers = voices(12, 15)
    labelled = np.zeros(180, bool)
    labelled[::30] = True  # one recording of every other speaker
    out = kept_out(vectors, labelled)
    assert {*speakers[out]} <= {1, 3, 5, 7, 9, 11} and out.any()
    assert not kept_out(vectors, np.ones(180, bool)).any()


def test_much_audio_keeps_little_out():
    """A hundred speakers judge as well as thousands; train on the others."""
    vectors, speakers = voices(400, 5)
    out = kept_out(vectors, np.zeros(2000, bool))
    assert len({*speakers[out]}) >= SPEAKERS - 2
    assert RECORDINGS <= out.sum() < 0.35 * 2000


def test_a_speaker_of_more_than_half_of_the_recordings_is_trained_on():
    vectors, speakers = voices(6, [200, 20, 20, 20, 20, 20])
    out = kept_out(vectors, np.zeros(300, bool))
    assert out.any() and not out[speakers == 0].any()
