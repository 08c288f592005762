"""Codes of frames: k-means of cepstra, and of a model's layer."""

import numpy as np
import torch
from scipy.fft import dct
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

from lgl_plugin.nnet.frame_codes import Cepstra, KMeansQuantiser, ModelLayer


def test_kmeans_quantiser_gives_the_nearest_centroid_by_cosine():
    torch.manual_seed(0)
    crops = torch.randn(20, 15, 160)
    quantiser = KMeansQuantiser(Cepstra, size=26, cb_vocab=7)
    quantiser.fit(crops)
    frames = crops.view(300, 2, 80).numpy().astype(np.float64)
    cepstra = dct(frames, norm="ortho")[..., :13].reshape(300, 26)
    np.testing.assert_allclose(
        quantiser.transform(crops).view(300, 26).numpy(), cepstra, atol=1e-4
    )
    centred = cepstra - cepstra.mean(0)
    cosines = centred @ quantiser.centroids.numpy().T
    codes = quantiser(crops).flatten().numpy()
    assert (codes == cosines.argmax(1)).all() and len(set(codes)) == 7


def test_an_unused_code_is_never_given():
    """Not even to frames on the other side of all centroids."""
    quantiser = KMeansQuantiser(torch.nn.Identity, size=2, cb_vocab=5)
    places = torch.tensor([[4.0, 0], [0, 3], [1, 1]])
    quantiser.fit(places.repeat(4, 1)[None])
    assert set(quantiser(places[None])[0].tolist()) == {0, 1, 2}
    quantiser.mean.zero_()
    quantiser.centroids[:3] = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.6]])
    frames = torch.tensor([[[-1.0, -9], [-9, -1], [-9, -8]]])
    assert quantiser(frames).tolist() == [[0, 1, 1]]


def test_a_layer_as_targets_is_not_trained(tmp_path):
    config = Wav2Vec2BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    Wav2Vec2BertModel(config).save_pretrained(tmp_path)
    layer = ModelLayer(tmp_path, 1).train()
    frames = torch.randn(2, 10, 160)
    # Its dropout would give other targets each time.
    assert layer(frames).equal(layer(frames))
    assert not any(weight.requires_grad for weight in layer.parameters())
