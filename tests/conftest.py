"""Tiny random encoders of every family, saved as folders like any pretrained one."""

import json

import pytest
import torch
import transformers

_SMALL = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
_CNN = {
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (10, 8, 4),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "intermediate_size": 40,
    "mask_time_prob": 0.3,  # on purpose: the encoder must not mask
    "layerdrop": 0.5,  # on purpose: the encoder must not drop layers
}
_GROUP = {**_SMALL, **_CNN, "feat_extract_norm": "group"}
_LARGE = {**_SMALL, **_CNN, "feat_extract_norm": "layer", "do_stable_layer_norm": True}
_LAYER = {**_SMALL, **_CNN, "feat_extract_norm": "layer"}

FAMILIES = {
    "wav2vec2-base": ("Wav2Vec2", _GROUP),
    "wav2vec2-large": ("Wav2Vec2", _LARGE),
    "hubert-base": ("Hubert", _GROUP),
    "hubert-large": ("Hubert", _LARGE),
    "wavlm-base": ("WavLM", _GROUP),
    "wavlm-large": ("WavLM", _LARGE),
    "data2vec-audio": ("Data2VecAudio", {**_LAYER, "num_conv_pos_embeddings": 3,
                                         "conv_pos_kernel_size": 7}),
    "unispeech-sat": ("UniSpeechSat", _GROUP),
    "wav2vec2-conformer-rel": ("Wav2Vec2Conformer", {**_LAYER, "conv_depthwise_kernel_size": 7,
                                                     "position_embeddings_type": "relative"}),
    "wav2vec2-conformer-rotary": ("Wav2Vec2Conformer", {**_LAYER, "conv_depthwise_kernel_size": 7,
                                                        "position_embeddings_type": "rotary"}),
    "w2v-bert-2": ("Wav2Vec2Bert", {**_SMALL, "intermediate_size": 40, "layerdrop": 0.5,
                                    "feature_projection_input_dim": 160, "vocab_size": None,
                                    "conv_depthwise_kernel_size": 7}),
    "whisper": ("Whisper", {"d_model": 24, "encoder_layers": 4, "encoder_attention_heads": 2,
                            "encoder_ffn_dim": 40, "decoder_layers": 1, "encoder_layerdrop": 0.5,
                            "decoder_attention_heads": 2, "decoder_ffn_dim": 40,
                            "num_mel_bins": 80, "max_source_positions": 50, "vocab_size": 20,
                            "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
                            "decoder_start_token_id": 1}),
}  # fmt: skip
VARIANTS = {"hubert-batch-norm": ("Hubert", {**_GROUP, "conv_pos_batch_norm": True})}


@pytest.fixture(scope="session")
def make_encoder_folder(tmp_path_factory):
    """Save a tiny random encoder of a family; gives its folder as a string."""
    made = {}

    def make(name: str) -> str:
        if name not in made:
            prefix, settings = {**FAMILIES, **VARIANTS}[name]
            torch.manual_seed(len(name))
            config = getattr(transformers, f"{prefix}Config")(**settings)
            model = getattr(transformers, f"{prefix}Model")(config)
            with torch.no_grad():  # no parameter at a value that would hide a mistake
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            if name == "w2v-bert-2":
                preprocessor = {"num_mel_bins": 80, "stride": 2}
                (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
            made[name] = str(folder)
        return made[name]

    return make


@pytest.fixture(scope="session")
def encoder_folder(make_encoder_folder):
    """A tiny random w2v-BERT folder, the shape of the built-in encoder."""
    return make_encoder_folder("w2v-bert-2")
