"""Fixtures of end-to-end tests."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tests.models.tiny import SIZES, build


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny random Llama with a tokenizer of whole words."""
    folder = tmp_path_factory.mktemp("model")
    build("llama", folder)
    words = {f"w{number}": number for number in range(SIZES["vocab_size"])}
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "w2"}))
    return folder
