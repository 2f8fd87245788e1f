"""Tiny random models of every family, as transformers writes them, and a way to run ours on them without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from batchinfer_kernels.contract import StepInputs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from batchinfer.models.decoder import Decoder

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA = {"head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 24}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [2.0, 3.0, 5.5],
    "partial_rotary_factor": 0.75,
}

# name → (transformers' configuration class, what it changes in SIZES)
MODELS: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 12}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1}),
    "llama-wide": ("LlamaConfig", {"hidden_size": 512, "intermediate_size": 512}),  # see cpu.memory's empty_rows
    "llama-uneven": ("LlamaConfig", {"intermediate_size": 50}),  # no whole panels of gates
    "llama-linear": ("LlamaConfig", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
    "llama-dynamic": ("LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    "llama-llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("LlamaConfig", {"rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "LlamaConfig",
        {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 16, "truncate": False}},
    ),
    "smollm3": ("SmolLM3Config", {"no_rope_layer_interval": 2}),
    "smollm3-window": (
        "SmolLM3Config",
        {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": True, "sliding_window": 9},
    ),
    "mistral": ("MistralConfig", {"sliding_window": 11, "head_dim": 16}),
    "mistral-full": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen2-window": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen2-yarn": ("Qwen2Config", {"rope_parameters": YARN, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "gemma2": ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 0.5}),
    "gemma3": ("Gemma3TextConfig", GEMMA | {"_sliding_window_pattern": 2, "sliding_window_pattern": 2}),
    "gemma3-linear": (
        "Gemma3TextConfig",
        GEMMA
        | {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "phi3": ("Phi3Config", {"sliding_window": 13}),
    "phi3-longrope": ("Phi3Config", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}),
    "olmo2": ("Olmo2Config", {}),
    "granite": (
        "GraniteConfig",
        {"attention_multiplier": 0.4, "embedding_multiplier": 6.0, "logits_scaling": 3.0, "residual_multiplier": 0.3},
    ),
}


def build(name: str, folder: Path, **more: Any) -> transformers.PreTrainedModel:
    """Save a random model in `folder`. Norm weights and biases too are random: ones and zeros would hide mistakes.

    `more` are further changes of its configuration.
    """
    config_class, changes = MODELS[name]
    torch.manual_seed(sum(name.encode()))
    config = getattr(transformers, config_class)(**(SIZES | changes | more))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        weight.data.add_(torch.randn_like(weight) * 0.15)
    model.save_pretrained(folder)
    return model


def write_word_tokenizer(folder: Path) -> None:
    """Write a tokenizer beside a tiny model: a token per word, w0 to w95, as many as the model's vocabulary."""
    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "w2", "bos_token": "w1"}')


class Paged:
    """A decoder with a cache whose blocks are handed out in shuffled order; unused slots hold NaN."""

    def __init__(self, decoder: Decoder, sequences: int, block_size: int = 4, length: int = 128) -> None:
        layers, heads, size = decoder.config.kv_shape
        per_sequence = -(-length // block_size)
        blocks = sequences * per_sequence + 3
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(7))
        shape = (blocks, 2, heads, block_size, size)
        dtype = decoder.dtype
        self.cache = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(layers)]
        self.tables = order[: sequences * per_sequence].view(sequences, per_sequence).to(torch.int32)
        self.decoder = decoder
        self.block_size = block_size
        self.computed = [0] * sequences

    @torch.inference_mode()
    def step(self, work: dict[int, list[int]]) -> torch.Tensor:
        """Compute the next tokens of some sequences; logits [T, V] of all these tokens."""
        rows, starts, lengths, positions, slots = list(work), [0], [], [], []
        for sequence, tokens in work.items():
            first = self.computed[sequence]
            span = torch.arange(first, first + len(tokens))
            positions.append(span)
            blocks = self.tables[sequence].long()[span // self.block_size]
            slots.append(blocks * self.block_size + span % self.block_size)
            starts.append(starts[-1] + len(tokens))
            lengths.append(first + len(tokens))
            self.computed[sequence] = lengths[-1]
        inputs = StepInputs(
            tokens_T=torch.tensor([token for tokens in work.values() for token in tokens]),
            positions_T=torch.cat(positions),
            slots_T=torch.cat(slots),
            block_tables_SW=self.tables[rows],
            query_starts_X=torch.tensor(starts),
            lengths_S=torch.tensor(lengths),
            prompt_S=torch.tensor(starts).diff() > 1,
            output_rows_N=torch.arange(starts[-1]),
            max_length=max(lengths),
        )
        return self.decoder.logits(self.decoder(inputs, self.cache))
