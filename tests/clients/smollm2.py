"""The quickstart's GGUF file as safetensors, for lm-eval's own `hf` model: the same weights and tokenizer.

transformers reads GGUF files itself, and then loses this tokenizer's splitting of digits.
"""

import json
from pathlib import Path

import tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from batchinfer.models.gguf import GGUFFile
from batchinfer.text.tokenizer import load_tokenizer


def write_safetensors(gguf: Path, folder: Path) -> None:
    """Everything that `from_pretrained` wants, in `folder`."""
    file = GGUFFile(gguf)
    model = LlamaForCausalLM(LlamaConfig(**file.config_dict()))
    missing, unexpected = model.load_state_dict(dict(file.weights()), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer = load_tokenizer(gguf)
    rust = next(value for value in vars(tokenizer).values() if isinstance(value, tokenizers.Tokenizer))
    rust.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "chat_template": tokenizer.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
