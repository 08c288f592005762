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
