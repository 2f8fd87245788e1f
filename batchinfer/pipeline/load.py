"""Assembly of an engine: tokenizer, backend, weights, KV cache, runner, and the model's own defaults."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from batchinfer.engine.blocks import BlockPool
from batchinfer.engine.engine import StepRunner
from batchinfer.engine.fake import FakeAnswer, FakeRunner
from batchinfer.errors import BadParameters, ModelError
from batchinfer.io.fetch import ModelFiles
from batchinfer.log import log
from batchinfer.models.gguf_header import shared_header
from batchinfer.models.json_file import end_ids, read_object
from batchinfer.pipeline.prepare import ModelLimits
from batchinfer.request import SamplingParams
from batchinfer.spec import EngineSpec, FakeSpec
from batchinfer.text.chat import ChatTemplate
from batchinfer.text.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch
    from batchinfer_kernels.contract import Capabilities

    from batchinfer.layers.rotary import RopeConfig
    from batchinfer.models.decoder import Decoder

FAKE_CONTEXT_TOKENS = 32768
_FAKE_DRAFT_ROWS = 128
_WIDE = ("float32", "float64")
_SAMPLING_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Assembly:
    """Components of an engine, ready. `defaults` are the sampling parameters of the model's generation_config.json."""

    tokenizer: Tokenizer
    chat: ChatTemplate | None
    defaults: SamplingParams
    limits: ModelLimits
    runner: StepRunner
    pool: BlockPool
    max_draft_rows: int


def assemble(
    engine: EngineSpec,
    files: ModelFiles | None,
    tokenizer_files: ModelFiles | None,
    fake: FakeSpec,
    chat_template: str | None,
) -> Assembly:
    """Load everything. `files` None is the fake model; `tokenizer_files` replaces the model's own tokenizer.

    Raises ModelError.
    """
    source = tokenizer_files or files
    generation = _generation_config(files.path) if files is not None else {}
    with shared_header(files.path if files is not None else None):
        tokenizer, chat = load_text(source, chat_template)
        model = _fake_model(engine, fake, tokenizer) if files is None else _load_model(engine, files.path)
    eos_ids = frozenset(token for token in tokenizer.eos_ids | end_ids(generation) if token < model.vocab_size)
    limits = ModelLimits(model.context_tokens, model.vocab_size, eos_ids)
    defaults = _defaults(generation, files)
    return Assembly(tokenizer, chat, defaults, limits, model.runner, model.pool, model.max_draft_rows)


def load_text(source: ModelFiles | None, chat_template: str | None) -> tuple[Tokenizer, ChatTemplate | None]:
    """Return the tokenizer of these files (None: bytes), and the given chat template or else its own."""
    tokenizer: Tokenizer = load_tokenizer(source.path) if source is not None else ByteTokenizer()
    template = chat_template or tokenizer.chat_template
    return tokenizer, ChatTemplate(template, tokenizer.special_tokens, tokenizer.control) if template else None


class _LoadedModel(NamedTuple):
    """Runner of a model, and what the engine needs to know of it."""

    runner: StepRunner
    pool: BlockPool
    context_tokens: int
    vocab_size: int
    max_draft_rows: int


def _load_model(engine: EngineSpec, path: Path) -> _LoadedModel:
    """Choose the backend, load the weights and allocate the KV cache."""
    # torch takes seconds to import: only here, where a model is really wanted
    import torch

    from batchinfer.models.config import stored_dtype
    from batchinfer.models.precision import default_dtype, weight_precision
    from batchinfer.models.weights import load_decoder
    from batchinfer.ops.choose import load_backend
    from batchinfer.ops.out_of_memory import room_for
    from batchinfer.ops.resources import use_threads

    use_threads(engine.num_threads)
    try:
        backend = load_backend(engine.device)
    except ValueError as error:
        raise ModelError(f"engine.device: {error}") from None
    stored = stored_dtype(path)
    dtype = engine.dtype or default_dtype(backend.capabilities, stored)
    precision = weight_precision(dtype, engine.quantization, backend.capabilities)
    kv_dtype: torch.dtype = getattr(torch, engine.kv_cache_dtype or dtype)
    with room_for("the weights", "take a smaller model, or a narrower engine.dtype"):
        decoder = load_decoder(path, precision, engine.max_model_len, backend)
    context = decoder.config.context_tokens
    make_runner = _host_runner if backend.steps is None else _device_runner
    runner, num_blocks = make_runner(decoder, engine, kv_dtype)
    log.info(
        "model loaded",
        device=str(backend.device),
        kernels=backend.capabilities.name,
        architecture=decoder.config.architecture,
        dtype=dtype,
        quantization=engine.quantization or "none",
        kv_cache_dtype=str(kv_dtype).removeprefix("torch."),
        context_tokens=context,
        kv_cache_tokens=num_blocks * engine.block_size,
        threads=torch.get_num_threads(),
    )
    _warn_of_slow_int8(engine, backend.capabilities)
    _tell_of_rounding(engine, backend.capabilities, stored)
    _tell_of_longrope(decoder.config.ropes, context)
    pool = BlockPool(num_blocks, engine.block_size, engine.enable_prefix_caching)
    return _LoadedModel(runner, pool, context, decoder.config.vocab_size, backend.capabilities.max_draft_rows)


