"""Rooflines: a case worked out by hand, counts against naive loops and real decoders, presets, and the command."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from batchinfer.bench.cost import LinearCost
from batchinfer.bench.presets import PRESETS, preset_config
from batchinfer.bench.processors import GPUS, Processor
from batchinfer.bench.roofline import Limits, compute, parse_formats
from batchinfer.bench.step_work import Formats, ModelWork, StepTokens
from batchinfer.bench.workload import Synthetic, TokenPrompt, TokenSpan
from batchinfer.models.config import LayerConfig, load_config, parse_config
from batchinfer.models.weights import load_decoder
from tests.models.tiny import build

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 3,
    "vocab_size": 5,
    "max_position_embeddings": 64,
}
PARAMETERS = {  # as published with the weights, norms included
    "smollm2-135m": 134_515_008,
    "qwen3-0.6b": 596_049_920,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
}


def make_processor(bandwidth: float = 10.0, rate: float = 100.0, memory: float = 1e6) -> Processor:
    return Processor("paper", memory, bandwidth, {"bfloat16": rate, "float8": 2 * rate}, "invented")


def small_run(processor: Processor, weight: int = 2, kv: int = 1):
    formats = Formats(weight, 2, kv, "float8", "bfloat16")
    prompts = [TokenPrompt([1, 2, 3], 2)]
    return compute("small", parse_config(SMALL, "small"), formats, processor, prompts, Limits(4, 64))


def test_limits_of_a_small_model_equal_a_count_by_hand():
    """A prompt of 3 tokens, answered by 2: a step with a chunk of 3 tokens, and one with a decode of length 4.

    Two layers with qkv 4 x (4 + 2 + 2), out 4 x 4, gate_up 4 x 6, down 3 x 4; 2 query heads and 1 kv head of size 2.
    """
    found = small_run(make_processor())
    assert (found.work.weights, found.work.layer_weights) == (2 * (32 + 16 + 24 + 12) + 2 * 4 * 5, 168)
    assert (found.counted.steps, found.counted.sequence_steps, found.kv_token_bytes) == (2, 2, 8)
    ops = found.ops
    # linear layers: weights twice, 12 numbers per token and layer of qkv; float8 counts 200 operations a second
    assert ops["qkv"].bytes == 2 * (2 * 32 * 2) + (3 + 1) * 2 * 12 * 2
    assert ops["qkv"].operations == 2 * 64 * (3 + 1)
    first = max((128 + 3 * 48) / 10, 2 * 64 * 3 / 200)
    assert ops["qkv"].limit_s == pytest.approx(first + max((128 + 48) / 10, 2 * 64 / 200))
    assert (ops["out"].operations, ops["gate_up"].operations, ops["down"].operations) == (256, 384, 192)
    # attention: keys and values of 4 tokens, of 2 numbers each; queries of 4 numbers in and out
    assert ops["decode attention"].bytes == 2 * (2 * 4 * 2 * 1) + 2 * (2 * 4 * 2)
    assert ops["decode attention"].operations == 2 * 4 * 4 * 4
    assert ops["prompt attention"].bytes == 2 * (2 * 3 * 2 * 1) + 2 * 3 * (2 * 4 * 2)
    assert ops["prompt attention"].operations == 2 * 4 * 4 * (1 + 2 + 3)
    # a layer: two norms of 4 numbers (4 passes), rope 2 * 4 + 2 * 2, activation 3 * 3; then keys and values, embedding
    per_token = 2 * 2 * (2 * 16 + 12 + 9) + 2 * 2 * 2 * 1 + 4 * 2
    assert ops["norms, rope, activation"].bytes == 4 * per_token + 2 * 4 * 4 * 2
    assert ops["LM head"].bytes == 2 * (20 * 2 + 4 * 2 + 5 * 4)
    assert (ops["LM head"].operations, ops["sampling"].bytes) == (2 * 40, 2 * 20)
    assert found.limit_s == pytest.approx(sum(op.limit_s for op in ops.values()))


@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_attention_counts_equal_a_loop_over_positions(window):
    config = parse_config(SMALL, "small")
    config = replace(config, layers=(LayerConfig(window, 0), LayerConfig(None, 0)))
    work = ModelWork(config, Formats(2, 2, 1, "bfloat16", "bfloat16"))
    starts, counts, lengths = np.array([0, 2, 7]), np.array([5, 4, 2]), np.array([1, 6, 20])

    def seen(position: int, window: int | None) -> range:
        return range(position + 1 if window is None else min(position + 1, window))

    def keys(start: int, count: int, window: int | None) -> set[int]:
        return {p - back for p in range(start, start + count) for back in seen(p, window)}

    found = work.works(StepTokens(14, 3, lengths, starts, counts))
    chunks = list(zip(starts, counts, strict=True))
    pairs = sum(len(seen(p, w)) for w in (window, None) for start, count in chunks for p in range(start, start + count))
    read = sum(len(keys(start, count, w)) for w in (window, None) for start, count in chunks)
    assert found["prompt attention"].operations == 4 * 4 * pairs
    assert found["prompt attention"].memory_bytes == 2 * 2 * read
    decoded = sum(len(seen(length - 1, w)) for w in (window, None) for length in lengths)
    assert found["decode attention"].operations == 4 * 4 * decoded
    assert found["decode attention"].memory_bytes == 2 * 2 * decoded


@pytest.mark.parametrize("name", ["llama-tied", "qwen3", "gemma2"])
def test_weights_equal_the_decoders(name, tmp_path):
    build(name, tmp_path)
    cost = LinearCost.of(load_decoder(tmp_path))
    work = ModelWork(load_config(tmp_path), Formats(4, 4, 4, "float32", "float32"))
    assert (work.layer_weights, work._hidden * work._vocabulary) == (cost.layer_weights, cost.head_weights)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_has_the_published_number_of_parameters(name):
    config = preset_config(name)
    norms = len(config.layers) * 2 * config.hidden_size + config.hidden_size
    norms += len(config.layers) * 2 * config.attention.head_size if config.attention.qk_norm else 0
    assert ModelWork(config, Formats(2, 2, 2, "bfloat16", "bfloat16")).weights + norms == PARAMETERS[name]


def test_limit_grows_with_work_and_shrinks_with_rates():
    base = small_run(make_processor()).limit_s
    assert small_run(make_processor(bandwidth=20.0)).limit_s == pytest.approx(base / 2)  # bound by bandwidth
    assert small_run(make_processor(rate=1.0)).limit_s > base
    assert small_run(make_processor(), kv=2).limit_s > base > small_run(make_processor(), weight=1).limit_s
    config, formats = preset_config("qwen3-0.6b"), parse_formats(None, None, GPUS["h200"])

    def limit(gpu: str, out: int, kv_tokens: int | None = None) -> tuple[float, int]:
        prompts = [TokenPrompt([number] * 40, out) for number in range(64)]
        found = compute("qwen3", config, formats, GPUS[gpu], prompts, Limits(64, 512, kv_tokens))
        assert found.counted.stats.prompt_tokens_computed + found.counted.stats.prompt_tokens_reused == 64 * 40
        return found.limit_s, found.counted.steps

    assert limit("h200", 30)[0] < limit("h200", 60)[0] < limit("a100-sxm", 60)[0] < limit("l4", 60)[0]
    few, many = limit("h200", 60, 1024), limit("h200", 60)
    assert few[1] > many[1] and few[0] > many[0], "a small KV cache runs few sequences at once"


def test_256_sequences_of_qwen3_on_an_h200_take_3_7_seconds():
    """13.7 TB of keys and values at 4.3 TB/s are 3.2 s; 0.3 s for weights and 0.2 s for prompts come on top."""
    workload = Synthetic(256, TokenSpan(100, 1024), TokenSpan(100, 1024))
    config, gpu = preset_config("qwen3-0.6b"), GPUS["h200"]
    prompts = workload.token_prompts(config.vocab_size, config.context_tokens)
    found = compute("qwen3-0.6b", config, parse_formats(None, None, gpu), gpu, prompts, Limits(256, 2048))
    assert found.limit_s == pytest.approx(3.7, rel=0.1)
    assert found.ops["decode attention"].bytes == pytest.approx(13.7e12, rel=0.05)


def test_model_larger_than_the_memory_is_refused(bench, capsys):
    assert bench("roofline", "llama-3-70b", "--gpu", "l4") == 64
    assert "the weights take 141.1: no room" in capsys.readouterr().err


# -- the command ---------------------------------------------------------------------------------------------------

KEYS = {
    *("command", "model", "processor", "formats", "weights", "weight_bytes", "kv_token_bytes", "kv_tokens", "steps"),
    *("mean_batch", "preemptions", "prompt_tokens", "computed_tokens", "answer_tokens", "ops", "limit_s"),
    *("answer_tokens_per_s", "total_tokens_per_s"),
}


def test_roofline_plans_the_steps_that_the_engine_takes(bench, tiny_model, tmp_path):
    """The model computes for real; prompts share a prefix, and 12 requests take turns on 5 seats."""
    out, ran = tmp_path / "x.json", tmp_path / "ran.json"
    work = ("--requests", 12, "--input-tokens", "40-60", "--output-tokens", "3-9", "--shared-prefix", 32)
    assert bench("roofline", tiny_model, "--gpu", "cpu", *work, "--max-num-seqs", 5, "--json", out) == 0
    found = json.loads(out.read_text())
    settings = ("--set", "engine.max_num_seqs=5", "--set", "engine.speculative_tokens=0")
    assert bench("throughput", tiny_model, *work, *settings, "--json", ran) == 0
    run = json.loads(ran.read_text())["median"]
    for name in ("steps", "mean_batch", "computed_tokens", "prompt_tokens", "answer_tokens"):
        assert found[name] == run[name], name


def test_roofline_of_a_gpu_measures_nothing(bench, tmp_path, capsys):
    out = tmp_path / "x.json"
    assert bench("roofline", "smollm2-135m", "--gpu", "h200", "--requests", 2, "--json", out) == 0
    text = capsys.readouterr().out
    assert "what reading reaches of the nominal 4.8" in text and "prompt attention" in text
    assert set(json.loads(out.read_text())) == KEYS


def test_roofline_of_this_cpu_is_measured(bench, tmp_path, capsys):
    config, out, lines = tmp_path / "config.json", tmp_path / "x.json", tmp_path / "w.jsonl"
    config.write_text(json.dumps(SMALL))
    lines.write_text('{"ids": [1, 2, 3], "max_tokens": 2}\n')
    assert bench("roofline", config, "--gpu", "cpu", "--workload", lines, "--dtype", "int8", "--json", out) == 0
    assert capsys.readouterr().out.startswith("machine ")
    found = json.loads(out.read_text())
    assert set(found) == KEYS | {"machine", "gemm_per_s_after", "other_cores", "notes"}
    assert Formats(**found["formats"]) == Formats(1, 4, 4, "int8", "float32")
    assert found["processor"]["operations_per_s"] == {
        "float32": found["machine"]["gemm_per_s"],
        "int8": found["machine"]["int8_per_s"],
    }
    assert (found["steps"], found["prompt_tokens"], found["answer_tokens"]) == (2, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["qwen3-0.6b"], 64, "--gpu"),
        (["qwen3-0.6b", "--gpu", "h20"], 64, "did you mean 'h200'?"),
        (["qwen3-0.7b", "--gpu", "h200"], 69, "did you mean 'qwen3-0.6b'?"),
        (["qwen3-0.6b", "--gpu", "a100-sxm", "--dtype", "float8"], 64, "--dtype float8: unknown on NVIDIA A100"),
        (["qwen3-0.6b", "--gpu", "cpu", "--dtype", "float8"], 64, "--dtype float8: unknown on a CPU"),
        (["qwen3-0.6b", "--gpu", "h200", "--kv-cache-dtype", "int8"], 64, "--kv-cache-dtype int8"),
        (["qwen3-0.6b", "--gpu", "h200", "--input-tokens", "50000"], 64, "the context has 40960"),
        (["qwen3-0.6b", "--gpu", "h200", "--workload", "w", "--seed", "3"], 64, "--seed: a workload file has"),
        (["qwen3-0.6b", "--gpu", "h200", "--kv-cache-tokens", "64"], 64, "raise engine.kv_cache_tokens"),
    ],
)
def test_invalid_roofline_is_refused(bench, capsys, arguments, code, message):
    assert bench("roofline", *arguments) == code
    captured = capsys.readouterr()
    assert message in captured.err and "Traceback" not in captured.err
