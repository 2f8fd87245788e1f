"""Mistral's `tekken.json` as a tokenizer: byte-level BPE by rank, with special tokens first.

Source: the file's fields as read by mistral-common (mistral_common/tokens/tokenizers/tekken.py).
"""

from __future__ import annotations

import base64
import json
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, pre_tokenizers
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from batchinfer.errors import ModelError
from batchinfer.models.file_kind import said
from batchinfer.text.fast import set_framing
from batchinfer.text.pieces import byte_level_text
from batchinfer.text.spm import check_lengths

NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
_MAX_SPECIAL = 100_000  # Mistral's own files have a thousand
# special tokens of files before version 7, which do not list them
_FIRST = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    *("[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]"),
    *("[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)


def load_tekken(path: Path) -> RustTokenizer:
    """Load a tekken vocabulary. Raises ModelError if the file is not one."""
    try:
        return _build(json.loads(path.read_bytes()))
    except Exception as error:  # the library raises plain Exception for invalid content
        raise ModelError(f"{path} {said(path, f'is not a tekken vocabulary: {error!r}')}") from None


def _build(values: dict[str, Any]) -> RustTokenizer:
    config = values["config"]
    num_special = int(config["default_num_special_tokens"])
    if not 0 <= num_special <= _MAX_SPECIAL:
        raise ValueError(f"it has {num_special} special tokens")
    ranked = sorted(values["vocab"], key=itemgetter("rank"))[: int(config["default_vocab_size"]) - num_special]
    tokens = [base64.b64decode(entry["token_bytes"]) for entry in ranked]
    check_lengths(tokens)
    special = _special(values.get("special_tokens"), num_special)
    vocab = {text: number for number, text in enumerate(special)}
    vocab |= {byte_level_text(token): num_special + rank for rank, token in enumerate(tokens)}
    merges = [(byte_level_text(first), byte_level_text(second)) for first, second in _merges(tokens)]
    rust = RustTokenizer(BPE(vocab, merges, ignore_merges=True))
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(config["pattern"]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    set_framing(rust, NAMED["bos_token"], None)
    return rust


def _special(listed: list[dict[str, Any]] | None, count: int) -> list[str]:
    """Return the special tokens by id; ids without a token in the file get generated names."""
    named = {int(entry["rank"]): str(entry["token_str"]) for entry in listed or ()} or dict(enumerate(_FIRST))
    return [named.get(number, f"<SPECIAL_{number}>") for number in range(count)]


def _merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """Return every pair of tokens that forms a third, ordered by the third's rank."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pairs: list[tuple[bytes, bytes]] = []
    for token in tokens:
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        pairs += sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return pairs
