"""Fixtures of runner tests."""

from __future__ import annotations

import pytest

from batchinfer.models.decoder import Decoder
from batchinfer.models.weights import load_decoder
from tests.models.tiny import build


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    folder = tmp_path_factory.mktemp("llama")
    build("llama", folder)
    return load_decoder(folder)
