"""The quickstart's GGUF file for other programs: its weights in transformers, and safetensors with its tokenizer.

transformers reads GGUF files itself, and then loses this tokenizer's splitting of digits.
"""

import json
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

from batchinfer.models.gguf import GGUFFile
from batchinfer.text.fast import FastTokenizer
from batchinfer.text.tokenizer import load_tokenizer
from tests.models.gguf_files import float_weights


def in_transformers(gguf: Path) -> LlamaForCausalLM:
    """float32."""
    file = GGUFFile(gguf)
    model = LlamaForCausalLM(LlamaConfig(**file.config_dict()))
    missing, unexpected = model.load_state_dict(float_weights(file), strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model.eval()


def write_safetensors(gguf: Path, folder: Path) -> None:
    """Everything that `from_pretrained` wants, in `folder`."""
    in_transformers(gguf).save_pretrained(folder)
    tokenizer = load_tokenizer(gguf)
    assert isinstance(tokenizer, FastTokenizer)
    tokenizer._rust.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "bos_token": "<|im_start|>",
        "chat_template": tokenizer.chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
