"""Decoders with random weights, made where they are used: no file, no network, and few packages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from batchinfer_kernels.formats import Precision

from batchinfer.layers.linear import Linear
from batchinfer.models.config import parse_config
from batchinfer.models.decoder import Decoder
from batchinfer.ops.backend import Backend

TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 199,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
SMALL = TINY | {
    "vocab_size": 4001,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
}
QWEN3_06B = TINY | {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "rope_theta": 1_000_000.0,
}
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}


@torch.inference_mode()
def random_decoder(values: Mapping[str, Any], backend: Backend, dtype: torch.dtype, source: str = "cpu") -> Decoder:
    """Return a decoder of this config.json. Weights are drawn on the device `source`: the same ones on any other."""
    generator = torch.Generator(source).manual_seed(0)

    def draw(shape: torch.Size | tuple[int, int], deviation: float) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=source).normal_(0, deviation, generator=generator)

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with backend.device:
            decoder = Decoder(backend, parse_config(dict(values), "a random model"))
    finally:
        torch.set_default_dtype(before)
    for module in decoder.modules():
        if isinstance(module, Linear):
            weight_OI = draw((module.out_features, module.in_features), module.in_features**-0.5)
            module.pack_weight(weight_OI.to(backend.device), Precision(str(dtype).removeprefix("torch.")))
    for parameter in decoder.parameters():  # norms: logits get gaps that rounding does not close
        parameter.copy_(draw(parameter.shape, 0.5).add_(2.0))
    decoder.build_stack()
    return decoder.eval()
