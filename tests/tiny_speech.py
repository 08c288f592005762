"""Tiny speech models of random weights, for tests."""

import torch

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
CONVS = {
    "conv_dim": [8] * 7,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
BERT = {
    "model_type": "wav2vec2-bert",
    "output_hidden_size": 16,
    "conv_depthwise_kernel_size": 5,
    **SIZES,
}


def config(family="wavlm", norm="group", **further):
    """A configuration, as base models have it, or large ones by "layer"."""
    if family == "wav2vec2-bert":
        return {**BERT, **further}
    norms = {"feat_extract_norm": norm, "do_stable_layer_norm": norm == "layer"}
    return {"model_type": family, **SIZES, **CONVS, **norms, **further}


def save(folder, normalise=None, **options):
    """Writes what `save_pretrained` of a pre-trained model writes."""
    import transformers

    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(**config(**options))
    transformers.AutoModel.from_config(made).save_pretrained(folder)
    if options.get("family") == "wav2vec2-bert":
        transformers.SeamlessM4TFeatureExtractor().save_pretrained(folder)
    elif normalise is not None:
        transformers.Wav2Vec2FeatureExtractor(
            do_normalize=normalise, return_attention_mask=True
        ).save_pretrained(folder)
    return str(folder)
