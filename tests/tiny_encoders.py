"""Small random models of every kind of encoder in torch, which are the oracle of ours."""

import re
from pathlib import Path

import numpy as np
import torch
import transformers

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
}
LARGE = {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True}
BUCKETS = {"num_buckets": 16, "max_bucket_distance": 20}
TINY_WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 16,
    "vocab_size": 64,
    "pad_token_id": 1,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "max_source_positions": 64,
    "num_mel_bins": 80,
}
VARIANTS = {
    "hubert base": TINY,
    "hubert large": TINY | LARGE,
    # As large; heads of 20, no power of two, as the 80 of HuBERT-xlarge.
    "hubert xlarge": TINY
    | LARGE
    | {"hidden_size": 40, "num_attention_heads": 2, "num_conv_pos_embedding_groups": 8},
    "hubert batch_norm": TINY | {"conv_pos_batch_norm": True},
    # What no published architecture has, yet the configuration allows.
    "hubert other": TINY
    | {
        "feat_extract_norm": "layer",
        "feat_proj_layer_norm": False,  # as DistilHuBERT
        "feat_extract_activation": "relu",
        "hidden_act": "gelu_new",
        "num_conv_pos_embeddings": 15,
        "layer_norm_eps": 1e-3,
        "num_hidden_layers": 3,
    },
    "wav2vec2 base": TINY,
    "wav2vec2 large": TINY | LARGE,
    "wavlm base": TINY | BUCKETS,
    "wavlm large": TINY | LARGE | {"conv_bias": False} | BUCKETS,
    "whisper 80": TINY_WHISPER,
    "whisper 128": TINY_WHISPER | {"num_mel_bins": 128, "activation_function": "relu"},
}
FAMILIES = {"hubert": "Hubert", "wav2vec2": "Wav2Vec2", "wavlm": "WavLM", "whisper": "Whisper"}


def tiny_config(variant: str, **changes) -> transformers.PreTrainedConfig:
    """Of one of `VARIANTS`, with changes."""
    cls = getattr(transformers, f"{FAMILIES[variant.split()[0]]}Config")
    return cls(**VARIANTS[variant] | changes)


def random_torch_model(config, cls=None, noise: float = 0.1):
    """A torch model, none of whose tensors has the 0 or 1 it is initialised with."""
    torch.manual_seed(0)
    model = (cls or model_class(config))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.uniform_(0.5, 2)
    return model


def model_class(config):
    """Of torch's models, the one of a configuration without a head."""
    return getattr(transformers, type(config).__name__.replace("Config", "Model"))


def encoder_of(model):
    """The part of a torch model that is an encoder."""
    return model.encoder if isinstance(model, transformers.WhisperModel) else model


def to_numpy(model) -> dict[str, np.ndarray]:
    """The tensors of a torch encoder."""
    return {name: tensor.numpy() for name, tensor in encoder_of(model).state_dict().items()}


def save(model, folder: Path, preprocessor: bool = True) -> None:
    """A folder in Hugging Face's format, as on the hub."""
    model.save_pretrained(folder)
    if not preprocessor:
        return
    if model.config.model_type == "whisper":
        whisper_extractor(model.config).save_pretrained(folder)
    else:
        transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder)


def whisper_extractor(config) -> transformers.WhisperFeatureExtractor:
    """Transformers' own log-mel."""
    return transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins)


def torch_states(model, waveform: np.ndarray, attention_mask=None) -> list[torch.Tensor]:
    """All hidden states, then the last hidden state, of (B, samples) clips of one length.

    Whisper's are its modules one after the other, as its own `forward` takes nothing but 30 s.
    """
    model = encoder_of(model)
    if model.config.model_type != "whisper":
        mask = None if attention_mask is None else torch.from_numpy(attention_mask)
        waveform = torch.as_tensor(waveform).to(model.dtype)
        out = model(waveform, attention_mask=mask, output_hidden_states=True)
        return [*out.hidden_states, out.last_hidden_state]
    mel = whisper_extractor(model.config)(list(waveform), sampling_rate=16_000, padding=False)
    mel = torch.tensor(np.stack(mel["input_features"])).to(model.dtype)
    activation = transformers.activations.ACT2FN[model.config.activation_function]
    hidden = activation(model.conv2(activation(model.conv1(mel)))).permute(0, 2, 1)
    states = [hidden + model.embed_positions.weight[: hidden.shape[1]]]
    for layer in model.layers:
        states.append(layer(states[-1], None))
    return [*states, model.layer_norm(states[-1])]


def without_weight_norm(name: str) -> str:
    """Torch's name of a parameter, whose direction stands for the weight that we store whole."""
    return re.sub(r"parametrizations\.weight\.original1$", "weight", name)