def _host_runner(decoder: Decoder, engine: EngineSpec, kv_dtype: torch.dtype) -> tuple[StepRunner, int]:
    """Return a runner that waits for each step, and the blocks of its KV cache."""
    from batchinfer.runner.kv_cache import bytes_per_token, default_kv_tokens, whole_blocks
    from batchinfer.runner.model_runner import ModelRunner

    context = decoder.config.context_tokens
    kv_tokens = engine.kv_cache_tokens
    if kv_tokens is None:
        kv_tokens = default_kv_tokens(bytes_per_token(decoder.config.kv_shape, kv_dtype), engine.max_num_seqs, context)
    num_blocks = whole_blocks(kv_tokens, engine.block_size)
    return ModelRunner(decoder, num_blocks, engine.block_size, engine.max_num_seqs, context, kv_dtype), num_blocks


def _device_runner(decoder: Decoder, engine: EngineSpec, kv_dtype: torch.dtype) -> tuple[StepRunner, int]:
    """Return a runner that goes on while the device computes, and the blocks of its KV cache."""
    from batchinfer.runner.memory import load_device_runner

    return load_device_runner(decoder, engine, kv_dtype)


def _warn_of_slow_int8(engine: EngineSpec, capabilities: Capabilities) -> None:
    """Log that 8-bit matrices bring rounding but no speed, if that is so."""
    if engine.quantization == "int8" and capabilities.slow_int8 is not None:
        log.warning(
            f"engine.quantization: int8 will not be faster than float32 here: {capabilities.slow_int8}",
            kernels=capabilities.name,
        )


def _tell_of_rounding(engine: EngineSpec, capabilities: Capabilities, stored: str | None) -> None:
    """Log that the checkpoint's numbers are rounded although no setting asks for it, if that is so."""
    if capabilities.dtype_of_activations and engine.dtype is None and stored in _WIDE:
        log.info(f"the checkpoint's {stored} numbers are rounded to bfloat16; engine.dtype: float32 keeps them")


def _tell_of_longrope(ropes: Sequence[RopeConfig], context_tokens: int) -> None:
    """Log that sequences of every length are computed with the factors for long ones, and how to change that."""
    for rope in ropes:
        original = rope.scaling.get("original_max_position_embeddings", context_tokens)
        if rope.kind == "longrope" and context_tokens > original:
            log.info(
                "longrope: sequences of every length are computed with the factors for long contexts, so that a row's "
                f"tokens do not depend on its neighbours; engine.max_model_len: {original} takes the short factors"
            )


def _fake_model(engine: EngineSpec, fake: FakeSpec, tokenizer: Tokenizer) -> _LoadedModel:
    context = engine.max_model_len or FAKE_CONTEXT_TOKENS
    kv_tokens = engine.kv_cache_tokens or max(context, 512 * engine.max_num_seqs)
    low, high = fake.answer_tokens if isinstance(fake.answer_tokens, tuple) else (fake.answer_tokens,) * 2
    if not tokenizer.eos_ids:
        raise ModelError("the tokenizer names no end-of-sequence token, which fake answers end with")
    answer = FakeAnswer(low, high, _plain_ids(tokenizer), min(tokenizer.eos_ids))
    pool = BlockPool(kv_tokens // engine.block_size, engine.block_size, engine.enable_prefix_caching)
    return _LoadedModel(FakeRunner(answer, fake.step_s), pool, context, tokenizer.vocab_size, _FAKE_DRAFT_ROWS)


def _plain_ids(tokenizer: Tokenizer, wanted: int = 1024) -> list[int]:
    """Return ids of printable tokens, which fake answers are made of."""
    candidates = list(range(min(tokenizer.vocab_size, 8 * wanted)))
    texts = tokenizer.decode_batch([[token] for token in candidates], skip_special_tokens=True)
    plain = [
        token for token, text in zip(candidates, texts, strict=True) if text.isascii() and text.isprintable() and text
    ]
    return plain[-wanted:]


def _generation_config(path: Path) -> dict[str, Any]:
    return read_object(path / "generation_config.json") if path.is_dir() else {}


def _defaults(generation: dict[str, Any], files: ModelFiles | None) -> SamplingParams:
    values = {name: generation[name] for name in _SAMPLING_DEFAULTS if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        values["temperature"] = 0.0
    try:
        return SamplingParams.from_mapping(values)
    except BadParameters as error:
        place = files.path if files is not None else "."
        raise ModelError(f"{place}/generation_config.json: {error}") from None
