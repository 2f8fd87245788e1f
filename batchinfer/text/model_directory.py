"""Tokenizer of a model directory: tokenizer.json, sentencepiece's tokenizer.model, or Mistral's tekken.json.

A tokenizer.json alone decides normalization and added tokens, whatever class tokenizer_config.json names: transformers
5 rebuilds some classes and drops the file's normalizer (LlamaTokenizer), or makes a token special that the file does
not (Gemma's <mask>). transformers is used only for a vocab.json.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from operator import itemgetter
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from batchinfer.errors import ModelError
from batchinfer.models.file_kind import misplaced_content, said
from batchinfer.models.json_file import end_ids, read_object
from batchinfer.text.fast import FastTokenizer, TokenizerFacts
from batchinfer.text.sentencepiece_model import load_sentencepiece
from batchinfer.text.tekken import NAMED, load_tekken

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "tekken.json")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def load_directory(path: Path) -> FastTokenizer:
    """Load the tokenizer of a model directory.

    Raises ModelError for files that are missing or damaged, or that need a package that is not installed.
    """
    config = read_object(path / "tokenizer_config.json")
    rust, own = _vocabulary(path, config)
    named = {**own, **_special_tokens({**read_object(path / "special_tokens_map.json"), **config})}
    _add_tokens(path, rust, config, named)
    template = _read_chat_template(path, config)
    return FastTokenizer(rust, TokenizerFacts(_digest(path, rust), _eos_ids(path, rust, named), named, template))


def _vocabulary(path: Path, config: Mapping[str, Any]) -> tuple[RustTokenizer, Mapping[str, str]]:
    """Return the tokenizer of the first file that exists, and the special tokens named by the file itself."""
    if (path / "tokenizer.json").is_file():
        return _read_rust(path / "tokenizer.json"), {}
    if (path / "tokenizer.model").is_file():
        return load_sentencepiece(path / "tokenizer.model", config)
    if (path / "tekken.json").is_file():
        return load_tekken(path / "tekken.json"), NAMED
    return _convert(path), {}


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: cannot be read as text: {error}") from None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return bos_token and the like, from values that are strings or {"content": string}."""
    names = [*_NAMED, *(name for name in config if name.endswith("_token") and name not in _NAMED)]
    contents = {name: _content(config.get(name)) for name in names}
    return {name: content for name, content in contents.items() if content is not None}


def _content(value: Any) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _read_rust(path: Path) -> RustTokenizer:
    try:
        return RustTokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for everything
        raise ModelError(f"{path} {said(path, f'is not a usable tokenizer: {error}')}") from None


def _convert(path: Path) -> RustTokenizer:
    """Convert a vocabulary that only transformers can read: vocab.json with merges.txt."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"{path}: has no tokenizer.json, tokenizer.model or tekken.json, and converting its tokenizer needs one "
            f"more package ({error}): pip install transformers"
        ) from None
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:
        raise ModelError(
            f"{path}: has no tokenizer.json, tokenizer.model or tekken.json, and transformers cannot load its "
            f"tokenizer: {' '.join(str(error).split())}"
        ) from None
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{path}: its tokenizer {type(tokenizer).__name__} exists in Python only; provide a tokenizer.json"
        )
    rust: RustTokenizer = tokenizer.backend_tokenizer
    return rust


def _add_tokens(path: Path, rust: RustTokenizer, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Add tokens that tokenizer.json lacks or defines differently; named ones become special."""
    present = {token.content: token for token in rust.get_added_tokens_decoder().values()}
    source = "tokenizer_config.json" if "added_tokens_decoder" in config else "added_tokens.json"
    for token_id, token in _config_tokens(path, config):
        if repr(present.get(token.content)) == repr(token):
            continue
        (rust.add_special_tokens if token.special else rust.add_tokens)([token])
        present[token.content] = token
        if rust.token_to_id(token.content) != token_id:
            raise ModelError(
                f"{path}: token {token.content!r} is {token_id} in {source} but "
                f"{rust.token_to_id(token.content)} in the vocabulary"
            )
    for text in named.values():
        token = present.get(text, AddedToken(text, normalized=False))
        if not token.special and rust.token_to_id(text) is not None:
            token.special = True
            rust.add_special_tokens([token])


def _config_tokens(path: Path, config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Return (id, token) pairs of added_tokens_decoder, else of the older added_tokens.json, by id."""
    if "added_tokens_decoder" not in config:
        return _older_tokens(path / "added_tokens.json", config)
    try:
        entries = sorted((int(token_id), entry) for token_id, entry in config["added_tokens_decoder"].items())
        return [(token_id, _added_token(**entry)) for token_id, entry in entries]
    except (AttributeError, TypeError, ValueError) as error:
        raise ModelError(f"{path / 'tokenizer_config.json'}: added_tokens_decoder is damaged: {error}") from None


def _older_tokens(file: Path, config: Mapping[str, Any]) -> list[tuple[int, AddedToken]]:
    """Return (id, token) pairs of a file that maps text to id; tokens named in the configuration are special."""
    named = set(_special_tokens(config).values())
    for key in ("additional_special_tokens", "extra_special_tokens"):
        listed = config.get(key)
        named.update(text for text in map(_content, listed if isinstance(listed, list) else ()) if text is not None)
    tokens = []
    for text, token_id in read_object(file).items():
        if type(token_id) is not int:
            raise ModelError(f"{file}: token {text!r} has the id {token_id!r}, which is not a whole number")
        tokens.append((token_id, _added_token(text, special=text in named)))
    return sorted(tokens, key=itemgetter(0))


def _added_token(content: str, special: bool = False, normalized: bool | None = None, **flags: bool) -> AddedToken:
    """Return an AddedToken. By default, text is normalized before matching unless the token is special."""
    normalized = not special if normalized is None else normalized
    return AddedToken(content, special=special, normalized=normalized, **flags)


def _read_chat_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """Return the template of chat_template.jinja, else of tokenizer_config.json; among named templates, `default`."""
    file = path / "chat_template.jinja"
    if file.is_file():
        kind = misplaced_content(file)
        if kind:
            raise ModelError(f"{file} is {kind}")
        return _read_text(file)
    template = config.get("chat_template", read_object(path / "chat_template.json").get("chat_template"))
    if isinstance(template, list):
        template = {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    if isinstance(template, dict):
        template = template.get("default", next(iter(template.values()), None))
    return template if isinstance(template, str) else None


def _eos_ids(path: Path, rust: RustTokenizer, named: Mapping[str, str]) -> frozenset[int]:
    """Return the tokenizer's end of sequence and generation_config.json's (a number or a list), else config.json's."""
    generation = read_object(path / "generation_config.json")
    listed = generation if generation.get("eos_token_id") is not None else read_object(path / "config.json")
    eos = rust.token_to_id(named["eos_token"]) if "eos_token" in named else None
    return end_ids(listed) if eos is None else end_ids(listed) | {eos}


def _digest(path: Path, rust: RustTokenizer) -> str:
    """Hash the files, if there is a tokenizer.json: the library's own serialization changes with its version."""
    digest = hashlib.sha256()
    vocabulary = next((name for name in _VOCABULARIES if (path / name).is_file()), None)
    if vocabulary is None:
        digest.update(rust.to_str().encode())
    for name in (vocabulary or "", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        if (path / name).is_file():
            digest.update(name.encode() + b"\0" + (path / name).read_bytes())
    return digest.hexdigest()
